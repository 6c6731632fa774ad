"""A rank's process, from its start to its exit: what it does, it tells the parent on a pipe.

In: a folder with ``request.json``, a pipe, the work. Out: documents, one a line; an exit code.
:mod:`.launch` is the parent.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any, NoReturn

import msgspec

from ..errors import ConvertError

Tell = Callable[..., None]
Work = Callable[[bytes, int, int, Callable[[str], None]], Any]
"""Of the request, the rank, the world, and a function to be called with what is being done."""


def serve(folder: Path, pipe: int, work: Work) -> NoReturn:
    """Do the work that ``request.json`` asks for, tell the parent, and end the process."""
    code = _served(folder, pipe, work)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # what is left has no say: NCCL has been seen to hang in its destructors


def _served(folder: Path, pipe: int, work: Work) -> int:
    tell = _teller(pipe)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides; a terminal tells all
    tell(doing="importing torch")
    # Late: it takes seconds, and whoever started this rank knows by now that it lives.
    import torch.distributed as dist

    from .watch import SHARE, Silence, watched

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    request = (folder / "request.json").read_bytes()

    def ended(silence: Silence) -> None:
        tell(error={"message": f"{silence.message}.", "peer": silence.waits})

    with watched(SHARE * float(json.loads(request)["timeout"]), ended) as watch:

        def told(what: str) -> None:
            watch.told(what)
            tell(doing=what)

        try:
            report = work(request, rank, world, told)
        except ConvertError as error:
            tell(error={**error.as_dict(), "peer": False})
            return error.exit_code
        except RuntimeError as error:
            # gloo has no error class of its own for a peer that is gone.
            peer = isinstance(error, dist.DistError) or "gloo" in str(error)
            tell(error={"message": f"{type(error).__name__}: {error}"[:2000], "peer": peer})
            return 1
    tell(result=msgspec.to_builtins(report))
    return 0


def _teller(pipe: int) -> Tell:
    """Writes documents, one a line; from any thread."""
    os.set_inheritable(pipe, False)
    lock = Lock()

    def tell(**message: Any) -> None:
        data = json.dumps(message).encode() + b"\n"
        with lock:
            while data:
                data = data[os.write(pipe, data) :]

    return tell
