"""Bfloat16 as float16 and back: what comes in and goes out is equal, to the bit.

Float16 has three bits more and a small range. So all numbers are divided by a power of two that
brings the largest to between 2**13 and 2**14, and its exponent travels with them, in one row more.
Rounding to float16 moves a number by 2**-12 of itself, and rounding to bfloat16 after that puts it
back where it was. Numbers below 2**-30 of the largest become multiples of 2**-38 of it, or zero.
"""

from __future__ import annotations

import math
from typing import Any, Final, TypeAlias

from ..trt.libraries import ConversionContext, trt
from .layers import cast, constant, elementwise, unary

# trt.ITensor; tensorrt ships no types.
Tensor: TypeAlias = Any
_TOP: Final = 14
_LEAST: Final = 2.0**-100
"""Below it all numbers are as good as zero; a logarithm of zero there is none."""


def pack(ctx: ConversionContext, name: str, x: Tensor) -> Tensor:
    """Float16 of the shape of ``x`` (bfloat16), and one row more in its longest dimension."""
    wide = cast(ctx, f"{name}_wide", x, trt.float32)
    magnitude = unary(ctx, f"{name}_magnitude", wide, "ABS")
    every = (1 << len(x.shape)) - 1
    largest = ctx.net.add_reduce(magnitude, trt.ReduceOperation.MAX, every, True)
    largest.name = f"{name}_largest"
    exponent = _exponent(ctx, name, largest.get_output(0))
    factor = _power(ctx, f"{name}_factor", exponent, -1.0)
    small = elementwise(ctx, f"{name}_small", wide, factor, "PROD")
    rows = ctx.net.add_concatenation(
        [
            cast(ctx, f"{name}_half", small, trt.float16),
            cast(ctx, f"{name}_row_half", _row(ctx, name, exponent, x.shape), trt.float16),
        ]
    )
    rows.axis = _longest(x.shape)
    rows.name = f"{name}_rows"
    return rows.get_output(0)


def unpack(ctx: ConversionContext, name: str, packed: Tensor) -> Tensor:
    """What was packed, in bfloat16."""
    shape = tuple(packed.shape)
    at = _longest(shape)
    last = tuple(n - 1 if dim == at else 0 for dim, n in enumerate(shape))
    first = (0,) * len(shape)
    exponent = _slice(ctx, f"{name}_exponent", packed, last, (1,) * len(shape))
    numbers = _slice(
        ctx, f"{name}_numbers", packed, first,
        tuple(n - (dim == at) for dim, n in enumerate(shape)),
    )  # fmt: skip
    told = cast(ctx, f"{name}_exponent_wide", exponent, trt.float32)
    factor = _power(ctx, f"{name}_back", told, 1.0)
    wide = cast(ctx, f"{name}_numbers_wide", numbers, trt.float32)
    return cast(
        ctx, f"{name}_narrow", elementwise(ctx, f"{name}_large", wide, factor, "PROD"), trt.bfloat16
    )


def _longest(shape: tuple[int, ...]) -> int:
    """Where a row is fewest numbers; the same with the row as without."""
    return max(range(len(shape)), key=lambda dim: (shape[dim], dim))


def _exponent(ctx: ConversionContext, name: str, largest: Tensor) -> Tensor:
    """By which power of two all is divided: a whole number, in float32."""
    least = constant(ctx, f"{name}_least", largest, _LEAST)
    there = elementwise(ctx, f"{name}_there", largest, least, "MAX")
    log = unary(ctx, f"{name}_log", there, "LOG")
    ln2 = constant(ctx, f"{name}_ln2", log, 1 / math.log(2))
    two = elementwise(ctx, f"{name}_log2", log, ln2, "PROD")
    whole = unary(ctx, f"{name}_whole", two, "CEIL")
    top = constant(ctx, f"{name}_top", whole, float(_TOP))
    return elementwise(ctx, f"{name}_power", whole, top, "SUB")


def _power(ctx: ConversionContext, name: str, exponent: Tensor, sign: float) -> Tensor:
    """``2 ** (sign * exponent)``; that it is near it is enough, see above."""
    ln2 = constant(ctx, f"{name}_ln2", exponent, sign * math.log(2))
    return unary(ctx, name, elementwise(ctx, f"{name}_ln", exponent, ln2, "PROD"), "EXP")


def _row(ctx: ConversionContext, name: str, exponent: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The exponent, repeated to one row of the longest dimension."""
    at = _longest(tuple(shape))
    size = tuple(1 if dim == at else n for dim, n in enumerate(shape))
    return _slice(ctx, f"{name}_row", exponent, (0,) * len(size), size, stride=0)


def _slice(
    ctx: ConversionContext,
    name: str,
    x: Tensor,
    start: tuple[int, ...],
    size: tuple[int, ...],
    stride: int = 1,
) -> Tensor:
    layer = ctx.net.add_slice(x, start, size, (stride,) * len(size))
    layer.name = name
    return layer.get_output(0)
