"""What was proven: errors, bounds and controls, as records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from torch import Tensor

FLOOR: Final = 1e-5
"""The error that is always allowed: a few hundred roundings of float32."""


@dataclass(frozen=True)
class Error:
    """Relative error: the largest and the root mean square deviation, over the reference's."""

    max: float
    rms: float

    def within(self, bound: Error) -> bool:
        """Whether both norms are; a NaN never is."""
        return self.max <= bound.max and self.rms <= bound.rms


@dataclass(frozen=True)
class Codes:
    """What was proven of a program with quantizers, rounding included, in float32 arithmetic.

    Attributes:
        ranks: every rank's error against ``reference``.
        bound: what codes next to a tie may do to the output when they flip.
        codes, flipped: how many codes the dense program has, and how many flip where they may.
        loss: what quantization itself loses: ``reference`` against the model without.
        reference: what the dense program with quantizers returns.
    """

    ranks: tuple[Error, ...]
    bound: Error
    codes: int
    flipped: int
    loss: Error
    reference: tuple[Tensor, ...]


@dataclass(frozen=True)
class Proof:
    """A proof that was carried out and passed.

    Attributes:
        algebra: every rank's error with float32 arithmetic, at most :data:`FLOOR`.
        ranks: every rank's error in the job's precision.
        dense: what the dense model loses in that precision, rounded to nearest.
        bound: what the ranks may lose in it.
        control: what is lost when every rank sees its own keys alone; ``None`` when there is
            nothing to lose, in a world of 1 or without attention over sharded keys.
        reference: what all errors are measured against.
        seconds: how long it took.
        seconds_a_run: how long all ranks took once, with float32 arithmetic.
        spread: what the dense model loses under other roundings, which the bound covers too.
        lost: what would be allowed relative to the reference; ``bound``, unless that shows nothing.
        rounded: what the dense model returns in the job's precision, where ``ranks`` are measured
            against that.
        controls: by another axis of the mesh, what is lost when every rank takes its peers there
            for copies of itself.
        codes: the same with quantizers that round; ``algebra`` leaves their rounding out then, and
            ``ranks`` are measured against the dense program with quantizers.
    """

    algebra: tuple[Error, ...]
    ranks: tuple[Error, ...]
    dense: Error
    bound: Error
    control: Error | None
    reference: tuple[Tensor, ...]
    seconds: float
    seconds_a_run: float
    spread: tuple[Error, ...] = ()
    lost: Error = Error(FLOOR, FLOOR)
    rounded: tuple[Tensor, ...] | None = None
    controls: Mapping[str, Error] = field(default_factory=dict)
    codes: Codes | None = None

    @property
    def against(self) -> tuple[Tensor, ...]:
        """What the ranks are measured against in the job's precision."""
        own = self.reference if self.codes is None else self.codes.reference
        return own if self.rounded is None else self.rounded

    @property
    def is_wide(self) -> bool:
        """Whether the job's precision is float32."""
        return self.dense == Error(0.0, 0.0)

    @property
    def algebra_bound(self) -> Error:
        """What may be lost with float32 arithmetic."""
        return self.bound if self.is_wide and self.codes is None else Error(FLOOR, FLOOR)


@dataclass(frozen=True)
class NetworkProof:
    """A proof of the networks that passed.

    Attributes:
        algebra: every rank's error with float32 arithmetic.
        ranks: every rank's error in the job's precision.
        seconds: how long it took.
        codes: every rank's error with quantizers that round; nothing where there are none.
    """

    algebra: tuple[Error, ...]
    ranks: tuple[Error, ...]
    seconds: float
    codes: tuple[Error, ...] = ()
