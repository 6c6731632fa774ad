"""Several jobs, each to a bundle or to what went wrong; those of one model load it once.

A job that fails does not keep the others from being done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

from .backends import Backend
from .bundle.ended import Ended
from .common import Common, shared_by
from .errors import ConvertError
from .job import Job
from .model.load import surroundings
from .pipeline import convert
from .progress import Progress


def convert_all(
    jobs: Sequence[tuple[Job, Backend]],
    shown: Callable[[int, Job], AbstractContextManager[Progress]],
) -> Iterator[Ended]:
    """Convert all, those that share a model one after another; each is told as it ends.

    Args:
        jobs: each with which TensorRT builds.
        shown: shows the job with this place.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, (job, backend) in enumerate(jobs):
        groups.setdefault((backend, *shared_by(job)), []).append(index)
    for group in groups.values():
        common = Common()
        with surroundings(jobs[group[0]][0]):
            for index in group:
                job, backend = jobs[index]
                if not common.serves(job):
                    common = Common(keeps=index != group[-1])
                is_shared, begun = common.source is not None, time.monotonic()
                manifest = error = None
                with shown(index, job) as progress:
                    try:
                        manifest = convert(job, backend, progress, common)
                    except ConvertError as failed:
                        error = failed
                seconds = time.monotonic() - begun
                yield Ended(index, job, seconds, manifest, error, is_shared)
