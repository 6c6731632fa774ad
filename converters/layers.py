"""Single layers with a name, as several lowerings add them. In and out: ``trt.ITensor``."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from ..trt.libraries import ConversionContext, trt

# trt.ITensor; tensorrt ships no types.
Tensor: TypeAlias = Any


def cast(ctx: ConversionContext, name: str, x: Tensor, dtype: Any) -> Tensor:
    """``x`` in ``dtype``, itself where it has that."""
    if x.dtype == dtype:
        return x
    layer = ctx.net.add_cast(x, dtype)
    layer.name = name
    return layer.get_output(0)


def constant(ctx: ConversionContext, name: str, like: Tensor, value: float) -> Tensor:
    """One float32 number with as many dimensions as ``like``."""
    shape = (1,) * len(like.shape)
    layer = ctx.net.add_constant(shape, np.full(shape, value, np.float32))
    layer.name = name
    return layer.get_output(0)


def elementwise(ctx: ConversionContext, name: str, a: Tensor, b: Tensor, kind: str) -> Tensor:
    """``kind`` is a ``trt.ElementWiseOperation`` by name; lengths of 1 are repeated."""
    layer = ctx.net.add_elementwise(a, b, getattr(trt.ElementWiseOperation, kind))
    layer.name = name
    return layer.get_output(0)


def unary(ctx: ConversionContext, name: str, x: Tensor, kind: str) -> Tensor:
    """``kind`` is a ``trt.UnaryOperation`` by name."""
    layer = ctx.net.add_unary(x, getattr(trt.UnaryOperation, kind))
    layer.name = name
    return layer.get_output(0)
