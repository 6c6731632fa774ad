"""Residual streams of a program: what blocks add to, followed through the graph.

A node comes in, and out comes where its stream began, through additions, casts and copies alone:
``x`` of ``x + attention(norm(x))``. Only tensors of the same shape are followed, so that a shift
that is broadcast over the tokens is no stream.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, fx

from . import ops  # noqa: F401  define cp::*, which is named below

aten: Final = torch.ops.aten
_SAME: Final = (
    aten._to_copy.default,
    aten.clone.default,
    aten.clamp.default,  # float16's ends
    torch.ops.cp.result.default,
)
"""Operators whose result is the stream that they are given."""


@dataclass(frozen=True)
class _Window:
    """The part of a node's value that is followed: all of it, or a range along a dimension."""

    node: fx.Node
    dim: int | None = None
    start: int = 0
    end: int = 0


def origin(node: fx.Node, begins: Callable[[fx.Node], bool]) -> fx.Node | None:
    """The node where the stream of ``node`` began, whole; ``None`` where there is not just one.

    Args:
        node: whose value a block returns.
        begins: whether a node is such a beginning; nothing is followed beyond one.
    """
    waiting, found, seen = [_Window(node)], set[fx.Node](), set[_Window]()
    while waiting:
        one = waiting.pop()
        if one in seen:
            continue
        seen.add(one)
        if one.dim is None and begins(one.node):
            found.add(one.node)
        else:
            waiting += _before(one)
    return found.pop() if len(found) == 1 else None


def _before(one: _Window) -> Iterator[_Window]:
    """What holds the same part of the stream one operator earlier."""
    node = one.node
    if (added := _operands(node)) is not None:
        yield from (replace(one, node=operand) for operand in added)
    elif node.target in _SAME:
        yield replace(one, node=node.all_input_nodes[0])
    elif node.target is aten.slice.Tensor and one.dim is None:
        yield from _sliced(node)
    elif node.target is aten.cat.default and one.dim is not None:
        yield from _part(one)


def _operands(node: fx.Node) -> tuple[fx.Node, ...] | None:
    """Both operands of an addition of tensors of one shape."""
    if node.target is not aten.add.Tensor:
        return None
    both = tuple(x for x in node.args[:2] if isinstance(x, fx.Node))
    is_whole = len(both) == 2 and all(shape_of(x) == shape_of(node) for x in both)
    return both if is_whole else None


def _sliced(node: fx.Node) -> Iterator[_Window]:
    given: Any = dict(zip(("x", "dim", "start", "end", "step"), node.args, strict=False))
    x, dim = given["x"], given.get("dim", 0)
    size = shape_of(x)[dim]
    start, end = given.get("start") or 0, given.get("end")
    end = size if end is None else min(end, size)
    if given.get("step", 1) == 1 and 0 <= start <= end:
        yield _Window(x, dim % len(shape_of(x)), start, end)


def _part(one: _Window) -> Iterator[_Window]:
    """Of a concatenation the operand that is just this range of it."""
    given: Any = one.node.args
    parts, *dim = given
    if one.dim is None or (dim[0] if dim else 0) % len(shape_of(one.node)) != one.dim:
        return
    place = 0
    for part in parts:
        length = shape_of(part)[one.dim]
        if (place, place + length) == (one.start, one.end):
            yield _Window(part)
        place += length


def joined_later(
    node: fx.Node, earlier: Collection[fx.Node], others: Collection[fx.Node]
) -> fx.Node | None:
    """Where the stream that ``node`` holds is added to one of ``others``, or laid beside it.

    Args:
        node: a value that is still read.
        earlier: operators that are not looked at.
        others: what follows from somewhere else.
    """
    waiting, seen = [node], set[fx.Node]()
    while waiting:
        one = waiting.pop()
        for user in one.users:
            if user in earlier or user in seen:
                continue
            seen.add(user)
            beside = _joined(user, one)
            if any(operand in others for operand in beside or ()):
                return user
            if beside is not None or user.target in _SAME:
                waiting.append(user)
    return None


def _joined(user: fx.Node, one: fx.Node) -> list[fx.Node] | None:
    """What ``user`` adds to ``one``, or has beside it feature by feature."""
    operands: Any = _operands(user)
    if operands is None and user.target is aten.cat.default:
        given: Any = user.args
        parts, *dim = given
        last = len(shape_of(user)) - 1
        is_beside = (dim[0] if dim else 0) % (last + 1) == last
        operands = parts if is_beside and all(shape_of(p) == shape_of(one) for p in parts) else None
    return None if operands is None else [x for x in operands if x is not one]


def shape_of(node: Any) -> tuple[int, ...]:
    """Of the tensor that a node gives; nothing where it gives none."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()
