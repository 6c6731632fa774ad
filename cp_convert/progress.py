"""What a long conversion tells about itself. No rich here: ``show`` draws it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock


class Progress:
    """Receives the conversion's stages; this one keeps silent."""

    def start(self, stage: str, total: int) -> None:
        """A stage of ``total`` steps begins."""

    def begin(self, stage: str, item: str) -> None:
        """Work on an item of the stage begins; several may be under way at once."""

    def end(self, stage: str, item: str) -> None:
        """Work on an item is done, or not needed."""

    def said(self, item: str, text: str) -> None:
        """What libraries wrote about an item while it was worked on; for those who ask."""

    def step(self, stage: str) -> None:
        """One step of the stage is done."""

    def finish(self, stage: str, seconds: float) -> None:
        """The stage is done."""

    def variant(self, name: str | None) -> None:
        """What follows is done for the variant of this name; ``None``: there is but one."""

    def note(self, text: str) -> None:
        """Something that a person should know, whatever comes of it."""


@dataclass
class Clock:
    """Times the stages and passes them on.

    Attributes:
        progress: who is told.
        seconds: how long every finished stage took, in order; of several variants together.
    """

    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)
    _adding: Lock = field(default_factory=Lock, repr=False)

    @contextmanager
    def stage(self, name: str, total: int = 1) -> Iterator[None]:
        """Time a stage; nothing is recorded when it fails."""
        self.progress.start(name, total)
        start = time.perf_counter()
        yield
        took = time.perf_counter() - start
        with self._adding:  # engines are built on threads
            self.seconds[name] = round(self.seconds.get(name, 0.0) + took, 3)
        self.progress.finish(name, round(took, 3))
