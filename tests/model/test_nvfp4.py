"""NVFP4 checkpoints: what is read, where it stays, and what is refused by name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.checkpoints.authors import FLUX_LAYERS, original_flux, smaller_flux
from benchmarks.checkpoints.comfy import as_json, quantized
from benchmarks.checkpoints.comfy import in_nvfp4 as comfy_nvfp4
from benchmarks.checkpoints.comfy import write as write_file
from benchmarks.checkpoints.modelopt import (
    FILE,
    FP8,
    in_nvfp4,
    numbers_of,
    tensors_of,
    write,
    written_twice,
)
from cp_convert.errors import UsageError, WeightsError
from cp_convert.ir.source import Source
from cp_convert.job import without
from tests.model.test_comfy import built, made_of_flux
from tests.model.test_comfy import loaded as opened
from tests.model.test_modelopt import LAYERS, Damage, loaded, module, with_
from tests.model.test_modelopt import without as lacking
from tests.runtime.bundles import FLUX


@pytest.mark.parametrize("rank", [0, 8])
def test_codes_stay_where_they_are_and_the_module_has_their_numbers(
    rank: int, tmp_path: Path
) -> None:
    tensors = in_nvfp4(module(), LAYERS, rank)
    write(tmp_path / "weights", tensors, "NVFP4_SVD" if rank else "NVFP4")
    source = loaded(tmp_path)
    assert sorted(source.codes) == sorted(f"{layer}.weight" for layer in LAYERS)
    assert source.precision == "bf16"
    held, truth = dict(source.module.named_parameters()), module().state_dict()
    for layer in LAYERS:
        name, one = f"{layer}.weight", source.codes[f"{layer}.weight"]
        own = [tensors[f"{layer}.{x}"] for x in ("weight", "weight_scale", "weight_scale_2")]
        assert torch.equal(one.codes, own[0])
        assert one.weight_scale == own[2].item()
        assert one.input_scale == tensors[f"{layer}.input_scale"].item()
        numbers = numbers_of(*own)
        if rank:
            down, up = (tensors[f"{layer}.svdquant_lora_{x}"].float() for x in "ab")
            numbers = (numbers + up @ down) * tensors[f"{layer}.pre_quant_scale"].float()
        torch.testing.assert_close(held[name], numbers.bfloat16(), rtol=0.01, atol=1e-6)
        assert (held[name] - truth[name]).norm() < 0.15 * truth[name].norm()
        assert source.located[name].size == one.codes.numel()
        assert source.parameters_outside[name] is one.codes


def test_names_tell_the_format_where_no_configuration_does(tmp_path: Path) -> None:
    folder = write(tmp_path / "weights", in_nvfp4(module(), LAYERS), "NVFP4")
    (folder / "config.json").unlink()
    assert len(loaded(tmp_path).codes) == 4


@pytest.mark.parametrize("is_described", [False, True])
def test_an_order_that_is_not_told(is_described: bool, tmp_path: Path) -> None:
    """ModelOpt puts scales in tiles where it is asked to, and codes in no other order."""
    folder = write(tmp_path / "weights", tensors := in_nvfp4(module(), LAYERS), "NVFP4")
    header = {"quantization_config": json.dumps({"quant_method": "modelopt"})}
    if is_described:
        layers = {layer: {"format": "nvfp4"} for layer in LAYERS}
        header["_quantization_metadata"] = json.dumps({"layers": layers})
    save_file(tensors, folder / FILE, header)
    with pytest.raises(WeightsError, match=r"by ModelOpt with options .* is not told") as caught:
        loaded(tmp_path)
    assert caught.value.exit_code == 2
    if not is_described:  # FP8 has one order alone
        write(folder, eight := tensors_of(module(), LAYERS))
        save_file(eight, folder / FILE, header)
        assert len(loaded(tmp_path).codes) == 4


def blocks(value: float, *shape: int) -> Tensor:
    found = torch.ones(*(shape or (64, 4)))
    found[-1, -1] = value
    return found.to(FP8)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lacking("blocks.0.qkv.weight_scale"), "qkv.weight_scale is missing.*stored in NVFP4"),
        (lacking("blocks.0.qkv.weight_scale_2"), "blocks.0.qkv.weight_scale_2 is missing"),
        (lacking("blocks.1.out.input_scale"), "blocks.1.out.input_scale is missing.*half prec"),
        (with_("blocks.0.out.input_scale", torch.tensor(-1.0)), "out.input_scale .* is -1.0"),
        (with_("blocks.0.out.weight_scale_2", torch.tensor(torch.nan)), "_scale_2 .* is nan"),
        (with_("blocks.0.out.weight_scale_2", torch.tensor(torch.inf)), "_scale_2 .* is inf"),
        (with_("blocks.0.out.weight_scale_2", torch.tensor(0.0)), r"_scale_2 .* is 0\.0"),
        (with_("blocks.0.out.weight_scale_2", torch.tensor(1e-36)), "_2 .* between 1.2e-35"),
        (with_("blocks.0.out.weight_scale_2", torch.ones(64)), r"weight_scale_2 .* F32\[64\]"),
        (with_("blocks.0.out.weight_scale", blocks(-1)), r"out.weight_scale .* is -1\.0"),
        (with_("blocks.0.out.weight_scale", blocks(torch.nan)), "out.weight_scale .* is nan"),
        (
            with_("blocks.0.out.weight_scale", blocks(1, 64, 2)),
            r"is F8_E4M3\[64, 2\]; of 64 rows of 64 numbers, blocks of 16 .* F8_E4M3\[64, 4\]",
        ),
        (with_("blocks.0.out.weight_scale", torch.ones(64, 4)), r"weight_scale .* is F32\[64, 4\]"),
        (with_("blocks.0.out.weight_scale", torch.ones(())), r"weight_scale .* is F32\[\]"),
        (with_("leave.weight_scale", blocks(1)), "leave.weight is stored as BF16 .* to NVFP4"),
        (with_("leave.weight_scale_2", torch.tensor(1.0)), "leave.weight is stored as BF16"),
        (with_("blocks.7.out.input_scale", torch.tensor(1.0)), "blocks.7.out.weight is not there"),
        (with_("blocks.0.out.weight", torch.zeros(64, 16).byte()), "of 64 rows of 32 numbers"),
        (with_("blocks.0.out.weight", torch.zeros(64, 64).byte()), "of 64 rows of 128 numbers"),
        (with_("blocks.0.out.weight", torch.zeros(2048).byte()), "of 0 rows of 0 numbers"),
        (with_("leave.weight", torch.zeros(16, 32).byte()), "leave.weight_scale is missing"),
        (with_("leave.weight", torch.ones(16, 64).to(FP8)), "leave.weight .* is quantized"),
        (with_("blocks.0.attn.k_bmm_quantizer._amax", torch.tensor(1.0)), "q_bmm.* is missing"),
    ],
)  # fmt: skip
def test_what_is_no_such_checkpoint_is_refused_by_name(
    damage: Damage, told: str, tmp_path: Path
) -> None:
    tensors = in_nvfp4(module(), LAYERS)
    damage(tensors)
    write(tmp_path / "weights", tensors, "NVFP4")
    with pytest.raises(WeightsError, match=told) as caught:
        loaded(tmp_path)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lacking("blocks.0.qkv.svdquant_lora_b"), "svdquant_lora_b is missing"),
        (lacking("blocks.0.qkv.pre_quant_scale"), "which 3 of 4 layers have"),
        (lambda t: [t.pop(f"blocks.0.qkv.svdquant_lora_{x}") for x in "ab"], "which 3 of 4"),
        (with_("blocks.0.out.svdquant_lora_a", torch.ones(8, 32)), r"\[8, 32\] and \[64, 8\]"),
        (with_("blocks.0.out.svdquant_lora_a", torch.ones(4, 64)), r"\[4, 64\] and \[64, 8\]"),
        (with_("blocks.0.out.svdquant_lora_b", torch.full((64, 8), torch.nan)), "not finite"),
        (with_("blocks.0.out.pre_quant_scale", torch.ones(32)), "there are 64 columns"),
        (with_("blocks.0.out.pre_quant_scale", -torch.ones(64)), r"pre_quant_scale .* is -1\.0"),
        (with_("blocks.0.out.svdquant_lora_a", torch.ones(8, 64).char()), "lora_a .* is I8; a low"),
        (with_("leave.svdquant_lora_a", torch.ones(8, 64)), "leave.weight is stored as BF16"),
    ],
)
def test_what_is_no_low_rank(damage: Damage, told: str, tmp_path: Path) -> None:
    tensors = in_nvfp4(module(), LAYERS, 8)
    damage(tensors)
    write(tmp_path / "weights", tensors, "NVFP4_SVD")
    with pytest.raises(WeightsError, match=told):
        loaded(tmp_path)


def test_a_scale_that_stands_twice(tmp_path: Path) -> None:
    file = write(tmp_path / "weights", in_nvfp4(module(), LAYERS), "NVFP4") / FILE
    written_twice(file, "blocks.0.out.weight_scale_2")
    with pytest.raises(WeightsError, match=r"weight_scale_2.*twice|twice.*weight_scale_2"):
        loaded(tmp_path)


def test_what_it_cannot_be_converted_for(tmp_path: Path) -> None:
    write(tmp_path / "weights", in_nvfp4(module(), LAYERS), "NVFP4")
    with pytest.raises(UsageError, match=r"--compute-capability 8\.9: its weights are NVFP4"):
        loaded(tmp_path, compute_capabilities=("8.9", "12.0"))
    with pytest.raises(UsageError, match="is quantized already"):
        loaded(tmp_path, quantize="nvfp4")
    with pytest.raises(UsageError, match=r"nvfp4 with --compute-capability 8\.9: NVFP4 is"):
        loaded(tmp_path, quantize="nvfp4", weights=None, compute_capabilities=("8.9", "12.0"))
    # What is no such number is refused later, with the backend's targets.
    assert without("nvfp4", ("8.9,12.0", "8.9+", "12.0+")) == ["8.9+"]


# --- single files of ComfyUI's and BFL's: another order of codes, and scales in tiles -------------


def check_numbers(source: Source, truth: nn.Module) -> None:
    """What is read is the model, but for the rounding; codes are in the order that engines read."""
    held = dict(source.module.named_parameters())
    for name, one in source.codes.items():
        assert one.blocks is not None
        own = numbers_of(one.codes, one.blocks, torch.tensor(one.weight_scale))
        torch.testing.assert_close(held[name], own.bfloat16(), rtol=0.01, atol=1e-6)
        assert (own - truth.state_dict()[name]).norm() < 0.12 * own.norm()
        assert name not in source.located


def test_tiles_are_those_of_cublas_and_nibbles_are_swapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("diffusers")
    smaller_flux(monkeypatch, 64)
    truth = built(FLUX)
    layers = [*FLUX_LAYERS, "final_layer.adaLN_modulation.1"]  # whose halves are swapped
    tensors = comfy_nvfp4(original_flux(truth), layers)
    source = opened(tmp_path, write_file(tmp_path / "flux.safetensors", tensors, {}), FLUX)
    assert len(source.codes) == len(made_of_flux()) + 1
    check_numbers(source, truth)
    assert all(one.is_multiplied for one in source.codes.values())


def test_a_file_of_two_formats(tmp_path: Path) -> None:
    """Each layer is read by its own."""
    named = {n: t.detach().bfloat16() for n, t in module().state_dict().items()}
    tensors, _ = quantized(comfy_nvfp4(named, LAYERS[:3]), LAYERS[3:], style="comfy_quant")
    file = write_file(tmp_path / "x.safetensors", tensors, {})
    source = opened(tmp_path, file)
    kinds = {name: one.codes.dtype for name, one in source.codes.items()}
    assert kinds == {
        **{f"{layer}.weight": torch.uint8 for layer in LAYERS[:3]},
        f"{LAYERS[3]}.weight": FP8,
    }
    truth, held = module().state_dict(), dict(source.module.named_parameters())
    for name in source.codes:
        assert (held[name] - truth[name]).norm() < 0.12 * truth[name].norm()
    assert list(source.located) == [n for n in source.located if n not in kinds or "out" in n]
    with pytest.raises(UsageError, match=r"--compute-capability 8\.9: its weights are NVFP4"):
        opened(tmp_path, file, compute_capabilities=("8.9", "12.0"))
    assert len(opened(tmp_path, file, attention="fp8").codes) == 4
    source = opened(tmp_path, file, allow_cast=("float8",))
    assert len(source.codes) == 3
    assert "1 weights in FP8 multiplied by their scales once" in " ".join(source.told)


def test_what_has_no_scale_of_its_input(tmp_path: Path) -> None:
    named = {n: t.detach().bfloat16() for n, t in module().state_dict().items()}
    tensors = comfy_nvfp4(named, LAYERS, inputs=False)
    file = write_file(tmp_path / "x.safetensors", tensors, {})
    source = opened(tmp_path, file)
    check_numbers(source, module())
    assert not any(one.is_multiplied for one in source.codes.values())
    assert "4 weights in NVFP4 without a scale" in source.told[-1]
    assert "--quantize nvfp4" in source.told[-1]
    source = opened(tmp_path, file, quantize="nvfp4", calibration=(), max_loss=None)
    assert "as --quantize does" in source.told[-1]
    with pytest.raises(UsageError, match=r"--quantize fp8: the weights of .* are NVFP4"):
        opened(tmp_path, file, quantize="fp8")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lacking("blocks.0.out.weight_scale"), "blocks.0.out.weight_scale is missing.*NVFP4"),
        (lacking("blocks.0.out.weight_scale_2"), "blocks.0.out.weight_scale_2 is missing.*NVFP4"),
        (lacking("blocks.0.out.comfy_quant"), "does not say of it which one"),
        (with_("blocks.0.out.weight_scale", blocks(1)), r"is F8_E4M3\[64, 4\]; of 64 rows"),
        (with_("blocks.0.out.weight_scale", blocks(-1, 128, 4)), r"out.weight_scale .* is -1\.0"),
        (with_("blocks.0.out.weight_scale_2", torch.tensor(0.0)), r"_scale_2 .* is 0\.0"),
        (with_("blocks.0.out.input_scale", torch.tensor(1e-40)), "input_scale .* between 1.2e-35"),
        (with_("blocks.0.out.input_scale", torch.tensor(-2.0)), r"input_scale .* is -2\.0"),
        (with_("blocks.0.out.weight", torch.ones(64, 64).to(FP8)), "not quantized to NVFP4"),
        (with_("blocks.0.out.weight", torch.ones(64).byte()), r"quantized as U8\[64\]"),
        (
            with_("blocks.0.out.comfy_quant", as_json({"format": "float8_e4m3fn"})),
            "is stored as U8 and not quantized to FP8|scales of two formats",
        ),
        (with_("leave.comfy_quant", as_json({"format": "nvfp4"})), "leave.weight is stored as BF"),
    ],
)
def test_what_is_no_such_file_is_refused_by_name(damage: Damage, told: str, tmp_path: Path) -> None:
    named = {n: t.detach().bfloat16() for n, t in module().state_dict().items()}
    tensors = comfy_nvfp4(named, LAYERS)
    damage(tensors)
    file = write_file(tmp_path / "x.safetensors", tensors, {})
    with pytest.raises(WeightsError, match=told) as caught:
        opened(tmp_path, file)
    assert caught.value.exit_code == 2
