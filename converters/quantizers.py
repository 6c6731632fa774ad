"""Lowerings of the quantizers: ``IQuantizeLayer`` and ``IDequantizeLayer``, per tensor.

NVFP4 has ``IDynamicQuantizeLayer`` instead of the first, and two of the second: scales of blocks
are codes too (documentation, *Double Quantization*). The scale of a tensor is a constant, as the
builder wants it: with any other it computes products in half precision, without a word.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch

from ..ir.nvfp4 import BLOCK
from ..trt.libraries import ConversionContext, get_trt_tensor, trt

# trt.ITensor; tensorrt ships no types.
Tensor: TypeAlias = Any
_TYPES = {
    torch.int8: trt.int8,
    torch.float8_e4m3fn: trt.fp8,
    torch.float16: trt.float16,
    torch.bfloat16: trt.bfloat16,
    torch.float32: trt.float32,
}


def quantize(ctx: ConversionContext, name: str, x: Any, scale: float, dtype: Any) -> Tensor:
    """From numbers to codes (documentation, *IQuantizeLayer*)."""
    tensor = get_trt_tensor(ctx, x, f"{name}_input")
    layer = ctx.net.add_quantize(tensor, scale_of(ctx, name, scale), _TYPES[dtype])
    assert layer is not None, f"TensorRT refused to quantize {tensor.shape} to {dtype}"
    layer.name = f"quantize {name}"
    return layer.get_output(0)


def dequantize(ctx: ConversionContext, name: str, x: Any, scale: float, dtype: Any) -> Tensor:
    """From codes to numbers (documentation, *IDequantizeLayer*)."""
    tensor = get_trt_tensor(ctx, x, f"{name}_codes")
    return _dequantized(ctx, name, tensor, scale, _TYPES[dtype])


def quantize_dequantize(
    ctx: ConversionContext, name: str, x: Any, scale: float, dtype: Any, to: Any = None
) -> Tensor:
    """Both, one after the other, so that a product next to them is computed with the codes."""
    tensor = get_trt_tensor(ctx, x, f"{name}_input")
    codes = quantize(ctx, name, tensor, scale, dtype)
    return _dequantized(ctx, name, codes, scale, tensor.dtype if to is None else _TYPES[to])


def there_and_back(
    ctx: ConversionContext, name: str, x: Tensor, scale: float, dtype: torch.dtype, back: float
) -> Tensor:
    """The same with another scale on the way back; in the type of ``x``."""
    codes = quantize(ctx, name, x, scale, dtype)
    return _dequantized(ctx, name, codes, back, x.dtype)


def _dequantized(ctx: ConversionContext, name: str, codes: Tensor, scale: float, to: Any) -> Tensor:
    layer = ctx.net.add_dequantize(codes, scale_of(ctx, f"{name}_back", scale), to)
    assert layer is not None, f"TensorRT refused to dequantize {codes.shape} of {codes.dtype}"
    layer.name = f"dequantize {name}"
    return layer.get_output(0)


def dequantize_blocks(
    ctx: ConversionContext, name: str, codes: Any, blocks: Any, scale: float, dtype: Any
) -> Tensor:
    """From NVFP4 codes to numbers: first the scales of blocks, then the codes."""
    if isinstance(codes, torch.Tensor):
        tensor = get_trt_tensor(ctx, codes, f"{name}_codes", target_quantized_type=trt.fp4)
    else:
        tensor = _input_of_fp4(ctx, codes)
    scales = get_trt_tensor(ctx, blocks, f"{name}_blocks")
    return _by_blocks(ctx, name, tensor, scales, scale_of(ctx, name, scale), _TYPES[dtype])


def quantize_dequantize_blocks(
    ctx: ConversionContext, name: str, x: Any, scale: float, to: Any = None
) -> Tensor:
    """To NVFP4, by the largest number of each block, and back."""
    tensor = get_trt_tensor(ctx, x, f"{name}_input")
    last = len(tensor.shape) - 1
    layer = ctx.net.add_dynamic_quantize(tensor, last, BLOCK, trt.fp4, trt.fp8)
    assert layer is not None, f"TensorRT refused to quantize {tensor.shape} by blocks"
    layer.name = f"quantize {name}"
    whole = scale_of(ctx, name, scale)
    layer.set_input(1, whole)
    codes, scales = layer.get_output(0), layer.get_output(1)
    return _by_blocks(ctx, name, codes, scales, whole, tensor.dtype if to is None else _TYPES[to])


def _by_blocks(
    ctx: ConversionContext, name: str, codes: Tensor, scales: Tensor, whole: Tensor, to: Any
) -> Tensor:
    """The scales are in the numbers' own type: the builder has no product for others."""
    steps = ctx.net.add_dequantize(scales, whole, to)
    assert steps is not None, f"TensorRT refused to dequantize scales of {scales.shape}"
    steps.name = f"dequantize {name}_blocks"
    layer = ctx.net.add_dequantize(codes, steps.get_output(0), to)
    assert layer is not None, f"TensorRT refused to dequantize {codes.shape} by blocks"
    layer.name = f"dequantize {name}"
    return layer.get_output(0)


def _input_of_fp4(ctx: ConversionContext, pairs: Tensor) -> Tensor:
    """The network's input of bytes as one of codes: Torch-TensorRT's inputs have no such type."""
    if pairs.dtype == trt.fp4:
        return pairs
    assert pairs.is_network_input, f"{pairs.name} is computed: codes of 4 bits cannot be"
    name, (*rows, columns) = pairs.name, pairs.shape
    pairs.name = f"{name} as bytes"
    ctx.net.remove_tensor(pairs)
    return ctx.net.add_input(name, trt.fp4, (*rows, 2 * columns))


def scale_of(ctx: ConversionContext, name: str, scale: float) -> Tensor:
    """One number of a whole tensor, float32."""
    constant = ctx.net.add_constant((), np.full(1, scale, np.float32))
    constant.name = f"{name}_scale"
    return constant.get_output(0)
