"""Whether a step computes the pieces between the first and the last, or takes what they added.

In: what the first piece's blocks add to their stream, on every rank its part. Out: the same answer
on all ranks. The rule is First Block Cache's (ParaAttention; diffusers' ``FirstBlockCacheConfig``;
cache-dit): where the mean distance of the residual to that of the step that was computed last, over
the mean size of that, is below a threshold, the others' residual of that step is added instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..bundle.parts import TO_SKIP
from ..errors import RunFailed, UsageError
from ..ir.split import Step
from .groups import everyone, group_of


class Trajectory(NamedTuple):
    """Steps that follow one another: those of a variant, in a pipeline's context (a branch)."""

    variant: str | None
    context: str | None


@dataclass
class _Computed:
    """Of the step that was computed last: the first piece's residual, the others' by stream."""

    residual: Tensor
    added: dict[str, Tensor]


@dataclass
class StepCache:
    """What a rank remembers from step to step.

    Attributes:
        threshold: relative distance below which a step is skipped; 0: none ever is.
        world: how many ranks decide together.
        communicator: of them, see :func:`.executors.open_rank`.
        context: which steps belong together, where a caller mixes several; all ranks set the same.
        computed, skipped: how many steps so far.
        distance: of the last step that had one before it.
    """

    threshold: float
    world: int
    communicator: Any = None
    context: str | None = None
    computed: int = 0
    skipped: int = 0
    distance: float | None = None
    _picture: int = 0
    _known: dict[Trajectory, _Computed] = field(default_factory=dict)

    def reset(self) -> None:
        """Forget all steps: what comes next is another picture; all ranks do so alike."""
        self._known = {}

    def enter(self, picture: int, context: str | None) -> None:
        """The next step belongs to the picture of this number; steps of others are forgotten."""
        if picture != self._picture:
            self.reset()
        self._picture, self.context = picture, context

    @torch.no_grad()
    def skips(self, variant: str | None, residual: Tensor) -> bool:
        """Whether the step of this residual is skipped; collective, and on all ranks the same."""
        before = self._known.get(Trajectory(variant, self.context))
        own = _sums(residual, None if before is None else before.residual)
        rows = self._everyone(own)
        self.distance = None
        if all(size >= 0 for _, size in rows):
            # Added in one order everywhere: an all-reduce need not be the same to the last bit.
            apart, size = (math.fsum(column) for column in zip(*rows, strict=True))
            self.distance = apart / size if size else math.inf
        skips = self.distance is not None and self.distance < self.threshold
        self.skipped += skips
        self.computed += not skips
        return skips

    @torch.no_grad()
    def keep(self, variant: str | None, step: Step, held: Mapping[str, Tensor]) -> None:
        """Remember a step that was computed; ``held`` are the values between its pieces."""
        added = {left: held[left] - held[entered] for entered, left in step.streams}
        # A copy: an engine writes its outputs to the same place at every call.
        known = _Computed(held[step.residual].clone(), added)
        self._known[Trajectory(variant, self.context)] = known

    @torch.no_grad()
    def streams(
        self, variant: str | None, step: Step, held: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What the last piece takes where the others are skipped."""
        added = self._known[Trajectory(variant, self.context)].added
        return {left: held[entered] + added[left] for entered, left in step.streams}

    def _everyone(self, own: Tensor) -> list[list[float]]:
        if self.world == 1:
            return [own.tolist()]
        rows = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(rows, own, group=group_of(self.communicator))
        return torch.stack(rows).tolist()


def _sums(residual: Tensor, before: Tensor | None) -> Tensor:
    """Of this rank's part: how far it is from that before, and the size of that; -1 without one."""
    if before is None:
        return torch.full((2,), -1.0, dtype=torch.float64, device=residual.device)
    both = (residual - before, before)
    return torch.stack([one.abs().sum(dtype=torch.float64) for one in both])


def opened_cache(
    threshold: float | None, world: int, communicator: Any, why_not: str | None
) -> StepCache | None:
    """A cache, where one is asked for; collective: all ranks ask for the same.

    Args:
        threshold: ``None``: none is asked for.
        world: how many ranks there are.
        communicator: of them, see :func:`.executors.open_rank`.
        why_not: why the bundle's pieces cannot be skipped, if they cannot.

    Raises:
        UsageError: it is no threshold, or the bundle has nothing to skip.
        RunFailed: ranks ask for different ones.
    """
    refusal = None if threshold is None else _refusal(threshold, world, communicator, why_not)
    told = everyone((threshold, None if refusal is None else refusal.message), communicator)
    if refusal is not None:
        raise refusal
    for rank, (other, problem) in enumerate(told):
        if problem is not None:
            raise RunFailed(f"rank {rank} cannot have the step cache that it asks for: {problem}")
        if other != told[0][0]:
            raise RunFailed(
                f"rank {rank} asks for step_cache={other}, and rank 0 for {told[0][0]}.",
                hint="all ranks open the bundle alike.",
            )
    return None if threshold is None else StepCache(threshold, world, communicator)


def _refusal(
    threshold: float, world: int, communicator: Any, why_not: str | None
) -> UsageError | None:
    if why_not is not None:
        return UsageError(
            f"step_cache: no piece of the bundle can be skipped: {why_not}.",
            hint=TO_SKIP,
        )
    if not 0 <= threshold < math.inf:
        return UsageError(
            f"step_cache={threshold}: a threshold is a relative distance, 0 or more.",
            hint="0.1 skips about as much as the published caches do.",
        )
    if world > 1 and isinstance(communicator, int):
        return UsageError(
            "step_cache: ranks decide together over a process group of torch.distributed, and an "
            "ncclComm_t was given.",
            hint="give the process group as the communicator.",
        )
    return None
