"""Engines built in processes of their own, several at a time, within a memory budget."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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
        self._at_work: dict[Path, tuple[Any, Connection, Task]] = {}
        self._aside: list[Any] = []
        self._turn = threading.Condition()
        self._stopped = False
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
        self._stop()
        for process, answer, _task in self._at_work.values():
            process.join()
            answer.close()
        for process in self._aside:
            process.join()
        self._at_work.clear()

    def aside(self, target: Callable[..., None], *given: Any) -> Connection:
        """Start a process for other work; it ends with the ``with`` block at the latest.

        Args:
            target: is called there.
            given: with these, and with the connection of whose other end the reader is returned.
        """
        answer, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(target=target, args=(*given, theirs), daemon=True)
        process.start()
        theirs.close()
        self._aside.append(process)
        return answer  # type: ignore[no-any-return]

    @contextmanager
    def beside(self) -> Iterator[ThreadPoolExecutor]:
        """Threads on which to build while other work goes on.

        Where the block ends in an error, builds that are under way are stopped, and waited for.
        """
        with ThreadPoolExecutor() as threads:
            try:
                yield threads
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                self._stop()
                raise

    def _stop(self) -> None:
        """End the workers; nothing is started any more."""
        with self._turn:
            self._stopped = True
            for process in (*self._aside, *(held[0] for held in self._at_work.values())):
                process.kill()
            self._turn.notify_all()

    def build(
        self,
        tasks: Sequence[Task],
        embedded: int,
        known: Mapping[str, Tensor],
        progress: Progress,
        label: str = "",
    ) -> Iterator[tuple[Engine, bytes]]:
        """Build all, yielding each as it is done, with its answer (:func:`.worker.answered`).

        Several threads may do so at once; they share the room.

        Args:
            tasks: one for each engine.
            embedded: bytes of weights that each engine holds.
            known: the packed program's tensors, which read-back networks share.
            progress: is told which ranks are being built.
            label: what these engines are, in front of their ranks.

        Raises:
            BuildFailed: TensorRT refused a network, or a worker was killed.
        """
        waiting, most, measured = list(tasks), _BASE + _PER_BYTE * embedded, False
        own: set[Path] = set()
        while waiting or own:
            with self._turn:
                if self._stopped:
                    raise BuildFailed("the conversion has ended.")
                while waiting and self._has_room(most):
                    progress.begin("build", f"{label}rank {waiting[0].rank}")
                    own.add(waiting[0].path)
                    self._start(waiting.pop(0))
                if not own:
                    self._turn.wait()  # for another thread's to end
                    continue
            for path in self._ended(own):
                task = self._at_work[path][2]
                data = self._collect(path, progress)
                own.remove(path)
                engine, peak = answered(data, known)
                most, measured = (max(most, peak) if measured else peak), True
                progress.end("build", f"{label}rank {task.rank}")
                yield engine, data

    def _has_room(self, most: int) -> bool:
        count = len(self._at_work)
        held = psutil.Process().memory_info().rss + sum(map(_memory, self._aside))
        return count == 0 or (count < self.jobs and held + (count + 1) * most <= self.memory)

    def _start(self, task: Task) -> None:
        answer, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(target=run, args=(task, theirs), daemon=True)
        process.start()
        theirs.close()
        self._at_work[task.path] = (process, answer, task)

    def _ended(self, own: Collection[Path]) -> list[Path]:
        answers = {path: self._at_work[path][1] for path in own}
        ready = wait(list(answers.values()))
        return [path for path, answer in answers.items() if answer in ready]

    def _collect(self, path: Path, progress: Progress) -> bytes:
        process, answer, task = self._at_work[path]
        rank = task.rank
        data = None
        with suppress(EOFError):
            data = answer.recv_bytes()
        process.join()
        answer.close()
        with self._turn:
            del self._at_work[path]
            self._turn.notify_all()
        said = _read(task.log)
        if data is None:
            raise BuildFailed(
                f"the process that built rank {rank} {_fate(process.exitcode)}."
                + "".join(f"\n  {line}" for line in said.splitlines()[-_LAST:]),
                hint=_ADVICE,
            )
        progress.said(f"rank {rank}", said)
        return data


def _memory(process: Any) -> int:
    """Bytes that a process holds; none when it has ended."""
    with suppress(psutil.NoSuchProcess):
        return int(psutil.Process(process.pid).memory_info().rss)
    return 0


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
