"""Lowerings of the quantizers: ``IQuantizeLayer`` and ``IDequantizeLayer``, per tensor.

The scale is a constant, as the builder wants it: with any other it computes products in half
precision, without a word.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch

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
    layer = ctx.net.add_quantize(tensor, _scale(ctx, name, scale), _TYPES[dtype])
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


def _dequantized(ctx: ConversionContext, name: str, codes: Tensor, scale: float, to: Any) -> Tensor:
    layer = ctx.net.add_dequantize(codes, _scale(ctx, f"{name}_back", scale), to)
    assert layer is not None, f"TensorRT refused to dequantize {codes.shape} of {codes.dtype}"
    layer.name = f"dequantize {name}"
    return layer.get_output(0)


def _scale(ctx: ConversionContext, name: str, scale: float) -> Tensor:
    constant = ctx.net.add_constant((), np.full(1, scale, np.float32))
    constant.name = f"{name}_scale"
    return constant.get_output(0)
