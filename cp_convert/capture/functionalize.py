"""Writes in place as values, in a traced graph.

Rotary embeddings and masks are often written piece by piece into a tensor that forward has made::

    out = empty_like(x)                       out_0 = empty_like(x)
    even = slice(out, 3, 0, n, 2)             ->
    copy_(even, a)                            out_1 = slice_scatter(out_0, copy(.., a), 3, 0, n, 2)
    y = type_as(out, x)                       y = type_as(out_1, x)

This is what torch's functionalization does, which traces the whole program anew for it. Here only
the writes are looked at: a view of a tensor that is written to is taken anew from its latest value
whenever it is read, and what is written to a view is scattered back through the same steps. Whether
a result shares its operand's memory is not guessed from a schema (``type_as``, ``reshape`` and
``dropout`` sometimes do): the operator is called on fake tensors like the operands.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..ir.program import fake_mode_of, fresh
from ..ir.writer import Writer

aten: Final = torch.ops.aten
_STEPS: Final = (
    aten.slice.Tensor,
    aten.select.int,
    aten.transpose.int,
    aten.permute.default,
    aten.unsqueeze.default,
)


class Unclear(Exception):
    """A write that is not understood."""


@dataclass(frozen=True)
class _View:
    """A tensor as seen from one that is written to.

    Attributes:
        root: the tensor that forward made.
        steps: the views that lead from it, in order.
    """

    root: fx.Node
    steps: tuple[fx.Node, ...] = ()


def functionalized(graph: fx.Graph) -> fx.Graph:
    """``graph`` itself, if nothing is written in place; otherwise one that computes the same.

    Raises:
        Unclear: an input, a parameter or a view of unknown kind is written to.
    """
    written = [node for node in graph.nodes if _is_write(node)]
    return _Walk(graph, written).graph if written else graph


def _is_write(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable and node.target is not aten.detach_.default


class _Walk(Writer):
    def __init__(self, graph: fx.Graph, written: list[fx.Node]) -> None:
        super().__init__(fx.Graph(), fake_mode_of(graph))
        self._last = {self._root(node): node for node in written}
        self._order = {node: i for i, node in enumerate(graph.nodes)}
        self._views: dict[fx.Node, _View] = {}
        self._values: dict[fx.Node, fx.Node] = {}
        for node in graph.nodes:
            self.origin = node
            self._add(node)

    def _root(self, node: fx.Node) -> fx.Node:
        """The tensor whose memory ``node`` is written to."""
        while True:
            shared = [node.all_input_nodes[0]] if _is_write(node) else self._shared(node)
            if not shared:
                return node
            if len(shared) > 1 or not (_is_write(node) or _is_step(node, shared[0])):
                raise Unclear(str(node.target))
            node = shared[0]

    def _shared(self, node: fx.Node) -> list[fx.Node]:
        """Operands whose memory the result shares."""
        target, operands = node.target, node.all_input_nodes
        values: list[Any] = [operand.meta.get("val") for operand in operands]
        if not isinstance(target, torch._ops.OpOverload) or not _are_tensors(values):
            raise Unclear(str(target))
        with self.mode, torch.no_grad():
            like = dict(zip(operands, map(fresh, values), strict=True))
            args, kwargs = fx.map_arg((node.args, node.kwargs), like.__getitem__)
            result = target(*args, **kwargs)
        memory = {_memory(x) for x in pytree.tree_leaves(result) if isinstance(x, Tensor)}
        return [operand for operand in operands if _memory(like[operand]) in memory]

    def _add(self, node: fx.Node) -> None:
        seen = [operand for operand in node.all_input_nodes if operand in self._views]
        view = self._views[seen[0]] if seen else None
        if _is_write(node):
            self._write(node, self._views[node.all_input_nodes[0]])
        elif view is not None and node.op == "call_function" and self._is_view(node, seen):
            steps = () if _is_alike(node, seen[0]) else (node,)
            self._views[node] = _View(view.root, (*view.steps, *steps))
        else:
            copy = self.graph.node_copy(node, self._read)
            copy.meta = dict(node.meta)
            self._values[node] = copy
            if node in self._last:
                self._views[node] = _View(node)

    def _is_view(self, node: fx.Node, seen: list[fx.Node]) -> bool:
        """Whether ``node`` shows what may still be written to; after the last write it is read."""
        roots = [self._views[operand].root for operand in seen]
        if all(self._order[node] > self._order[self._last[root]] for root in roots):
            return False
        shared = self._shared(node)
        if not shared:
            return False
        if shared != seen or len(shared) > 1 or not _is_step(node, shared[0]):
            raise Unclear(str(node.target))
        return True

    def _read(self, node: fx.Node) -> fx.Node:
        view = self._views.get(node)
        return self._values[node] if view is None else self._seen(view)[-1]

    def _seen(self, view: _View) -> list[fx.Node]:
        """The root's latest value, and what every step makes of it."""
        values = [self._values[view.root]]
        for step in view.steps:
            rest = fx.map_arg(step.args[1:], self._read)
            values.append(self.op(step.target, values[-1], *rest, **step.kwargs))
        return values

    def _write(self, node: fx.Node, view: _View) -> None:
        before = self._seen(view)
        rest = fx.map_arg(node.args[1:], self._read)
        kwargs = fx.map_arg(dict(node.kwargs), self._read)
        value = self.op(_functional(node), before[-1], *rest, **kwargs)
        for step, whole in zip(reversed(view.steps), reversed(before[:-1]), strict=True):
            value = self._scattered(step, whole, value)
        self._values[view.root] = value
        self._views[node] = view

    def _scattered(self, step: fx.Node, whole: fx.Node, part: fx.Node) -> fx.Node:
        """``whole``, with ``part`` where the step looks."""
        rest: Any = step.args[1:]
        if step.target is aten.slice.Tensor:
            return self.op(aten.slice_scatter.default, whole, part, *rest)
        if step.target is aten.select.int:
            return self.op(aten.select_scatter.default, whole, part, *rest)
        if step.target is aten.transpose.int:
            return self.op(aten.transpose.int, part, *rest)
        if step.target is aten.unsqueeze.default:
            return self.op(aten.squeeze.dim, part, *rest)
        rank = len(rest[0])
        order = [dim % rank for dim in rest[0]]
        return self.op(aten.permute.default, part, [order.index(dim) for dim in range(rank)])


