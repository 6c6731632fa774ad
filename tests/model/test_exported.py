"""Checkpoints that ModelOpt itself has written: read, held against our writer's, and damaged."""

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.checkpoints import modelopt
from benchmarks.checkpoints.exported import exported, quantized
from cp_convert.errors import WeightsError
from cp_convert.ir.quantize import FP8
from cp_convert.ir.source import Source
from cp_convert.job import Job
from cp_convert.model.live import taken_off
from cp_convert.model.load import load, surroundings
from tests.conftest import ROOT

for _name in ("modelopt.torch.quantization", "diffusers", "onnx"):
    pytest.importorskip(_name)
SMALL = ROOT / "benchmarks" / "small"
FOLDERS = dict[tuple[str, str], Path]
KINDS = [
    ("wan", "fp8-attention"), ("wan", "int8"), ("wan", "nvfp4"), ("flux2", "nvfp4-attention"),
    ("wan", "fp8-awq"), ("wan", "mixed-svd"),
]  # fmt: skip
WRITERS: dict[str, Callable[[nn.Module, list[str]], dict[str, Tensor]]] = {
    "fp8": modelopt.tensors_of, "int8": modelopt.smoothed, "nvfp4": modelopt.in_nvfp4,
}  # fmt: skip


def built(model: str) -> tuple[nn.Module, dict[str, Any]]:
    space = runpy.run_path(str(SMALL / f"{model}.py"))
    return space["build_model"](), space["example_inputs"]()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> FOLDERS:
    root = tmp_path_factory.mktemp("exported")
    return {
        (model, kind): exported(*built(model), kind, root / f"{model}-{kind}")
        for model, kind in KINDS
    }


def loaded(model: str, weights: Path, out: Path) -> Source:
    job = Job(
        model=SMALL / f"{model}.py", strategy="ulysses", world=2, out=out, precision="bf16",
        weights=weights, weights_mode="external",
    )  # fmt: skip
    with surroundings(job):
        return load(job)


def written(
    kind: str, module: nn.Module, layers: list[str], told: dict[str, Any]
) -> dict[str, Tensor]:
    """What our writer writes for it; of several kinds, which layer is which is the file's."""
    if kind == "mixed-svd":
        algorithms = {layer: one["quant_algo"] for layer, one in told["quantized_layers"].items()}
        assert sorted(algorithms) == sorted(layers)
        assert set(algorithms.values()) == {"FP8", "NVFP4_SVD"}
        assert modelopt.said(algorithms) == told["quantized_layers"]
        return modelopt.mixed(module, algorithms)
    if kind == "fp8-awq":
        return modelopt.tensors_of(module, layers, smooth=True)
    return WRITERS[kind.split("-")[0]](module, layers)


def layout(tensors: dict[str, Tensor]) -> dict[str, tuple[str, list[int]]]:
    return {name: (str(t.dtype), list(t.shape)) for name, t in tensors.items()}


@pytest.mark.parametrize(("model", "kind"), KINDS)
def test_our_writer_writes_what_modelopt_writes(model: str, kind: str, folders: FOLDERS) -> None:
    """Names, types and shapes of everything, and what the configuration says."""
    folder, (module, _) = folders[model, kind], built(model)
    stored = load_file(folder / modelopt.FILE)
    layers = [name.removesuffix(".weight_scale") for name in stored if ".weight_scale" in name]
    layers = [name for name in layers if f"{name}.weight" in stored]
    assert len(layers) > 9
    told = json.loads((folder / "config.json").read_text())["quantization_config"]
    own = written(kind, module, layers, told)
    if "attention" in kind:
        paths = {name.rsplit(".", 2)[0] for name in stored if "_bmm_quantizer" in name}
        assert len(paths) == 2
        own = modelopt.with_attention(own, sorted(paths))
        own = {name: t for name, t in own.items() if "bmm2_output" not in name}  # not in "fp8"
    assert layout(own) == layout(stored)
    names = {"fp8": "FP8", "int8": "W8A8_SQ_PER_CHANNEL", "nvfp4": "NVFP4"}
    names["mixed"] = "MIXED_PRECISION"
    assert told["quant_method"] == "modelopt"
    assert told["quant_algo"] == names[kind.split("-")[0]]
    assert told["producer"]["name"] == "modelopt"


