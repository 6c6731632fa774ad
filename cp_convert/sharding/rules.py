"""Which dimensions of an operator may be sharded together: one table over core ATen.

A :class:`Rule` says: when these dimensions of these operands are sharded alike and all other
operands are whole, the operator, run by every rank on what it has, gives the ranks' parts of the
result (or, for a reduction, partial results). What has no rule is computed on whole tensors, which
is always right. Source for the reading of each operator: the ATen operator set of PyTorch's
documentation (*IRs*, core ATen) and, for the idea of one rule an operator, DTensor's
(*torch.distributed.tensor*).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any, Final

import torch
from torch import Tensor, fx

from ..ir import nvfp4, ops, quantize  # noqa: F401  define cp::*
from ..ir.layout import Layout
from ..ir.program import Arguments, arguments, shape, with_argument

aten: Final = torch.ops.aten
cp: Final = torch.ops.cp
Layouts = Mapping[int, Layout]


@dataclass(frozen=True)
class Rule:
    """Dimensions of one operator that are sharded together.

    Attributes:
        inputs: by the operand's position among :func:`operands`, its sharded dimension.
        output: the sharded dimension of the result (of each result, if there are several);
            ``None`` for a reduction over the sharded dimension.
        carry: from the operands' layouts to the results'; ``None`` where it cannot be done.
        localise: the operator's own arguments (sizes, bounds) on one rank.
        back: from where the result should be cut to where the operand at a position should be.
        forth: the other way round; without both, operands and results are cut alike.
        reduce: how ranks' partial results combine: ``sum``, ``mean``, ``max`` or ``min``.
        regroups: the tokens of the operand are not those of the result (patches, rows).
        free: the operands' layouts need not agree.
        context: attention over sharded keys, which a strategy completes.
        results: how many results the operator has.
    """

    inputs: Mapping[int, int]
    output: int | None
    carry: Callable[[Layouts], list[Layout] | None] | None = None
    localise: Callable[[Any, Any, Layouts], Arguments] | None = None
    back: Callable[[frozenset[int], int], frozenset[int]] | None = None
    forth: Callable[[frozenset[int], int], frozenset[int]] | None = None
    reduce: str | None = None
    regroups: bool = False
    free: bool = False
    context: bool = False
    results: int = 1

    def layouts(self, given: Layouts) -> list[Layout] | None:
        """The results' layouts, or ``None``; without ``carry`` all operands must agree."""
        if self.carry is not None:
            return self.carry(given)
        distinct = list(dict.fromkeys(given.values()))
        return distinct * self.results if len(distinct) == 1 else None


