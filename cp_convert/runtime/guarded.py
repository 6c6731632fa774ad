"""One rank under another launcher: it has to end itself when it hangs, for nobody else will."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import msgspec

from ..errors import ConvertError, RunFailed
from .session import Request, run_rank
from .watch import SHARE, Silence, watched


def run_guarded(
    request: Mapping[str, Any], rank: int, world: int, local: int
) -> list[dict[str, Any]]:
    """Run one rank; returns all ranks' reports.

    Raises:
        ConvertError: see :func:`.session.run_rank`.
    """
    asked = msgspec.convert({**request, "store": None}, Request)

    def ended(silence: Silence) -> None:
        message = f"rank {rank} failed while {silence.doing}: {silence.message}."
        sys.stderr.write(f"{RunFailed.title}: {message}\n")
        sys.stderr.flush()

    with watched(SHARE * asked.timeout, ended) as watch:
        try:
            reports = run_rank(asked, rank, world, local, watch.told, gather=True)
        except ConvertError:
            raise
        except RuntimeError as error:  # what torch.distributed raises when a peer is gone
            raise RunFailed(
                f"rank {rank} failed while {watch.doing}: {first_line(error)}",
                hint="look at what the other ranks said.",
            ) from error
    return [msgspec.to_builtins(one) for one in reports]


def first_line(error: BaseException) -> str:
    """Of what an exception says, its class where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
