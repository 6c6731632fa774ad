"""FP8 checkpoints: what is read, where it stays, and what is refused by name."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.checkpoints.modelopt import (
    FILE,
    FP8,
    smoothed,
    tensors_of,
    with_attention,
    write,
    written_twice,
)
from cp_convert.errors import UsageError, WeightsError
from cp_convert.ir.source import Source
from cp_convert.job import Job
from cp_convert.model.load import load, surroundings

MODEL = """
import torch
from torch import nn
from torch.nn import functional

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(8 * q, k, v)
        return x + self.out(mixed.transpose(1, 2).flatten(2))

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(16, 64), nn.Linear(64, 16)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return self.leave(x)

def build_model():
    torch.manual_seed(0)
    return Model()

def example_inputs():
    torch.manual_seed(1)
    return {"x": torch.randn(1, 32, 16)}
"""
LAYERS = [f"blocks.{i}.{name}" for i in (0, 1) for name in ("qkv", "out")]


def model_at(folder: Path) -> Path:
    path = folder / "dit.py"
    path.write_text(MODEL)
    return path


def module() -> torch.nn.Module:
    space: dict[str, object] = {"__name__": "dit"}
    exec(MODEL, space)
    built: torch.nn.Module = space["build_model"]()  # type: ignore[operator]
    return built


def job(folder: Path, **options: object) -> Job:
    values = {
        "model": model_at(folder), "strategy": "ulysses", "world": 2, "out": folder / "out",
        "weights": folder / "weights", "weights_mode": "external", **options,
    }  # fmt: skip
    return Job(**values)  # type: ignore[arg-type]


def loaded(folder: Path, **options: object) -> Source:
    asked = job(folder, **options)
    with surroundings(asked):
        return load(asked)


def test_codes_stay_where_they_are_and_the_module_has_their_numbers(tmp_path: Path) -> None:
    tensors = tensors_of(module(), LAYERS)
    write(tmp_path / "weights", tensors)
    source = loaded(tmp_path)
    assert sorted(source.codes) == sorted(f"{layer}.weight" for layer in LAYERS)
    assert source.precision == "bf16"
    held = dict(source.module.named_parameters())
    for name, one in source.codes.items():
        layer = name.removesuffix(".weight")
        assert torch.equal(one.codes.view(torch.uint8), tensors[name].view(torch.uint8))
        assert one.weight_scale == tensors[f"{layer}.weight_scale"].item()
        assert one.input_scale == tensors[f"{layer}.input_scale"].item()
        numbers = tensors[name].float() * one.weight_scale
        assert torch.equal(held[name], numbers.bfloat16())
        assert source.located[name].dtype == FP8
        assert source.parameters_outside[name].dtype == FP8
    assert source.parameters_outside["leave.weight"].dtype == torch.bfloat16


def test_scales_of_attention(tmp_path: Path) -> None:
    tensors = with_attention(tensors_of(module(), LAYERS), ["blocks.1"])
    tensors["blocks.1.softmax_quantizer._amax"] = torch.tensor(0.9)
    write(tmp_path / "weights", tensors)
    source = loaded(tmp_path)
    assert source.attentions == {
        "blocks.1": tuple(
            tensors[f"blocks.1.{letter}_bmm_quantizer._amax"].item() / 448 for letter in "qkv"
        )
    }
    for options, why in (
        ({"attention": "precision"}, "--attention precision"),
        ({"allow_cast": ("float8",)}, "--allow-cast float8"),
    ):
        source = loaded(tmp_path, **options)
        assert source.attentions == {}
        assert f"scales of 1 attentions left out ({why})" in source.told[-1]


def test_attention_goes_with_layers_of_codes(tmp_path: Path) -> None:
    tensors = with_attention(smoothed(module(), LAYERS), ["blocks.1"])
    write(tmp_path / "weights", tensors, SMOOTH)
    assert list(loaded(tmp_path).attentions) == ["blocks.1"]
    assert loaded(tmp_path, attention="precision").attentions == {}
    with pytest.raises(UsageError, match=r"--compute-capability 8.6: it has scales for attention"):
        loaded(tmp_path, compute_capabilities=("8.6", "8.9"))
    with pytest.raises(UsageError, match=r"--attention fp8: .* dit.py are in the precision"):
        loaded(tmp_path, attention="fp8", weights=None)
    plain = {name: t.detach().bfloat16() for name, t in module().state_dict().items()}
    write(tmp_path / "weights", with_attention(plain, ["blocks.1"]))
    with pytest.raises(UsageError, match=r"its linear layers are not quantized: the two go"):
        loaded(tmp_path)


SMOOTH = "W8A8_SQ_PER_CHANNEL"


def test_int8_codes_with_factors_of_the_input(tmp_path: Path) -> None:
    tensors = smoothed(module(), LAYERS)
    write(tmp_path / "weights", tensors, SMOOTH)
    source = loaded(tmp_path, compute_capabilities=("7.5", "8.6"), precision="fp16")
    assert sorted(source.codes) == sorted(f"{layer}.weight" for layer in LAYERS)
    held = dict(source.module.named_parameters())
    for layer in LAYERS:
        name, one = f"{layer}.weight", source.codes[f"{layer}.weight"]
        scale, factors = (tensors[f"{layer}.{x}"] for x in ("weight_scale", "pre_quant_scale"))
        assert one.input_scale == tensors[f"{layer}.input_scale"].item()
        assert torch.equal(one.weight_scale, scale)  # type: ignore[arg-type]
        assert torch.equal(one.smooth, factors.float())  # type: ignore[arg-type]
        assert torch.equal(one.codes, tensors[name])
        numbers = tensors[name].float() * scale[:, None] * factors.float()
        assert torch.equal(held[name], numbers.half())
        assert source.located[name].dtype == torch.int8
        truth = module().state_dict()[name]
        assert (held[name] - truth).abs().max() < 0.02 * truth.abs().max()


def test_int8_codes_need_no_factors(tmp_path: Path) -> None:
    tensors = smoothed(module(), LAYERS)
    for layer in LAYERS:
        del tensors[f"{layer}.pre_quant_scale"]
    write(tmp_path / "weights", tensors, SMOOTH)
    assert [one.smooth for one in loaded(tmp_path).codes.values()] == [None] * 4


def test_fp8_codes_with_factors_of_the_input(tmp_path: Path) -> None:
    tensors = tensors_of(module(), LAYERS, smooth=True)
    write(tmp_path / "weights", tensors)
    source = loaded(tmp_path)
    held, truth = dict(source.module.named_parameters()), module().state_dict()
    for layer in LAYERS:
        name, one = f"{layer}.weight", source.codes[f"{layer}.weight"]
        factors = tensors[f"{layer}.pre_quant_scale"].float()
        assert one.weight_scale == tensors[f"{layer}.weight_scale"].item()
        assert torch.equal(one.smooth, factors)  # type: ignore[arg-type]
        numbers = tensors[name].float() * one.weight_scale * factors
        torch.testing.assert_close(held[name], numbers.bfloat16())
        assert (held[name] - truth[name]).norm() < 0.03 * truth[name].norm()
    cast = loaded(tmp_path, allow_cast=("float8",))
    assert not cast.codes
    assert all(torch.equal(held[n], p) for n, p in cast.module.named_parameters())


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda t: t.pop("blocks.0.out.pre_quant_scale"), "in FP8.*, which 3 of 4 layers have"),
        (lambda t: t["blocks.0.out.pre_quant_scale"].zero_(), "pre_quant_scale .* is 0.0"),
        (lambda t: t["blocks.0.out.pre_quant_scale"].neg_(), "pre_quant_scale .* is -0.5"),
        (lambda t: t["blocks.0.out.pre_quant_scale"].mul_(torch.nan), "pre_quant_scale .* is nan"),
        (
            lambda t: t.update({"blocks.0.out.pre_quant_scale": torch.ones(32)}),
            r"blocks.0.out.pre_quant_scale .* F32\[32\]; there are 64 columns",
        ),
        (
            lambda t: t.update({"leave.pre_quant_scale": torch.ones(64)}),
            "leave.pre_quant_scale is a scale, and leave.weight is stored as BF16",
        ),
    ],
)
def test_what_is_no_factor_of_the_input(
    damage: Callable[[dict[str, Tensor]], object], told: str, tmp_path: Path
) -> None:
    tensors = tensors_of(module(), LAYERS, smooth=True)
    damage(tensors)
    write(tmp_path / "weights", tensors)
    with pytest.raises(WeightsError, match=told) as caught:
        loaded(tmp_path)
    assert caught.value.exit_code == 2


Damage = Callable[[dict[str, Tensor]], None]


def without(name: str) -> Damage:
    return lambda tensors: tensors.pop(name)  # type: ignore[return-value]


def with_(name: str, value: Tensor) -> Damage:
    return lambda tensors: tensors.update({name: value})


def attended(last: Tensor) -> Damage:
    """Scales of an attention's q, k and v, the last of which is this one."""

    def add(tensors: dict[str, Tensor]) -> None:
        tensors.update(with_attention({}, ["blocks.0"]))
        tensors["blocks.0.v_bmm_quantizer._amax"] = last

    return add


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (without("blocks.0.qkv.weight_scale"), "blocks.0.qkv.weight_scale is missing"),
        (without("blocks.1.out.input_scale"), "blocks.1.out.input_scale is missing.*half prec"),
        (with_("blocks.0.out.input_scale", torch.tensor(-1.0)), "out.input_scale .* is -1.0"),
        (with_("blocks.0.out.input_scale", torch.tensor(0.0)), "out.input_scale .* is 0.0"),
        (with_("blocks.0.out.input_scale", torch.tensor(1e-40)), "input_scale .* between 1.2e"),
        (with_("blocks.0.out.weight_scale", torch.tensor(1e36)), r"is .*8.3e\+34, where"),
        (with_("blocks.0.out.weight_scale", torch.tensor(torch.nan)), "weight_scale .* is nan"),
        (with_("blocks.0.out.weight_scale", torch.tensor(torch.inf)), "weight_scale .* is inf"),
        (with_("blocks.0.out.weight_scale", torch.ones(64)), r"weight_scale .* F32\[64\]"),
        (with_("blocks.0.out.weight_scale", torch.ones((), dtype=torch.int8)), r"is I8\[\]"),
        (with_("leave.weight_scale", torch.tensor(1.0)), "leave.weight is stored as BF16"),
        (with_("blocks.7.out.weight_scale", torch.tensor(1.0)), "blocks.7.out.weight is not there"),
        (
            with_("blocks.0.attn.q_bmm_quantizer._amax", torch.tensor(1.0)),
            "blocks.0.attn.k_bmm_quantizer._amax is missing",
        ),
        (with_("blocks.0.qkv.output_quantizer._amax", torch.tensor(1.0)), "no quantizer that is"),
        (attended(torch.tensor(0.0)), "blocks.0.v_bmm_quantizer._amax .* is 0.0"),
        (attended(torch.tensor(2e-35)), "blocks.0.v_bmm_quantizer._amax .* between 1.2e-35"),
        (attended(torch.ones(4)), r"blocks.0.v_bmm_quantizer._amax .* F32\[4\]"),
        (with_("blocks.0.out.weight", torch.zeros(64, 32).to(FP8)), "1 of another shape"),
        (
            with_("blocks.0.out.weight", torch.full((64, 64), torch.nan).to(FP8)),
            "blocks.0.out.weight .* holds NaN",
        ),
        (without("blocks.0.out.bias"), "1 missing: blocks.0.out.bias"),
        (with_("blocks.0.out.pre_quant_scale", torch.ones(64)), "missing: .*, which 1 of 4 layers"),
        (with_("blocks.0.out.svdquant_lora_a", torch.ones(8, 64)), "1 unexpected"),
    ],
)  # fmt: skip
def test_what_is_no_such_checkpoint_is_refused_by_name(
    damage: Damage, told: str, tmp_path: Path
) -> None:
    tensors = tensors_of(module(), LAYERS)
    damage(tensors)
    write(tmp_path / "weights", tensors)
    with pytest.raises(WeightsError, match=told) as caught:
        loaded(tmp_path)
    assert caught.value.exit_code == 2


