"""What the ranks may lose in the job's precision, and against what that is measured. ADR 4."""

from __future__ import annotations

import math
from typing import Final

from torch import Tensor

from ..errors import ProofFailed
from ..ir.proof import FLOOR, Error
from .measure import Truth

MARGIN: Final = 2.0
"""How many times the dense model's own loss the ranks may lose."""
FEW: Final = 4
"""The margin is doubled for an output of so many numbers: the fewer, the luckier a loss can be."""
LARGEST: Final = 0.2
"""A bound beyond this share of the output is none: what is wrong would be within it."""


def bound_of(truth: Truth, rtol: float | None) -> Error:
    """Of every rank's error in the job's precision; ``rtol`` replaces it. See docs/adr/0004."""
    if rtol is not None:
        return Error(rtol, rtol)
    lost = truth.worst
    # Two values that are equal but for a rounding may be rounded to two neighbours: twice a unit.
    # Over many outputs such errors are spread evenly, hence the root of three.
    last = Error(2 * truth.unit, 2 * truth.unit / math.sqrt(3))
    numbers = min((t.numel() for t in truth.reference if t.numel()), default=1)
    margin = MARGIN * (1 + FEW / numbers)
    return Error(max(FLOOR, last.max, margin * lost.max), max(FLOOR, last.rms, margin * lost.rms))


def judged_by(truth: Truth, rtol: float | None) -> tuple[tuple[Tensor, ...], Error]:
    """What all ranks are compared with in the job's precision, and what they may be off.

    That is the reference, unless the dense model itself loses so much of it that the bound would
    be beyond :data:`LARGEST`. It is what the dense model returns in the job's precision then, from
    which nothing may be further than that. (FLUX multiplies its guidance by 1000, and bfloat16 has
    3504 for 3500: another number on every road, and the same one on all that are right.)
    """
    bound = bound_of(truth, rtol)
    limit = Error(LARGEST, LARGEST)
    if rtol is not None or not truth.rounded or bound.within(limit):
        return truth.reference, bound
    return truth.rounded, limit


def nothing_shown(lost: float, off: float) -> ProofFailed:
    """The error where not even the dense model in the job's precision is near.

    Args:
        lost: what the dense model loses, the largest relative error.
        off: the largest relative error of a rank.
    """
    return ProofFailed(
        f"nothing can be proven in this precision: the dense model itself loses "
        f"{lost:.1e} of its output in it with these inputs and weights, and the ranks, "
        f"which round in another order, are {off:.1e} off what it returns then.",
        hint="with float32 arithmetic all ranks are right. Take another --precision, --float32 "
        "for the module that loses so much, example inputs whose products half precision holds, "
        "or allow it with --rtol.",
    )
