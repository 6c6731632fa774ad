"""One program as several that run one after another, cut after modules that are named.

A program of all ranks comes in, whole, and its pieces go out: each a program with inputs of
forward, weights, and what earlier pieces computed, as it lies on the ranks. A piece holds what the
outputs of its last module need and no earlier piece has computed; the last piece, the rest. What
follows from weights and constants alone is computed by every piece that reads it.

::

    transformer_blocks.0 | ... | single_transformer_blocks.37    |
    embedders, block 0   |     | the other blocks                | norm_out, proj_out
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import fx

from .blocks import cuts_between
from .cuts import MOVES, Cut, Place, Wiring, check_narrow, check_order, cut_of, paths_of
from .program import Binding, Lowered, module_of, module_path, tensor_of
from .selected import Selected
from .streams import origin
from .writer import Writer

BETWEEN: Final = "between."
"""What the names of values begin with that one piece hands to another."""
RESIDUAL: Final = f"{BETWEEN}residual"
_RESULT: Final = torch.ops.cp.result.default


@dataclass(frozen=True)
class Piece:
    """One of them.

    Attributes:
        end: where it ends; ``None`` for the last.
        program: its inputs are forward's, by their names, and values of earlier pieces.
    """

    end: Place | None
    program: Lowered

    @property
    def after(self) -> str | None:
        """The module at whose end it ends, if it does."""
        return None if self.end is None or self.end.enters else self.end.module

    @property
    def before(self) -> str | None:
        """The module at whose beginning it ends, if it does."""
        return self.end.module if self.end is not None and self.end.enters else None


@dataclass(frozen=True)
class Step:
    """What a cache over steps needs to know: the pieces between the first and the last are skipped.

    Attributes:
        residual: an output of the last of the ``first``: what blocks have added to a stream.
        streams: of every stream that the ``last`` read its name as the first leave it, and as the
            last take it.
        first, last: how many pieces are computed in any case, at the beginning and at the end.
    """

    residual: str
    streams: tuple[tuple[str, str], ...]
    first: int = 1
    last: int = 1


@dataclass(frozen=True)
class Pieces:
    """A whole program in pieces.

    Attributes:
        all: in the order in which they run.
        step: see :class:`Step`; ``None`` where pieces cannot be skipped.
        why_not: why they cannot.
    """

    all: tuple[Piece, ...]
    step: Step | None
    why_not: str | None = None

    @property
    def programs(self) -> tuple[Lowered, ...]:
        """Of all pieces."""
        return tuple(one.program for one in self.all)


def split(program: Lowered, modules: Sequence[str], places: Sequence[Place] = ()) -> Pieces:
    """``program`` in pieces, one for each of ``modules`` and one for the rest; it stays as it is.

    Args:
        program: of all ranks, or of one.
        modules: paths; the order does not matter. What may be skipped lies between these.
        places: where the program is cut besides, if it is narrow there (:mod:`.blocks`).

    Raises:
        UsageError: there is no such module, nothing lies before, between or behind them, or the
            program is not narrow there: a residual is still open.
    """
    wiring = Wiring.of(program)
    named = sorted((cut_of(wiring, name) for name in modules), key=lambda cut: len(cut.before))
    check_order(named, wiring)
    for cut in named:
        check_narrow(cut, wiring)
    cuts = cuts_between(wiring, named, places) if places else named
    place = dict.fromkeys(wiring.order, 0)
    for number, cut in enumerate(cuts, 1):
        place |= dict.fromkeys(place.keys() - cut.before, number)
    own: dict[int, list[fx.Node]] = {}
    for node in wiring.order:
        if node.op != "output":
            own.setdefault(place[node], []).append(node)
    step, why_not = _step(named, cuts, place)
    whole = _Whole(program, place, own, wiring.free, len(cuts), step)
    ends = [*(cut.place for cut in cuts), None]
    pieces = tuple(Piece(end, whole.piece(number)) for number, end in enumerate(ends))
    return Pieces(pieces, None if step is None else step.told, why_not)


@dataclass(frozen=True)
class _Entered:
    """The first pieces' stream: how it leaves them and where it began; and what is told of it."""

    entered: tuple[fx.Node, fx.Node]
    told: Step


def _step(
    named: Sequence[Cut], cuts: Sequence[Cut], place: Mapping[fx.Node, int]
) -> tuple[_Entered | None, str | None]:
    """What a cache over steps needs, or why there cannot be one."""
    if not named:
        return None, "no --split-after says where what may be skipped begins and ends"
    if len(named) < 2:
        return None, "a first and a last piece leave nothing between them to skip"
    first, count = named[0], cuts.index(named[0]) + 1
    end, last = cuts.index(named[-1]) + 1, len(cuts)
    leaving = [n for n in place if place[n] < count and n in first.outputs]
    streams: list[tuple[fx.Node, fx.Node]] = []
    for node in place:
        if not count <= place[node] < end or all(place.get(u, last) < end for u in node.users):
            continue
        entered = origin(node, leaving.__contains__)
        if entered is None:
            return None, f"the last piece reads {node.name} of {module_path(node)}, no stream"
        streams.append((entered, node))
    if not streams:
        return None, "the last piece reads nothing of those between"
    main = max((entered for entered, _ in streams), key=lambda n: tensor_of(n).numel())
    began = origin(main, _enters(first.module))
    if began is None:
        return None, f"{first.module} adds to no stream"
    pairs = tuple((BETWEEN + a.name, BETWEEN + b.name) for a, b in streams)
    return _Entered((main, began), Step(RESIDUAL, pairs, count, last + 1 - end)), None


