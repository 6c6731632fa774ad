"""Ranks, axes and groups: pure arithmetic, no torch, no environment.

Ranks are numbered row-major over the axes, the last axis varying fastest, as in
``torch.distributed.DeviceMesh``. A mesh of one axis is what a plain ``--world N`` means.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from .errors import UsageError


@dataclass(frozen=True)
class Axis:
    """One mesh axis, seen by all ranks at once.

    Attributes:
        name: what the axis is called, such as ``"cp"``.
        groups: disjoint groups of ranks that communicate along this axis; together every rank.
    """

    name: str
    groups: tuple[tuple[int, ...], ...]

    def inner(self, size: int) -> Axis:
        """Groups of ``size`` neighbours: members ``0 .. size-1``, then the next."""
        return Axis(
            f"{self.name}.inner",
            tuple(g[i : i + size] for g in self.groups for i in range(0, len(g), size)),
        )

    def outer(self, size: int) -> Axis:
        """Groups of the members that stand at the same place in the groups of :meth:`inner`."""
        return Axis(
            f"{self.name}.outer", tuple(g[i::size] for g in self.groups for i in range(size))
        )

    @property
    def size(self) -> int:
        """How many ranks communicate with one another along the axis."""
        return len(self.groups[0])

    @property
    def flat(self) -> list[int]:
        """All groups one after another: the form in which ``cp::*`` ops carry them."""
        return [rank for group in self.groups for rank in group]


@dataclass(frozen=True)
class Mesh:
    """Named axes and their sizes, for example ``(("cp", 8),)``."""

    axes: tuple[tuple[str, int], ...]

    @classmethod
    def line(cls, world: int) -> Mesh:
        """A mesh of one axis called ``cp``."""
        return cls((("cp", world),))

    @property
    def world(self) -> int:
        """The world size: how many ranks there are."""
        return prod(size for _, size in self.axes)

    @property
    def ranks(self) -> range:
        """All ranks, ascending."""
        return range(self.world)

    def axis(self, name: str) -> Axis:
        """The axis called ``name`` with its groups.

        Raises:
            KeyError: there is no such axis.
        """
        names = [axis for axis, _ in self.axes]
        if name not in names:
            raise KeyError(f"no axis {name!r} in mesh {names}")
        position = names.index(name)
        size = self.axes[position][1]
        stride = prod(s for _, s in self.axes[position + 1 :])
        starts = [r for r in self.ranks if (r // stride) % size == 0]
        return Axis(name, tuple(tuple(s + i * stride for i in range(size)) for s in starts))

    @property
    def whole(self) -> Axis:
        """All axes taken together as one: every rank in a single group."""
        return Axis("+".join(name for name, _ in self.axes), (tuple(self.ranks),))

    def free(self, taken: Iterable[Axis]) -> Axis:
        """The axis that stays free where ranks work together along other axes already.

        Ranks that any group of ``taken`` connects form a cell. Member ``i`` of every cell, ranks
        ascending, stands in group ``i``: beside tensor parallelism over ``[0, 1]`` and ``[2, 3]``
        the free axis is ``[0, 2]`` and ``[1, 3]``. Without any, it is :attr:`whole`.

        Raises:
            UsageError: cells of different sizes.
        """
        cell = {rank: {rank} for rank in self.ranks}
        for group in (group for axis in taken for group in axis.groups):
            joined = set().union(*(cell[rank] for rank in group))
            cell.update(dict.fromkeys(joined, joined))
        cells = sorted({tuple(sorted(members)) for members in cell.values()})
        if len({len(members) for members in cells}) > 1:
            raise UsageError(
                f"the model's process groups connect ranks unequally: {[list(c) for c in cells]}.",
                hint="every rank needs as many peers as the others have.",
            )
        return Axis(self.whole.name, tuple(zip(*cells, strict=True)))


def split_groups(flat: Sequence[int], size: int) -> list[tuple[int, ...]]:
    """The inverse of :attr:`Axis.flat`: ``size`` ranks to a group."""
    return [tuple(flat[i : i + size]) for i in range(0, len(flat), size)]


def bytes_sent(kind: str, payload: int, size: int) -> int:
    """Bytes one rank puts on the wire for one collective of ``payload`` input bytes.

    Averaged over ranks: a broadcast's root sends ``payload`` to ``size - 1`` others, and every
    rank is root as often as the others are.

    Raises:
        KeyError: ``kind`` is no collective of TensorRT's.
    """
    numerator, denominator = {
        "ALL_GATHER": (size - 1, 1),
        "ALL_TO_ALL": (size - 1, size),
        "BROADCAST": (size - 1, size),
        "ALL_REDUCE": (2 * (size - 1), size),
        "REDUCE": (size - 1, size),
        "REDUCE_SCATTER": (size - 1, size),
        "GATHER": (size - 1, size),
        "SCATTER": (size - 1, size * size),
    }[kind]
    return payload * numerator // denominator
