"""Ranks as processes of this machine, watched: when one dies or hangs, all are ended.

No torch here. A rank tells what it is doing on a pipe, one JSON document a line; an error, silence
for longer than the timeout, or an end without a farewell ends every rank. :mod:`.blame` finds the
one that is the cause.
"""

from __future__ import annotations

import json
import math
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Final

from .blame import Rank, failure, silence

MODULE: Final = "cp_convert.runtime.rank"
_GRACE: Final = 2.0
"""Seconds between asking a process to end and ending it, or for others to say why they fail."""


def launch(
    request: Mapping[str, Any],
    world: int,
    *,
    timeout: float,
    environments: Sequence[Mapping[str, str]] | None = None,
    told: Callable[[int, str], None] = lambda rank, doing: None,
    module: str = MODULE,
) -> list[dict[str, Any]]:
    """Run ``world`` ranks to their end; returns what each reported, rank 0 first.

    Args:
        request: what the ranks are to do; JSON.
        world: how many processes.
        timeout: seconds for which a rank may say nothing.
        environments: variables of each rank, besides this process's.
        told: is called with a rank and what it begins to do.
        module: what a rank's process runs, by :mod:`.serve`.

    Raises:
        RunFailed: a rank died, hung, or said that it failed; the others were ended.
        ConvertError: what all ranks refuse alike, such as inputs of other shapes.
    """
    with tempfile.TemporaryDirectory(prefix="cp-convert-run-") as name:
        folder = Path(name)
        (folder / "request.json").write_text(json.dumps(request))
        with _started(folder, world, environments, module) as (ranks, pipes):
            _watch(ranks, pipes, timeout, told)
            return [dict(rank.result or {}) for rank in ranks]


@contextmanager
def _started(
    folder: Path, world: int, environments: Sequence[Mapping[str, str]] | None, module: str
) -> Iterator[tuple[list[Rank], list[IO[bytes]]]]:
    ranks: list[Rank] = []
    pipes: list[IO[bytes]] = []
    try:
        for number in range(world):
            own = environments[number] if environments else {}
            rank, pipe = _start(folder, number, world, own, module)
            ranks.append(rank)
            pipes.append(pipe)
        yield ranks, pipes
    finally:
        _end(ranks)
        for pipe in pipes:
            pipe.close()


def _start(
    folder: Path, number: int, world: int, own: Mapping[str, str], module: str
) -> tuple[Rank, IO[bytes]]:
    reading, writing = os.pipe()
    said = folder / f"rank{number}.log"
    environment = {
        **os.environ,
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(_threads(world))),
        **own,
    }
    command = [sys.executable, "-m", module, str(folder), str(writing)]
    with said.open("wb") as words:
        process = subprocess.Popen(  # noqa: S603  our own module
            command,
            stdin=subprocess.DEVNULL,
            stdout=words,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=[writing],
            start_new_session=True,  # with what it starts, it is one group that can be ended
        )
    os.close(writing)
    return Rank(number, process, said), os.fdopen(reading, "rb")


def _threads(world: int) -> int:
    """For each of the ranks: together they have the cores, and no more."""
    return max(1, len(os.sched_getaffinity(0)) // world)


def _watch(
    ranks: Sequence[Rank],
    pipes: Sequence[IO[bytes]],
    timeout: float,
    told: Callable[[int, str], None],
) -> None:
    """Until all have said farewell, or one has failed and the others had time to say why."""
    verdict = math.inf
    with selectors.DefaultSelector() as selector:
        for rank, pipe in zip(ranks, pipes, strict=True):
            os.set_blocking(pipe.fileno(), False)
            selector.register(pipe, selectors.EVENT_READ, (rank, bytearray()))
        while selector.get_map() and time.monotonic() < verdict:
            ended = {rank.number for rank in ranks if rank.process.poll() is not None}
            for key, _ in selector.select(timeout=min(timeout / 20, 0.25)):
                rank, unread = key.data
                ended.discard(rank.number)  # what it said before is heard first
                if not _read(rank, unread, key.fd, told):
                    selector.unregister(key.fileobj)
            if any(rank.error or (rank.number in ended and not rank.result) for rank in ranks):
                verdict = min(verdict, time.monotonic() + min(_GRACE, timeout / 10))
            if verdict == math.inf:
                _check_silence(ranks, timeout)
    if verdict == math.inf and any(rank.result is None for rank in ranks):
        _await_ends(ranks)
        verdict = time.monotonic()
    if verdict < math.inf:
        raise failure(ranks)


def _await_ends(ranks: Sequence[Rank]) -> None:
    """Those that hung up without a word are about to end: how, says why."""
    for rank in ranks:
        if rank.result is None and rank.error is None:
            with suppress(subprocess.TimeoutExpired):
                rank.process.wait(_GRACE)


def _check_silence(ranks: Sequence[Rank], timeout: float) -> None:
    now = time.monotonic()
    silent = [rank for rank in ranks if rank.result is None and now - rank.heard > timeout]
    if silent:
        raise silence(silent, ranks)


def _read(rank: Rank, unread: bytearray, file: int, told: Callable[[int, str], None]) -> bool:
    """Documents, one a line; what is left of the last one waits for the rest. False at the end."""
    data = os.read(file, 1 << 16)
    unread += data
    *lines, rest = bytes(unread).split(b"\n")
    unread[:] = rest
    for line in lines:
        _hear(rank, json.loads(line), told)
    return bool(data)


def _hear(rank: Rank, message: Mapping[str, Any], told: Callable[[int, str], None]) -> None:
    rank.heard = time.monotonic()
    if "result" in message:
        rank.result = message["result"]
    elif "error" in message:
        rank.error = message["error"]
    else:
        rank.doing = str(message["doing"])
        told(rank.number, rank.doing)


def _end(ranks: Sequence[Rank]) -> None:
    """No process of any rank is left, nor one that a rank started."""
    alive = [rank for rank in ranks if rank.process.poll() is None]
    finished = all(rank.result is not None for rank in ranks)
    for rank in alive:
        if not finished:
            _signal(rank, signal.SIGTERM)
    deadline = time.monotonic() + _GRACE
    for rank in alive:
        with suppress(subprocess.TimeoutExpired):
            rank.process.wait(max(0.0, deadline - time.monotonic()))
    for rank in ranks:
        _signal(rank, signal.SIGKILL)
        rank.process.wait()


def _signal(rank: Rank, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(rank.process.pid, number)
