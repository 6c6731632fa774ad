"""Ranks, axes and groups: pure arithmetic, no torch, no environment.

Ranks are numbered row-major over the axes, the last axis varying fastest, as in
``torch.distributed.DeviceMesh``. Sizes come in (``--world 8 --mesh cfg=2,tp=2``), groups of ranks
go out. docs/adr/0020 says why the axes stand in this order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Final

from .errors import UsageError

GUIDANCE: Final = "cfg"
SEQUENCE: Final = "cp"
TENSOR: Final = "tp"
AXES: Final = (GUIDANCE, SEQUENCE, TENSOR)
"""Outermost first. Neighbours have the fastest wires, so that the axis with the most traffic is
innermost: tensor parallelism reduces every block's whole activations twice, context parallelism
exchanges a share of Q, K, V and O once, guidance gathers the output once a forward."""


@dataclass(frozen=True)
class Axis:
    """One mesh axis, seen by all ranks at once.

    Attributes:
        name: what the axis is called, such as ``"cp"``.
        groups: disjoint groups of ranks that communicate along this axis; together every rank.
        unit: slots of a spread sequence are padded to a multiple of it on every rank.
    """

    name: str
    groups: tuple[tuple[int, ...], ...]
    unit: int = 1

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
    """Named axes and their sizes, for example ``(("cfg", 2), ("cp", 4), ("tp", 1))``."""

    axes: tuple[tuple[str, int], ...]

    @classmethod
    def line(cls, world: int) -> Mesh:
        """A mesh of one axis called ``cp``."""
        return cls(((SEQUENCE, world),))

    @classmethod
    def of(cls, world: int, cfg: int = 1, tp: int = 1) -> Mesh:
        """``world`` ranks over :data:`AXES`; the sequence has what guidance and weights leave.

        Raises:
            UsageError: they leave no whole number of ranks.
        """
        for name, size in ((GUIDANCE, cfg), (TENSOR, tp)):
            if size < 1:
                raise UsageError(f"--{name} {size}: an axis has at least one rank.")
        if world % (cfg * tp):
            raise UsageError(
                f"--cfg {cfg} times --tp {tp} does not divide the world of {world}.",
                hint=f"--world {cfg * tp} or a multiple of it.",
            )
        return cls(((GUIDANCE, cfg), (SEQUENCE, world // (cfg * tp)), (TENSOR, tp)))

    @classmethod
    def sizes(cls, text: str) -> dict[str, int]:
        """What ``--mesh`` says, by axis: ``cfg=2,tp=2,cp=2``.

        Raises:
            UsageError: it cannot be read.
        """
        found: dict[str, int] = {}
        for part in text.split(","):
            name, _, size = (word.strip() for word in part.partition("="))
            if name not in AXES or not size.isdecimal() or int(size) < 1 or name in found:
                raise UsageError(
                    f"--mesh {text}: {part.strip()!r} is not one of cfg=N, cp=N and tp=N, each "
                    "once.",
                    hint="--mesh cfg=2,tp=2,cp=2 takes eight ranks.",
                )
            found[name] = int(size)
        return found

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

    def size(self, name: str) -> int:
        """How many ranks the axis called ``name`` has; 1 where there is none."""
        return dict(self.axes).get(name, 1)

    @property
    def words(self) -> str:
        """The axes that communicate, as ``--mesh`` takes them: ``cfg=2,cp=4``."""
        return ",".join(f"{name}={size}" for name, size in self.axes if size > 1)

    @property
    def others(self) -> tuple[Axis, ...]:
        """The axes that communicate, besides the sequence's."""
        return tuple(self.axis(name) for name, n in self.axes if name != SEQUENCE and n > 1)

    @property
    def names_groups(self) -> bool:
        """Whether an axis communicates in a part of the ranks."""
        return any(1 < size < self.world for _, size in self.axes)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where ``rank`` stands on every axis."""
        found = {}
        for name, size in reversed(self.axes):
            rank, found[name] = divmod(rank, size)
        return dict(reversed(found.items()))

    def sequence(self, own: Iterable[Axis] = ()) -> Axis:
        """The ranks that share a sequence, in groups.

        Args:
            own: groups in which the model communicates by itself, see :meth:`free`.

        Raises:
            UsageError: ``own`` beside other axes, or cells of different sizes.
        """
        taken = tuple(own)
        if not taken:
            return self.axis(SEQUENCE)
        if self.size(SEQUENCE) < self.world:
            raise UsageError(
                f"--mesh {self.words}: the model has process groups of its own.",
                hint="leave --cfg, --tp and --mesh out: its groups are the other axes.",
            )
        return Mesh.line(self.world).free(taken)

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


def worlds_up_to(largest: int) -> list[int]:
    """Sizes that are worth a look: powers of two up to the largest, and that itself; none for 1."""
    return sorted({2**i for i in range(1, largest.bit_length())} | {largest}) if largest > 1 else []


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
