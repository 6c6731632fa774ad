import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cp_convert.errors import WeightsError
from cp_convert.ir.tensors import FLOAT8, is_finite
from cp_convert.model import meta
from cp_convert.model.checkpoint import locate
from cp_convert.model.load import cast_module
from cp_convert.model.ties import Ties
from cp_convert.model.weights import Filled, check_finite
from cp_convert.model.weights import load_weights as fill


def load_weights(module: nn.Module, path: Path, **options: Any) -> Filled:
    return fill(module, locate(path), path, **options)


def model() -> nn.Module:
    return nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Linear(4, 2)})


def truth() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn_like(t) for name, t in model().state_dict().items()}


def assert_loaded(module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, tensors[name].to(tensor.dtype))


def sharded(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """Two shards and the index that names them, as published models have."""
    parts = {"m-1.safetensors": ["a.weight", "b.bias"], "m-2.safetensors": ["a.bias", "b.weight"]}
    for file, names in parts.items():
        save_file({name: tensors[name] for name in names}, folder / file)
    weight_map = {name: file for file, names in parts.items() for name in names}
    index = folder / "m.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_a_file_an_index_and_a_folder_load_the_same(tmp_path: Path) -> None:
    tensors = truth()
    save_file(tensors, tmp_path / "one.safetensors")
    (tmp_path / "shards").mkdir()
    index = sharded(tmp_path / "shards", tensors)
    (tmp_path / "loose").mkdir()
    save_file(tensors, tmp_path / "loose" / "x.safetensors")
    for path in (tmp_path / "one.safetensors", index, tmp_path / "shards", tmp_path / "loose"):
        module = model()
        load_weights(module, path)
        assert_loaded(module, tensors)


def test_the_modules_dtype_is_kept(tmp_path: Path) -> None:
    tensors = truth()
    save_file(tensors, tmp_path / "one.safetensors")
    module = model().to(torch.bfloat16)
    load_weights(module, tmp_path / "one.safetensors")
    assert next(module.parameters()).dtype == torch.bfloat16
    assert_loaded(module, tensors)


def test_tied_tensors_may_stand_in_the_file_once(tmp_path: Path) -> None:
    module = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    module["b"].weight = module["a"].weight
    tensors = {n: torch.randn_like(t) for n, t in module.state_dict().items() if n != "b.weight"}
    save_file(tensors, tmp_path / "one.safetensors")
    load_weights(module, tmp_path / "one.safetensors")
    assert torch.equal(module["b"].weight, tensors["a.weight"])


def test_every_difference_is_listed_by_name_and_nothing_is_copied(tmp_path: Path) -> None:
    tensors = truth()
    del tensors["a.bias"]
    tensors["c.weight"] = torch.ones(1)
    tensors["b.bias"] = torch.ones(5)
    save_file(tensors, tmp_path / "one.safetensors")
    module = model()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        load_weights(module, tmp_path / "one.safetensors")
    for part in (
        "1 missing: a.bias",
        "1 unexpected: c.weight",
        "b.bias: [5] in the file, [2] in the",
    ):
        assert part in caught.value.message
    assert_loaded(module, before)


@pytest.mark.parametrize(
    "prefix", ["transformer.", "model.diffusion_model.", "module.", "_orig_mod.", "any.thing."]
)
def test_one_prefix_is_matched_and_said(prefix: str, tmp_path: Path) -> None:
    tensors, path = truth(), tmp_path / "one.safetensors"
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, path)
    module = model()
    filled = load_weights(module, path)
    assert_loaded(module, tensors)
    assert prefix in filled.told[0]
    save_file(tensors, path)  # and the other way round: the model is wrapped
    wrapped: nn.Module = model()
    for part in reversed(prefix.removesuffix(".").split(".")):
        wrapped = nn.ModuleDict({part: wrapped})
    assert prefix in load_weights(wrapped, path).told[0]
    assert_loaded(wrapped, {prefix + name: tensor for name, tensor in tensors.items()})


