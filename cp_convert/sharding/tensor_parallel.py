"""Tensor parallelism: a dense program comes in, one whose ranks share its weights goes out.

::

    y = linear(x, W, b)            columns: y_r = linear(x, W[r], b[r])
    z = linear(y, V, c)            rows:    z   = all_reduce(linear(y_r, V[:, r])) + c

Which matrices, and which heads, is found by :mod:`.regions`; the walk is that of the sequence
(:mod:`.walk`), told what to split and how. Parameters become parameters of every rank's own
(``Lowered.own``), in the shape of a slice. A bias of rows is added once, after the reduction; means
over a split dimension (RMS norms over all heads) become sums of all ranks' shares.
Megatron-LM, Shoeybi et al., arXiv:1909.08053; what diffusers' ``_tp_plan`` calls colwise, rowwise
and packed comes out as columns, rows and segments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import CannotShard
from ..ir.program import Lowered, shape
from ..ir.shares import Declared, Divided, Share, Shared
from ..mesh import Axis
from .declared import restricted
from .propagation import Rules, Want
from .regions import Found, regions
from .rules import operands
from .shard import rules_by_node
from .tensor_rules import ADDMM, LINEAR, tensor_rules_of
from .walk import Value, Walk

aten = torch.ops.aten


def tensor_parallel(
    program: Lowered, axis: Axis, plan: Mapping[str, Declared] = MappingProxyType({})
) -> Divided:
    """Share the weights of ``program`` among the ranks of ``axis``.

    ``plan`` says of placeholders that they are to be shared, and no others; empty: all that can be.

    Raises:
        CannotShard: nothing can be shared, or not as the plan says.
    """
    assert not program.own or axis.size == 1, "own groups stand beside no other axis"
    if axis.size == 1:
        return Divided(program, axis, {}, (), ())
    rules = rules_by_node(program, tensor_rules_of)
    graph = program.graph_module.graph
    found = regions(graph, rules, axis.size)
    if plan:
        found = restricted(found, plan, graph, rules, axis.size)
    if not found.regions:
        raise _nothing(found, axis)
    walk = _TensorWalk(program, axis, found)
    walk.run()
    first = {name: _part(program.state[name], share) for name, share in walk.shares.items()}
    divided = replace(
        program,
        graph_module=walk.module(),
        outputs=walk.outputs,
        state={**program.state, **first},
        own=Shared(program.state, walk.shares, axis),
    )
    return Divided(divided, axis, walk.shares, tuple(walk.moves), found.kept)


def _part(whole: Tensor, share: Share) -> Tensor:
    """Only its type and shape matter: the numbers are every rank's own. It takes no memory."""
    return whole.new_zeros(()).expand(share.shape(tuple(whole.shape)))


def _nothing(found: Found, axis: Axis) -> CannotShard:
    first = found.kept[0] if found.kept else None
    if first is None:
        return CannotShard(
            f"--tp {axis.size}: the model has no attention and no pair of matrices that is "
            "recognised, so there are no weights to split.",
            hint="leave --tp out.",
        )
    return CannotShard(
        f"--tp {axis.size}: no weights can be split: {first.reason}.",
        where=f"{first.module} ({first.source})",
        hint="another --tp, or none; what cannot be split stays whole on every rank, but here that "
        "is all.",
    )


class _TensorWalk(Walk):
    """The walk along the regions that were found, and nowhere else.

    Attributes:
        shares: by placeholder, how its parameter is cut.
    """

    def __init__(self, program: Lowered, axis: Axis, found: Found) -> None:
        self.shares: dict[str, Share] = {}
        self.ends = found.ends
        graph = program.graph_module.graph
        rules: dict[fx.Node, Any] = {n: [] for n in graph.nodes if n.op == "call_function"}
        wanted: dict[fx.Node, Want] = {}
        for region in found.regions:
            rules.update((node, [rule]) for node, rule in region.rules.items())
            wanted.update((n, Want(d, 1, region.cuts[n])) for n, d in region.dims.items())
        for node in found.gathered:
            rules[node] = tensor_rules_of(node)
            wanted.update((parameter, Want(0, 1)) for parameter in operands(node)[1:])
        chosen: Rules = rules
        super().__init__(program, axis, chosen, wanted)

    def _given(self, node: fx.Node) -> None:
        want = self.wants.get(node)
        if want is None or node.name not in self.program.state:
            super()._given(node)
            return
        layout = self._even(shape(node)[want.dim], want.cuts)
        self.shares[node.name] = share = Share(want.dim, layout)
        part = self.graph.node_copy(node)
        part.name = node.name
        with self.mode:
            like = node.meta["val"]
            part.meta["val"] = torch.empty(
                share.shape(shape(node)), dtype=like.dtype, device=like.device
            )
        self.env[node] = Value(parts={(want.dim, layout): part}, wanted=(want.dim, layout))

    def _mark(self, node: fx.Node) -> None:
        self._call(node)  # the sequence is split later

    def _call(self, node: fx.Node) -> None:
        super()._call(node)
        if node in self.ends:
            self.env[node] = Value(whole=self._whole(node))

    def _partial(self, node: fx.Node, nodes: list[fx.Node]) -> fx.Node:
        if node.target is LINEAR and len(nodes) > 2:
            return self.op(LINEAR, *nodes[:2])
        if node.target is ADDMM:
            return self.op(aten.mm.default, *nodes[1:])
        return super()._partial(node, nodes)

    def _completed(self, node: fx.Node, reduced: fx.Node, nodes: list[fx.Node]) -> fx.Node:
        bias = nodes[0] if node.target is ADDMM else None
        if node.target is LINEAR and len(nodes) > 2:
            bias = nodes[2]
        return reduced if bias is None else self.op(aten.add.Tensor, reduced, bias)
