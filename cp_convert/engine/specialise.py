"""One rank's own program: shards become slices, collectives name the rank's own group first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import torch
from torch import fx

from ..ir import ops
from ..ir.program import Lowered, copied, module_of, tensor_of
from ..mesh import split_groups

_SHARD: Final = torch.ops.cp.shard.default


def specialise(lowered: Lowered, rank: int) -> Lowered:
    """The program of one rank: shards become slices, and collectives name the rank's group first.

    The other groups stay behind it: whether a group is all ranks or a part of them is told apart
    by whether there are others, and a group of the first ranks looks like a world otherwise.
    ``lowered`` stays as it is; parameters are shared.
    """
    graph = copied(lowered.graph_module.graph)
    for node in list(graph.nodes):
        if node.target is _SHARD:
            _slice(node, rank)
        elif node.target in ops.COLLECTIVES or node.target is ops.FUSED:
            *rest, flat, size = node.args
            node.args = (*rest, own_first(flat, size, rank), size)
    graph.lint()
    return replace(
        lowered,
        graph_module=module_of(lowered.graph_module, graph),
        state={**lowered.state, **{name: of[rank] for name, of in lowered.own.items()}},
        own={},
    )


def _slice(node: fx.Node, rank: int) -> None:
    x, dim, flat, size = node.args
    assert isinstance(x, fx.Node) and isinstance(dim, int)
    length = tensor_of(node).shape[dim]
    start = own_first(flat, size, rank).index(rank) * length
    node.target = torch.ops.aten.slice.Tensor
    node.args = (x, dim, start, start + length)


def own_first(flat: object, size: object, rank: int) -> list[int]:
    """All groups one after another, the rank's own first."""
    assert isinstance(flat, Sequence) and isinstance(size, int)
    groups = sorted(split_groups(list(flat), size), key=lambda group: rank not in group)
    return [member for group in groups for member in group]
