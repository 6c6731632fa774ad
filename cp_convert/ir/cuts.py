"""Where a program can be cut: after a module, if it is narrow there.

A program and the path of a module come in, and all that the module's outputs are computed from goes
out; or a refusal, where a residual is still open there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, NamedTuple

import torch
from torch import Tensor, fx

from ..errors import UsageError
from ..words import near
from . import ops
from .program import Lowered, module_path
from .streams import joined_later, shape_of

_RESULT: Final = torch.ops.cp.result.default
MOVES: Final = (
    torch.ops.cp.shard.default,
    torch.ops.cp.scatter.default,
    torch.ops.aten.permute.default,
    torch.ops.aten._to_copy.default,
)
"""How a block is given its part of what is whole before it."""


class Place(NamedTuple):
    """After a module, or before it, by its path."""

    module: str
    enters: bool = False


@dataclass(frozen=True)
class Cut:
    """After a module, or before it: operators up to there, and which of them others read.

    Attributes:
        module: its path.
        own: its operators.
        outputs: what others read of it; of a cut before a module, what that is given.
        before: all that the outputs are computed from, they too.
        enters: whether it is before the module.
    """

    module: str
    own: frozenset[fx.Node]
    outputs: tuple[fx.Node, ...]
    before: frozenset[fx.Node]
    enters: bool = False

    @property
    def place(self) -> Place:
        """Where it is."""
        return Place(self.module, self.enters)


Owners = Mapping[str, Sequence[fx.Node]]


@dataclass(frozen=True)
class Wiring:
    """What of a program is asked again for every cut.

    Attributes:
        graph: of the program.
        free: what follows from weights and constants alone; every piece may have its own.
        order: all that is not free and no placeholder, in the program's order.
        reads: what each of these reads, those of the same kind alone.
        within: the operators of every module.
    """

    graph: fx.Graph
    free: frozenset[fx.Node]
    order: tuple[fx.Node, ...]
    reads: Mapping[fx.Node, tuple[fx.Node, ...]]
    within: Owners

    @classmethod
    def of(cls, program: Lowered) -> Wiring:
        """Looked up once."""
        graph, free = program.graph_module.graph, _free_of(program)
        order = tuple(n for n in graph.nodes if n not in free and n.op != "placeholder")
        known = set(order)
        reads = {n: tuple(x for x in n.all_input_nodes if x in known) for n in order}
        return cls(graph, free, order, reads, _owners(graph))


def _free_of(program: Lowered) -> frozenset[fx.Node]:
    """What ranks send one another is computed once, and handed on: it is not free."""
    inputs = {binding.node for binding in program.inputs}
    free: set[fx.Node] = set()
    for node in program.graph_module.graph.nodes:
        given = node.op == "placeholder" and node.name in inputs
        given = given or node.target in ops.COLLECTIVES
        if node.op != "output" and not given and all(n in free for n in node.all_input_nodes):
            free.add(node)
    return frozenset(free)


def _owners(graph: fx.Graph) -> Owners:
    """By the path of every module, the operators that were made within its forward."""
    found: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            for path in dict.fromkeys(paths_of(node)):
                found.setdefault(path, []).append(node)
    return found


def cut_of(wiring: Wiring, module: str) -> Cut:
    """The cut after ``module``, by its path.

    Raises:
        UsageError: there is no such module, or nothing that it computes is read by others.
    """
    own = {n for n in wiring.within.get(module, ()) if n not in wiring.free}
    outputs = [n for n in sorted(own) if not own.issuperset(n.users)]
    if not outputs:
        raise _unknown(wiring.graph, module)
    return Cut(module, frozenset(own), tuple(outputs), frozenset(_needed(outputs, wiring)))


def cut_before(wiring: Wiring, module: str) -> Cut:
    """The cut before ``module``: what it is given, and all that this is computed from.

    Moves that the module makes are before it, where they are of what it is given, or others read
    them too: how a block is given its part of what is whole, and tables that all blocks read.

    Raises:
        UsageError: see :func:`cut_of`.
    """
    behind = cut_of(wiring, module)
    before, shared = set(behind.before - behind.own), set[fx.Node]()
    for node in sorted(behind.own & behind.before, reverse=True):
        if node.target in MOVES and any(u in shared or u not in behind.own for u in node.users):
            shared.add(node)
    for node in sorted(behind.own & behind.before):
        given = [n for n in node.all_input_nodes if n not in wiring.free]
        known = [n in before or n.op == "placeholder" for n in given]
        if node.target in MOVES and all(known) and (known or node in shared):
            before.add(node)
    own = behind.own - before
    outputs = tuple(n for n in sorted(before) if any(user in own for user in n.users))
    return Cut(module, own, outputs, frozenset(before), enters=True)


def _needed(outputs: Iterable[fx.Node], wiring: Wiring) -> set[fx.Node]:
    """All that these are computed from, they too; of an operator with several results, all."""
    found: set[fx.Node] = set()
    waiting = [node for node in outputs if node in wiring.reads]
    while waiting:
        node = waiting.pop()
        if node in found:
            continue
        found.add(node)
        waiting += wiring.reads[node]
        if not isinstance(node.meta.get("val"), Tensor):
            waiting += [user for user in node.users if user in wiring.reads]
    return found


def paths_of(node: fx.Node) -> list[str]:
    """Of all modules within whose forward the node was made, the outermost first."""
    return [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]


def _unknown(graph: fx.Graph, module: str) -> UsageError:
    known = list(dict.fromkeys(path for n in graph.nodes for path in paths_of(n) if path))
    within = next((path for path in known if path.startswith(f"{module}.")), None)
    if within is not None:
        return UsageError(
            f"--split-after {module}: it computes nothing by itself that others read.",
            hint=f"name a module in it, such as {within}.",
        )
    return UsageError(
        f"--split-after {module}: the program has no module of this path.",
        hint=near(module, known),
    )


def check_order(cuts: Sequence[Cut], wiring: Wiring) -> None:
    """Refuse cuts between, before or behind which nothing lies; they are sorted by size.

    Raises:
        UsageError: there is nothing, or no order of the pieces.
    """
    for first, then in pairwise(cuts):
        if not first.before < then.before:
            both = f"--split-after {first.module} and {then.module}"
            if first.before == then.before:
                raise UsageError(f"{both}: nothing lies between them.", hint="name one of them.")
            raise UsageError(
                f"{both}: neither follows from the other, so no order of two pieces has both ends.",
                hint="name modules that run one after another, such as two blocks.",
            )
    if cuts and is_end(cuts[-1], wiring):
        raise UsageError(
            f"--split-after {cuts[-1].module}: nothing of the program follows it.",
            hint="name a module that others follow, such as a block.",
        )


def is_end(cut: Cut, wiring: Wiring) -> bool:
    """Whether nothing follows a cut."""
    rest = (n for n in reversed(wiring.order) if n.op == "call_function")
    return all(n in cut.before or n.target is _RESULT for n in rest)


def check_narrow(cut: Cut, wiring: Wiring) -> None:
    """Refuse to cut where a stream runs beside the module that is named.

    Raises:
        UsageError: with the stream, and where it is joined.
    """
    followers, before = set(cut.outputs), cut.before
    for node in wiring.order:
        if node not in before and not followers.isdisjoint(wiring.reads[node]):
            followers.add(node)
    for node in wiring.order:
        if node not in before or before.issuperset(node.users) or node in cut.outputs:
            continue
        later = joined_later(node, before, followers)
        if later is not None:
            raise UsageError(
                f"--split-after {cut.module}: a residual is still open there. Beside what "
                f"{cut.module} returns, {list(shape_of(node))} of {module_path(node)} is read, to "
                f"which {module_path(later)} adds it later ({node.name}, {later.name}).",
                hint=f"cut after the whole block: {_block(cut.module)}",
            )


def _block(module: str) -> str:
    """The numbered module that a path is within."""
    names = module.split(".")
    ends = [place for place, name in enumerate(names[:-1]) if name.isdecimal()]
    return f"--split-after {'.'.join(names[: ends[-1] + 1])}." if ends else "name a block."