def test_a_prefix_that_is_not_the_only_one_is_not_guessed(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    for prefixes in (("x.", "y."), ("x.", "transformer.", "diffusion_model.")):
        save_file({p + name: tensor for p in prefixes for name, tensor in truth().items()}, path)
        with pytest.raises(WeightsError, match="4 missing"):
            load_weights(model(), path)
    others = {"vae.weight": torch.ones(1)}
    save_file({"x." + name: tensor for name, tensor in truth().items()} | others, path)
    with pytest.raises(WeightsError, match="4 missing"):
        load_weights(model(), path)
    save_file({"transformer." + name: tensor for name, tensor in truth().items()} | others, path)
    assert "1 tensors of other models" in load_weights(model(), path).told[1]


@pytest.mark.parametrize("unallocated", [True, False])
def test_tied_names_that_disagree_are_refused(unallocated: bool, tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    with meta.unallocated() if unallocated else nullcontext():
        module = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
        module["b"].weight = module["a"].weight
    tensors = {name: torch.randn(tensor.shape) for name, tensor in module.state_dict().items()}
    save_file(tensors, path)
    with pytest.raises(WeightsError, match=r"a\.weight .* and b\.weight .* numbers differ"):
        load_weights(module, path)
    tensors["b.weight"] = tensors["a.weight"].clone()
    save_file(tensors, path)
    filled = load_weights(module, path)
    assert module["b"].weight is module["a"].weight
    assert filled.located["a.weight"] == filled.located["b.weight"]


class Viewed(nn.Module):
    """``part`` is a view of ``whole``, but not the same parameter."""

    def __init__(self, part: Any) -> None:
        super().__init__()
        self.whole = nn.Parameter(torch.randn(4, 6))
        self.part = nn.Parameter(part(self.whole.data))


@pytest.mark.parametrize("absent", ["whole", "part"])
@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize(
    "part",
    [lambda w: w[1:3], lambda w: w.T, lambda w: w[:, ::2], lambda w: w, lambda w: w.view(-1)],
)
def test_views_are_not_ties(part: Any, absent: str, half: bool, tmp_path: Path) -> None:
    module, path = Viewed(part), tmp_path / "one.safetensors"
    ties = Ties.of(module)
    right = {name: tensor.clone().contiguous() for name, tensor in module.state_dict().items()}
    if half:
        cast_module(module, torch.float16)
    save_file({name: t for name, t in right.items() if name != absent}, path)
    with pytest.raises(WeightsError, match=f"1 missing: {absent}"):
        load_weights(module, path, ties=ties)
    save_file({**right, "part": right["part"] + 1}, path)
    with pytest.raises(WeightsError, match="numbers differ"):
        load_weights(module, path, ties=ties)
    save_file(right, path)
    load_weights(module, path, ties=ties)
    assert_loaded(module, right)


def quantized(kind: str) -> dict[str, torch.Tensor]:
    """``a.weight`` as quantizers store it, and what they put beside it."""
    whole = truth()
    weight = whole.pop("a.weight")
    byte = torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8)
    return whole | {
        "int8": {"a.weight": weight.to(torch.int8)},
        "bool": {"a.weight": weight.bool()},
        "int64": {"a.weight": weight.long()},
        "scaled float8": {
            "a.weight": weight.to(torch.float8_e4m3fn), "a.scale_weight": torch.ones(1)
        },
        "scaled float8 of another kind": {
            "a.weight": weight.to(torch.float8_e5m2), "a.weight_scale_inv": torch.ones(1)
        },
        "nf4": {
            "a.weight": byte, "a.weight.absmax": torch.ones(1),
            "a.weight.quant_map": torch.ones(16),
        },
        "gptq": {
            "a.qweight": torch.zeros(1, 4, dtype=torch.int32), "a.scales": torch.ones(4),
            "a.qzeros": torch.zeros(4, dtype=torch.int32),
        },
        "nvfp4": {
            "a.weight": byte, "a.weight_scale": torch.ones(2).to(torch.float8_e4m3fn),
            "a.weight_scale_2": torch.ones(1),
        },
    }[kind]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "scales"),
    [
        ("int8", "without scales"),
        ("bool", "without scales"),
        ("int64", "without scales"),
        ("scaled float8", "scales are a.scale_weight"),
        ("scaled float8 of another kind", "scales are a.weight_scale_inv"),
        ("nf4", "scales are a.weight.absmax, a.weight.quant_map"),
        ("gptq", "scales are a.qzeros, a.scales"),
        ("nvfp4", "scales are a.weight_scale, a.weight_scale_2"),
    ],
)
@pytest.mark.parametrize("allowed", [(), ("float8",)])
def test_quantized_weights_are_called_so(
    kind: str, scales: str, allowed: tuple[str, ...], tmp_path: Path
) -> None:
    path = tmp_path / "one.safetensors"
    save_file(quantized(kind), path)
    with pytest.raises(WeightsError) as caught:
        load_weights(model(), path, allowed=allowed)
    message = caught.value.message
    assert "is quantized: stored as" in message and "a." in message and path.name in message
    assert scales in message or sorted(scales[11:].split(", ")) == sorted(
        message.split("scales are ")[1].rstrip(".").split(", ")
    )


