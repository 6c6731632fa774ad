"""Between a whole tensor and the ranks' parts of it, in operators.

A whole tensor and a layout come in, this rank's part goes out (a slice, free of communication), or
the other way round (one all-gather). Padding, segments and token order are in here alone.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import fx
from torch._subclasses import FakeTensorMode

from ..ir.layout import Layout, Segment
from ..ir.program import tensor_of
from ..ir.writer import Writer
from ..mesh import Axis

aten: Final = torch.ops.aten


class PartWriter(Writer):
    """Adds to a new graph what takes tensors apart and puts them together.

    Attributes:
        axis: the ranks that hold the parts.
    """

    def __init__(self, axis: Axis, mode: FakeTensorMode) -> None:
        super().__init__(fx.Graph(), mode)
        self.axis = axis

    def blanked(self, part: fx.Node, dim: int, layout: Layout, value: float) -> fx.Node:
        """Padding replaced by ``value``, so that it takes no part in a reduction."""
        ones = self.op(aten.full.default, [layout.length], True, dtype=torch.bool)
        real = self.sharded(ones, 0, layout)
        sizes = [1] * tensor_of(part).dim()
        sizes[dim] = layout.local
        like = self.op(aten._reshape_copy.default, real, sizes)
        fill = self.op(aten.full.default, [], value, dtype=tensor_of(part).dtype)
        return self.op(aten.where.self, like, part, fill)

    def sharded(self, whole: fx.Node, dim: int, layout: Layout) -> fx.Node:
        """This rank's part of every segment, one after another."""
        parts = []
        for start, segment in zip(layout.cuts, layout.segments, strict=False):
            piece = whole
            if len(layout.segments) > 1:
                stop = start + segment.length
                piece = self.op(aten.slice.Tensor, whole, dim, start, stop)
            piece = self._padded(piece, dim, segment, layout.size)
            parts.append(
                self.op(torch.ops.cp.shard.default, piece, dim, self.axis.flat, self.axis.size)
            )
        return parts[0] if len(parts) == 1 else self.op(aten.cat.default, parts, dim)

    def _padded(self, piece: fx.Node, dim: int, segment: Segment, size: int) -> fx.Node:
        missing = size * segment.local - segment.length
        if not missing:
            return piece
        sizes = list(tensor_of(piece).shape)
        sizes[dim] = missing
        zeros = self.op(aten.full.default, sizes, 0, dtype=tensor_of(piece).dtype)
        return self.op(aten.cat.default, [piece, zeros], dim)

    def gathered(self, part: fx.Node, dim: int, layout: Layout) -> fx.Node:
        """All ranks' parts in the model's order, padding dropped."""
        rank = tensor_of(part).dim()
        order = [dim, *(d for d in range(rank) if d != dim)]
        back = [order.index(d) for d in range(rank)]
        # NCCL has neither booleans nor, inside TensorRT, 64-bit integers.
        dtype = tensor_of(part).dtype
        carried = {torch.bool: torch.float32, torch.int64: torch.int32}.get(dtype, dtype)
        if carried != dtype:
            part = self.op(aten._to_copy.default, part, dtype=carried)
        front = part if dim == 0 else self.op(aten.permute.default, part, order)
        joined = self.op(torch.ops.cp.all_gather.default, front, self.axis.flat, self.axis.size)
        if not layout.is_plain:
            joined = self._reordered(joined, layout)
        if carried != dtype:
            joined = self.op(aten._to_copy.default, joined, dtype=dtype)
        return joined if dim == 0 else self.op(aten.permute.default, joined, back)

    def _reordered(self, joined: fx.Node, layout: Layout) -> fx.Node:
        """From shard order to the model's order, along dimension 0."""
        rest = list(tensor_of(joined).shape[1:])
        by_rank = self.op(aten._reshape_copy.default, joined, [layout.size, layout.local, *rest])
        pieces, begin = [], 0
        for segment in layout.segments:
            end = begin + segment.local
            own = self.op(aten.slice.Tensor, by_rank, 1, begin, end)
            slots = layout.size * segment.local
            flat = self.op(aten._reshape_copy.default, own, [slots, *rest])
            if slots > segment.length:
                flat = self.op(aten.slice.Tensor, flat, 0, 0, segment.length)
            pieces.append(flat)
            begin = end
        return pieces[0] if len(pieces) == 1 else self.op(aten.cat.default, pieces, 0)
