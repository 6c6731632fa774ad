"""Where splitting is first sound: from every attention's queries backwards.

Only queries ask to be split. Keys and values follow when they come from the same tokens; those of
another source (a text that cross-attention reads) stay whole, which needs no communication.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Final

import torch
from torch import Tensor, fx

from .links import GETITEM, Link, links, operands, shape

ATTENTION: Final = torch.ops.cp.attention.default
Linked = dict[fx.Node, list[Link]]


@dataclass(frozen=True)
class Want:
    """A dimension that should be sharded.

    Attributes:
        dim: the dimension.
        weight: the work of the attention that asks for it; the largest is heard.
        cuts: where, besides the ends, tokens of another kind begin.
    """

    dim: int
    weight: int
    cuts: frozenset[int] = frozenset()


def wants(graph: fx.Graph, linked: Linked, inputs: Iterable[str], world: int) -> dict[fx.Node, Want]:
    """For every value that should be sharded, how; constants and parameters are left out."""
    varying = varies(graph, inputs)
    found: dict[fx.Node, Want] = {}

    def add(node: fx.Node, want: Want) -> None:
        if node not in varying or shape(node)[want.dim] < world:
            return
        old = found.get(node)
        if old is None or old.weight < want.weight:
            found[node] = want
        elif old.dim == want.dim:
            found[node] = Want(old.dim, old.weight, old.cuts | want.cuts)

    for node in reversed(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is ATTENTION:
            q = operands(node)[0]
            if shape(q)[2] >= world:
                add(q, Want(2, prod(shape(q)) * shape(operands(node)[1])[2]))
        if (want := found.get(node)) is None:
            continue
        if node.target is GETITEM:
            add(node.args[0], want)  # type: ignore[arg-type]
            continue
        link = next((x for x in linked[node] if x.output == want.dim), None)
        if link is not None:
            _ask(node, link, want, world, add)
    return found


def _ask(node: fx.Node, link: Link, want: Want, world: int, add: object) -> None:
    for position, dim in link.inputs.items():
        operand = operands(node)[position]
        if link.regroups and (
            shape(operand)[dim] % world or shape(node)[want.dim] % world
        ):
            continue  # whole groups of tokens would have to be padded
        cuts = want.cuts if link.back is None else link.back(want.cuts, position)
        add(operand, Want(dim, want.weight, cuts))  # type: ignore[operator]


def varies(graph: fx.Graph, inputs: Iterable[str]) -> set[fx.Node]:
    """The nodes that depend on what the user passes."""
    names = set(inputs)
    found: set[fx.Node] = set()
    for node in graph.nodes:
        is_input = node.op == "placeholder" and node.name in names
        if is_input or any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def is_tensor(node: fx.Node) -> bool:
    """Whether the node's value is one tensor."""
    return isinstance(node.meta.get("val"), Tensor)
