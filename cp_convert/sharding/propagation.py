"""Where splitting is first sound: from what asks for it, an attention's queries, backwards.

Only queries ask for their tokens. Keys and values follow when they come from the same tokens; those
of another source (a text that cross-attention reads) stay whole, which needs no communication.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod

from torch import Tensor, fx

from ..ir.ops import ATTENTION
from ..ir.program import shape
from .rules import GETITEM, Rule, operands

Rules = dict[fx.Node, list[Rule]]


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


Seeds = Callable[[fx.Node], Iterable[tuple[fx.Node, Want]]]
"""By an operator, which of its operands it asks to be sharded, and how."""


def queries(node: fx.Node) -> Iterator[tuple[fx.Node, Want]]:
    """An attention's queries, token by token."""
    if node.target is ATTENTION:
        q, k = operands(node)[:2]
        yield q, Want(2, prod(shape(q)) * shape(k)[2])


def wants(
    graph: fx.Graph, rules: Rules, inputs: Iterable[str], world: int, seeds: Seeds = queries
) -> dict[fx.Node, Want]:
    """For every value that should be sharded, how; constants and parameters are left out.

    Args:
        graph: of the dense program.
        rules: of its operators.
        inputs: placeholders of what the user passes.
        world: how many ranks share a dimension.
        seeds: where it begins.
    """
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

    for node in graph.nodes:
        for operand, want in seeds(node):
            add(operand, want)
    before: dict[fx.Node, Want] | None = None
    while before != found:
        before = dict(found)
        for node in reversed(graph.nodes):
            if node.op == "call_function":
                _backwards(node, rules, found, world, add)
        for node in graph.nodes:
            if node.op == "call_function":
                _forwards(node, rules, found)
    return found


Add = Callable[[fx.Node, Want], None]


def _backwards(
    node: fx.Node, rules: Rules, found: dict[fx.Node, Want], world: int, add: Add
) -> None:
    """What the node's operands should be, for the node to be as it should."""
    want = found.get(node)
    if want is None:
        return
    if node.target is GETITEM:
        base = node.all_input_nodes[0]
        rule = _rule(base, rules, want)
        alike = rule is not None and rule.back is None
        add(base, Want(want.dim, want.weight, want.cuts if alike else frozenset()))
        return
    rule = _rule(node, rules, want)
    if rule is None:
        return
    for position, dim in rule.inputs.items():
        operand = operands(node)[position]
        # Whole groups of tokens would have to be padded.
        if rule.regroups and (shape(operand)[dim] % world or shape(node)[want.dim] % world):
            continue
        if node.target is ATTENTION and position > 0:
            continue  # keys follow where they come from; masks are cut where they are used
        cuts = want.cuts if rule.back is None else rule.back(want.cuts, position)
        add(operand, Want(dim, want.weight, cuts))


def _forwards(node: fx.Node, rules: Rules, found: dict[fx.Node, Want]) -> None:
    """Cuts of the operands are cuts of the result: both are to have one layout."""
    want = found.get(node)
    if want is None or node.target is ATTENTION:
        return
    if node.target is GETITEM:
        base = node.all_input_nodes[0]
        own, rule = found.get(base), _rule(base, rules, want)
        if own is not None and own.dim == want.dim and rule is not None and rule.forth is None:
            found[node] = Want(want.dim, want.weight, want.cuts | own.cuts)
        return
    rule = _rule(node, rules, want)
    if rule is None:
        return
    cuts = want.cuts
    for position, dim in rule.inputs.items():
        own = found.get(operands(node)[position])
        if own is not None and own.dim == dim:
            cuts |= own.cuts if rule.forth is None else rule.forth(own.cuts, position)
    found[node] = Want(want.dim, want.weight, cuts)


def _rule(node: fx.Node, rules: Rules, want: Want) -> Rule | None:
    return next((x for x in rules[node] if x.output == want.dim), None)


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