@pytest.mark.parametrize(("model", "kind"), KINDS)
def test_it_is_read_as_the_module_that_was_quantized(
    model: str, kind: str, folders: FOLDERS, tmp_path: Path
) -> None:
    """The codes and scales of the file are those that the live module gives, and its numbers."""
    source = loaded(model, folders[model, kind], tmp_path / "out")
    module, inputs = built(model)
    truth = {name: p.detach().clone() for name, p in module.named_parameters()}
    own = quantized(module.bfloat16().eval(), inputs, kind)
    is_smooth = kind in ("int8", "fp8-awq")
    live = taken_off(own, Job(SMALL / f"{model}.py", "ulysses", 2, tmp_path / "x"), alone=True)
    assert source.codes.keys() == live.codes.keys()
    assert source.attentions.keys() == live.steps.keys()
    for path, steps in source.attentions.items():
        assert steps == pytest.approx(live.steps[path])
    held = dict(source.module.named_parameters())
    alike = 0
    for name, one in source.codes.items():
        error = (held[name].float() - truth[name]).norm() / truth[name].norm()
        assert error < (0.15 if one.blocks is not None else 0.03)
        is_fused = any(part in name for part in ("to_q.", "to_k.", "to_v.", "add_"))
        is_fp8 = one.codes.dtype == FP8
        assert (one.smooth is not None) == (is_smooth or one.low_rank is not None)
        if is_fp8 or not is_fused:  # the export makes one scale of theirs
            own_codes = live.codes[name].view(torch.uint8)
            apart = (one.codes.view(torch.uint8).int() - own_codes.int()).abs()
            # ModelOpt divides by FP8's scale in bfloat16, and may round to the neighbour.
            assert apart.max() <= is_fp8
            assert apart.float().mean() < 0.1
            assert one.input_scale == pytest.approx(live.coded[name].input_scale)
            alike += 1
    assert alike > 3


def without(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.pop(name)  # type: ignore[return-value]


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: change(tensors[name])})


def moved(name: str, to: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({to: tensors.pop(name)})


OUT, FEED = "blocks.0.attn1.to_out.0", "blocks.0.ffn.net.2"


@pytest.mark.parametrize(
    ("kind", "damage", "told"),
    [
        ("fp8-attention", without(f"{OUT}.input_scale"), f"{OUT}.input_scale is missing"),
        ("fp8-attention", changed(f"{OUT}.weight_scale", torch.neg), f"{OUT}.weight_scale .* -"),
        ("fp8-attention", changed(f"{OUT}.input_scale", lambda x: x * torch.nan), "is nan"),
        (
            "fp8-attention",
            moved(f"{OUT}.weight_scale", "proj_out.weight_scale"),
            f"proj_out.weight is stored as BF16|{OUT}.weight_scale is missing",
        ),
        (
            "fp8-attention",
            changed("blocks.0.attn1.k_bmm_quantizer._amax", lambda x: -x),
            "attn1.k_bmm_quantizer._amax .* is -",
        ),
        (
            "fp8-attention",
            without("blocks.0.attn2.v_bmm_quantizer._amax"),
            "blocks.0.attn2.v_bmm_quantizer._amax is missing",
        ),
        (
            "int8",
            changed(f"{OUT}.weight_scale", lambda x: x[:64]),
            rf"{OUT}.weight_scale .* F32\[64\]; there are 128 rows",
        ),
        ("int8", changed(f"{OUT}.pre_quant_scale", torch.zeros_like), "pre_quant_scale .* is 0.0"),
        (
            "nvfp4",
            changed(f"{OUT}.weight_scale", lambda x: x.view(torch.uint8)[:, ::2].view(FP8)),
            rf"{OUT}.weight_scale .* F8_E4M3\[128, 4\]; .* blocks of 16 .*\[128, 8\]",
        ),
        ("nvfp4", without(f"{OUT}.weight_scale_2"), f"{OUT}.weight_scale_2 is missing"),
        (
            "fp8-awq",
            changed(f"{OUT}.pre_quant_scale", torch.neg),
            rf"{OUT}.pre_quant_scale .* is -",
        ),
        (
            "fp8-awq",
            without(f"{OUT}.pre_quant_scale"),
            f"{OUT}.pre_quant_scale is missing: .*, which 9 of 10 layers have",
        ),
        ("mixed-svd", without(f"{FEED}.weight_scale_2"), f"{FEED}.weight_scale_2 is missing"),
        ("mixed-svd", without(f"{FEED}.svdquant_lora_b"), f"{FEED}.svdquant_lora_b is missing"),
        (
            "mixed-svd",
            changed(f"{OUT}.weight", lambda x: x.bfloat16()),
            f"say that {OUT} is FP8, and {OUT}.weight .* is stored as BF16",
        ),
        (
            "mixed-svd",
            changed("proj_out.weight", lambda x: x.to(FP8)),
            "do not name proj_out.weight, which is stored as F8_E4M3",
        ),
    ],
)
def test_a_damaged_one_is_refused_by_name(
    kind: str, damage: Callable[[dict[str, Tensor]], None], told: str,
    folders: FOLDERS, tmp_path: Path,
) -> None:  # fmt: skip
    tensors = load_file(folders["wan", kind] / modelopt.FILE)
    damage(tensors)
    config = (folders["wan", kind] / "config.json").read_text()
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "config.json").write_text(config)
    kept = {name: t.contiguous() for name, t in tensors.items()}
    save_file(kept, tmp_path / "weights" / modelopt.FILE)
    with pytest.raises(WeightsError, match=told) as caught:
        loaded("wan", tmp_path / "weights", tmp_path / "out")
    assert caught.value.exit_code == 2
