"""Checkpoints that torchao and ComfyUI's library of kernels have quantized themselves.

In: a module, or tensors by name, and the layers. Out: what is saved. ``torchao`` (0.18) is needed,
for :func:`by_diffusers` ``accelerate`` too, and for :func:`by_kitchen` ``comfy-kitchen`` (0.2.40).
ComfyUI itself is no package: ``comfy_quant`` and the scales of inputs are put beside as it does.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .comfy import as_json

TORCHAO: Final = {
    "row": lambda: _float8("PerRow"),
    "tensor": lambda: _float8("PerTensor"),
    "weight": lambda: _of_torchao("Float8WeightOnlyConfig"),
    "int8": lambda: _of_torchao("Int8DynamicActivationInt8WeightConfig"),
    "int8-weight": lambda: _of_torchao("Int8WeightOnlyConfig"),
}
"""torchao's configurations: FP8 with inputs by tokens, by the whole, and left alone; INT8."""
KITCHEN: Final = {
    "float8_e4m3fn": "TensorCoreFP8Layout",
    "nvfp4": "TensorCoreNVFP4Layout",
    "mxfp8": "TensorCoreMXFP8Layout",
    "int8_tensorwise": "TensorWiseINT8Layout",
}
"""Layouts of ``comfy-kitchen``, by what ``comfy_quant`` calls them."""


def by_torchao(module: nn.Module, layers: Collection[str], kind: str, path: Path) -> Path:
    """A file of the tensors that torchao makes of ``module``'s, which stays as it is."""
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    coded = quantized(module, layers, kind)
    tensors, told = flatten_tensor_state_dict(coded.state_dict())
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, told)
    return path


def quantized(module: nn.Module, layers: Collection[str], kind: str) -> nn.Module:
    """A copy of ``module`` in bfloat16 whose weights are torchao's tensors."""
    from torchao.quantization import quantize_

    coded = deepcopy(module).bfloat16()
    with without_a_gpu():
        quantize_(coded, TORCHAO[kind](), filter_fn=lambda _, name: name in layers)
    return coded


def by_diffusers(module: nn.Module, folder: Path) -> Path:
    """Diffusers' ``save_pretrained`` of the model that it has torchao quantize: all its layers."""
    from diffusers import TorchAoConfig

    made: Any = type(module)
    with tempfile.TemporaryDirectory() as plain, without_a_gpu():
        own: Any = deepcopy(module).bfloat16()
        own.save_pretrained(plain)
        config = TorchAoConfig(TORCHAO["row"]())
        coded = made.from_pretrained(plain, torch_dtype=torch.bfloat16, quantization_config=config)
        coded.save_pretrained(folder, safe_serialization=True)
    return folder


@contextmanager
def without_a_gpu() -> Iterator[None]:
    """It looks for a GPU that multiplies FP8 before it makes codes; nothing else is changed."""
    with (
        patch("torchao.quantization.quant_api._check_hardware_support"),
        patch("torchao.quantization.quant_api.is_sm_at_least_89", lambda: True),
    ):
        yield


def _float8(granularity: str) -> Any:
    from torchao import quantization as ao

    return ao.Float8DynamicActivationFloat8WeightConfig(granularity=getattr(ao, granularity)())


def _of_torchao(name: str) -> Any:
    from torchao import quantization as ao

    return getattr(ao, name)()


def by_kitchen(
    named: Mapping[str, Tensor], layers: Collection[str], kind: str, *, inputs: bool = True
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The same with the weights of ``layers`` as codes of :data:`KITCHEN`; no metadata."""
    layout, tensors = _layout(kind), dict(named)
    for number, layer in enumerate(layers):
        weight = f"{layer}.weight"
        codes, told = layout.quantize(named[weight])
        for suffix, tensor in layout.state_dict_tensors(codes, told).items():
            tensors[weight + suffix] = tensor.contiguous()
        if inputs:
            largest = 5 + 0.05 * number
            scale = largest / (6 * 448 if kind == "nvfp4" else 448)
            tensors[f"{layer}.input_scale"] = torch.tensor(scale)
        tensors[f"{layer}.comfy_quant"] = as_json({"format": kind})
    return tensors, {}


def numbers_of_kitchen(weight: Tensor, kind: str) -> Tensor:
    """What its codes of ``weight`` stand for, as it says itself."""
    layout = _layout(kind)
    found: Tensor = layout.dequantize(*layout.quantize(weight))
    return found


def _layout(kind: str) -> Any:
    from comfy_kitchen import tensor

    return getattr(tensor, KITCHEN[kind])