def _enters(module: str) -> Callable[[fx.Node], bool]:
    """Whether a node is what the list of blocks, of which ``module`` is one, is given."""
    *names, last = module.split(".")
    within = ".".join([*names, ""]) if last.isdecimal() and names else f"{module}."

    def begins(node: fx.Node) -> bool:
        if not any(f"{path}.".startswith(within) for path in paths_of(node)):
            return True
        return node.target in MOVES and all(map(begins, node.all_input_nodes))

    return begins


@dataclass(frozen=True)
class _Whole:
    """A program, and the number of the piece of every operator that follows from inputs."""

    program: Lowered
    place: Mapping[fx.Node, int]
    own: Mapping[int, Sequence[fx.Node]]
    free: Collection[fx.Node]
    last: int
    step: _Entered | None

    def piece(self, number: int) -> Lowered:
        """The program of one; that at whose end the residual is known also returns it."""
        residual = self._residual(number)
        graph, twins = fx.Graph(), dict[fx.Node, fx.Node]()
        own = self.own[number]
        needed = self._needed(own, residual, number)
        for node in needed:
            if node.op == "placeholder" or node in self.place:
                twins[node] = graph.placeholder(node.name)
                twins[node].meta = dict(node.meta)
                twins[node].name = node.name
        body = {*own, *(n for n in needed if n not in twins)}
        for node in sorted(body):
            twins[node] = graph.node_copy(node, twins.__getitem__)
            twins[node].name = node.name
        outputs = self._outputs(graph, twins, own, number)
        graph.lint()
        return self._program(graph, needed, outputs)

    def _residual(self, number: int) -> Sequence[fx.Node]:
        """A stream as the first pieces leave it and as it began, in the last of them."""
        is_told = self.step is not None and number == self.step.told.first - 1
        return self.step.entered if self.step is not None and is_told else ()

    def _needed(
        self, own: Sequence[fx.Node], residual: Sequence[fx.Node], number: int
    ) -> list[fx.Node]:
        """What the piece reads and does not compute itself, in the program's order."""
        found: set[fx.Node] = set()
        waiting = [*residual, *(x for node in own for x in node.all_input_nodes)]
        if number == self.last:
            waiting += self.program.graph_module.graph.output_node().all_input_nodes
        while waiting:
            node = waiting.pop()
            if node not in found and self.place.get(node) != number:
                found.add(node)
                waiting += node.all_input_nodes if node in self.free else []
        return sorted(found)

    def _outputs(
        self,
        graph: fx.Graph,
        twins: Mapping[fx.Node, fx.Node],
        own: Sequence[fx.Node],
        number: int,
    ) -> tuple[Binding, ...]:
        """What the piece returns; forward's own outputs are the last one's."""
        if number == self.last:
            end = self.program.graph_module.graph.output_node()
            graph.output(fx.map_arg(end.args[0], twins.__getitem__))
            return self.program.outputs
        write = Writer(graph)
        handed = {BETWEEN + n.name: twins[n] for n in own if self._is_read_later(n, number)}
        if residual := self._residual(number):
            after, before = (twins[node] for node in residual)
            write.origin = after
            handed[RESIDUAL] = write.op(torch.ops.aten.sub.Tensor, after, before)
        results: dict[str, fx.Node] = {}
        for name, node in handed.items():
            write.origin = node
            results[name] = write.op(_RESULT, node)
        graph.output(tuple(results.values()))
        return tuple(_binding(name, node) for name, node in results.items())

    def _is_read_later(self, node: fx.Node, number: int) -> bool:
        if any(self.place.get(user, self.last) > number for user in node.users):
            return True
        step = self.step
        return step is not None and node in step.entered and number < step.told.first - 1

    def _program(
        self, graph: fx.Graph, needed: Sequence[fx.Node], outputs: tuple[Binding, ...]
    ) -> Lowered:
        given = {node.name for node in needed}
        whole = self.program
        between = [_binding(BETWEEN + n.name, n) for n in needed if n in self.place]
        return Lowered(
            module_of(whole.graph_module, graph),
            {name: tensor for name, tensor in whole.state.items() if name in given},
            (*(b for b in whole.inputs if b.node in given), *between),
            outputs,
            Selected(whole.own, {name: name for name in whole.own if name in given}),
        )


def _binding(name: str, node: fx.Node) -> Binding:
    value = tensor_of(node)
    return Binding(name, node.name, value.dtype, tuple(value.shape))
