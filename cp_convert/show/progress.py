"""A long conversion as it goes: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as Bars

from ..progress import Progress
from .screen import Screen


@contextmanager
def shown(screen: Screen) -> Iterator[Progress]:
    """Progress bars on stderr; plain lines where that is no terminal, and with ``-v``."""
    if screen.verbosity < 0:
        yield Progress()
    elif screen.verbosity > 0 or not screen.err.is_terminal:
        yield _Lines(screen.err, is_verbose=screen.verbosity > 0)
    else:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description:10}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[items]}", markup=False),
        )
        with Bars(*columns, console=screen.err, transient=True) as bars:
            yield _Bars(bars)


class _Lines(Progress):
    """One plain line a stage."""

    def __init__(self, console: Console, *, is_verbose: bool = False) -> None:
        self.console = console
        self.is_verbose = is_verbose
        self.begun: dict[str, float] = {}

    def start(self, stage: str, total: int) -> None:
        self.console.print(f"{stage} ...", soft_wrap=True)

    def begin(self, stage: str, item: str) -> None:
        self.begun[item] = time.monotonic()
        self.console.print(f"{stage} {item} ...", soft_wrap=True)

    def end(self, stage: str, item: str) -> None:
        seconds = time.monotonic() - self.begun.pop(item)
        self.console.print(f"{stage} {item} done in {seconds:.1f} s", soft_wrap=True)

    def said(self, item: str, text: str) -> None:
        if self.is_verbose and text:
            self.console.print(f"{item}: {text}", markup=False, soft_wrap=True)

    def finish(self, stage: str, seconds: float) -> None:
        self.console.print(f"{stage} done in {seconds:.1f} s")

    def variant(self, name: str | None) -> None:
        if name is not None:
            self.console.print(f"variant {name} ...", soft_wrap=True, markup=False)

    def note(self, text: str) -> None:
        self.console.print(f"note: {text}", soft_wrap=True, markup=False)


class _Bars(Progress):
    """One bar a stage; of several variants the bar grows with every one."""

    def __init__(self, bars: Bars) -> None:
        self.bars = bars
        self.tasks: dict[str, Any] = {}
        self.under_way: Counter[str] = Counter()
        self.items: dict[str, list[str]] = {}

    def start(self, stage: str, total: int) -> None:
        self.under_way[stage] += 1
        if stage not in self.tasks:
            self.tasks[stage] = self.bars.add_task(stage, total=total, items="")
            return
        task = self.bars.tasks[self.tasks[stage]]
        task.stop_time = None
        self.bars.update(task.id, total=(task.total or 0) + total)

    def begin(self, stage: str, item: str) -> None:
        self._tell(stage, [*self.items.get(stage, ()), item])

    def end(self, stage: str, item: str) -> None:
        self._tell(stage, [one for one in self.items[stage] if one != item])

    def _tell(self, stage: str, items: list[str]) -> None:
        self.items[stage] = items
        self.bars.update(self.tasks[stage], items=", ".join(items))

    def step(self, stage: str) -> None:
        self.bars.advance(self.tasks[stage])

    def finish(self, stage: str, seconds: float) -> None:
        self.under_way[stage] -= 1
        if not self.under_way[stage]:
            task = self.bars.tasks[self.tasks[stage]]
            self.bars.update(task.id, completed=task.total)
            self.bars.stop_task(task.id)

    def variant(self, name: str | None) -> None:
        if name is not None:
            self.bars.console.print(f"variant {name}", soft_wrap=True, markup=False)

    def note(self, text: str) -> None:
        self.bars.console.print(f"note: {text}", soft_wrap=True, markup=False)


@contextmanager
def running(screen: Screen) -> Iterator[Callable[[int, str], None]]:
    """What ranks are doing: one line on a terminal that changes, plain lines with ``-v``."""
    if screen.verbosity > 0:
        yield lambda rank, doing: screen.err.print(f"rank {rank}: {doing}", soft_wrap=True)
    elif screen.verbosity == 0 and screen.err.is_terminal:
        with screen.err.status("starting") as status:
            yield lambda rank, doing: status.update(f"rank {rank}: {doing}")
    else:
        yield lambda rank, doing: None