def operands(node: fx.Node) -> list[fx.Node]:
    """The node's tensor arguments in order, repeated where they repeat."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), lambda n: found.append(n) or n)  # type: ignore[func-returns-value]
    return found


def rules_of(node: fx.Node) -> list[Rule]:
    """Every way in which ``node`` can be computed in parts; empty when there is none."""
    known = RULES.get(node.target)
    if known is None and isinstance(node.target, torch._ops.OpOverload):
        known = _pointwise if torch.Tag.pointwise in node.target.tags else None
    return [] if known is None else known(node)


# ---------------------------------------------------------------- elementwise and shape


def _pointwise(node: fx.Node) -> list[Rule]:
    """Right-aligned broadcasting: every dimension by itself."""
    out, given = shape(node), operands(node)
    found = []
    for dim, size in enumerate(out):
        inputs = {}
        for position, operand in enumerate(given):
            own = dim - (len(out) - len(shape(operand)))
            if own >= 0 and shape(operand)[own] == size:
                inputs[position] = own
        if size > 1 and inputs:
            found.append(Rule(inputs, dim))
    return found


def _same(node: fx.Node, dims: Sequence[int], results: int = 1) -> list[Rule]:
    """Dimensions of the first operand that the result keeps in their places."""
    return [Rule({0: d}, d, results=results) for d in dims if shape(operands(node)[0])[d] > 1]


def _like(node: fx.Node) -> list[Rule]:
    return _same(node, range(len(shape(node))))


def _view(node: fx.Node) -> list[Rule]:
    """Runs of dimensions with equal products; the outermost of a run may be sharded."""
    ins, outs = shape(operands(node)[0]), shape(node)
    found = []
    for i, o in _outermost(ins, outs):
        n, m = ins[i], outs[o]
        if n != m and n % m and m % n:
            continue
        times, over = (m // n, 1) if m >= n and m % n == 0 else (1, n // m)
        found.append(
            Rule(
                {0: i},
                o,
                carry=lambda given, t=times, v=over: _one(given[0].scaled(t, v)),  # type: ignore[misc]
                localise=_sized(node, o, times, over),
                back=lambda cuts, _, t=times, v=over: frozenset(  # type: ignore[misc]
                    c * v // t for c in cuts if c * v % t == 0
                ),
                forth=lambda cuts, _, t=times, v=over: frozenset(  # type: ignore[misc]
                    c * t // v for c in cuts if c * t % v == 0
                ),
                regroups=n != m,
            )
        )
    return found


def _one(layout: Layout | None) -> list[Layout] | None:
    return None if layout is None else [layout]


def _outermost(ins: Sequence[int], outs: Sequence[int]) -> list[tuple[int, int]]:
    a = [d for d, n in enumerate(ins) if n != 1]
    b = [d for d, n in enumerate(outs) if n != 1]
    found, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        found.append((a[i], b[j]))
        left, right = ins[a[i]], outs[b[j]]
        i, j = i + 1, j + 1
        while left != right:
            if left < right:
                left, i = left * ins[a[i]], i + 1
            else:
                right, j = right * outs[b[j]], j + 1
    return found


SIZED: Final[dict[Any, str]] = {
    aten.view.default: "size",
    aten.reshape.default: "shape",
    aten._unsafe_view.default: "size",
    aten._reshape_copy.default: "size",
    aten.expand.default: "size",
}
"""Operators that are told the sizes of their result, and by which argument."""


def _sized(
    node: fx.Node, dim: int, times: int = 1, over: int = 1
) -> Callable[[Any, Any, Layouts], Arguments]:
    """Names the local length of ``dim`` in the operator's list of sizes, if it has one."""

    def localise(args: Any, kwargs: Any, given: Layouts) -> Arguments:
        name = SIZED.get(node.target)
        if name is None:
            return tuple(args), dict(kwargs)
        sizes = list(shape(node))
        sizes[dim] = given[0].local * times // over
        return with_argument(node, name, sizes)(args, kwargs)

    return localise


def _expand(node: fx.Node) -> list[Rule]:
    ins, outs = shape(operands(node)[0]), shape(node)
    shift = len(outs) - len(ins)
    return [
        Rule({0: d}, d + shift, localise=_sized(node, d + shift))
        for d, n in enumerate(ins)
        if n > 1 and n == outs[d + shift]
    ]


def _repeat(node: fx.Node) -> list[Rule]:
    times = list(arguments(node)["repeats"])
    shift = len(times) - len(shape(operands(node)[0]))
    return [
        Rule({0: d}, d + shift)
        for d, n in enumerate(shape(operands(node)[0]))
        if n > 1 and times[d + shift] == 1
    ]


def _permute(node: fx.Node) -> list[Rule]:
    order = [d % len(shape(node)) for d in arguments(node)["dims"]]
    return [Rule({0: i}, o) for o, i in enumerate(order) if shape(node)[o] > 1]


def _transpose(node: fx.Node) -> list[Rule]:
    rank = len(shape(node))
    given = arguments(node)
    order = list(range(rank))
    a, b = given["dim0"] % rank, given["dim1"] % rank
    order[a], order[b] = order[b], order[a]
    return [Rule({0: i}, o) for o, i in enumerate(order) if shape(node)[o] > 1]


def _t(node: fx.Node) -> list[Rule]:
    rank = len(shape(node))
    return [Rule({0: rank - 1 - o}, o) for o in range(rank) if shape(node)[o] > 1]