def test_a_plain_float8_cast_needs_a_word_and_is_recorded(tmp_path: Path) -> None:
    path, tensors = tmp_path / "one.safetensors", truth()
    save_file({n: t.to(torch.float8_e5m2) if t.dim() > 1 else t for n, t in tensors.items()}, path)
    with pytest.raises(WeightsError, match="quantized") as caught:
        load_weights(model(), path)
    assert "--allow-cast float8" in (caught.value.hint or "")
    module = model().to(torch.bfloat16)
    filled = load_weights(module, path, allowed=("float8",))
    assert torch.equal(module["a"].weight, tensors["a.weight"].to(torch.float8_e5m2).bfloat16())
    assert [(c.stored, c.computed, c.tensors) for c in filled.casts] == [
        ("float32", "bfloat16", 2),
        ("float8_e5m2", "bfloat16", 2),
    ]


def test_integers_of_the_model_stay_what_they_are(tmp_path: Path) -> None:
    module, path = nn.Linear(2, 2), tmp_path / "one.safetensors"
    module.register_buffer("order", torch.arange(3))
    right = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    save_file(right | {"order": torch.tensor([2, 0, 1])}, path)
    load_weights(module, path)
    assert module.order.tolist() == [2, 0, 1]
    for other in (torch.ones(3), torch.ones(3, dtype=torch.int32)):
        save_file(right | {"order": other}, path)
        with pytest.raises(WeightsError, match=r"order of .* is stored as [FI]32"):
            load_weights(module, path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_is_not_finite_is_named(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    path, tensors = tmp_path / "one.safetensors", truth()
    tensors["b.weight"][1, 2] = value
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, path)
    with pytest.raises(WeightsError, match=r"b\.weight \(.*one\.safetensors\) holds NaN or inf"):
        load_weights(model(), path)
    module = model().to(dtype)
    with torch.no_grad():
        module["b"].weight[1, 2] = value
    with pytest.raises(WeightsError, match=r"b\.weight .*build_model"):
        check_finite(module)


def test_what_half_cannot_hold_is_not_called_broken(tmp_path: Path) -> None:
    path, tensors = tmp_path / "one.safetensors", truth()
    tensors["b.weight"][1, 2] = 1e5
    save_file(tensors, path)
    with pytest.raises(WeightsError, match=r"up to 1e\+05, which float16 cannot hold") as caught:
        load_weights(model().half(), path)
    assert caught.value.hint == "-p bf16 or -p fp32."
    load_weights(model().bfloat16(), path)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    save_file(truth(), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(WeightsError, match="cannot be read as safetensors") as caught:
        load_weights(model(), path)
    assert "truncated" in (caught.value.hint or "")


def test_what_is_no_weights_path_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"pickle")
    (tmp_path / "bad.safetensors.index.json").write_text("[1]")
    (tmp_path / "empty").mkdir()
    (tmp_path / "many").mkdir()
    for name in ("p", "q"):
        save_file(truth(), tmp_path / "many" / f"{name}.safetensors")
    (tmp_path / "lost").mkdir()
    index = sharded(tmp_path / "lost", truth())
    (tmp_path / "lost" / "m-2.safetensors").unlink()
    for path, message in (
        (tmp_path / "absent.safetensors", "there is no"),
        (tmp_path / "x.bin", "no safetensors file"),
        (tmp_path / "bad.safetensors.index.json", "no safetensors index"),
        (tmp_path / "empty", "holds no .safetensors"),
        (tmp_path / "many", "stands in both"),
        (index, "m-2.safetensors is missing"),
    ):
        with pytest.raises(WeightsError, match=message):
            load_weights(model(), path)


@pytest.mark.parametrize("dtype", FLOAT8.values())
def test_codes_that_are_no_numbers_are_known_by_their_bits(dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype)
    for one in every:
        held = torch.stack([every[1], one, every[2]]).reshape(3, 1)
        assert is_finite(held) == bool(one.float().isfinite())
