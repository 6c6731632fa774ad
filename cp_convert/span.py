"""A range of sizes: which of them a program is lifted from, and at which it is proven. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from .errors import UsageError

FITTED: Final = 4
"""Sizes that a program is lifted from: three coefficients at most, and one more to hold at."""

MOST: Final = 1 << 16
"""Sizes of a range: every expression is looked at, and every size named, at each of them."""


@dataclass(frozen=True)
class Span:
    """A range of sizes that one program, and one engine a rank, serves.

    Attributes:
        name: of the argument of ``example_inputs`` that is the size; of a preset ``batch`` or
            ``text``.
        first, last, step: its values.
    """

    name: str
    first: int
    last: int
    step: int = 1

    @classmethod
    def read(cls, text: str) -> Span:
        """What ``--dynamic`` says: ``text=64:512`` or ``text=64:512:8``.

        Raises:
            UsageError: it cannot be read.
        """
        name, _, told = text.partition("=")
        numbers = told.split(":")
        is_read = name.isidentifier() and len(numbers) in (2, 3)
        if not is_read or not all(one.isascii() and one.isdecimal() for one in numbers):
            raise UsageError(
                f"--dynamic {text}: it is no NAME=FIRST:LAST or NAME=FIRST:LAST:STEP.",
                hint="--dynamic text=64:512 serves every length from 64 to 512.",
            )
        first, last, step = [*map(int, numbers), 1][:3]
        if first < 1 or step < 1 or last <= first:
            raise UsageError(
                f"--dynamic {text}: a range begins at 1 or more, and ends later; steps are 1 at "
                "least."
            )
        if (last - first) // step >= MOST:
            raise UsageError(
                f"--dynamic {text}: these are more than {MOST} sizes.",
                hint="take steps: NAME=FIRST:LAST:STEP.",
            )
        return cls(name, first, first + (last - first) // step * step, step)

    @property
    def values(self) -> range:
        """All sizes."""
        return range(self.first, self.last + 1, self.step)

    @property
    def words(self) -> str:
        """As ``--dynamic`` takes it."""
        return f"{self.name}={self.first}:{self.last}" + (f":{self.step}" if self.step > 1 else "")

    def divides(self, multiple: int) -> bool:
        """Whether ``multiple`` divides every size."""
        return self.first % multiple == 0 and self.step % multiple == 0

    def fitted(self, multiple: int) -> list[int]:
        """The sizes that a program is lifted from, ascending, the ends or their neighbours first.

        Args:
            multiple: what a sequence's length is padded to. Where it divides all sizes these are
                spread over the range. Where it does not, a program has padding, and only sizes
                that it does not divide are taken: what is right with any padding is right with
                none.

        Raises:
            UsageError: the range has too few.
        """
        padded = not self.divides(multiple)
        taken = [n for n in self.values if n % multiple or not padded]
        if len(taken) < FITTED:
            which = f" that {multiple} does not divide" if padded else ""
            raise UsageError(
                f"--dynamic {self.words}: the program is made at {FITTED} sizes{which}, to see how "
                f"it follows from them, and the range has {len(taken)}.",
                hint="a wider range; or variants, which are engines for a size each.",
            )
        last = len(taken) - 1
        return [taken[i] for i in (0, 1, max(2, last // 2), last)]

    def proven(self, multiple: int) -> list[int]:
        """The ends, those of :meth:`fitted` and one without padding, ascending."""
        found = {*self.fitted(multiple), self.first, self.last}
        if not any(n % multiple == 0 for n in found):
            second = self.values[len(self.values) // 2 :]
            found |= set([n for n in second if n % multiple == 0][:1])
        return sorted(found)
