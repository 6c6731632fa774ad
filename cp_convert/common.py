"""What conversions of one model have in common, whatever their strategies: loaded, traced, begun.

The first of several jobs puts it here, the others take it; docs/ci.md tells when jobs share.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Final

from .ir.records import Loaded, Traced
from .ir.source import Source
from .job import BLOCKS, FUSED, Job
from .mesh import SEQUENCE

if TYPE_CHECKING:  # late: it imports TensorRT, which a recalled job does without
    from .stages import Begun

_LATER: Final = frozenset(
    {
        "strategy", "world", "open_axes", "ulysses", "hardware", "exchange", "layout", "program",
        "max_loss", "rtol", "split_after", "unsafe_groups", "out", "force", "cache", "jobs",
        "memory", "command",
    }
)  # fmt: skip
"""Options that decide nothing before the strategy."""


def shared_by(job: Job) -> tuple[object, ...]:
    """Of everything that decides how a model is loaded, traced and measured.

    An option that is new counts until it is said that it does not.
    """
    told = [getattr(job, one.name) for one in fields(job) if one.name not in _LATER]
    # The world decides at which sizes of a range a model is traced.
    # Weights are external whatever their size is; scales are apart (ADR 22).
    told += [job.layout == BLOCKS, job.may_share]
    return *told, job.strategy == FUSED, job.mesh.size(SEQUENCE) > 1, job.sizes


@dataclass
class Common:
    """One model, as far as jobs have come with it.

    Attributes:
        keeps: whether another job follows that will want it.
        job: the first, whose model it is.
        source: the model.
        values: the key of its numbers, see :class:`.ir.records.Loaded`.
        traces: its variants' programs, where they were traced and not measured.
        begun: its variants', where they came so far.
    """

    keeps: bool = False
    job: Job | None = None
    source: Source | None = None
    values: str | None = None
    traces: list[Traced] | None = None
    begun: list[Begun] = field(default_factory=list)

    def serves(self, job: Job) -> bool:
        """Whether the model is loaded, and the one that this job would load.

        A model that communicates by itself is made for one world.
        """
        if self.source is None or self.job is None or shared_by(self.job) != shared_by(job):
            return False
        if 0 < len(self.begun) <= len(self.source.others):  # the earlier job failed on the way
            return False
        own = self.source.groups or self.source.peers
        return not own or self.job.world == job.world

    def forget(self) -> None:
        """The model is loaded once more, as something was done with this one."""
        self.source, self.traces, self.begun = None, None, []

    def taken(self, loaded: Loaded) -> list[Begun]:
        """The variants of ``loaded`` as far as an earlier job brought them, or nothing."""
        if len(self.begun) < len(loaded.variants):
            return []
        return [replace(b, loaded=v) for b, v in zip(self.begun, loaded.variants, strict=True)]

    def keep(self, begun: Begun) -> None:
        """A variant that has come so far."""
        if self.keeps:
            self.begun.append(begun)
