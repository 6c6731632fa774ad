"""A rank's own watch: a thread that ends the process when nothing goes on, or nobody waits for it.

The main thread may stand in a collective for ever, and then only another thread can say so, and
abort NCCL under its hands.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final

import torch
import torch.distributed as dist

from ..errors import RunFailed

SHARE: Final = 0.8
"""Of the time-out, after which a rank speaks for itself: before others end it without its word."""
_PERIOD: Final = 0.25
_ABORT: Final = 5.0
"""Seconds that an abort may take; NCCL's has been seen to hang as well."""
_TORCH: Final = (str(Path(torch.__file__).parent), "<eval_with_key>")


@dataclass(frozen=True)
class Silence:
    """What a rank was at when nothing went on.

    Attributes:
        seconds: for so long.
        doing: the last step that was begun.
        where: function, file and line at which the main thread stood.
        waits: whether that is within torch, where a rank waits for others.
    """

    seconds: float
    doing: str
    where: str
    waits: bool

    @property
    def message(self) -> str:
        """In words."""
        how = "waited in vain" if self.waits else "got no further"
        return f"it {how} for {self.seconds:.0f} s; it stood in {self.where}"


class Watch:
    """Looks on; made by :func:`watched`."""

    def __init__(self, seconds: float, ended: Callable[[Silence], None]) -> None:
        self.seconds, self.ended = seconds, ended
        self.doing, self.heard = "starting", time.monotonic()
        self.over = threading.Event()
        self.main, self.parent = threading.get_ident(), os.getppid()

    def told(self, doing: str) -> None:
        """A step was begun."""
        self.doing, self.heard = doing, time.monotonic()

    def run(self) -> None:
        """Until the block is over, or the process."""
        while not self.over.wait(min(_PERIOD, self.seconds / 20)):
            if os.getppid() != self.parent:  # nobody is left who would end this rank
                os._exit(RunFailed.exit_code)
            if time.monotonic() - self.heard > self.seconds:
                where, waits = _place(sys._current_frames().get(self.main))
                self.ended(Silence(self.seconds, self.doing, where, waits))
                abort()
                os._exit(RunFailed.exit_code)


def _place(frame: FrameType | None) -> tuple[str, bool]:
    """Where a thread stands: the innermost of its frames that is not torch's own, if any."""
    waits = frame is not None and frame.f_code.co_filename.startswith(_TORCH)
    while frame is not None and frame.f_code.co_filename.startswith(_TORCH):
        frame = frame.f_back
    if frame is None:
        return "torch", waits
    code = frame.f_code
    return f"{code.co_name} ({code.co_filename}:{frame.f_lineno})", waits


def abort() -> None:
    """End NCCL's communicators under the hands of whoever waits in them; takes seconds at most.

    gloo needs none: its sockets end with the process.
    """
    if dist.is_initialized() and "nccl" in dist.get_backend_config():
        ending: Any = dist.distributed_c10d._abort_process_group
        thread = threading.Thread(target=ending, daemon=True)
        thread.start()
        thread.join(_ABORT)


@contextmanager
def watched(seconds: float, ended: Callable[[Silence], None]) -> Iterator[Watch]:
    """A watch over the block.

    Args:
        seconds: how long nothing may be told.
        ended: is called on the watch's thread before it ends the process.
    """
    watch = Watch(seconds, ended)
    thread = threading.Thread(target=watch.run, daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        watch.over.set()
        thread.join()
