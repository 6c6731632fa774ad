"""Pieces as one program again: what all engines of a rank compute, one after another.

In: the program that was cut, its pieces, and of every kind the lowered program of its first piece.
Out: a lowered program with the inputs, weights and outputs of the whole one. Of a piece that runs
another's engine, operators carry its own modules and lines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx

from .kinds import Twin, by_use, weights_of
from .program import PROVENANCE, Binding, Lowered, erase_dead, module_of
from .serialize import module_rows


def joined(
    whole: Lowered,
    pieces: Sequence[Lowered],
    firsts: Mapping[int, Lowered],
    twins: Sequence[Twin],
    names: Mapping[str, str],
) -> Lowered:
    """All pieces as one program.

    Args:
        whole: what was cut.
        pieces: of it, in their order, as they were cut.
        firsts: by the number of a piece that engines are built of, that piece, lowered.
        twins: of every piece, whose engine it runs.
        names: by placeholder of ``whole``, the binding of a weight that is an engine's input.
    """
    join = _Join(whole)
    for number, twin in enumerate(twins):
        built, is_own = firsts[twin.of], twin.of == number
        origins = {} if is_own else _origins(pieces[twin.of], pieces[number])
        join.add(_Part(built, twin, weights_of(built, names, twin), origins))
    return join.program()


Origin = tuple[Any, Any]
"""The modules whose forward made an operator, and the lines."""
Origins = Mapping[Origin, Mapping[str, Any]]


def _origins(built: Lowered, own: Lowered) -> Origins:
    """What operators of a piece tell of their origin, by that of those that are built."""
    pairs = zip(by_use(built.graph_module.graph), by_use(own.graph_module.graph), strict=True)
    found: dict[Origin, Mapping[str, Any]] = {}
    for theirs, ours in pairs:
        found.setdefault(_origin(theirs), {k: ours.meta[k] for k in PROVENANCE if k in ours.meta})
    return found


def _origin(node: fx.Node) -> Origin:
    return module_rows(node), node.meta.get("stack_trace")


@dataclass(frozen=True)
class _Part:
    """What is known of a piece.

    Attributes:
        built: what its engine is built of.
        twin: whose that is, and what its bindings are called here.
        weights: by its placeholders, those of the whole program.
        origins: where operators come from, where that is not as in ``built``.
    """

    built: Lowered
    twin: Twin
    weights: Mapping[str, str]
    origins: Origins

    def called(self, binding: Binding) -> str:
        """The name of a binding here."""
        return self.twin.names.get(binding.name, binding.name)


class _Join:
    """A program that is being put together; ``whole`` is what it is to compute."""

    def __init__(self, whole: Lowered) -> None:
        self._whole, self._graph = whole, fx.Graph()
        self._placeholders: dict[str, fx.Node] = {}
        for node in whole.graph_module.graph.find_nodes(op="placeholder"):
            own = self._placeholders[node.name] = self._graph.placeholder(node.name)
            own.meta, own.name = dict(node.meta), node.name
        self._made = {one.name: self._placeholders[one.node] for one in whole.inputs}
        self._held: dict[str, Tensor] = {}
        self._ends: tuple[fx.Node, ...] = ()

    def add(self, part: _Part) -> None:
        """One piece more."""
        given = {one.node: self._made[part.called(one)] for one in part.built.inputs}
        twins: dict[fx.Node, fx.Node] = {}
        for node in part.built.graph_module.graph.nodes:
            if node.op == "placeholder":
                own = part.weights.get(node.name, node.name)
                twins[node] = given.get(node.name) or self._placeholders[own]
            elif node.op == "output":
                self._ends = tuple(twins[one] for one in node.all_input_nodes)
            else:
                twins[node] = self._copied(node, part, twins)
        for binding, end in zip(part.built.outputs, self._ends, strict=True):
            (self._made[part.called(binding)],) = end.all_input_nodes  # of cp::result

    def _copied(self, node: fx.Node, part: _Part, twins: Mapping[fx.Node, fx.Node]) -> fx.Node:
        own = self._graph.node_copy(node, twins.__getitem__)
        if part.origins:
            own.meta |= part.origins.get(_origin(node), {})
        if node.op == "get_attr":
            own.target = f"{node.target}_of_{part.twin.of}"
            self._held[own.target] = getattr(part.built.graph_module, str(node.target))
        return own

    def program(self) -> Lowered:
        """All pieces that were added."""
        self._graph.output(self._ends)
        erase_dead(self._graph)
        self._graph.lint()
        outputs = zip(self._whole.outputs, self._ends, strict=True)
        return replace(
            self._whole,
            graph_module=module_of(self._held, self._graph),
            outputs=tuple(replace(one, node=node.name) for one, node in outputs),
        )
