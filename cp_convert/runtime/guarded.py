"""One rank under another launcher: it has to end itself when it hangs, for nobody else will."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import msgspec
import torch.distributed as dist

from ..errors import ConvertError, RunFailed
from .session import Request, run_rank

_PERIOD: Final = 0.25


class _Watch:
    """Ends the process from a thread of its own after silence."""

    def __init__(self, rank: int, timeout: float) -> None:
        self.rank, self.timeout = rank, timeout
        self.doing, self.heard = "starting", time.monotonic()
        self.over = threading.Event()

    def told(self, doing: str) -> None:
        """A step was begun."""
        self.doing, self.heard = doing, time.monotonic()

    def run(self) -> None:
        while not self.over.wait(_PERIOD):
            if time.monotonic() - self.heard > self.timeout:
                self._end()

    def _end(self) -> None:
        error = RunFailed(
            f"rank {self.rank} said nothing for {self.timeout:.0f} s while {self.doing}."
        )
        sys.stderr.write(f"{error.title}: {error.message}\n")
        sys.stderr.flush()
        abort()
        os._exit(RunFailed.exit_code)  # the main thread may hang in a collective for ever


def abort() -> None:
    """End NCCL's communicators under the hands of whoever waits in them."""
    if dist.is_initialized() and dist.is_nccl_available():
        backend: Any = dist.group.WORLD
        if dist.get_backend(backend) == "nccl":
            dist.distributed_c10d._abort_process_group()


@contextmanager
def watched(rank: int, timeout: float) -> Iterator[_Watch]:
    """A watch over the block."""
    watch = _Watch(rank, timeout)
    thread = threading.Thread(target=watch.run, daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        watch.over.set()
        thread.join()


def run_guarded(
    request: Mapping[str, Any], rank: int, world: int, local: int
) -> list[dict[str, Any]]:
    """Run one rank; returns all ranks' reports.

    Raises:
        ConvertError: see :func:`.session.run_rank`.
    """
    asked = msgspec.convert({**request, "store": None}, Request)
    with watched(rank, asked.timeout) as watch:
        try:
            reports = run_rank(asked, rank, world, local, watch.told, gather=True)
        except ConvertError:
            raise
        except RuntimeError as error:  # what torch.distributed raises when a peer is gone
            raise RunFailed(
                f"rank {rank} failed while {watch.doing}: {str(error).splitlines()[0]}",
                hint="look at what the other ranks said.",
            ) from error
    return [msgspec.to_builtins(one) for one in reports]
