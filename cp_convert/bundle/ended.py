"""What became of one of several jobs: its bundle's manifest, or its error, as data."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConvertError
from ..job import Job
from .manifest import Manifest


@dataclass(frozen=True)
class Ended:
    """What became of one job.

    Attributes:
        index: its place among all.
        job: what was asked for.
        seconds: that it took.
        manifest: its bundle's; ``None`` where it failed.
        error: why it failed.
        is_shared: whether an earlier job's model was used.
    """

    index: int
    job: Job
    seconds: float
    manifest: Manifest | None = None
    error: ConvertError | None = None
    is_shared: bool = False