def _functional(node: fx.Node) -> Any:
    """``aten.add.Tensor`` for ``aten.add_.Tensor``."""
    schema: Any = getattr(node.target, "_schema", None)
    first, *others = schema.arguments
    packet, overload = str(node.target).removeprefix("aten.").split(".")
    found = getattr(getattr(aten, packet.removesuffix("_"), None), overload, None)
    is_first = first.is_write and not any(argument.is_write for argument in others)
    if not is_first or not packet.endswith("_") or found is None or found._schema.is_mutable:
        raise Unclear(str(node.target))
    return found


def _is_step(node: fx.Node, operand: fx.Node) -> bool:
    return _is_alike(node, operand) or (node.target in _STEPS and node.args[0] is operand)


def _is_alike(node: fx.Node, operand: fx.Node) -> bool:
    """Whether a result that shares its operand's memory is the operand itself."""
    result, given = node.meta.get("val"), operand.meta.get("val")
    return isinstance(result, Tensor) and _like(result) == _like(given)


def _like(value: Any) -> tuple[Any, ...]:
    return value.dtype, tuple(value.shape), value.stride(), value.storage_offset()


def _are_tensors(values: list[Any]) -> bool:
    return all(isinstance(value, Tensor) for value in values)


def _memory(value: Tensor) -> int:
    return int(value.untyped_storage()._cdata)
