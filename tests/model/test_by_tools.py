"""Files that torchao and ComfyUI's library wrote themselves; ``by_tools/make.py`` says how."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.checkpoints.comfy import in_nvfp4, quantized
from benchmarks.checkpoints.rowwise import torchao
from cp_convert.errors import UsageError, WeightsError
from tests.model.by_tools.make import HERE
from tests.model.test_comfy import loaded, named
from tests.model.test_modelopt import LAYERS

FP8 = torch.float8_e4m3fn


def file(name: str) -> Path:
    return HERE / f"{name}.safetensors"


def layout(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {name: (t.dtype, t.shape) for name, t in tensors.items()}


@pytest.mark.parametrize(
    ("name", "options", "by_token", "multiplied"),
    [
        ("torchao-row", {}, True, True),
        ("torchao-weight", {}, False, False),
        ("torchao-tensor", {"quantize": "fp8"}, False, False),
        ("kitchen-float8_e4m3fn", {}, False, True),
        ("kitchen-nvfp4", {"compute_capabilities": ("12.0",)}, False, True),
    ],
)
def test_codes_stand_for_what_the_tool_says(
    name: str, options: dict[str, object], by_token: bool, multiplied: bool, tmp_path: Path
) -> None:
    source = loaded(tmp_path, file(name), **options)
    assert set(source.codes) == {f"{layer}.weight" for layer in LAYERS}
    held, numbers = dict(source.module.named_parameters()), load_file(file("numbers"))
    for layer in LAYERS[:2]:
        wanted = numbers[f"{name} {layer}"]
        # What it multiplies in bfloat16, and in two steps, is in float32 here.
        torch.testing.assert_close(held[f"{layer}.weight"], wanted, rtol=2**-7, atol=0)
        own = source.codes[f"{layer}.weight"]
        assert own.by_token == by_token
        assert own.is_multiplied == multiplied


def test_our_writers_have_the_tools_layout() -> None:
    """Names, types and shapes; so that what is tested with them is as the tools have it."""
    ours, told = torchao(named(), LAYERS)
    theirs = load_file(file("torchao-row"))
    assert layout(ours) == layout(theirs)
    with safe_open(file("torchao-row"), "pt") as opened:
        assert set(opened.metadata()) == set(told)
    fp8, _ = quantized(named(), LAYERS, "comfy_quant")
    assert layout(fp8) == layout(load_file(file("kitchen-float8_e4m3fn")))
    nvfp4, theirs = in_nvfp4(named(), LAYERS), load_file(file("kitchen-nvfp4"))
    assert layout(nvfp4) == layout(theirs)
    for name in (n for n, t in nvfp4.items() if t.dtype in (torch.uint8, FP8)):
        alike = nvfp4[name].view(torch.uint8) == theirs[name].view(torch.uint8)
        assert alike.float().mean() > 0.97, name  # nibbles and tiles: elsewhere hardly any is


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("torchao-int8", "is said to be Int8Tensor"),
        ("torchao-int8-weight", "is said to be Int8Tensor"),
        ("kitchen-mxfp8", "mxfp8"),
        ("kitchen-int8_tensorwise", "int8_tensorwise"),
    ],
)
def test_other_kinds_are_refused_by_name(name: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=told) as refused:
        loaded(tmp_path, file(name))
    assert refused.value.exit_code == 2


def test_a_scale_of_the_whole_input_needs_another_in_its_place(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"blocks.0.\w+.weight as a whole, as it runs") as refused:
        loaded(tmp_path, file("torchao-tensor"))
    assert "--quantize fp8" in (refused.value.hint or "")
    source = loaded(tmp_path, file("torchao-tensor"), allow_cast=("float8",))
    assert not source.codes