def rows(value: float, count: int = 64) -> Tensor:
    found = torch.ones(count)
    found[5] = value
    return found


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (without("blocks.0.qkv.weight_scale"), "stored in INT8, and has no such scale"),
        (without("blocks.1.out.input_scale"), "blocks.1.out.input_scale is missing.*half prec"),
        (with_("blocks.0.out.input_scale", rows(1)), r"input_scale .* F32\[64\]"),
        (with_("blocks.0.out.weight_scale", torch.tensor(1.0)), r"F32\[\]; there are 64 rows"),
        (with_("blocks.0.out.weight_scale", rows(-1)), "weight_scale .* is -1.0"),
        (with_("blocks.0.out.weight_scale", rows(torch.nan)), "weight_scale .* is nan"),
        (without("blocks.0.out.pre_quant_scale"), "missing: .*, which 3 of 4 layers"),
        (with_("blocks.0.out.weight_scale", rows(1e-40)), "weight_scale .* between 1.2e-35"),
        (with_("blocks.0.out.pre_quant_scale", rows(0)), "pre_quant_scale .* is 0.0"),
        (with_("blocks.0.out.pre_quant_scale", rows(torch.inf)), "pre_quant_scale .* is inf"),
        (with_("blocks.0.out.pre_quant_scale", rows(1, 32)), r"F32\[32\]; there are 64 columns"),
        (with_("leave.pre_quant_scale", rows(1)), "as BF16 and not quantized to INT8"),
        (with_("leave.weight_scale", rows(1)), "as BF16 and not quantized to INT8"),
        (with_("blocks.7.out.input_scale", rows(1)), "blocks.7.out.weight is not there"),
        (with_("blocks.0.out.weight", torch.ones(64, 32).char()), "32 columns|another shape"),
        (with_("blocks.0.out.weight", torch.ones(64).char()), "there are 0 rows"),
        (with_("leave.weight", torch.ones(16, 64).to(FP8)), "leave.weight .* is quantized"),
    ],
)
def test_what_is_no_such_int8_checkpoint(damage: Damage, told: str, tmp_path: Path) -> None:
    tensors = smoothed(module(), LAYERS)
    damage(tensors)
    write(tmp_path / "weights", tensors, SMOOTH)
    with pytest.raises(WeightsError, match=told) as caught:
        loaded(tmp_path)
    assert caught.value.exit_code == 2


