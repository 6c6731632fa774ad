"""A rank's pieces as one: called with forward's inputs, each hands on what later ones take.

In: what computes each piece, in order. Out: forward's outputs. With a step cache the pieces between
the first and the last may be left out, see :mod:`.step_cache`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from ..ir.split import Step
from .step_cache import StepCache

Tensors = Mapping[str, Tensor]
Part = Callable[[Tensors], dict[str, Tensor]]
"""Computes a piece: takes its inputs from all that is known by name, and returns its outputs."""


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

    def __call__(self, given: Tensors) -> dict[str, Tensor]:
        """Outputs by name."""
        first, *others = self._parts
        if not others:
            return first(given)
        *between, last = others
        held = {**given, **first(given)}
        step, cache = self._step, self._cache
        if step is None or cache is None:
            self._compute(between, held)
        elif cache.skips(self._variant, held[step.residual]):
            held |= cache.streams(self._variant, step, held)
        else:
            self._compute(between, held)
            cache.keep(self._variant, step, held)
        return last(held)

    def _compute(self, parts: Sequence[Part], held: dict[str, Tensor]) -> None:
        for part in parts:
            held |= part(held)
