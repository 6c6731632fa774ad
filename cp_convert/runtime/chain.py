"""A rank's pieces as one: called with forward's inputs, each hands on what later ones take.

In: what computes each piece, in order. Out: forward's outputs. With a step cache the pieces between
the first and the last may be left out, see :mod:`.step_cache`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from ..ir.split import Step
from .step_cache import StepCache

Tensors = Mapping[str, Tensor]


class Part(NamedTuple):
    """A piece: what it takes, and what computes it from that, perhaps among other values."""

    inputs: Collection[str]
    compute: Callable[[Tensors], dict[str, Tensor]]


class Chain:
    """One variant's pieces on one rank.

    Args:
        variant: which.
        parts: of the pieces, or the one whole.
        step: what a step cache skips, and by what it decides.
        cache: the rank's, if there is one.
    """

    def __init__(
        self, variant: str | None, parts: Sequence[Part], step: Step | None, cache: StepCache | None
    ) -> None:
        self._variant, self._parts = variant, parts
        self._step, self._cache = step, cache
        last = {name: number for number, part in enumerate(parts) for name in part.inputs}
        compared = () if step is None else [name for both in step.streams for name in both]
        self._dying: dict[int, list[str]] = {}
        for name, number in last.items():
            if name not in compared:
                self._dying.setdefault(number, []).append(name)

    def __call__(self, given: Tensors) -> dict[str, Tensor]:
        """Outputs by name."""
        held, count = dict(given), len(self._parts)
        step, cache = self._step, self._cache
        if step is None or cache is None:
            return self._compute(range(count), held)
        begin, end = step.first, count - step.last
        self._compute(range(begin), held)
        if cache.skips(self._variant, held[step.residual]):
            held |= cache.streams(self._variant, step, held)
        else:
            self._compute(range(begin, end), held)
            cache.keep(self._variant, step, held)
        return self._compute(range(end, count), held)

    def _compute(self, numbers: range, held: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute pieces, and let go of what no later one takes; the outputs of the last."""
        found: dict[str, Tensor] = {}
        for number in numbers:
            found = self._parts[number].compute(held)
            held |= found
            for name in self._dying.get(number, ()):
                held.pop(name, None)
        return found
