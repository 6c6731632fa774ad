"""Variants of a preset, traced by a process of its own while others are sharded and built.

Tracing holds one core and most of the time of a bundle of several shapes. Of every three variants
two are traced beside. What the process hands over is a program as the cache keeps it, by files;
where it fails in any way, its variants are traced as if there were none, which tells what is wrong.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

from .backends import Backend
from .cache.store import Cache
from .capture.capture import captured_in, see, write
from .collecting import set_aside
from .engine.build import prepare
from .engine.pool import Pool
from .engine.worker import begin
from .ir.records import Loaded, Seen
from .ir.source import Source
from .job import FUSED, Job
from .model.load import load, surroundings
from .progress import Clock, Progress
from .trt.libraries import decompositions

_OF: Final = 3
"""One variant of so many is traced by the process that does all the rest as well."""


@dataclass(frozen=True)
class Errand:
    """What the process is told.

    Attributes:
        job: the conversion.
        backend, tool: see :class:`.ir.records.Loaded`.
        numbers: of the variants that it traces, in their order.
        folder: where every program goes, into a folder of its number.
    """

    job: Job
    backend: Backend
    tool: str
    numbers: tuple[int, ...]
    folder: Path


def errand_of(loaded: Loaded, folder: Path) -> Errand | None:
    """What can be traced beside, if anything.

    A model file may build another model every time it is run. Weights that are not mapped from
    files as they are would lie in memory twice.
    """
    job, source = loaded.job, loaded.source
    numbers = tuple(n for n in range(len(loaded.variants)) if n % _OF)
    if len(numbers) < _OF - 1 or not job.is_preset or job.workers < 2:
        return None
    if not (source.external and source.located) or source.casts or source.codes:
        return None
    return Errand(job, loaded.backend, loaded.tool, numbers, folder)


class Ahead:
    """Programs of variants that another process traces; without an errand there are none.

    Args:
        errand: what it is told.
        pool: starts it, and ends it at the latest when the pool ends.
    """

    def __init__(self, errand: Errand | None, pool: Pool) -> None:
        self._errand = errand
        self._answer = None if errand is None else pool.aside(run, errand)
        self._keys: dict[int, str | None] = {}

    def seen(self, number: int, source: Source, clock: Clock) -> Seen | None:
        """The program of a variant, waited for; ``None`` where this process is to trace it."""
        if self._errand is None or number not in self._errand.numbers:
            return None
        with clock.stage("trace"):
            while number not in self._keys:
                if self._answer is None:
                    return None
                try:
                    done, key = self._answer.recv()
                except EOFError:
                    self._answer = None
                else:
                    self._keys[done] = key
        with clock.stage("decompose"):
            captured = captured_in(self._errand.folder / str(number), source)
        return Seen(captured, self._keys[number])


def run(errand: Errand, answer: Connection) -> None:
    """The process: load the model, and trace it with every variant's inputs."""
    begin(errand.folder / "log")
    job = errand.job
    prepare(errand.backend, fused=job.strategy == FUSED)
    cache, table, clock = Cache(job.cache), decompositions(), Clock(Progress())
    with surroundings(job), set_aside():
        source = load(job)
        variants = source, *source.others
        for number in errand.numbers:
            found = see(variants[number], None, table, cache, errand.tool, clock)
            folder = errand.folder / str(number)
            folder.mkdir()
            write(found.captured, folder)
            with suppress(BrokenPipeError):  # the conversion has ended
                answer.send((number, found.key))
