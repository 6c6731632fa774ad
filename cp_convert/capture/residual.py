"""The residual stream of a half-precision program, held in float32.

Before and after, in a block ``x + f(norm(x))`` whose sums outgrow float16::

    x1 = x0 + f(norm(x0))    ->    X1 = float(x0) + float(f(half(norm(float(x0)))))
    x2 = x1 + g(norm(x1))    ->    X2 = X1 + float(g(half(norm(X1))))

A sum belongs to the stream when one operand also reaches the other one through a product with
weights or an attention: that is what a residual connection is, whatever the model calls it. From
there float32 spreads as torch promotes types, through norms, gates, views and concatenations, and
ends where a product reads it. Products stay in half precision; they are all the work.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..errors import CannotLower
from ..ir import ops
from ..ir.program import HALF, Lowered, arguments, copied, erase_dead, module_of, with_dtypes
from ..ir.writer import Writer

aten: Final = torch.ops.aten
_SUMS: Final = (aten.add.Tensor, aten.addcmul.default)
_PRODUCTS: Final = (
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.matmul.default,
    aten.linear.default,
    aten.convolution.default,
    ops.ATTENTION,
)
_SEEN_THROUGH: Final = (
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default),
    *(aten.permute.default, aten.transpose.int, aten.unsqueeze.default, aten.squeeze.dims),
    *(aten.slice.Tensor, aten.select.int, aten.cat.default, aten.clone.default),
    *(aten.split_with_sizes.default, aten.clamp.default, operator.getitem),
    ops.MARK,
)
"""What hands on the stream's own numbers."""


def float32_residual(program: Lowered) -> Lowered:
    """``program`` with its residual stream in float32; itself where nothing is in half precision.

    Args:
        program: decomposed and still whole.

    Raises:
        CannotLower: it has no residual stream.
    """
    graph = copied(program.graph_module.graph)
    if not any(_is_half(node) for node in graph.nodes):
        return program
    stream = residual_sums(graph)
    if not stream:
        raise CannotLower(
            "--float32 residual: nowhere in this program is a value added to what products with "
            "weights make of it, so there is no residual stream.",
            hint="name modules instead: --float32 'blocks.*.norm', say.",
        )
    names = _Promotion(graph, stream).names
    outputs = tuple(replace(b, node=names.get(b.node, b.node)) for b in program.outputs)
    module = module_of(program.graph_module, graph)
    return replace(program, graph_module=module, outputs=outputs)


def residual_sums(graph: fx.Graph) -> set[fx.Node]:
    """The sums of the residual stream, in half precision."""
    sums = [node for node in graph.nodes if node.target in _SUMS and _is_half(node)]
    sources = {n: [_sources(o) for o in n.all_input_nodes if _alike(o, n)] for n in sums}
    bits: dict[fx.Node, int] = {}
    for source in (s for of_sum in sources.values() for found in of_sum for s in found):
        bits.setdefault(source, 1 << len(bits))
    reached = _reached_through_products(graph, bits)

    def is_residual(node: fx.Node) -> bool:
        for found in sources[node]:
            wanted = _union(bits[source] for source in found)
            if any(reached[other] & wanted for other in node.all_input_nodes):
                return True
        return False

    return {node for node in sums if is_residual(node)}


def _reached_through_products(graph: fx.Graph, bits: Mapping[fx.Node, int]) -> dict[fx.Node, int]:
    """For every node, which of the marked ones reach it through a product."""
    plain: dict[fx.Node, int] = {}
    through: dict[fx.Node, int] = {}
    for node in graph.nodes:
        before = _union(plain[n] for n in node.all_input_nodes)
        plain[node] = before | bits.get(node, 0)
        through[node] = _union(through[n] for n in node.all_input_nodes)
        if node.target in _PRODUCTS:
            through[node] |= before
    return through


def _union(masks: Iterable[int]) -> int:
    union = 0
    for mask in masks:
        union |= mask
    return union


