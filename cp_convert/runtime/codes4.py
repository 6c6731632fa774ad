"""NVFP4 as torch computes it: a call of ours in, torch's own operators out, to the same codes.

See :mod:`.codes`. Nothing here multiplies codes: what they stand for is multiplied.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import fx

from ..ir.nvfp4 import BLOCK, LARGEST_CODE, MAGNITUDES
from ..ir.program import shape, tensor_of
from ..ir.quantize import FP8, LARGEST
from ..ir.writer import Writer

aten: Final = torch.ops.aten


class Tables(Writer):
    """Writes, and keeps tables and scales among a program's own parameters.

    A GPU divides by a number by multiplying with its inverse, which is another code next to a tie;
    and a tensor that is made of a number as it runs cannot be part of a CUDA graph.
    """

    def __init__(self, graph: fx.Graph, state: dict[str, torch.Tensor]) -> None:
        super().__init__(graph)
        self.state = state
        self._tables: dict[tuple[float, ...] | float, fx.Node] = {}
        *_, self._last = graph.find_nodes(op="placeholder")

    def scale(self, value: float) -> fx.Node:
        """A tensor of ``value``, float32 ``[]``."""
        return self._kept(value)

    def table(self, *values: float) -> fx.Node:
        """The same of several, ``[N]``."""
        return self._kept(values)

    def _kept(self, value: tuple[float, ...] | float) -> fx.Node:
        if value not in self._tables:
            with self.graph.inserting_after(self._last):
                made = self.graph.placeholder(f"scale_of_codes_{len(self._tables)}")
            tensor = torch.tensor(value, dtype=torch.float32)
            made.meta["val"] = self.mode.from_tensor(tensor)
            self._tables[value] = self._last = made
            self.state[made.name] = tensor
        return self._tables[value]

    def as_type(self, x: fx.Node, dtype: torch.dtype) -> fx.Node:
        """``x`` in ``dtype``."""
        cast: Any = aten._to_copy.default
        return self.op(cast, x, dtype=dtype)


def dequantized(
    write: Tables, codes: fx.Node, blocks: fx.Node, scale: float, dtype: torch.dtype
) -> fx.Node:
    """``cp::dequantize_blocks``, in torch's operators."""
    low = write.op(aten.bitwise_and.Scalar, codes, 15)
    high = write.op(aten.bitwise_right_shift.Tensor_Scalar, codes, 4)
    both = write.as_type(write.op(aten.stack.default, [low, high], -1), torch.int32)
    table = write.table(*MAGNITUDES, *(-one for one in MAGNITUDES))
    numbers = write.op(aten.index.Tensor, table, [both])
    return _times_blocks(write, numbers, blocks, scale, _whole(codes), dtype)


def rounded(write: Tables, x: fx.Node, scale: float, to: torch.dtype | None = None) -> fx.Node:
    """``cp::quantize_dequantize_blocks``, in torch's operators."""
    wide = write.op(aten.reshape.default, write.as_type(x, torch.float32), _in_blocks(shape(x)))
    largest = write.op(aten.amax.default, write.op(aten.abs.default, wide), [-1])
    blocks = write.op(aten.div.Tensor, largest, write.scale(LARGEST_CODE))
    blocks = write.op(aten.div.Tensor, blocks, write.scale(scale))
    blocks = write.as_type(write.op(aten.clamp.default, blocks, None, LARGEST[FP8]), FP8)
    step = _steps(write, blocks, scale)
    is_there = write.op(aten.gt.Scalar, step, 0)
    ratio = write.op(aten.div.Tensor, wide, step)
    ratio = write.op(aten.where.ScalarOther, is_there, ratio, 0.0)
    numbers = _nearest(write, ratio)
    return _times_blocks(write, numbers, blocks, scale, list(shape(x)), to or tensor_of(x).dtype)


def _nearest(write: Tables, ratio: fx.Node) -> fx.Node:
    size, op = write.op(aten.abs.default, ratio), write.op
    coarse = op(aten.where.Scalar, op(aten.lt.Scalar, size, 4), 1.0, 2.0)
    step = op(aten.where.ScalarSelf, op(aten.lt.Scalar, size, 2), 0.5, coarse)
    whole = op(aten.round.default, op(aten.div.Tensor, size, step))
    within = op(aten.clamp.default, op(aten.mul.Tensor, whole, step), None, LARGEST_CODE)
    return op(aten.copysign.Tensor, within, ratio)


def _steps(write: Tables, blocks: fx.Node, scale: float) -> fx.Node:
    """What a code of 1 stands for in each block, ``[.., K/16, 1]``."""
    wide = write.as_type(blocks, torch.float32)
    steps = write.op(aten.mul.Tensor, wide, write.scale(scale))
    return write.op(aten.unsqueeze.default, steps, -1)


def _times_blocks(
    write: Tables,
    numbers: fx.Node,
    blocks: fx.Node,
    scale: float,
    whole: list[int],
    dtype: torch.dtype,
) -> fx.Node:
    own = write.op(aten.reshape.default, numbers, _in_blocks(whole))
    product = write.op(aten.mul.Tensor, own, _steps(write, blocks, scale))
    return write.as_type(write.op(aten.reshape.default, product, whole), dtype)


def _in_blocks(sizes: Any) -> list[int]:
    return [*sizes[:-1], sizes[-1] // BLOCK, BLOCK]


def _whole(codes: fx.Node) -> list[int]:
    *rows, columns = shape(codes)
    return [*rows, 2 * columns]
