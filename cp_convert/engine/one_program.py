"""One program, and so one engine, for all ranks: a rank's slice taken by a collective."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import torch
from torch import fx

from ..ir import ops
from ..ir.program import Lowered, copied, module_of, tensor_of
from ..ir.writer import Writer

aten: Final = torch.ops.aten
_SHARD: Final = torch.ops.cp.shard.default
_CARRIED: Final = {torch.bool: torch.int32}
"""A type that TensorRT's collectives do not carry, and what carries it without loss."""


def why_not_shared(program: Lowered) -> str | None:
    """Why the ranks' engines differ, or ``None`` when all can be the same."""
    if program.own:
        return "ranks have parameters of their own"
    for node in program.graph_module.graph.nodes:
        if node.target not in (*ops.COLLECTIVES, ops.FUSED, _SHARD):
            continue
        if len(node.args[-2]) != node.args[-1]:
            return "collectives name groups of ranks"
        if node.target is _SHARD and tensor_of(node).dtype == torch.int64:
            return f"{node.args[0]} is int64, which TensorRT's collectives do not carry"
    return None


def by_scatter(program: Lowered) -> Lowered:
    """Every ``cp::shard`` becomes a scatter from rank 0: an exact copy, no arithmetic.

    ::

        shard(x, dim)  ->  move(scatter(move(x, dim, 0), root 0), 0, dim)

    All ranks hold ``x`` whole, so any of them could be the root. ``program`` stays as it is.
    """
    graph = copied(program.graph_module.graph)
    write = Writer(graph)
    for node in graph.find_nodes(op="call_function", target=_SHARD):
        write.origin = node
        with graph.inserting_before(node):
            new = _scattered(write, node)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    graph.lint()
    return replace(program, graph_module=module_of(program.graph_module, graph))


def _scattered(write: Writer, node: fx.Node) -> fx.Node:
    given: Any = node.args
    x, dim, groups, size = given
    value = tensor_of(x)
    order = [dim, *(d for d in range(value.dim()) if d != dim)]
    back = [order.index(d) for d in range(value.dim())]
    carried = _CARRIED.get(value.dtype, value.dtype)
    if carried != value.dtype:
        x = write.op(aten._to_copy.default, x, dtype=carried)
    front = x if dim == 0 else write.op(aten.permute.default, x, order)
    own = write.op(torch.ops.cp.scatter.default, front, 0, groups, size)
    result = own if dim == 0 else write.op(aten.permute.default, own, back)
    if carried != value.dtype:
        result = write.op(aten._to_copy.default, result, dtype=value.dtype)
    return result
