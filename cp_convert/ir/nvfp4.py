"""NVFP4: numbers of 4 bits in blocks of 16, as operators of a program.

A number is one of 0, 0.5, 1, 1.5, 2, 3, 4, 6 or their opposites (E2M1), times the scale of its
block of 16 along the last dimension (E4M3), times one scale of the tensor, a constant. Codes lie
in pairs in bytes, the even column in the lower half. A block that is quantized has the scale that
makes its largest magnitude a code of 6, itself rounded to E4M3 (TensorRT documentation,
*IDynamicQuantizeLayer* and *Double Quantization*; NVIDIA ModelOpt, ``NVFP4``).

``cp::dequantize_blocks`` gives the numbers that stored codes stand for, and
``cp::quantize_dequantize_blocks`` rounds what flows, in ``to`` or in the type that it came in:
TensorRT lets nothing but a product read such codes. ``cp::quantize_blocks`` is its first half.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from .quantize import FP8, LARGEST

_LIBRARY: Final = torch.library.Library("cp", "FRAGMENT")
_LIBRARY.define(
    "dequantize_blocks(Tensor codes, Tensor blocks, float scale, ScalarType dtype) -> Tensor"
)
_LIBRARY.define("quantize_dequantize_blocks(Tensor x, float scale, ScalarType? to=None) -> Tensor")
_LIBRARY.define("quantize_blocks(Tensor x, float scale) -> (Tensor, Tensor)")

DEQUANTIZE_BLOCKS: Final = torch.ops.cp.dequantize_blocks.default
QUANTIZE_DEQUANTIZE_BLOCKS: Final = torch.ops.cp.quantize_dequantize_blocks.default
QUANTIZE_BLOCKS: Final = torch.ops.cp.quantize_blocks.default
BLOCK_QUANTIZERS: Final = (DEQUANTIZE_BLOCKS, QUANTIZE_DEQUANTIZE_BLOCKS)
"""Those that stand in programs."""
PAIRS: Final = torch.uint8
"""The type of codes, two in a byte."""
BLOCK: Final = 16
LARGEST_CODE: Final = 6.0
LARGEST_OF_ALL: Final = LARGEST_CODE * LARGEST[FP8]
"""What the largest number of a tensor is of its scale: the largest code of the largest block."""
LARGEST_NUMBER: Final = {**LARGEST, PAIRS: LARGEST_OF_ALL}
"""The same by the type of codes, of all types."""
STEP_OF_ALL: Final = 2.0**-12
"""A scale of a tensor whose numbers lie between -1 and 1: every type holds what codes stand for."""
MAGNITUDES: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""By the lower three bits of a code; the fourth is the sign."""


def nearest(ratio: Tensor) -> Tensor:
    """The numbers of 4 bits nearest to ``ratio``, float32, ties to even; 6 for what is beyond.

    Steps of 0.5 up to 2, of 1 up to 4 and of 2 up to 6, each rounded by itself.
    """
    size = ratio.abs()
    found = size.clamp(max=2).mul_(2).round_().mul_(0.5)
    found += size.clamp(2, 4).round_()
    found += size.clamp_(4, LARGEST_CODE).mul_(0.5).round_().mul_(2)
    return found.sub_(2 + 4).copysign_(ratio)


def pairs(numbers: Tensor) -> Tensor:
    """``[.., K]`` numbers of :func:`nearest` as codes, two in a byte: ``[.., K/2]``."""
    rows = numbers.reshape(-1, numbers.shape[-1])
    found = torch.cat([_paired(piece) for piece in rows.split(_at_once(rows))])
    return found.view(*numbers.shape[:-1], -1)


def _paired(numbers: Tensor) -> Tensor:
    doubled = numbers.abs().mul_(2).int()
    by_double = torch.zeros(13, dtype=PAIRS, device=numbers.device)
    for code, magnitude in enumerate(MAGNITUDES):
        by_double[int(2 * magnitude)] = code
    codes = by_double.index_select(0, doubled.flatten()).view(numbers.shape)
    codes += torch.signbit(numbers).to(PAIRS).mul_(8)
    return codes[..., 0::2] + codes[..., 1::2] * 16


def _at_once(rows: Tensor) -> int:
    """How many rows a CPU keeps at hand: several passes go over them."""
    count = _AT_ONCE // rows.shape[-1] if rows.device.type == "cpu" else len(rows)
    return max(1, count)


_AT_ONCE: Final = 1 << 18