def _cat(node: fx.Node) -> list[Rule]:
    given, rank = operands(node), len(shape(node))
    dim = arguments(node)["dim"] % rank
    if any(len(shape(x)) != rank for x in given):
        return []
    found = [
        Rule(dict.fromkeys(range(len(given)), d), d)
        for d in range(rank)
        if d != dim and shape(node)[d] > 1
    ]
    ends = [0]
    for x in given:
        ends.append(ends[-1] + shape(x)[dim])

    def carry(layouts: Layouts) -> list[Layout] | None:
        joined = layouts[0]
        for position in range(1, len(given)):
            joined = joined.joined(layouts[position])
        return [joined]

    def back(cuts: frozenset[int], position: int) -> frozenset[int]:
        start, stop = ends[position], ends[position + 1]
        return frozenset(c - start for c in cuts if start < c < stop)

    def forth(cuts: frozenset[int], position: int) -> frozenset[int]:
        return frozenset({*ends[1:-1], *(c + ends[position] for c in cuts)})

    every = dict.fromkeys(range(len(given)), dim)
    found.append(Rule(every, dim, carry=carry, back=back, forth=forth, free=True))
    return found


def _stack(node: fx.Node) -> list[Rule]:
    rank = len(shape(node))
    dim = arguments(node)["dim"] % rank
    count = len(operands(node))
    return [
        Rule(dict.fromkeys(range(count), d if d < dim else d - 1), d)
        for d in range(rank)
        if d != dim and shape(node)[d] > 1
    ]


def _slice(node: fx.Node) -> list[Rule]:
    given, ins = arguments(node), shape(operands(node)[0])
    dim = given["dim"] % len(ins)
    found = _same(node, [d for d in range(len(ins)) if d != dim])
    start, stop, _ = slice(given["start"], given["end"]).indices(ins[dim])
    if given["step"] != 1 or stop <= start:
        return found

    def carry(layouts: Layouts) -> list[Layout] | None:
        part = layouts[0].between(start, stop)
        return None if part is None else [part[0]]

    def localise(args: Any, kwargs: Any, layouts: Layouts) -> Arguments:
        part = layouts[0].between(start, stop)
        assert part is not None
        begin = part[1]
        args, kwargs = with_argument(node, "start", begin)(args, kwargs)
        return with_argument(node, "end", begin + part[0].local)(args, kwargs)

    def back(cuts: frozenset[int], _: int) -> frozenset[int]:
        return frozenset({start, stop, *(c + start for c in cuts)} - {0, ins[dim]})

    def forth(cuts: frozenset[int], _: int) -> frozenset[int]:
        return frozenset(c - start for c in cuts if start < c < stop)

    found.append(Rule({0: dim}, dim, carry=carry, localise=localise, back=back, forth=forth))
    return found


def _split(node: fx.Node) -> list[Rule]:
    """``split`` and its kin, whose results are pieces of one dimension."""
    given, ins = arguments(node), shape(operands(node)[0])
    dim = given["dim"] % len(ins)
    pieces = [tuple(x.shape)[dim] for x in node.meta["val"]]
    found = _same(node, [d for d in range(len(ins)) if d != dim], results=len(pieces))
    ends = [0]
    for piece in pieces:
        ends.append(ends[-1] + piece)
    name = "split_sizes" if "split_sizes" in given else "split_size"

    def parts(layout: Layout) -> list[Layout] | None:
        ranges = [layout.between(a, b) for a, b in pairwise(ends)]
        return None if None in ranges else [r[0] for r in ranges if r is not None]

    def localise(args: Any, kwargs: Any, layouts: Layouts) -> Arguments:
        sizes = [part.local for part in parts(layouts[0]) or []]
        return with_argument(node, name, sizes)(args, kwargs)

    def back(cuts: frozenset[int], _: int) -> frozenset[int]:
        return frozenset(ends[1:-1])

    def forth(cuts: frozenset[int], _: int) -> frozenset[int]:
        return frozenset()

    if name == "split_sizes":
        found.append(
            Rule(
                {0: dim},
                dim,
                carry=lambda g: parts(g[0]),
                localise=localise,
                back=back,
                forth=forth,
                results=len(pieces),
            )
        )
    return found


def _unbind(node: fx.Node) -> list[Rule]:
    ins = shape(operands(node)[0])
    dim = arguments(node)["dim"] % len(ins)
    return _without(node, dim, results=len(node.meta["val"]))


def _without(node: fx.Node, dim: int, results: int = 1) -> list[Rule]:
    ins = shape(operands(node)[0])
    return [
        Rule({0: d}, d if d < dim else d - 1, results=results)
        for d in range(len(ins))
        if d != dim and ins[d] > 1
    ]


def _select(node: fx.Node) -> list[Rule]:
    return _without(node, arguments(node)["dim"] % len(shape(operands(node)[0])))


