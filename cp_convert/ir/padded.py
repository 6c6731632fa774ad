"""What ranks hold of a sequence whose length follows a size: arithmetic on a range, no torch.

In: lengths at two sizes. Out: what a rank holds at all of them, and the complaint where one would
hold nothing: the program is another one there.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from math import lcm

from ..errors import CannotLift
from .lift import Range, Slots


def slots_of(lengths: Mapping[int, int], multiple: int, unit: int) -> Slots:
    """What a rank holds of a sequence that has these lengths at two sizes.

    Args:
        lengths: by size; the first two are looked at.
        multiple: what a length is padded to.
        unit: of slots.
    """
    (n, first), (m, second), *_ = lengths.items()
    scale = Fraction(second - first, m - n)
    offset = first - scale * n
    under = lcm(scale.denominator, offset.denominator)
    return Slots(int(scale * under), int(offset * under), under, multiple, unit)


def check_ranks(sizes: Range, ranks: int) -> None:
    """Refuse sizes at which a rank would hold padding alone.

    Raises:
        CannotLift: there are some, with the largest of them.
    """
    for one in sizes.slots:
        empty = [n for n in sizes.values if (ranks - 1) * one.at(n) >= one.length(n)]
        if empty:
            raise CannotLift(
                f"at {sizes.name}={empty[-1]} the last of {ranks} ranks holds padding alone.",
                hint=f"begin the range above that: --dynamic {sizes.name}={empty[-1] + 1}:"
                f"{sizes.last}.",
            )
