"""Quantizers: from numbers to codes of 8 bits and back, as operators of a program.

``cp::quantize`` gives codes, ``cp::dequantize`` the numbers they stand for, and
``cp::quantize_dequantize`` both at once, for codes that nothing but a product may read (TensorRT
moves INT8 by a collective, and refuses to move FP8); it returns numbers in ``to``, or in the type
that they came in. A code times the constant ``scale`` is the number, of all numbers of the tensor
alike. Rounding is to nearest, ties to even, and what lies beyond the codes becomes the outermost
one (TensorRT documentation, *IQuantizeLayer*).

:func:`encoded` and :func:`decoded` quantize a token's head by its own largest number.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

_LIBRARY: Final = torch.library.Library("cp", "FRAGMENT")
_LIBRARY.define("quantize(Tensor x, float scale, ScalarType dtype) -> Tensor")
_LIBRARY.define("dequantize(Tensor x, float scale, ScalarType dtype) -> Tensor")
_LIBRARY.define(
    "quantize_dequantize(Tensor x, float scale, ScalarType dtype, ScalarType? to=None) -> Tensor"
)

QUANTIZE: Final = torch.ops.cp.quantize.default
DEQUANTIZE: Final = torch.ops.cp.dequantize.default
QUANTIZE_DEQUANTIZE: Final = torch.ops.cp.quantize_dequantize.default
QUANTIZERS: Final = (QUANTIZE, DEQUANTIZE, QUANTIZE_DEQUANTIZE)
FP8: Final = torch.float8_e4m3fn
INT8: Final = torch.int8
LARGEST: Final = {torch.int8: 127.0, FP8: 448.0}
"""The largest code of every type; INT8's -128 is a code, and no quantizer of ours aims at it."""
LOWEST: Final = {torch.int8: -128.0, FP8: -448.0}
SCALES: Final = (2.0**-116, 2.0**116)
"""Between which a scale lies. One over it, and what the smallest and the largest code stand for (of
NVFP4 in the smallest and the largest block), are normal numbers of float32 then. Below, an inverse
may be infinite, and codes are zeros where subnormal numbers are."""
TINY: Final = torch.finfo(torch.float32).tiny
"""The smallest normal number: the product of an input's scale and a weight's is no less."""


def are_scales(numbers: Tensor) -> Tensor:
    """Of each, whether codes can be measured by it; see :data:`SCALES`."""
    return (numbers >= SCALES[0]) & (numbers <= SCALES[1])


def scaled(x: Tensor, scale: float) -> Tensor:
    """``x / scale`` in float32: what a quantizer rounds to codes."""
    return x.float() / torch.tensor(scale, dtype=torch.float32, device=x.device)


def to_codes(ratio: Tensor, dtype: torch.dtype) -> Tensor:
    """The codes nearest to ``ratio``, ties to even; the outermost ones for what is beyond."""
    within = ratio.clamp(LOWEST[dtype], LARGEST[dtype])
    return (within.round() if dtype == torch.int8 else within).to(dtype)


def from_codes(codes: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """The numbers that ``codes`` stand for, in ``dtype``."""
    factor = torch.tensor(scale, dtype=torch.float32, device=codes.device)
    return (codes.float() * factor).to(dtype)


def _quantize(x: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    return to_codes(scaled(x, scale), dtype)


def _both(x: Tensor, scale: float, dtype: torch.dtype, to: torch.dtype | None = None) -> Tensor:
    return from_codes(_quantize(x, scale, dtype), scale, to or x.dtype)


for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("quantize", _quantize, _device)
    _LIBRARY.impl("dequantize", from_codes, _device)
    _LIBRARY.impl("quantize_dequantize", _both, _device)


def _of_type(x: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def _of_same_type(
    x: Tensor, scale: float, dtype: torch.dtype, to: torch.dtype | None = None
) -> Tensor:
    return _of_type(x, scale, to or x.dtype)


for _name, _fake in (
    ("quantize", _of_type),
    ("dequantize", _of_type),
    ("quantize_dequantize", _of_same_type),
):
    torch.library.register_fake(f"cp::{_name}", _fake, lib=_LIBRARY)


def quantize(x: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Codes of ``x``, in ``dtype``, INT8 or FP8 (E4M3); the shape is unchanged."""
    return torch.ops.cp.quantize(x, scale, dtype)  # type: ignore[no-any-return]


def dequantize(codes: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """``codes * scale`` in the floating type ``dtype``; the shape is unchanged."""
    return torch.ops.cp.dequantize(codes, scale, dtype)  # type: ignore[no-any-return]


def token_step(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """What a token's numbers are divided by, in float32, before codes of :data:`STEP` are taken.

    Args:
        largest: the token's largest magnitude.
        dtype: of the codes.
    """
    wide = largest.float().clamp(min=TOKEN_FLOOR)
    return wide * (1 / (LARGEST[dtype] * STEP[dtype]))


TOKEN_FLOOR: Final = 1e-12
"""The largest magnitude of a token of zeros, as row-wise checkpoints are computed."""
STEP: Final = {torch.int8: 2.0**-7, FP8: 2.0**-9}
"""What a code of 1 stands for where numbers lie between -1 and 1: every type holds it exactly."""


def encoded(x: Tensor) -> tuple[Tensor, Tensor]:
    """INT8 codes of ``x``, and what they are measured by: ``[..., D]`` and ``[..., 1]``.

    A row of ``D`` numbers (one head of one token) is divided by its largest magnitude over 127. It
    is that magnitude which goes with the codes: as one of the row's own numbers its type holds it
    exactly, which a scale of half precision would not be.
    """
    largest = x.abs().amax(-1, keepdim=True)
    return quantize(x.float() / _step(largest), 1.0, torch.int8), largest


def decoded(codes: Tensor, largest: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers that :func:`encoded` made these codes of, in ``dtype``."""
    return (dequantize(codes, 1.0, torch.float32) * _step(largest)).to(dtype)


def _step(largest: Tensor) -> Tensor:
    """What a code of 1 stands for; not quite nothing for a row of zeros, which has no quotient."""
    return largest.float().clamp_min(_SMALLEST) * (1 / LARGEST[torch.int8])


_SMALLEST: Final = 1e-30