def _sources(node: fx.Node) -> list[fx.Node]:
    """Where the numbers of ``node`` were computed."""
    found, waiting = [], [node]
    while waiting:
        one = waiting.pop()
        if one.target in _SEEN_THROUGH:
            waiting += one.all_input_nodes
        else:
            found.append(one)
    return found


def _alike(operand: fx.Node, node: fx.Node) -> bool:
    value = operand.meta.get("val")
    return isinstance(value, Tensor) and value.shape == node.meta["val"].shape


def _is_half(node: fx.Node) -> bool:
    return any(
        isinstance(leaf, Tensor) and leaf.dtype in HALF
        for leaf in pytree.tree_leaves(node.meta.get("val"))
    )


class _Promotion(Writer):
    """Float32 from the stream's sums on, until a product reads it.

    Attributes:
        names: of outputs whose nodes were replaced.
    """

    def __init__(self, graph: fx.Graph, stream: set[fx.Node]) -> None:
        super().__init__(graph)
        self._wide: dict[fx.Node, fx.Node] = {}
        self._casts: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
        self._returned: dict[fx.Node, fx.Node] = {}
        for node in list(graph.nodes):
            if node in stream or any(n in self._wide for n in node.all_input_nodes):
                self.origin = node
                with graph.inserting_before(node):
                    self._replace(node)
        self.names = {node.name: new.name for node, new in self._returned.items()}
        erase_dead(graph)
        graph.lint()

    def _replace(self, node: fx.Node) -> None:
        if node.op == "output":
            self._returned = {n: self._narrow(n) for n in node.all_input_nodes if n in self._wide}
            node.args = fx.map_arg(node.args, lambda n: self._returned.get(n, n))
        elif node.target in _PRODUCTS:
            node.args, node.kwargs = fx.map_arg((node.args, node.kwargs), self._narrow)
        elif node.target is aten._to_copy.default and node.kwargs.get("dtype") is not None:
            node.args = fx.map_arg(node.args, lambda n: self._wide.get(n, n))
        elif node.target is aten.clamp.default and _saturates(node):
            self._wide[node] = self._wide[node.all_input_nodes[0]]
        else:
            self._recompute(node)

    def _recompute(self, node: fx.Node) -> None:
        """The same operator on float32 operands."""
        given = fx.map_arg((node.args, node.kwargs), self._widen)
        args, kwargs = with_dtypes(given, dict.fromkeys(HALF, torch.float32))
        new = self.op(node.target, *args, **kwargs)
        if _is_half(node):
            self._wide[node] = new
        else:
            node.replace_all_uses_with(new)

    def _widen(self, node: fx.Node) -> fx.Node:
        return self._wide[node] if node in self._wide else self._cast(node, node, torch.float32)

    def _narrow(self, node: fx.Node) -> fx.Node:
        """What a product or the caller is given in the place of ``node``."""
        if node not in self._wide:
            return node
        return self._cast(node, self._wide[node], node.meta["val"].dtype)

    def _cast(self, node: fx.Node, source: fx.Node, dtype: torch.dtype) -> fx.Node:
        """Cast right behind ``source``, once for all that read it."""
        if not _is_half(node):
            return node
        if (source, dtype) not in self._casts:
            with self.graph.inserting_before(_first_after(source)):
                cast = self.op(aten._to_copy.default, source, dtype=dtype)
            self._casts[source, dtype] = cast
        return self._casts[source, dtype]


def _first_after(node: fx.Node) -> fx.Node:
    """Where a node may stand that reads ``node``: behind it, and behind all placeholders."""
    after = node.next
    while after.op == "placeholder":
        after = after.next
    return after


def _saturates(node: fx.Node) -> bool:
    """Whether it keeps values within float16, as diffusers' blocks do: float32 needs none of it."""
    given, limit = arguments(node), torch.finfo(torch.float16).max
    return (given["min"], given["max"]) == (-limit, limit)