def test_a_scale_that_stands_twice(tmp_path: Path) -> None:
    file = write(tmp_path / "weights", tensors_of(module(), LAYERS)) / FILE
    written_twice(file, "blocks.0.out.input_scale")
    with pytest.raises(WeightsError, match=r"blocks.0.out.input_scale.*twice|twice.*input_scale"):
        loaded(tmp_path)


@pytest.mark.parametrize("algorithm", ["W4A16_AWQ", "W4A8_AWQ", "MXFP8"])
def test_other_algorithms_are_refused_by_name(algorithm: str, tmp_path: Path) -> None:
    write(tmp_path / "weights", tensors_of(module(), LAYERS), algorithm)
    with pytest.raises(
        WeightsError, match=f"by ModelOpt to {algorithm}, of which .* takes FP8, W8A8_SQ"
    ):
        loaded(tmp_path)


def test_what_it_cannot_be_converted_for(tmp_path: Path) -> None:
    write(tmp_path / "weights", tensors_of(module(), LAYERS))
    with pytest.raises(UsageError, match=r"--compute-capability 8\.6: its weights are FP8"):
        loaded(tmp_path, compute_capabilities=("8.9", "8.6"))
    with pytest.raises(UsageError, match="is quantized already"):
        loaded(tmp_path, quantize="fp8")


