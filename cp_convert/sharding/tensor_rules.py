"""Which dimensions of an operator may be split along weights and heads: the table, and more rows.

A node comes in, its :class:`.rules.Rule` go out: those of :mod:`.rules` but for attention over
sharded keys, and those that only matter where parameters are split as well. A matrix by its output
columns and by its input rows (Megatron-LM, Shoeybi et al., arXiv:1909.08053, section 3), heads
that are not the outermost of what a view takes apart, grouped query heads (Ainslie et al.,
arXiv:2305.13245).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from typing import Any, Final

import torch
from torch import fx

from ..ir.layout import Layout
from ..ir.ops import ATTENTION
from ..ir.program import Arguments, arguments, shape, with_argument
from .rules import SIZED, Layouts, Rule, of_mask, operands, rules_of

aten: Final = torch.ops.aten


def tensor_rules_of(node: fx.Node) -> list[Rule]:
    """Every way in which ``node`` can be computed on slices of weights, heads and channels."""
    found = [rule for rule in rules_of(node) if not rule.context]
    more = _MORE.get(node.target)
    return found if more is None else found + more(node)


def weight_of(node: fx.Node) -> fx.Node | None:
    """The matrix of a linear layer, ``[out, in]`` or ``[in, out]``; ``None`` for what is none."""
    position = _MATRIX.get(node.target)
    return None if position is None else operands(node)[position]


def _linear(node: fx.Node) -> list[Rule]:
    """``x @ weight^T + bias``: by columns with their biases, or by rows, which leaves sums."""
    x, _, *bias = operands(node)
    last = len(shape(x)) - 1
    columns = Rule({1: 0, **({2: 0} if bias else {})}, last)
    return [columns, Rule({0: last, 1: 1}, None, reduce="sum")]


def _addmm(node: fx.Node) -> list[Rule]:
    """By rows; columns are in the table."""
    told = arguments(node)
    plain = told["beta"] == 1 and told["alpha"] == 1
    return [Rule({1: 1, 2: 0}, None, reduce="sum")] if plain else []


def _grouped(node: fx.Node) -> list[Rule]:
    """Query heads with their groups' key heads; one key head serves all queries as it is."""
    given = arguments(node)
    q, k = shape(given["query"])[1], shape(given["key"])[1]
    mask = of_mask(given["attn_mask"], 1, q)
    if q == k:
        return []
    if k == 1:
        return [Rule({0: 1, **mask}, 1)]
    return [Rule({0: 1, 1: 1, 2: 1, **mask}, 1, carry=lambda g: [g[0]], free=True)]


def _inner(node: fx.Node) -> list[Rule]:
    """A view that takes one dimension apart, or puts it together, split within every outer part.

    ::

        [.., 3 * H * D] -> [.., 3, H, D]    H over the ranks: three segments, each cut alike
    """
    found = []
    for one, many, split in _runs(shape(operands(node)[0]), shape(node)):
        sizes = [shape(node if split else operands(node)[0])[d] for d in many]
        for place in range(1, len(many)):
            outer, inner = prod(sizes[:place]), prod(sizes[place + 1 :])
            if sizes[place] > 1 and outer > 1:
                given, made = (one, many[place]) if split else (many[place], one)
                block = prod(sizes[place:])
                found.append(_within(node, given, made, outer, block, inner, split=split))
    return found


def _within(
    node: fx.Node, given: int, made: int, outer: int, block: int, inner: int, *, split: bool
) -> Rule:
    """One dimension of ``outer`` blocks beside the same dimension of one block, ``inner`` wide."""

    def narrowed(layout: Layout) -> list[Layout] | None:
        count, rest = divmod(len(layout.segments), outer)
        if rest or layout.length != outer * block or layout.padding:
            return None
        first = layout.segments[:count]
        if layout.segments != first * outer:
            return None
        one = Layout(layout.size, first).scaled(1, inner)
        return None if one is None else [one]

    def widened(layout: Layout) -> list[Layout] | None:
        one = layout.scaled(inner, 1)
        return None if one is None else [Layout(one.size, one.segments * outer)]

    def to_wide(cuts: frozenset[int]) -> frozenset[int]:
        every = {b * block + c * inner for b in range(outer) for c in (0, *cuts)}
        return frozenset(every - {0})

    def to_narrow(cuts: frozenset[int]) -> frozenset[int]:
        return frozenset({c % block // inner for c in cuts if not c % inner} - {0})

    carry, back, forth = (narrowed, to_wide, to_narrow) if split else (widened, to_narrow, to_wide)

    def localise(args: Any, kwargs: Any, layouts: Layouts) -> Arguments:
        own = carry(layouts[0])
        assert own is not None
        sizes = list(shape(node))
        sizes[made] = own[0].local
        return with_argument(node, SIZED[node.target], sizes)(args, kwargs)

    return Rule(
        {0: given},
        made,
        carry=lambda g: carry(g[0]),
        localise=localise,
        back=lambda cuts, _: back(cuts),
        forth=lambda cuts, _: forth(cuts),
    )


def _runs(ins: tuple[int, ...], outs: tuple[int, ...]) -> Iterator[tuple[int, list[int], bool]]:
    """Where one dimension becomes several, or several one: it, they, and whether it is apart."""
    i = j = 0
    while i < len(ins) and j < len(outs):
        a, b = [i], [j]
        while (left := prod(ins[d] for d in a)) != (right := prod(outs[d] for d in b)):
            (a if left < right else b).append((a if left < right else b)[-1] + 1)
            if a[-1] >= len(ins) or b[-1] >= len(outs):
                return
        if len(a) == 1 < len(b):
            yield i, b, True
        elif len(b) == 1 < len(a):
            yield j, a, False
        i, j = a[-1] + 1, b[-1] + 1


LINEAR: Final = aten.linear.default
ADDMM: Final = aten.addmm.default
_MATRIX: Final[dict[Any, int]] = {LINEAR: 1, aten.mm.default: 1, ADDMM: 2}
_MORE: Final[dict[Any, Callable[[fx.Node], list[Rule]]]] = {
    LINEAR: _linear,
    ADDMM: _addmm,
    ATTENTION: _grouped,
    **{target: _inner for target in SIZED if target is not aten.expand.default},
}
