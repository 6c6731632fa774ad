"""Ranks as processes of this machine, watched: when one dies or hangs, all are ended.

No torch here. A rank tells what it is doing on a pipe, one JSON document a line; silence for
longer than the timeout, or an end without a farewell, ends every rank. What is left then is what a
rank said last.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

from ..errors import RunFailed

MODULE: Final = "cp_convert.runtime.rank"
_SAID: Final = 20
"""How many lines of a rank's own words are shown."""
_GRACE: Final = 2.0
"""Seconds between asking a process to end and ending it."""


@dataclass
class Rank:
    """One process.

    Attributes:
        number: the rank.
        process: the process.
        said: file of its stdout and stderr.
        doing: what it told last.
        heard: when, by the monotonic clock.
        result: what it told at its end.
        error: why it cannot go on; ``peer`` in it says that another rank is the cause.
    """

    number: int
    process: subprocess.Popen[bytes]
    said: Path
    doing: str = "starting"
    heard: float = field(default_factory=time.monotonic)
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None

    def words(self) -> str:
        """The end of what it said, without noise."""
        text = self.said.read_text(errors="replace") if self.said.exists() else ""
        return "\n".join([x for x in text.splitlines() if x.strip()][-_SAID:])


def launch(
    request: Mapping[str, Any],
    world: int,
    *,
    timeout: float,
    environments: Sequence[Mapping[str, str]] | None = None,
    told: Callable[[int, str], None] = lambda rank, doing: None,
) -> list[dict[str, Any]]:
    """Run ``world`` ranks to their end; returns what each reported, rank 0 first.

    Args:
        request: what :mod:`.rank` is to do; JSON.
        world: how many processes.
        timeout: seconds for which a rank may say nothing.
        environments: variables of each rank, besides this process's.
        told: is called with a rank and what it begins to do.

    Raises:
        RunFailed: a rank died, hung, or said that it failed; the others were ended.
    """
    with tempfile.TemporaryDirectory(prefix="cp-convert-run-") as name:
        folder = Path(name)
        (folder / "request.json").write_text(json.dumps(request))
        with _started(folder, world, environments) as (ranks, pipes):
            _watch(ranks, pipes, timeout, told)
            return [dict(rank.result or {}) for rank in ranks]


@contextmanager
def _started(
    folder: Path, world: int, environments: Sequence[Mapping[str, str]] | None
) -> Iterator[tuple[list[Rank], list[IO[bytes]]]]:
    ranks: list[Rank] = []
    pipes: list[IO[bytes]] = []
    try:
        for number in range(world):
            own = environments[number] if environments else {}
            rank, pipe = _start(folder, number, world, own)
            ranks.append(rank)
            pipes.append(pipe)
        yield ranks, pipes
    finally:
        _end(ranks)
        for pipe in pipes:
            pipe.close()


def _start(folder: Path, number: int, world: int, own: Mapping[str, str]) -> tuple[Rank, IO[bytes]]:
    reading, writing = os.pipe()
    said = folder / f"rank{number}.log"
    environment = {
        **os.environ,
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "PYTHONUNBUFFERED": "1",
        **own,
    }
    command = [sys.executable, "-m", MODULE, str(folder), str(writing)]
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


def _watch(
    ranks: Sequence[Rank],
    pipes: Sequence[IO[bytes]],
    timeout: float,
    told: Callable[[int, str], None],
) -> None:
    """Until all have said farewell, or one has failed and the others had time to say why."""
    verdict: float | None = None
    with selectors.DefaultSelector() as selector:
        for rank, pipe in zip(ranks, pipes, strict=True):
            os.set_blocking(pipe.fileno(), False)
            selector.register(pipe, selectors.EVENT_READ, (rank, bytearray()))
        while selector.get_map() and (verdict is None or time.monotonic() < verdict):
            for key, _ in selector.select(timeout=min(timeout / 4, 0.5)):
                rank, unread = key.data
                data = os.read(key.fd, 1 << 16)
                if not data:
                    selector.unregister(key.fileobj)
                    if rank.result is None and verdict is None:
                        verdict = time.monotonic() + _GRACE
                    continue
                _read(rank, unread, data, told)
            if verdict is None:
                _check_silence([key.data[0] for key in selector.get_map().values()], timeout)
    if verdict is not None:
        raise failure(min((r for r in ranks if r.result is None), key=_blame))


def _read(rank: Rank, unread: bytearray, data: bytes, told: Callable[[int, str], None]) -> None:
    """Documents, one a line; what is left of the last one waits for the rest."""
    unread += data
    *lines, rest = bytes(unread).split(b"\n")
    unread[:] = rest
    for line in lines:
        _hear(rank, json.loads(line), told)


def _hear(rank: Rank, message: Mapping[str, Any], told: Callable[[int, str], None]) -> None:
    rank.heard = time.monotonic()
    if "result" in message:
        rank.result = message["result"]
    elif "error" in message:
        rank.error = message["error"]
    else:
        rank.doing = str(message["doing"])
        told(rank.number, rank.doing)


def _blame(rank: Rank) -> tuple[int, int]:
    """Collectives of the others fail because of one: who died without a word comes first."""
    if rank.error is not None:
        return (2 if rank.error.get("peer") else 1), rank.number
    return (3 if rank.process.poll() is None else 0), rank.number


def failure(rank: Rank) -> RunFailed:
    """What a rank that ended without a result has to say."""
    if rank.error is not None:
        return RunFailed(
            f"rank {rank.number} failed while {rank.doing}: {rank.error['message']}",
            where=rank.error.get("where"),
            hint=rank.error.get("hint"),
        )
    code = rank.process.poll()
    how = "closed its report" if code is None else f"ended with exit code {code}"
    if code is not None and code < 0:
        how = f"was ended by {signal.Signals(-code).name}"
    words = rank.words()
    return RunFailed(
        f"rank {rank.number} {how} while {rank.doing}; the other ranks were ended."
        + (f"\n{words}" if words else " It said nothing."),
        hint="run it again with -v, or with --executor torch --devices cpu.",
    )


def _check_silence(ranks: Sequence[Rank], timeout: float) -> None:
    now = time.monotonic()
    silent = [rank for rank in ranks if now - rank.heard > timeout]
    if not silent:
        return
    doing = "; ".join(f"rank {r.number} was {r.doing}" for r in ranks)
    words = silent[0].words()
    raise RunFailed(
        f"rank {silent[0].number} said nothing for {timeout:.0f} s, and all ranks were ended: "
        f"{doing}." + (f"\n{words}" if words else ""),
        hint="--timeout allows more; a rank that waits for one that is not there hangs like this.",
    )


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
