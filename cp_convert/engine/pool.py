"""Engines built in processes of their own, several at a time, within a memory budget."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Final

import psutil
from torch import Tensor

from ..errors import BuildFailed
from ..ir.engine import Engine
from ..progress import Progress
from ..trt.offline import has_driver
from .worker import Task, answered, run

_BASE: Final = 1_300_000_000
_PER_BYTE: Final = 3
"""What a build takes in memory: torch and TensorRT, and copies of the weights that it embeds
(measured: docs/large.md). The first build that ends replaces the estimate."""


class Pool:
    """Builds engines in worker processes; leaving the ``with`` block stops those still at work.

    Workers are forked from a server that has imported what they need and has done nothing else:
    no threads, no model, no CUDA. It is started at once, and imports beside the first stages.
    With a GPU driver, importing Torch-TensorRT initialises CUDA, which no fork survives; then every
    worker starts afresh.

    Args:
        jobs: how many workers at once, at most.
        memory: bytes that this process and its workers may hold together; one worker runs in any
            case.
    """

    def __init__(self, jobs: int, memory: int) -> None:
        self.jobs = jobs
        self.memory = memory
        self._at_work: dict[int, tuple[Any, Connection, Task]] = {}
        if sys.platform == "linux" and not has_driver():
            self._context: Any = multiprocessing.get_context("forkserver")
            self._context.set_forkserver_preload([run.__module__])
            with _unheard(signal.SIGINT):
                forkserver.ensure_running()
        else:
            self._context = multiprocessing.get_context("spawn")

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for process, _answer, _task in self._at_work.values():
            process.kill()
        for process, answer, _task in self._at_work.values():
            process.join()
            answer.close()
        self._at_work.clear()

    def build(
        self,
        tasks: Sequence[Task],
        embedded: int,
        known: Mapping[str, Tensor],
        progress: Progress,
    ) -> Iterator[tuple[Engine, bytes]]:
        """Build all, yielding each as it is done, with its answer (:func:`.worker.answered`).

        Args:
            tasks: one for each engine.
            embedded: bytes of weights that each engine holds.
            known: the packed program's tensors, which read-back networks share.
            progress: is told which ranks are being built.

        Raises:
            BuildFailed: TensorRT refused a network, or a worker was killed.
        """
        waiting, most, measured = list(tasks), _BASE + _PER_BYTE * embedded, False
        while waiting or self._at_work:
            while waiting and self._has_room(most):
                progress.begin("build", f"rank {waiting[0].rank}")
                self._start(waiting.pop(0))
            for rank in self._ended():
                data = self._collect(rank, progress)
                engine, peak = answered(data, known)
                most, measured = (max(most, peak) if measured else peak), True
                progress.end("build", f"rank {rank}")
                yield engine, data

    def _has_room(self, most: int) -> bool:
        count = len(self._at_work)
        held = psutil.Process().memory_info().rss
        return count == 0 or (count < self.jobs and held + (count + 1) * most <= self.memory)

    def _start(self, task: Task) -> None:
        answer, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(target=run, args=(task, theirs), daemon=True)
        process.start()
        theirs.close()
        self._at_work[task.rank] = (process, answer, task)

    def _ended(self) -> list[int]:
        ready = wait([answer for _, answer, _ in self._at_work.values()])
        return [rank for rank, (_, answer, _) in self._at_work.items() if answer in ready]

    def _collect(self, rank: int, progress: Progress) -> bytes:
        process, answer, task = self._at_work[rank]
        data = None
        with suppress(EOFError):
            data = answer.recv_bytes()
        process.join()
        answer.close()
        del self._at_work[rank]
        said = _read(task.log)
        if data is None:
            raise BuildFailed(
                f"the process that built rank {rank} {_fate(process.exitcode)}."
                + "".join(f"\n  {line}" for line in said.splitlines()[-_LAST:]),
                hint=_ADVICE,
            )
        progress.said(f"rank {rank}", said)
        return data


@contextmanager
def _unheard(number: signal.Signals) -> Iterator[None]:
    """Processes that are started here ignore the signal; a terminal sends it to all of them."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may change handlers
        return
    handler = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, handler)


def _read(log: Path) -> str:
    """What a worker wrote; the file is part of no bundle."""
    text = ""
    with suppress(OSError):
        text = log.read_text(errors="replace").strip()
    log.unlink(missing_ok=True)
    return text


_LAST: Final = 5
"""Lines of a dead worker's log that are shown."""
_ADVICE: Final = "if memory was short: --jobs 1, or --weights-mode external."


def _fate(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        killed = ", as the system does when memory runs out" if name == "SIGKILL" else ""
        return f"was ended by {name}{killed}"
    return f"ended without an answer (exit code {code})"
