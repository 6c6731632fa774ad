"""Packed programs of one model at several sizes to one, in which integers are expressions.

All are the same nodes in the same order. Where an integer differs from size to size, a shape or the
bound of a slice, it becomes a sum over the size ``n`` and the slots ``L(n)`` that a rank holds of a
sequence of that size, rounded up so that ranks have equally many. Coefficients are exact, and every
expression holds at all sizes that came in, of which there is at least one more than coefficients.
What differs otherwise is refused with the place in the model: other operators, numbers that are no
integers, tables whose contents change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm
from typing import Any, Final, NoReturn

import msgspec

from ..errors import CannotLift
from .serialize import Packed
from .tables import place, rebuilt

SIZE: Final = "size"
"""Tag of an expression: a denominator, then coefficients of :meth:`Range.row`."""
_DENSE: Final = "dense"
"""Tag of strides: dimensions in the order in which they lie in memory, outermost first."""
_RANGE: Final = "range"


class Slots(msgspec.Struct, frozen=True):
    """What a rank holds of a sequence of ``(scale n + offset) / under`` tokens.

    It is ``times * ceil(tokens / over)``.
    """

    scale: int
    offset: int
    under: int
    over: int
    times: int

    def length(self, n: int) -> Fraction:
        """Tokens of the whole sequence."""
        return Fraction(self.scale * n + self.offset, self.under)

    def at(self, n: int) -> int:
        """Slots of one rank."""
        return -int(-self.length(n) // self.over) * self.times


class Range(msgspec.Struct, frozen=True):
    """The sizes that a lifted program is for.

    Attributes:
        name: of the argument of ``example_inputs`` that is the size.
        first, last, step: its values.
        slots: what padded sequences take of a rank.
    """

    name: str
    first: int
    last: int
    step: int
    slots: tuple[Slots, ...] = ()

    @property
    def values(self) -> range:
        """All sizes."""
        return range(self.first, self.last + 1, self.step)

    def row(self, n: int) -> list[int]:
        """What expressions are sums over: 1, the size, and the slots."""
        return [1, n, *(one.at(n) for one in self.slots)]


@dataclass(frozen=True)
class Lifted:
    """A program for all sizes of a range, twice.

    Attributes:
        sizes: the range.
        stored: as torch runs it.
        built: as TensorRT is given it.
    """

    sizes: Range
    stored: Packed
    built: Packed


def lift(programs: Mapping[int, Packed], sizes: Range) -> Packed:
    """One program for all sizes.

    Args:
        programs: by size; numbers of the last size's become the result's.
        sizes: for which sizes it has to be.

    Raises:
        CannotLift: the programs differ in more than integers, or these follow no such expression.
    """
    documents = {n: msgspec.msgpack.decode(one.document) for n, one in programs.items()}
    _check_nodes(documents)
    lifted = _Lifting(rebuilt(programs, documents, sizes.last, OTHER_WAY), sizes).result()
    lifted[_RANGE] = msgspec.to_builtins(sizes)
    return Packed(msgspec.msgpack.encode(lifted), programs[max(programs)].tensors)


def range_of(document: Mapping[str, Any]) -> Range | None:
    """The sizes of a lifted program; ``None`` for one of fixed shapes."""
    told = document.get(_RANGE)
    return None if told is None else msgspec.convert(told, Range)


def fill(packed: Packed, n: int) -> Packed:
    """The program at one size.

    Raises:
        ValueError: it is not lifted, or an expression is no whole number there.
    """
    document = msgspec.msgpack.decode(packed.document)
    sizes = range_of(document)
    if sizes is None:
        raise ValueError("the program has fixed shapes")
    del document[_RANGE]
    return Packed(msgspec.msgpack.encode(_filled(document, sizes.row(n))), packed.tensors)


def fill_last(packed: Packed) -> Packed:
    """The program at the largest size of its range.

    Raises:
        ValueError: see :func:`fill`.
    """
    sizes = range_of(msgspec.msgpack.decode(packed.document))
    if sizes is None:
        raise ValueError("the program has fixed shapes")
    return fill(packed, sizes.last)


def value(told: Sequence[int], row: Sequence[int]) -> int:
    """An expression's.

    Raises:
        ValueError: it is no whole number.
    """
    under, *factors = told
    whole, rest = divmod(sum(a * b for a, b in zip(factors, row, strict=True)), under)
    if rest:
        raise ValueError(f"{told} is no whole number at {row}")
    return whole


def _filled(told: Any, row: Sequence[int]) -> Any:
    if isinstance(told, dict):
        if told.keys() == {SIZE}:
            return value(told[SIZE], row)
        return {key: _filled(one, row) for key, one in told.items()}
    if not isinstance(told, list):
        return told
    filled = [_filled(one, row) for one in told]
    if len(filled) == 3 and isinstance(filled[2], dict) and filled[2].keys() == {_DENSE}:
        filled[2] = _strides(filled[1], filled[2][_DENSE])
    return filled


def _strides(shape: Sequence[int], order: Sequence[int]) -> list[int]:
    strides, step = [1] * len(shape), 1
    for dim in reversed(order):
        strides[dim] = step
        step *= max(shape[dim], 1)
    return strides


def _check_nodes(documents: Mapping[int, Any]) -> None:
    """Refuse other operators, with the first place where they are others."""
    (first, own), *others = documents.items()
    hint = f"{_FROM_TWO} {OTHER_WAY}" if 1 in documents else OTHER_WAY
    for n, other in others:
        pairs = zip(own["nodes"], other["nodes"], strict=False)
        for index, (a, b) in enumerate(pairs):
            if a[:3] != b[:3]:
                raise CannotLift(
                    f"the program has {a[2]} at {first} where it has {b[2]} at {n}.",
                    where=place(own, index),
                    hint=hint,
                )
        if len(own["nodes"]) != len(other["nodes"]):
            raise CannotLift(f"the program has other operators at {first} and {n}.", hint=hint)


OTHER_WAY: Final = (
    "several sizes are served by variants as well, each with an engine of its own: --batch, --text "
    "and --resolution, or variants = {...} in a model file."
)

_FROM_TWO: Final = "begin at 2: where there is one of a kind torch leaves copies out. Or:"


class _Lifting:
    """The walk through all documents at once.

    Args:
        documents: by size.
        sizes: see :func:`lift`.
    """

    def __init__(self, documents: Mapping[int, Any], sizes: Range) -> None:
        self._sizes = sizes
        self._documents = documents
        self._points = list(documents)
        self._rows = [sizes.row(n) for n in documents]
        self._known: dict[tuple[int, ...], dict[str, list[int]]] = {}

    def result(self) -> dict[str, Any]:
        """The lifted document."""
        of_all = list(self._documents.values())
        nodes = []
        for index, same in enumerate(zip(*(one["nodes"] for one in of_all), strict=True)):
            *calls, _ = zip(*same, strict=True)
            where = index
            lifted = [self._lifted(part, where) for part in calls[:5]]
            nodes.append([*lifted, self._value(calls[5], where), same[-1][-1]])
        known = {"nodes": nodes, "stacks": of_all[-1]["stacks"]}
        return {
            key: known[key] if key in known else self._lifted([one[key] for one in of_all], None)
            for key in of_all[0]
        }

    def _value(self, told: Sequence[Any], where: int) -> Any:
        """What a node computes: strides of tensors that are dense follow from their shapes."""
        last = told[-1]
        if last is None or last[0] != "tensor":
            return self._lifted(told, where)
        dtype, shape, strides = (list(one) for one in zip(*(t[1] for t in told), strict=True))
        order = sorted(range(len(strides[-1])), key=lambda dim: (-strides[-1][dim], dim))
        is_dense = _strides(shape[-1], order) == strides[-1]
        kept: Any = {_DENSE: order} if is_dense else self._lifted(strides, where)
        return ["tensor", [self._lifted(dtype, where), self._lifted(shape, where), kept]]

    def _lifted(self, told: Sequence[Any], where: int | None) -> Any:
        first = told[0]
        if all(one == first and type(one) is type(first) for one in told):
            return first
        if all(type(one) is int for one in told):
            return self._expression(tuple(told), where)
        if all(isinstance(one, list) and len(one) == len(first) for one in told):
            return [self._lifted(part, where) for part in zip(*told, strict=True)]
        if all(isinstance(one, dict) and one.keys() == first.keys() for one in told):
            if "node" in first:
                self._refuse("other operands", told, where)
            return {key: self._lifted([one[key] for one in told], where) for key in first}
        return self._refuse("arguments that differ in more than whole numbers", told, where)

    def _refuse(self, what: str, told: Sequence[Any], where: int | None) -> NoReturn:
        n, m = self._points[0], self._points[-1]
        document = self._documents[n]
        name = "the program" if where is None else document["nodes"][where][2]
        raise CannotLift(
            f"{name} has {what} at {n} and {m}: {told[0]} and {told[-1]}.",
            where=None if where is None else place(document, where),
            hint=OTHER_WAY,
        )

    def _expression(self, told: tuple[int, ...], where: int | None) -> dict[str, list[int]]:
        if told not in self._known:
            found = _fitted(self._rows, told)
            if found is None or not self._holds(found):
                self._refuse("a number that follows no rule in the size", told, where)
            self._known[told] = {SIZE: found}
        return self._known[told]

    def _holds(self, found: Sequence[int]) -> bool:
        """Whether it is a whole number at every size of the range."""
        try:
            return all(value(found, self._sizes.row(n)) is not None for n in self._sizes.values)
        except ValueError:
            return False


def _fitted(rows: Sequence[Sequence[int]], told: Sequence[int]) -> list[int] | None:
    """The expression that gives ``told``, in as few terms as do: a denominator and coefficients."""
    width = len(rows[0])
    for taken in ([0, 1], *([0, 1, *range(2, last + 1)] for last in range(2, width))):
        if len(taken) >= len(rows):
            return None
        solved = _solved([[row[i] for i in taken] for row in rows], told)
        if solved is not None:
            under = lcm(*(one.denominator for one in solved))
            whole = [0] * width
            for i, one in zip(taken, solved, strict=True):
                whole[i] = int(one * under)
            return [under, *whole]
    return None


def _solved(rows: Sequence[Sequence[int]], told: Sequence[int]) -> list[Fraction] | None:
    """The one exact solution of more equations than unknowns; ``None``: there is none, or many."""
    table = [[*map(Fraction, row), Fraction(one)] for row, one in zip(rows, told, strict=True)]
    width = len(rows[0])
    for column in range(width):
        pivot = next((i for i in range(column, len(table)) if table[i][column]), None)
        if pivot is None:
            return None
        table[column], table[pivot] = table[pivot], table[column]
        head = [one / table[column][column] for one in table[column]]
        table[column] = head
        for i, row in enumerate(table):
            if i != column and row[column]:
                table[i] = [a - row[column] * b for a, b in zip(row, head, strict=True)]
    if any(row[-1] for row in table[width:]):
        return None
    return [row[-1] for row in table[:width]]
