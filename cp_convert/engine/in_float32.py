"""Arithmetic on weights alone, in float32 whatever they are stored in."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, fx

from ..ir import ops  # noqa: F401  defines cp::*
from ..ir.program import HALF, with_dtypes

aten: Final = torch.ops.aten
VIEWS: Final = (
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.view.default,
    aten.reshape.default,
    aten._reshape_copy.default,
    aten.unsqueeze.default,
    aten.squeeze.dims,
    aten.slice.Tensor,
    aten.select.int,
    aten.expand.default,
    torch.ops.cp.result.default,
)
"""Operators that look at the same numbers in another way."""
MOVES: Final = (*VIEWS, aten.cat.default, aten.clone.default, aten.flip.default)
"""Operators that leave the numbers what they are."""
_NO_ARITHMETIC: Final = (
    *MOVES,
    aten._to_copy.default,
    aten.split_with_sizes.default,
    aten.unbind.int,
    operator.getitem,
)
_SINGLE: Final = dict.fromkeys(HALF, torch.float32)


def in_float32(
    root: torch.nn.Module,
    graph: fx.Graph,
    weights: Mapping[fx.Node, Tensor],
    known: Collection[fx.Node],
) -> dict[fx.Node, Tensor]:
    """What weights give by arithmetic, where others read it; numbers of 16 bits in float32.

    Args:
        root: holds the graph's attributes.
        graph: what is read; it stays as it is.
        weights: by placeholder.
        known: what is known already.
    """
    alone = _alone(graph, weights)
    wanted = [
        node
        for node in alone
        if node not in known
        and isinstance(node.meta.get("val"), Tensor)
        and any(user not in alone for user in node.users)
        and _has_arithmetic(node, alone, known)
    ]
    values: dict[fx.Node, Any] = {}
    for node in _ancestors(graph, wanted):
        values[node] = _value(root, node, weights, values)
    return {node: values[node] for node in wanted}


def _alone(graph: fx.Graph, weights: Mapping[fx.Node, Tensor]) -> dict[fx.Node, bool]:
    """Operators of weights and attributes alone, one weight at least; in order."""
    constants = set(graph.find_nodes(op="get_attr"))
    found: dict[fx.Node, bool] = {}
    for node in graph.nodes:
        operands = node.all_input_nodes
        if node.op != "call_function" or not operands or not _may(node):
            continue
        if all(n in found or n in weights or n in constants for n in operands):
            if any(n in found or n in weights for n in operands):
                found[node] = True
            else:
                constants.add(node)
    return found


def _may(node: fx.Node) -> bool:
    is_random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    is_plain = getattr(node.target, "namespace", None) == "aten"
    return (is_plain and not is_random) or node.target is operator.getitem


def _has_arithmetic(node: fx.Node, alone: Collection[fx.Node], known: Collection[fx.Node]) -> bool:
    """Whether numbers are changed between what is known and ``node``, not only moved or cast."""
    above = _above([node], known)
    return any(one.target not in _NO_ARITHMETIC for one in above if one in alone)


def _above(nodes: Iterable[fx.Node], known: Collection[fx.Node] = ()) -> set[fx.Node]:
    found: set[fx.Node] = set()
    left = list(nodes)
    while left:
        node = left.pop()
        if node not in found and node not in known:
            found.add(node)
            left += node.all_input_nodes
    return found


def _ancestors(graph: fx.Graph, nodes: Iterable[fx.Node]) -> list[fx.Node]:
    above = _above(nodes)
    return [node for node in graph.nodes if node in above]


def _value(
    root: torch.nn.Module,
    node: fx.Node,
    weights: Mapping[fx.Node, Tensor],
    values: Mapping[fx.Node, Any],
) -> Any:
    if node.op != "call_function":
        given = weights[node] if node in weights else getattr(root, str(node.target))
        return given.float() if given.dtype in HALF else given
    args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
    args, kwargs = with_dtypes((args, kwargs), _SINGLE)
    target: Any = node.target
    with torch.no_grad():
        return target(*args, **kwargs)