def test_a_loss_is_bounded_where_something_is_quantized(tmp_path: Path) -> None:
    write(tmp_path / "weights", tensors_of(module(), LAYERS))
    assert loaded(tmp_path, max_loss=0.1).codes
    with pytest.raises(UsageError, match="--max-loss: nothing is quantized"):
        loaded(tmp_path, weights=None, max_loss=0.1)


def test_options_that_go_with_nothing(tmp_path: Path) -> None:
    for options, told in (
        ({"keep": ("x",)}, "--keep: it goes with --quantize"),
        ({"calibration": (tmp_path / "a",)}, "--calibration: it goes with --quantize"),
        ({"quantize": "fp8", "calibration": (tmp_path / "a",)}, "there is no such file"),
        ({"quantize": "fp8", "compute_capabilities": ("8.9", "8.6", "7.5")}, "8.6, 7.5: FP8 is"),
        ({"max_loss": 2.0, "exchange": "int8"}, "lies between 0 and 1"),
        ({"max_loss": 0.1, "exchange": "int8", "proof": "none"}, "measured by the proof"),
        ({"exchange": "int4"}, "not one of int8"),
        ({"quantize": "fp4"}, "not one of fp8, int8"),
        ({"attention": "int8"}, "not one of fp8, precision"),
        (
            {"attention": "fp8", "quantize": "int8", "compute_capabilities": ("8.6", "8.9")},
            "--attention fp8 with --compute-capability 8.6: FP8 is multiplied from 8.9 on",
        ),
        ({"attention": "fp8", "precision": "fp32"}, "fp8 and --precision fp32: the two do not"),
        ({"attention": "fp8", "strategy": "fused"}, "fp8 and --strategy fused: the two do not"),
    ):
        with pytest.raises(UsageError, match=told):
            job(tmp_path, **options)
