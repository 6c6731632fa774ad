"""``python -m cp_convert.runtime.rank FOLDER PIPE``: one rank, started by :mod:`.launch`."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import msgspec

from ..errors import ConvertError


def main(folder: Path, pipe: int) -> int:
    """Do what ``request.json`` says and tell the parent; returns the exit code."""

    def tell(**message: Any) -> None:
        os.write(pipe, json.dumps(message).encode() + b"\n")

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides; a terminal tells all
    tell(doing="importing torch")
    import torch.distributed as dist

    from .session import Request, run_rank

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    request = msgspec.json.decode((folder / "request.json").read_bytes(), type=Request)
    try:
        (report,) = run_rank(request, rank, world, rank, lambda what: tell(doing=what))
    except ConvertError as error:
        tell(error={**error.as_dict(), "exit_code": error.exit_code})
        return error.exit_code
    except dist.DistError as error:
        tell(error={"message": str(error).splitlines()[0], "peer": True})
        return 1
    except RuntimeError as error:
        # gloo has no error class of its own for a peer that is gone.
        peer = "gloo" in str(error)
        tell(error={"message": f"{type(error).__name__}: {error}"[:2000], "peer": peer})
        return 1
    tell(result=msgspec.to_builtins(report))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
