"""A lifted program as one rank's program for the converters, its sizes as operators.

A packed program for a range of sizes comes in (:mod:`..ir.lift`), one goes out in which every
number that follows the size is computed from an input's dimension, and whose inputs know their
smallest and their largest shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import lcm
from typing import Any, Final

import msgspec
import torch
from torch import fx

from ..errors import CannotLower
from ..ir.extents import EXPANDED, EXTENT, FILLED, RESHAPED, SLICED
from ..ir.lift import SIZE, Range, fill, range_of, value
from ..ir.program import Lowered, arguments, module_path, source_line, tensor_of
from ..ir.serialize import Packed, unpack
from .specialise import own_first, specialise

aten: Final = torch.ops.aten
_SHARD: Final = torch.ops.cp.shard.default
Told = Any
"""Of a lifted document: a whole number or an expression, or a list of them."""


def symbolic(packed: Packed, rank: int) -> Lowered:
    """The program of ``rank`` for all sizes of its range.

    Raises:
        CannotLower: an operator whose shape follows the size, and that is not known as such.
    """
    document = msgspec.msgpack.decode(packed.document)
    sizes = range_of(document)
    assert sizes is not None
    program = unpack(fill(packed, sizes.last))
    _Writer(program, document, sizes, rank).run()
    least = [_shape(told[3], sizes.row(sizes.first)) for told in document["inputs"]]
    inputs = tuple(replace(b, least=s) for b, s in zip(program.inputs, least, strict=True))
    return specialise(replace(program, inputs=inputs), rank)


def _shape(told: Sequence[Told], row: Sequence[int]) -> tuple[int, ...]:
    return tuple(one if isinstance(one, int) else value(one[SIZE], row) for one in told)


class _Writer:
    """Replaces what follows the size, in place.

    Args:
        program: at the largest size.
        document: the lifted one, with the same nodes.
        sizes: the range.
        rank: whose program it becomes.
    """

    def __init__(
        self, program: Lowered, document: Mapping[str, Any], sizes: Range, rank: int
    ) -> None:
        self._graph, self._sizes, self._rank = program.graph_module.graph, sizes, rank
        self._nodes = list(self._graph.nodes)
        self._document = document
        self._extents: dict[tuple[bool, tuple[int, ...]], fx.Node] = {}
        self._after = list(self._graph.find_nodes(op="placeholder"))[-1]
        self._slots = [n for one in sizes.slots for n in msgspec.structs.astuple(one)]
        self._source = self._given()

    def _given(self) -> tuple[fx.Node, int, list[int]]:
        """The input and its dimension that tells the size, and how."""
        by_name = {node.name: node for node in self._nodes}
        for _, node, _, shape in self._document["inputs"]:
            for dim, one in enumerate(shape):
                if isinstance(one, dict) and not any(one[SIZE][3:]):
                    under, offset, scale, *_ = one[SIZE]
                    return by_name[node], dim, [scale, offset, under]
        raise CannotLower("no input's shape tells the size.")

    def run(self) -> None:
        """Replace all."""
        for node, told in zip(self._nodes, self._document["nodes"], strict=True):
            if node.op == "call_function" and (_follows(told[3:5]) or self._is_shard(node, told)):
                self._replace(node, told)
        self._graph.eliminate_dead_code()
        self._graph.lint()

    def _is_shard(self, node: fx.Node, told: Sequence[Any]) -> bool:
        return node.target is _SHARD and isinstance(told[5][1][1][_dim(node)], dict)

    def _replace(self, node: fx.Node, told: Sequence[Any]) -> None:
        if node.target is aten.split_with_sizes.default:
            self._split(node, told)
            return
        rewrite = _KNOWN.get(node.target)
        found = None if rewrite is None else rewrite(node, told, self)
        if found is None:
            raise CannotLower(
                f"{node.target} follows the size in a way that engines for a range do not know.",
                where=f"{module_path(node)} ({source_line(node) or 'source unknown'})",
                hint="--program yes serves a range by torch alone; variants have an engine each.",
            )
        self._put(node, *found)

    def _split(self, node: fx.Node, told: Sequence[Any]) -> None:
        """Pieces of lengths that follow the size, as slices."""
        lengths, dim = told[3][1], int(arguments(node)["dim"])
        for piece in list(node.users):
            index: Any = piece.args[1]
            start = self.number(_added(lengths[:index], len(self._slots) // 5))
            length = self.number(lengths[index])
            whole = tensor_of(piece).dim()
            self._put(piece, SLICED, (node.args[0], dim % whole, start, length))
        self._graph.erase_node(node)

    def _put(self, node: fx.Node, target: Any, args: tuple[Any, ...]) -> None:
        with self._graph.inserting_before(node):
            new = self._graph.call_function(target, args)
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        self._graph.erase_node(node)
        new.name = node.name

    def number(self, told: Told, times: int | None = None) -> Any:
        """A whole number, or the node that computes it.

        Args:
            told: the number or expression.
            times: how many times that; all ranks' programs have the same nodes, whatever it is.
        """
        if not isinstance(told, dict):
            return told * (1 if times is None else times)
        under, *factors = told[SIZE]
        known = (under, *(one if times is None else times * one for one in factors))
        if (times is None, known) not in self._extents:
            source, dim, own = self._source
            with self._graph.inserting_after(self._after):
                node = self._graph.call_function(
                    EXTENT, (source, dim, own, list(known), self._slots)
                )
            node.meta["val"] = value(known, self._sizes.row(self._sizes.last))
            self._after = self._extents[times is None, known] = node
        return self._extents[times is None, known]

    def numbers(self, told: Sequence[Told]) -> list[Any]:
        """See :meth:`number`."""
        return [self.number(one) for one in told]

    @property
    def rank(self) -> int:
        """Whose program it becomes."""
        return self._rank


def _added(told: Sequence[Told], slots: int) -> Told:
    """The sum of numbers and expressions."""
    if all(isinstance(one, int) for one in told):
        return sum(told)
    width = 2 + slots
    rows = [one[SIZE] if isinstance(one, dict) else [1, one, *[0] * (width - 1)] for one in told]
    under = lcm(*(row[0] for row in rows))
    return {SIZE: [under, *(sum(row[i] * under // row[0] for row in rows)
                            for i in range(1, width + 1))]}  # fmt: skip


def _follows(told: Told) -> bool:
    if isinstance(told, dict):
        return told.keys() == {SIZE} or any(_follows(one) for one in told.values())
    return isinstance(told, list) and any(_follows(one) for one in told)


def _dim(node: fx.Node) -> int:
    dim: Any = node.args[1]
    return int(dim) % tensor_of(node).dim()


Rewritten = tuple[Any, tuple[Any, ...]] | None
Rewrite = Callable[[fx.Node, Sequence[Any], _Writer], Rewritten]


def _reshaped(node: fx.Node, told: Sequence[Any], write: _Writer) -> Rewritten:
    return RESHAPED, (node.args[0], write.numbers(told[5][1][1]))


def _expanded(node: fx.Node, told: Sequence[Any], write: _Writer) -> Rewritten:
    whole: Any = node.args[0]
    if tensor_of(whole).dim() != tensor_of(node).dim():
        return None
    return EXPANDED, (whole, write.numbers(told[5][1][1]))


def _filled(node: fx.Node, told: Sequence[Any], write: _Writer) -> Rewritten:
    return FILLED, (write.numbers(told[5][1][1]), node.args[1], tensor_of(node).dtype)


def _sliced(node: fx.Node, told: Sequence[Any], write: _Writer) -> Rewritten:
    given = arguments(node)
    if given["step"] != 1:
        return None
    start = told[3][2] if len(told[3]) > 2 else 0
    if isinstance(start, int) and start < 0:
        return None
    dim = int(given["dim"]) % tensor_of(node).dim()
    length = told[5][1][1][dim]
    return SLICED, (node.args[0], dim, write.number(start or 0), write.number(length))


def _own_shard(node: fx.Node, told: Sequence[Any], write: _Writer) -> Rewritten:
    x, _, flat, size = node.args
    index = own_first(flat, size, write.rank).index(write.rank)
    dim = _dim(node)
    length = told[5][1][1][dim]
    return SLICED, (x, dim, write.number(length, index), write.number(length))


_KNOWN: Final[Mapping[Any, Rewrite]] = {
    aten.view.default: _reshaped,
    aten.reshape.default: _reshaped,
    aten._reshape_copy.default: _reshaped,
    aten.expand.default: _expanded,
    aten.full.default: _filled,
    aten.slice.Tensor: _sliced,
    _SHARD: _own_shard,
}
