"""Operators whose shapes follow a size that is known at run time, as TensorRT's shape tensors.

Sizes are tensors of one int64 each; a shape is their concatenation. TensorRT computes with them on
the host before it runs anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import torch

from ..trt.libraries import ConversionContext, get_trt_tensor, trt

# trt.ITensor; tensorrt ships no types.
Tensor: TypeAlias = Any
_DTYPES: Final = {
    torch.bool: trt.bool,
    torch.int32: trt.int32,
    torch.int64: trt.int64,
    torch.float16: trt.float16,
    torch.bfloat16: trt.bfloat16,
    torch.float32: trt.float32,
}
_SUM, _PRODUCT = trt.ElementWiseOperation.SUM, trt.ElementWiseOperation.PROD
_FLOOR = trt.ElementWiseOperation.FLOOR_DIV


def extent(
    ctx: ConversionContext, name: str, x: Any, dim: int, own: list[int], told: list[int],
    slots: list[int],
) -> Tensor:  # fmt: skip
    """See :func:`cp_convert.ir.extents.extent`."""
    write = _Writer(ctx, name)
    shape = ctx.net.add_shape(get_trt_tensor(ctx, x, f"{name}_input"))
    shape.name = f"{name}_shape"
    length = ctx.net.add_slice(shape.get_output(0), (dim,), (1,), (1,))
    length.name = f"{name}_length"
    scale, offset, under = own
    size = write.over(write.plus(write.times(length.get_output(0), under), -offset), scale)
    divisor, constant, of_size, *of_slots = told
    # These numbers may be a rank's own: the layers are the same whatever they are.
    total = write.sum(write.product(size, of_size), write.number(constant))
    for factor, start in zip(of_slots, range(0, len(slots), 5), strict=True):
        scale, offset, under, over, times = slots[start : start + 5]
        whole = write.plus(write.times(size, scale), offset + under * over - 1)
        part = write.over(whole, under * over)
        total = write.sum(total, write.product(part, times * factor))
    return write.over(total, divisor)


class _Writer:
    """Adds layers of whole numbers to a network."""

    def __init__(self, ctx: ConversionContext, name: str) -> None:
        self._net, self._name, self._count = ctx.net, name, 0

    def _of(self, a: Tensor, b: Tensor, kind: Any) -> Tensor:
        layer = self._net.add_elementwise(a, b, kind)
        layer.name = f"{self._name}_{self._count}"
        self._count += 1
        return layer.get_output(0)

    def number(self, value: int) -> Tensor:
        """One int64."""
        layer = self._net.add_constant((1,), np.array([value], np.int64))
        layer.name = f"{self._name}_number_{self._count}"
        self._count += 1
        return layer.get_output(0)

    def sum(self, a: Tensor, b: Tensor) -> Tensor:
        """Of both."""
        return self._of(a, b, _SUM)

    def plus(self, a: Tensor, number: int) -> Tensor:
        """With a number added."""
        return self._of(a, self.number(number), _SUM) if number else a

    def product(self, a: Tensor, number: int) -> Tensor:
        """Multiplied by a number."""
        return self._of(a, self.number(number), _PRODUCT)

    def times(self, a: Tensor, number: int) -> Tensor:
        """The same, without a layer where the number is 1."""
        return a if number == 1 else self.product(a, number)

    def over(self, a: Tensor, number: int) -> Tensor:
        """Divided by a number, rounded down; there is no remainder but in ceilings."""
        return a if number == 1 else self._of(a, self.number(number), _FLOOR)

    def shape(self, told: Sequence[Any]) -> Tensor:
        """One tensor of numbers and of tensors of one number."""
        parts = [self.number(one) if isinstance(one, int) else one for one in told]
        layer = self._net.add_concatenation(parts)
        layer.axis = 0
        layer.name = f"{self._name}_sizes"
        return layer.get_output(0)


def reshaped(ctx: ConversionContext, name: str, x: Any, shape: Sequence[Any]) -> Tensor:
    """``x`` in another shape."""
    layer = ctx.net.add_shuffle(get_trt_tensor(ctx, x, f"{name}_input"))
    layer.set_input(1, _Writer(ctx, name).shape(shape))
    layer.name = name
    return layer.get_output(0)


def sliced(ctx: ConversionContext, name: str, x: Any, dim: int, start: Any, length: Any) -> Tensor:
    """``length`` entries of dimension ``dim``, from ``start`` on."""
    tensor = get_trt_tensor(ctx, x, f"{name}_input")
    rank = len(tensor.shape)
    whole = ctx.net.add_shape(tensor)
    whole.name = f"{name}_shape"
    write = _Writer(ctx, name)
    sizes: list[Any] = []
    for d, known in enumerate(tensor.shape):
        if d != dim and known < 0:
            one = ctx.net.add_slice(whole.get_output(0), (d,), (1,), (1,))
            one.name = f"{name}_whole_{d}"
            sizes.append(one.get_output(0))
        else:
            sizes.append(length if d == dim else int(known))
    begin = [start if d == dim else 0 for d in range(rank)]
    layer = ctx.net.add_slice(tensor, trt.Dims(), trt.Dims(), (1,) * rank)
    layer.set_input(1, write.shape(begin))
    layer.set_input(2, write.shape(sizes))
    layer.name = name
    return layer.get_output(0)


def filled(
    ctx: ConversionContext, name: str, shape: Sequence[Any], value: float, dtype: torch.dtype
) -> Tensor:
    """One number throughout."""
    one = ctx.net.add_constant((1,) * len(shape), np.full((1,) * len(shape), value, np.float32))
    one.name = f"{name}_number"
    number = one.get_output(0)
    if dtype != torch.float32:
        cast = ctx.net.add_cast(number, _DTYPES[dtype])
        cast.name = f"{name}_cast"
        number = cast.get_output(0)
    return expanded(ctx, name, number, shape)


def expanded(ctx: ConversionContext, name: str, x: Any, shape: Sequence[Any]) -> Tensor:
    """``x``, its dimensions of length 1 repeated up to ``shape``, which has as many."""
    tensor = get_trt_tensor(ctx, x, f"{name}_input")
    write = _Writer(ctx, name)
    strides = tuple(0 if known == 1 else 1 for known in tensor.shape)
    layer = ctx.net.add_slice(tensor, (0,) * len(shape), trt.Dims(), strides)
    layer.set_input(2, write.shape(shape))
    layer.name = name
    return layer.get_output(0)


LOWERINGS: Final[dict[str, Callable[..., Tensor]]] = {
    "extent": extent,
    "reshaped": reshaped,
    "sliced": sliced,
    "filled": filled,
    "expanded": expanded,
}
