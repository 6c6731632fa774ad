"""Quantizers as torch computes them: a rank's program in, one of torch's own operators out.

Where a GPU multiplies FP8 (compute capability 8.9 and later), a linear layer of codes is one
product of codes, ``torch._scaled_mm`` (cuBLASLt; accumulated in float32 and rounded once)::

    linear(dq(q(x / s_x)), dequantize(c, s_w), b)  ->  scaled_mm(q(x / s_x), c.T, s_x, s_w, b)

Whatever quantizer is left is written out in torch's arithmetic, to the same codes: an operator of a
library is a wall for ``torch.compile``, whose neighbours would not be fused with it.

torch has no attention over FP8 codes. On a CPU it stays the operator that means it exactly; on a
GPU, where its scores would take gigabytes, q, k and v are rounded to their codes, and the fused
attention of their numbers leaves its probabilities as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import torch
from torch import fx

from ..ir.nvfp4 import DEQUANTIZE_BLOCKS, QUANTIZE_DEQUANTIZE_BLOCKS
from ..ir.ops import ATTENTION
from ..ir.program import Lowered, copied, module_of, shape, tensor_of
from ..ir.quantize import (
    DEQUANTIZE,
    FP8,
    LARGEST,
    LOWEST,
    QUANTIZE,
    QUANTIZE_DEQUANTIZE,
)
from ..job import FP8_FROM
from . import codes4
from .codes4 import Tables

aten: Final = torch.ops.aten
_STEP: Final = 16
"""What rows and columns of a product of codes are multiples of (cuBLASLt documentation)."""


def multiplies_codes(device: torch.device) -> bool:
    """Whether torch has a product of FP8 codes for ``device``."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_FROM


def by_torch(program: Lowered, *, products: bool, fused: bool = False) -> Lowered:
    """The program without quantizers of ours; the one that is given stays as it is.

    Args:
        program: of one rank.
        products: whether linear layers of codes become products of codes. What is no such layer, or
            has sizes or a type that torch does not multiply, is computed as before.
        fused: whether attentions over codes become torch's own, over what the codes stand for.
    """
    graph, state = copied(program.graph_module.graph), dict(program.state)
    write = _Codes(graph, state)
    for node in graph.find_nodes(op="call_function", target=ATTENTION) if fused else ():
        if node.kwargs.get("steps"):
            _attend(node, write)
    if not any(node.target in _WRITERS for node in graph.nodes):
        return program
    if products:
        for node in graph.find_nodes(op="call_function", target=aten.linear.default):
            if (layer := _layer(node)) is not None:
                _multiply(node, layer, write)
    graph.eliminate_dead_code()
    for target, written in _WRITERS.items():
        for node in graph.find_nodes(op="call_function", target=target):
            with graph.inserting_before(node):
                write.origin = node
                node.replace_all_uses_with(written(write, *node.args))
            graph.erase_node(node)
    graph.lint()
    return replace(program, graph_module=module_of(program.graph_module, graph), state=state)


class _Codes(Tables):
    """Writes, and shares the codes of what several layers read."""

    def __init__(self, graph: fx.Graph, state: dict[str, torch.Tensor]) -> None:
        super().__init__(graph, state)
        self._rows: dict[tuple[fx.Node, float], fx.Node] = {}

    def rows(self, x: fx.Node, scale: float) -> fx.Node:
        """FP8 codes of ``x`` as a matrix; layers that read the same share them."""
        if (x, scale) not in self._rows:
            flat = self.op(aten.reshape.default, x, [-1, shape(x)[-1]])
            self._rows[x, scale] = self.op(QUANTIZE, flat, scale, FP8)
        return self._rows[x, scale]


_Layer = tuple[fx.Node, float, fx.Node, float, fx.Node | None]
"""Input, its scale, codes of the weight, their scale, bias."""


def _layer(node: fx.Node) -> _Layer | None:
    """The operands of a linear layer that multiplies codes."""
    given: Any = node.args
    x, weight, bias = (*given, None)[:3]
    dtype = tensor_of(node).dtype
    if x.target is not QUANTIZE_DEQUANTIZE or x.args[2] is not FP8:
        return None
    if weight.target is not DEQUANTIZE or tensor_of(weight.args[0]).dtype is not FP8:
        return None
    if any(size % _STEP for size in shape(weight)) or dtype is torch.float32:
        return None
    if bias is not None and tensor_of(bias).dtype is not dtype:
        return None
    return x.args[0], x.args[1], weight.args[0], weight.args[1], bias


def _multiply(node: fx.Node, layer: _Layer, write: _Codes) -> None:
    x, x_scale, codes, w_scale, bias = layer
    scales = write.scale(x_scale), write.scale(w_scale)
    with write.graph.inserting_before(node):
        write.origin = node
        rows, columns = write.rows(x, x_scale), write.op(aten.t.default, codes)
        dtype = tensor_of(node).dtype
        product = write.op(aten._scaled_mm.default, rows, columns, *scales, bias, None, dtype)
        whole = write.op(aten.reshape.default, product, list(shape(node)))
    node.replace_all_uses_with(whole)
    write.graph.erase_node(node)


def _attend(node: fx.Node, write: _Codes) -> None:
    """Torch's fused attention over what the codes of q, k and v stand for."""
    given: dict[str, Any] = dict(node.kwargs)
    read: Any = node.args
    steps = given.pop("steps")
    with write.graph.inserting_before(node):
        write.origin = node
        coded = [
            write.op(QUANTIZE_DEQUANTIZE, x, step, FP8)
            for x, step in zip(read[:3], steps, strict=True)
        ]
        sdpa = aten.scaled_dot_product_attention.default
        attended = write.op(sdpa, *coded, *read[3:], **given)
    node.replace_all_uses_with(attended)
    write.graph.erase_node(node)


def _quantize(write: _Codes, x: fx.Node, scale: float, dtype: torch.dtype) -> fx.Node:
    wide = write.op(aten._to_copy.default, x, dtype=torch.float32)
    ratio = write.op(aten.div.Tensor, wide, write.scale(scale)) if scale != 1 else wide
    within = write.op(aten.clamp.default, ratio, LOWEST[dtype], LARGEST[dtype])
    whole = write.op(aten.round.default, within) if dtype is torch.int8 else within
    return write.op(aten._to_copy.default, whole, dtype=dtype)


def _dequantize(write: _Codes, x: fx.Node, scale: float, dtype: torch.dtype) -> fx.Node:
    wide = write.op(aten._to_copy.default, x, dtype=torch.float32)
    number = write.op(aten.mul.Tensor, wide, scale) if scale != 1 else wide
    return write.op(aten._to_copy.default, number, dtype=dtype)


def _both(
    write: _Codes, x: fx.Node, scale: float, dtype: torch.dtype, to: torch.dtype | None = None
) -> fx.Node:
    codes = _quantize(write, x, scale, dtype)
    return _dequantize(write, codes, scale, to or tensor_of(x).dtype)


_WRITERS: Final[dict[Any, Callable[..., fx.Node]]] = {
    QUANTIZE: _quantize,
    DEQUANTIZE: _dequantize,
    QUANTIZE_DEQUANTIZE: _both,
    DEQUANTIZE_BLOCKS: codes4.dequantized,
    QUANTIZE_DEQUANTIZE_BLOCKS: codes4.rounded,
}
