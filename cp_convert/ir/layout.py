"""How a token dimension is spread over the ranks: pure arithmetic, no torch.

A sharded dimension is a sequence of *segments*, for example text then image. Every segment is cut
into equal parts, one a rank, and a rank holds its parts one after another. All ranks' parts joined
in rank order therefore stand in *shard order* (text0, image0, text1, image1, ...), not in the
order of the model. A segment whose length does not divide is padded at its end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """Tokens that are cut into equal parts together.

    Attributes:
        length: real tokens, on all ranks together.
        local: slots that every rank holds; ``size * local >= length``.
    """

    length: int
    local: int


@dataclass(frozen=True)
class Layout:
    """The segments of one sharded dimension over ``size`` ranks."""

    size: int
    segments: tuple[Segment, ...]

    @classmethod
    def even(cls, lengths: Sequence[int], size: int, unit: int = 1) -> Layout:
        """Segments of these lengths, each padded as little as gives ranks whole units of slots."""
        return cls(size, tuple(Segment(n, unit * -(-n // (size * unit))) for n in lengths))

    @property
    def length(self) -> int:
        """Real tokens on all ranks."""
        return sum(s.length for s in self.segments)

    @property
    def local(self) -> int:
        """Slots of one rank."""
        return sum(s.local for s in self.segments)

    @property
    def padding(self) -> int:
        """Slots of all ranks that hold no token."""
        return self.size * self.local - self.length

    @property
    def is_plain(self) -> bool:
        """Whether shard order is the model's order and there is no padding."""
        return len(self.segments) == 1 and not self.padding

    @property
    def cuts(self) -> tuple[int, ...]:
        """Where segments meet, in the model's order, ends included."""
        ends = [0]
        for segment in self.segments:
            ends.append(ends[-1] + segment.length)
        return tuple(ends)

    def joined(self, other: Layout) -> Layout:
        """Both one after another on every rank."""
        return Layout(self.size, self.segments + other.segments)

    def between(self, start: int, stop: int) -> tuple[Layout, int] | None:
        """The layout of tokens ``start`` to ``stop`` and the first local slot of them.

        ``None`` when the range does not begin and end where segments do.
        """
        cuts = self.cuts
        if start not in cuts or stop not in cuts or start >= stop:
            return None
        first, last = cuts.index(start), cuts.index(stop)
        before = sum(s.local for s in self.segments[:first])
        return Layout(self.size, self.segments[first:last]), before

    def scaled(self, times: int, over: int) -> Layout | None:
        """Every token becomes ``times / over`` of one; ``None`` when that is no whole number."""
        parts = [(s.length * times, s.local * times) for s in self.segments]
        if any(length % over or local % over for length, local in parts):
            return None
        return Layout(self.size, tuple(Segment(n // over, m // over) for n, m in parts))

    def tokens_of(self, rank: int) -> list[tuple[int, int]]:
        """Ranges of the model's order that ``rank`` holds, in its own order; none is empty."""
        ranges = []
        for begin, segment in zip(self.cuts, self.segments, strict=False):
            start = min(rank * segment.local, segment.length)
            stop = min(start + segment.local, segment.length)
            if stop > start:
                ranges.append((begin + start, begin + stop))
        return ranges

    def slots_of(self, rank: int) -> list[tuple[int, int]]:
        """Ranges of local slots that hold tokens on ``rank``; none is empty."""
        ranges, begin = [], 0
        for segment in self.segments:
            real = min(max(segment.length - rank * segment.local, 0), segment.local)
            if real:
                ranges.append((begin, begin + real))
            begin += segment.local
        return merged(ranges)

    @property
    def slots(self) -> list[tuple[int, int]]:
        """Ranges of the joined slots of all ranks that hold tokens."""
        return merged(
            (rank * self.local + start, rank * self.local + stop)
            for rank in range(self.size)
            for start, stop in self.slots_of(rank)
        )

    @property
    def order(self) -> list[tuple[int, int]]:
        """Ranges of the model's order that make up shard order, padding left out."""
        return merged(r for rank in range(self.size) for r in self.tokens_of(rank))


def merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Neighbouring ranges that touch, made one; their order is kept."""
    result: list[tuple[int, int]] = []
    for start, stop in ranges:
        if result and result[-1][1] == start:
            result[-1] = (result[-1][0], stop)
        else:
            result.append((start, stop))
    return result
