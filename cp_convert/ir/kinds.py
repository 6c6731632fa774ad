"""Which pieces of a program are of one kind: the same operators, on other weights.

Pieces come in, and of each goes out the number of the one whose engine it runs, and what every
binding of that engine is called in this piece. Two are of one kind where they are equal in
everything but names: operators, arguments, shapes, types, and the numbers of constants. Names of
weights, of inputs and of values between pieces are told by the place where they are first read.
Which modules and lines made an operator does not count: layers of the engine are named after the
first piece's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import msgspec
from torch import Tensor, fx

from .program import Binding, Lowered, names_in
from .selected import Selected
from .serialize import plain, target_name, told_tensor, told_value
from .tensors import numbers


@dataclass(frozen=True)
class Twin:
    """Whose engine a piece runs.

    Attributes:
        of: the number of the piece that the engine is built from; of that piece, its own.
        names: by the engine's binding, this piece's: weights, inputs and outputs.
    """

    of: int
    names: Mapping[str, str]

    @property
    def renames(self) -> bool:
        """Whether the engine was built from another piece."""
        return any(theirs != own for theirs, own in self.names.items())


@dataclass(frozen=True)
class _Kind:
    """A piece without names: what it computes, and its bindings in the order of their places."""

    key: bytes
    bindings: tuple[str, ...]


def twins_of(programs: Sequence[Lowered], names: Mapping[str, str]) -> tuple[Twin, ...]:
    """Of every piece, the first one of its kind.

    Args:
        programs: of the pieces, in their order.
        names: by placeholder, the binding of a weight that is an engine's input.
    """
    digests = _Digests()
    firsts: dict[bytes, tuple[int, _Kind]] = {}
    twins = []
    for number, program in enumerate(programs):
        own = _kind(program, names_in(program, names), digests)
        of, first = firsts.setdefault(own.key, (number, own))
        twins.append(Twin(of, dict(zip(first.bindings, own.bindings, strict=True))))
    return tuple(twins)


def through(built: Lowered, names: Mapping[str, str], twin: Twin, whole: Lowered) -> Lowered:
    """What the engine of ``built`` computes where it is given the bindings of a piece of its kind.

    Args:
        built: the program of the piece that is built.
        names: by placeholder, the binding of a weight that is an engine's input.
        twin: of the piece.
        whole: has the weights of all pieces.
    """
    if not twin.renames:
        return built
    given = weights_of(built, names, twin)
    return replace(
        built,
        state={node: whole.state[given.get(node, node)] for node in built.state},
        own=Selected(whole.own, {node: own for node, own in given.items() if own in whole.own}),
        inputs=tuple(_renamed(one, twin) for one in built.inputs),
        outputs=tuple(_renamed(one, twin) for one in built.outputs),
    )


def weights_of(built: Lowered, names: Mapping[str, str], twin: Twin) -> dict[str, str]:
    """By the placeholders of ``built`` that are inputs of its engine, those that the piece has."""
    nodes = {name: node for node, name in names.items()}
    return {node: nodes[twin.names[name]] for node, name in names_in(built, names).items()}


def _renamed(binding: Binding, twin: Twin) -> Binding:
    return replace(binding, name=twin.names[binding.name])


_INPUT: Final = "input"
_WEIGHT: Final = "weight"


def _kind(program: Lowered, names: Mapping[str, str], digests: _Digests) -> _Kind:
    places: dict[fx.Node, int] = {}
    called, rows = dict[fx.Node, str](), list[Any]()
    inputs = {one.node: one.name for one in program.inputs}
    for node in by_use(program.graph_module.graph):
        if node.op == "placeholder":
            rows.append(_given(program, node, inputs, names, digests))
            if (name := inputs.get(node.name, names.get(node.name))) is not None:
                called[node] = name
        elif node.op == "get_attr":
            rows.append(digests.of(getattr(program.graph_module, str(node.target))))
        else:
            args = plain(list(node.args), places, node)
            kwargs = {key: plain(node.kwargs[key], places, node) for key in sorted(node.kwargs)}
            rows.append((target_name(node), args, kwargs, _value(node)))
        places[node] = len(places)
    ends = {one.node: one.name for one in program.outputs}
    end = program.graph_module.graph.output_node()
    returned = [node for node in end.all_input_nodes if node.name in ends]
    rows.append([places[node] for node in returned])
    bindings = (*called.values(), *(ends[node.name] for node in returned))
    return _Kind(hashlib.sha256(msgspec.msgpack.encode(rows)).digest(), bindings)


def by_use(graph: fx.Graph) -> list[fx.Node]:
    """All nodes, each behind what it reads: in an order that follows from what is read alone."""
    found: dict[fx.Node, None] = {}
    for root in (graph.output_node(), *graph.nodes):
        waiting = [root]
        while waiting:
            node = waiting[-1]
            missing = [one for one in node.all_input_nodes if one not in found]
            if missing:
                waiting.append(missing[0])
            else:
                found[waiting.pop()] = None
    return list(found)


def _given(
    program: Lowered,
    node: fx.Node,
    inputs: Mapping[str, str],
    names: Mapping[str, str],
    digests: _Digests,
) -> Any:
    """An input by its type and shape, and so a weight that is one; another by its numbers."""
    if node.name in inputs or node.name in names:
        kind = _INPUT if node.name in inputs else _WEIGHT
        held = node.meta["val"] if node.name in inputs else program.state[node.name]
        return kind, told_tensor(held)
    if node.name in program.own:
        return [digests.of(one) for one in program.own[node.name]]
    return digests.of(program.state[node.name])


def _value(node: fx.Node) -> Any:
    """What a node gives, without how that lies in memory, which decides nothing."""
    told = told_value(node.meta.get("val"))
    return _without_strides(told)


def _without_strides(told: Any) -> Any:
    if told is None:
        return None
    kind, rest = told
    if kind == "tensor":
        return rest[:2]
    return [_without_strides(one) for one in rest] if kind in ("list", "tuple") else rest


class _Digests:
    """Of tensors, each looked through once."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, str]] = {}

    def of(self, tensor: Tensor) -> Any:
        """Type, shape and SHA-256 of the numbers."""
        if id(tensor) not in self._known:
            digest = hashlib.sha256(numbers(tensor)).hexdigest()
            self._known[id(tensor)] = tensor, digest  # held, so that no other gets its id
        return told_tensor(tensor), self._known[id(tensor)][1]