def _pad(node: fx.Node) -> list[Rule]:
    rank, pad = len(shape(node)), list(arguments(node)["pad"])
    padded = {rank - 1 - i // 2 for i, n in enumerate(pad) if n}
    return _same(node, [d for d in range(rank) if d not in padded])


def _along(node: fx.Node) -> list[Rule]:
    """Operators that mix one dimension, named ``dim`` or ``dims``, and no other."""
    given, rank = arguments(node), len(shape(operands(node)[0]))
    named: Any = given.get("dim", given.get("dims"))
    if named == []:
        return []  # roll without dimensions goes through all of them
    mixed = {d % rank for d in ([named] if isinstance(named, int) else named)}
    several = node.meta["val"]
    results = 1 if isinstance(several, Tensor) else len(several)
    return _same(node, [d for d in range(rank) if d not in mixed], results=results)


def _scatter_slice(node: fx.Node) -> list[Rule]:
    """``slice_scatter(base, src, dim, ...)``: both keep the other dimensions."""
    rank = len(shape(node))
    dim = arguments(node)["dim"] % rank
    return [Rule({0: d, 1: d}, d) for d in range(rank) if d != dim and shape(node)[d] > 1]


# ---------------------------------------------------------------- indexing


def _embedding(node: fx.Node) -> list[Rule]:
    indices = shape(operands(node)[1])
    return [Rule({1: d}, d) for d, n in enumerate(indices) if n > 1]


def _index_select(node: fx.Node) -> list[Rule]:
    dim = arguments(node)["dim"] % len(shape(node))
    others = _same(node, [d for d in range(len(shape(node))) if d != dim])
    return [*others, *([Rule({1: 0}, dim)] if shape(node)[dim] > 1 else [])]


def _index(node: fx.Node) -> list[Rule]:
    """``x[:, index]``: one index tensor; more than one is left whole."""
    x, *_ = operands(node)
    where = [i for i, index in enumerate(arguments(node)["indices"]) if index is not None]
    if len(where) != 1:
        return []
    place, index = where[0], arguments(node)["indices"][where[0]]
    if index.meta["val"].dtype == torch.bool:
        return []
    wide = len(shape(index))
    found = [
        Rule({0: d}, d if d < place else d - 1 + wide)
        for d, n in enumerate(shape(x))
        if d != place and n > 1
    ]
    return found + [Rule({1: d}, place + d) for d, n in enumerate(shape(index)) if n > 1]


def _gather(node: fx.Node) -> list[Rule]:
    x, index = operands(node)[:2]
    dim = arguments(node)["dim"] % len(shape(node))
    return [
        Rule({0: d, 1: d}, d)
        for d, n in enumerate(shape(node))
        if d != dim and n > 1 and shape(x)[d] == shape(index)[d]
    ]


# ---------------------------------------------------------------- products, norms, reductions


def _linear(node: fx.Node) -> list[Rule]:
    return _same(node, range(len(shape(node)) - 1))


def _matmul(node: fx.Node, first: int = 0) -> list[Rule]:
    """``a @ b`` with broadcast batch dimensions; the contraction leaves partial sums."""
    a, b = operands(node)[first : first + 2]
    sa, sb, so = shape(a), shape(b), shape(node)
    if len(sa) < 2 or len(sb) < 2:
        return []
    found = []
    for d, n in enumerate(so[:-2]):
        da, db = d - (len(so) - len(sa)), d - (len(so) - len(sb))
        inputs = {}
        if da >= 0 and sa[da] == n:
            inputs[first] = da
        if db >= 0 and sb[db] == n:
            inputs[first + 1] = db
        if n > 1 and inputs:
            found.append(Rule(inputs, d))
    if so[-2] > 1:
        found.append(Rule({first: len(sa) - 2}, len(so) - 2))
    if so[-1] > 1:
        found.append(Rule({first + 1: len(sb) - 1}, len(so) - 1))
    if sa[-1] > 1 and first == 0:
        found.append(Rule({0: len(sa) - 1, 1: len(sb) - 2}, None, reduce="sum"))
    return found


def _added_matmul(node: fx.Node) -> list[Rule]:
    """``addmm`` and ``baddbmm``: the first operand broadcasts against the result."""
    bias, out = shape(operands(node)[0]), shape(node)
    found = []
    for rule in _matmul(node, first=1):
        assert rule.output is not None
        own = rule.output - (len(out) - len(bias))
        extra = {0: own} if own >= 0 and bias[own] == out[rule.output] else {}
        found.append(Rule({**rule.inputs, **extra}, rule.output))
    return found


def _convolution(node: fx.Node) -> list[Rule]:
    """The batch, and a spatial dimension whose windows do not overlap (patches, 1x1)."""
    given = arguments(node)
    x, weight = operands(node)[:2]
    found = _same(node, [0])
    if given["transposed"]:
        return found
    for i, (stride, pad, dilation) in enumerate(
        zip(given["stride"], given["padding"], given["dilation"], strict=True)
    ):
        dim, kernel = i + 2, shape(weight)[i + 2]
        whole = shape(x)[dim] == shape(node)[dim] * stride
        if kernel == stride and not pad and dilation == 1 and whole and shape(node)[dim] > 1:
            found.append(
                Rule(
                    {0: dim},
                    dim,
                    carry=lambda g, s=stride: _one(g[0].scaled(1, s)),  # type: ignore[misc]
                    back=lambda cuts, _, s=stride: frozenset(c * s for c in cuts),  # type: ignore[misc]
                    forth=lambda cuts, _, s=stride: frozenset(  # type: ignore[misc]
                        c // s for c in cuts if c % s == 0
                    ),
                    regroups=stride > 1,
                )
            )
    return found


def _layer_norm(node: fx.Node) -> list[Rule]:
    kept = len(shape(operands(node)[0])) - len(arguments(node)["normalized_shape"])
    return _same(node, range(kept), results=3)


def _rms_norm(node: fx.Node) -> list[Rule]:
    kept = len(shape(operands(node)[0])) - len(arguments(node)["normalized_shape"])
    return _same(node, range(kept))


def _reduction(how: str | None) -> Callable[[fx.Node], list[Rule]]:
    def rule(node: fx.Node) -> list[Rule]:
        given, ins = arguments(node), shape(operands(node)[0])
        named: Any = given.get("dim")
        if named is None or named == []:
            reduced = set(range(len(ins)))
        else:
            dims = [named] if isinstance(named, int) else list(named)
            reduced = {d % len(ins) for d in dims}
        keep = bool(given.get("keepdim", False))
        found = []
        for d, n in enumerate(ins):
            if n == 1:
                continue
            if d not in reduced:
                out = d if keep else d - sum(r < d for r in reduced)
                found.append(Rule({0: d}, out, results=_results(node)))
            elif how is not None:
                found.append(Rule({0: d}, None, reduce=how))
        return found

    return rule


def _results(node: fx.Node) -> int:
    return 1 if isinstance(node.meta["val"], Tensor) else len(node.meta["val"])


def _attention(node: fx.Node) -> list[Rule]:
    """Rows, batch and heads need no communication; the context is a strategy's work."""
    given = arguments(node)
    q, k = shape(given["query"]), shape(given["key"])
    mask = given["attn_mask"]
    found = []
    if not given["is_causal"]:
        found.append(Rule({0: 2, **of_mask(mask, 2, q[2])}, 2))
    found.append(Rule({0: 0, 1: 0, 2: 0, **of_mask(mask, 0, q[0])}, 0))
    if q[1] == k[1]:
        found.append(Rule({0: 1, 1: 1, 2: 1, **of_mask(mask, 1, q[1])}, 1))

    def carry(layouts: Layouts) -> list[Layout] | None:
        return [layouts[0]] if layouts[1] == layouts[2] else None

    found.append(Rule({0: 2, 1: 2, 2: 2}, 2, carry=carry, context=True))
    return [rule for rule in found if q[rule.output] > 1]  # type: ignore[index]


def of_mask(mask: Any, dim: int, size: int) -> dict[int, int]:
    """What an attention's mask has to do with a dimension of its queries."""
    if mask is None:
        return {}
    own = dim - (4 - len(shape(mask)))
    return {3: own} if own >= 0 and shape(mask)[own] == size and size > 1 else {}


def _blocks(node: fx.Node) -> list[Rule]:
    """A collective of the model's own, which moves blocks of dimension 0.

    Its peers hold the same part of the sequence (:meth:`cp_convert.mesh.Mesh.free`).
    """
    return _same(node, range(1, len(shape(node))))


def _blocks_of_4_bits(node: fx.Node) -> list[Rule]:
    """NVFP4: along every dimension but the last, whose blocks have a scale in common."""
    given = range(len(operands(node)))
    dims = range(len(shape(node)) - 1)
    return [Rule(dict.fromkeys(given, d), d) for d in dims if shape(node)[d] > 1]


def _shard(node: fx.Node) -> list[Rule]:
    """A part along one axis of the mesh, of which another axis takes other dimensions."""
    rank, dim = len(shape(node)), arguments(node)["dim"]
    return _same(node, [d for d in range(rank) if d != dim])


RulesOf = Callable[[fx.Node], list[Rule]]


_QUANTIZERS: Final = (cp.quantize, cp.dequantize, cp.quantize_dequantize)
_OF_4_BITS: Final = dict.fromkeys(nvfp4.BLOCK_QUANTIZERS, _blocks_of_4_bits)


def _table() -> dict[Any, RulesOf]:
    rows: list[tuple[RulesOf, tuple[Any, ...]]] = [
        (_pointwise, (aten.clone, aten._to_copy, aten.alias, aten.detach, aten.lift_fresh_copy,
                      aten.copy, aten.where, aten.masked_fill, aten.clamp, *_QUANTIZERS)),
        (_like, (aten.full_like, aten.zeros_like, aten.ones_like, aten.empty_like)),
        (_view, (aten.view, aten.reshape, aten._unsafe_view, aten._reshape_copy, aten.squeeze,
                 aten.unsqueeze)),
        (_expand, (aten.expand,)),
        (_repeat, (aten.repeat,)),
        (_permute, (aten.permute,)),
        (_transpose, (aten.transpose,)),
        (_t, (aten.t,)),
        (_cat, (aten.cat,)),
        (_stack, (aten.stack,)),
        (_slice, (aten.slice,)),
        (_split, (aten.split, aten.split_with_sizes)),
        (_unbind, (aten.unbind,)),
        (_select, (aten.select,)),
        (_pad, (aten.constant_pad_nd,)),
        (_along, (aten._softmax, aten.softmax, aten._log_softmax, aten.cumsum, aten.flip,
                  aten.topk, aten.sort, aten.roll)),
        (_scatter_slice, (aten.slice_scatter,)),
        (_embedding, (aten.embedding,)),
        (_index_select, (aten.index_select,)),
        (_index, (aten.index,)),
        (_gather, (aten.gather,)),
        (_linear, (aten.linear,)),
        (_matmul, (aten.mm, aten.bmm, aten.matmul)),
        (_added_matmul, (aten.addmm, aten.baddbmm)),
        (_convolution, (aten.convolution,)),
        (_layer_norm, (aten.native_layer_norm,)),
        (_rms_norm, (aten.rms_norm,)),
        (_like, (cp.all_reduce, cp.broadcast, cp.reduce, cp.mark)),
        (_shard, (cp.shard,)),
        (_blocks, (cp.all_gather, cp.all_to_all, cp.reduce_scatter, cp.gather, cp.scatter)),
        (_reduction("sum"), (aten.sum,)),
        (_reduction("mean"), (aten.mean,)),
        (_reduction("max"), (aten.amax,)),
        (_reduction("min"), (aten.amin,)),
        (_reduction(None), (aten.var, aten.std, aten.any, aten.all, aten.prod, aten.argmax,
                            aten.argmin, aten.logsumexp, aten.linalg_vector_norm)),
    ]  # fmt: skip
    table: dict[Any, RulesOf] = {ops.ATTENTION: _attention, **_OF_4_BITS}
    for rule, packets in rows:
        for packet in packets:
            for name in packet.overloads():
                overload = getattr(packet, name)
                if _is_tensor_operator(overload):
                    table[overload] = rule
    return table


def _is_tensor_operator(overload: Any) -> bool:
    arguments = overload._schema.arguments
    return not any(a.is_out or str(a.type) == "Dimname" for a in arguments)


RULES: Final = _table()
GETITEM: Final = operator.getitem


def elements(node: fx.Node) -> int:
    """How many numbers the node's value has."""
    return prod(shape(node))
