"""How the ranks of an axis share parameters: which part of each is whose.

A parameter is cut along one dimension, each of its segments into equal parts (:mod:`.layout`), so
that a packed matrix gives every rank its heads of the queries, of the keys, of the values. What
goes out are a rank's numbers, and where they lie in a file that holds the whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ..mesh import Axis
from .layout import Layout
from .program import Lowered
from .sharded import Move


@dataclass(frozen=True)
class Share:
    """How one parameter is cut.

    Attributes:
        dim: along which dimension.
        layout: into which segments, over how many ranks.
    """

    dim: int
    layout: Layout

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Of one rank's part."""
        return (*whole[: self.dim], self.layout.local, *whole[self.dim + 1 :])

    def of(self, whole: Tensor, member: int) -> Tensor:
        """The part of the axis' member; a view where it is one range of ``whole``."""
        ranges = self.layout.tokens_of(member)
        parts = [whole.narrow(self.dim, start, stop - start) for start, stop in ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)

    def pieces(self, whole: Tensor, member: int, most: int) -> Iterator[Tensor]:
        """The same numbers in row-major order, about ``most`` at once and a row at least."""
        if prod(whole.shape[: self.dim]) > 1:
            rows = max(1, most // prod(self.shape(tuple(whole.shape))[1:]))
            for some in whole.split(rows):
                yield self.of(some, member)
            return
        for start, stop in self.layout.tokens_of(member):
            yield from whole.narrow(self.dim, start, stop - start).reshape(-1).split(most)

    def place(self, whole: tuple[int, ...], member: int) -> tuple[int, int] | None:
        """First number and count of the part in row-major order; ``None``: it is in pieces."""
        ranges = self.layout.tokens_of(member)
        if prod(whole[: self.dim]) > 1 or len(ranges) > 1:
            return None
        row = prod(whole[self.dim + 1 :])
        ((start, stop),) = ranges
        return start * row, (stop - start) * row


@dataclass(frozen=True)
class Shares:
    """Which parameters are shared, by the model's own names, and by which ranks."""

    of: Mapping[str, Share]
    axis: Axis

    def ranks(self, member: int) -> tuple[int, ...]:
        """Those that stand at the place ``member`` of the axis, ascending."""
        return tuple(sorted(group[member] for group in self.axis.groups))


class Shared(Mapping[str, tuple[Tensor, ...]]):
    """Every rank's part of every shared parameter, rank 0 first, made when it is asked for.

    Ranks that stand at the same place of the axis have one tensor in common.
    """

    def __init__(
        self, wholes: Mapping[str, Tensor], shares: Mapping[str, Share], axis: Axis
    ) -> None:
        self._wholes, self._shares, self._axis = wholes, shares, axis

    def __getitem__(self, name: str) -> tuple[Tensor, ...]:
        share, whole = self._shares[name], self._wholes[name]
        parts = [share.of(whole, member) for member in range(self._axis.size)]
        places = {r: i for group in self._axis.groups for i, r in enumerate(group)}
        return tuple(parts[places[rank]] for rank in sorted(places))

    def __contains__(self, name: object) -> bool:
        return name in self._shares  # a Mapping's own would make the parts

    def __iter__(self) -> Iterator[str]:
        return iter(self._shares)

    def __len__(self) -> int:
        return len(self._shares)


@dataclass(frozen=True)
class Declared:
    """What a model's own plan says of one matrix.

    Attributes:
        module: whose ``weight`` it is.
        line: of the plan.
        dim: which dimension of ``[out, in]`` ranks share.
        blocks: the lengths of what is shared by itself; one where the matrix is not packed.
    """

    module: str
    line: str
    dim: int
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class Kept:
    """An attention or a matrix that stays whole on every rank, and why.

    Attributes:
        module, source: where the model computes it.
        reason: in words.
    """

    module: str
    source: str | None
    reason: str


@dataclass(frozen=True)
class Divided:
    """A program whose ranks share weights.

    Attributes:
        program: the program; the shared ones among its parameters are every rank's own.
        axis: the ranks that share.
        shares: by placeholder, how its parameter is cut.
        moves: what was split, gathered and reduced on the way.
        kept: attentions that stay whole on every rank.
    """

    program: Lowered
    axis: Axis
    shares: Mapping[str, Share]
    moves: tuple[Move, ...]
    kept: tuple[Kept, ...]

    @property
    def spared(self) -> int:
        """Bytes of weights that a rank leaves to the others."""
        parts = sum(self.program.state[name].nbytes for name in self.shares)
        return (self.axis.size - 1) * parts

    def named(self, names: Mapping[str, str]) -> Shares:
        """The shares by other ``names`` of the placeholders."""
        return Shares({names[node]: share for node, share in self.shares.items()}, self.axis)
