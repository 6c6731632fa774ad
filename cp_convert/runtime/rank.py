"""``python -m cp_convert.runtime.rank FOLDER PIPE``: one rank, started by :mod:`.launch`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from .serve import serve


def run(data: bytes, rank: int, world: int, told: Callable[[str], None]) -> Any:
    """Run the bundle that the request names."""
    from .session import Request, run_rank  # late: torch, after the parent heard of us

    request = msgspec.json.decode(data, type=Request)
    (report,) = run_rank(request, rank, world, rank, told)
    return report


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]), run)
