"""Where attention's share of the result is lost, in a model for which nothing can be proven.

The dense program is run twice side by side, as two ranks that are given the same inputs; on the
second every value of an attention over sharded keys belongs to another key. Where the two differ,
attention is felt; the first operator that reads a difference and returns none is what loses it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..ir.program import Executable, Lowered, copied, module_of
from ..strategies import Site
from .blame import Place, placed
from .errors import error_of
from .lockstep import PerRank, run

_MARK: Final = "values_of_other_keys"


def where_attention_vanishes(
    dense: Executable, flat: Mapping[str, Tensor], sites: Collection[Site], least: float
) -> Place | None:
    """Module and line of the first operator that loses what attention found out.

    Args:
        dense: the program before it was sharded, without collectives of its own.
        flat: its inputs by binding name.
        sites: its attentions, in order of execution.
        least: relative differences up to here are none.

    Returns:
        ``None`` where none does.
    """
    program = _marked(dense, [site.keys_sharded for site in sites])
    differ: dict[fx.Node, bool] = {}
    found: list[Place] = []

    def swap(node: fx.Node, values: PerRank) -> PerRank:
        is_swapped = node.name.startswith(_MARK)
        if is_swapped:
            values = PerRank((values[0], values[1].roll(1 + values[1].shape[2] // 2, 2)))
        differ[node] = not values.is_common and _apart(values) > least
        # Values that are the same for every key are lost at once.
        reads = is_swapped or any(differ.get(source, False) for source in node.all_input_nodes)
        if reads and not differ[node] and not found and not _is_part(node):
            found.append(placed(node))
        return values

    run(program, flat, 2, widen=True, alter=swap)
    return found[0] if found else None


def _marked(dense: Executable, wanted: Collection[bool]) -> Lowered:
    """The program with a node of its own for the values of every wanted attention."""
    graph = copied(dense.graph_module.graph)
    attentions = graph.find_nodes(op="call_function", target=torch.ops.cp.attention.default)
    for attention, is_wanted in zip(attentions, wanted, strict=True):
        if is_wanted:
            with graph.inserting_before(attention):
                values = graph.create_node(
                    "call_function", torch.ops.aten.clone.default, (attention.args[2],), name=_MARK
                )
            values.meta = dict(attention.args[2].meta)
            attention.args = (*attention.args[:2], values, *attention.args[3:])
    module = module_of(dense.graph_module, graph)
    whole = Lowered(module, dense.state, dense.inputs, dense.outputs, {})
    kept = {node.name for node in graph.nodes}
    return replace(whole, outputs=tuple(b for b in dense.outputs if b.node in kept))


def _apart(values: PerRank) -> float:
    pairs = zip(pytree.tree_leaves(values[1]), pytree.tree_leaves(values[0]), strict=True)
    errors = [error_of(ours, theirs).max for ours, theirs in pairs if isinstance(ours, Tensor)]
    return max(errors, default=0.0)


def _is_part(node: fx.Node) -> bool:
    """Whether the node only takes a part of what it reads, which another may read whole."""
    schema = getattr(node.target, "_schema", None)
    return schema is None or any(result.alias_info is not None for result in schema.returns)