def from_pairs(codes: Tensor) -> Tensor:
    """The numbers of ``[.., K/2]`` bytes, float32 ``[.., K]``."""
    own = torch.tensor(MAGNITUDES, device=codes.device)
    own, byte = torch.cat((own, -own)), torch.arange(256, device=codes.device)
    both = torch.stack((own[byte & 15], own[byte >> 4]), dim=-1)
    # Two numbers of a byte are one of 64 bits: a look-up for both.
    found = both.view(torch.int64).flatten().index_select(0, codes.flatten().int())
    return found.view(torch.float32).view(*codes.shape[:-1], 2 * codes.shape[-1])


def in_blocks(x: Tensor) -> Tensor:
    """``[.., K]`` as ``[.., K/16, 16]``."""
    return x.reshape(*x.shape[:-1], -1, BLOCK)


def ratios(x: Tensor, scale: float, *, rounded: bool = True) -> tuple[Tensor, Tensor]:
    """What becomes codes, and the scales of blocks.

    Args:
        x: ``[.., K]``.
        scale: of the tensor.
        rounded: whether scales are E4M3; else they are as they come.

    Returns:
        float32 ``[.., K]``, zeros where a block's scale is; and ``[.., K/16]``.
    """
    wide = in_blocks(x.float())
    whole = torch.tensor(scale, dtype=torch.float32, device=x.device)
    blocks = wide.abs().amax(-1) / LARGEST_CODE / whole
    blocks = blocks.clamp(max=LARGEST[FP8]).to(FP8) if rounded else blocks
    step = (blocks.float() * whole)[..., None]
    return torch.where(step > 0, wide / step, 0.0).flatten(-2), blocks


def times_blocks(numbers: Tensor, blocks: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """``numbers`` times the scales of their blocks times that of the tensor, in ``dtype``."""
    whole = torch.tensor(scale, dtype=torch.float32, device=numbers.device)
    return (in_blocks(numbers) * (blocks.float() * whole)[..., None]).flatten(-2).to(dtype)


def _dequantize(codes: Tensor, blocks: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    return times_blocks(from_pairs(codes), blocks, scale, dtype)


def _quantize(x: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    rows = x.reshape(-1, x.shape[-1])
    parts = [_rounded(piece, scale) for piece in rows.split(_at_once(rows))]
    numbers, blocks = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
    return numbers.view(x.shape), blocks.view(*x.shape[:-1], -1)


def _rounded(x: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    ratio, blocks = ratios(x, scale)
    return nearest(ratio), blocks


def _both(x: Tensor, scale: float, to: torch.dtype | None = None) -> Tensor:
    return times_blocks(*_quantize(x, scale), scale, to or x.dtype)


for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("dequantize_blocks", _dequantize, _device)
    _LIBRARY.impl("quantize_dequantize_blocks", _both, _device)
    _LIBRARY.impl("quantize_blocks", _quantize, _device)


def _fake_numbers(codes: Tensor, blocks: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], 2 * codes.shape[-1]), dtype=dtype)


def _fake_both(x: Tensor, scale: float, to: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(x, dtype=to or x.dtype, memory_format=torch.contiguous_format)


def _fake_codes(x: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    blocks = x.new_empty((*x.shape[:-1], x.shape[-1] // BLOCK), dtype=FP8)
    return _fake_both(x, scale, torch.float32), blocks


torch.library.register_fake("cp::dequantize_blocks", _fake_numbers, lib=_LIBRARY)
torch.library.register_fake("cp::quantize_dequantize_blocks", _fake_both, lib=_LIBRARY)
torch.library.register_fake("cp::quantize_blocks", _fake_codes, lib=_LIBRARY)


def quantize_blocks(x: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Numbers of 4 bits, float32 ``[.., K]``, and the scales of their blocks, E4M3 ``[.., K/16]``.

    Args:
        x: ``[.., K]``.
        scale: of the tensor.
    """
    return torch.ops.cp.quantize_blocks(x, scale)  # type: ignore[no-any-return]


def dequantize_blocks(codes: Tensor, blocks: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """What ``codes`` ``[.., K/2]`` in blocks ``[.., K/16]`` stand for, ``[.., K]`` in ``dtype``."""
    return torch.ops.cp.dequantize_blocks(codes, blocks, scale, dtype)  # type: ignore[no-any-return]


def quantize_dequantize_blocks(x: Tensor, scale: float, to: torch.dtype | None = None) -> Tensor:
    """``x`` ``[.., K]`` rounded to NVFP4, in ``to`` or its own type."""
    return torch.ops.cp.quantize_dequantize_blocks(x, scale, to)  # type: ignore[no-any-return]
