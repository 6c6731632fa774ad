"""A process that runs a rank, and which of several that failed is the cause."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from .. import errors
from ..errors import ConvertError, RunFailed

_SAID: Final = 20
"""How many lines of a rank's own words are shown."""


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
        error: why it cannot go on; ``peer`` in it says that another rank may be the
            cause.
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


def failure(ranks: Sequence[Rank]) -> ConvertError:
    """What is to be said when ranks ended, or were ended, without a result."""
    worst = min((rank for rank in ranks if rank.result is None), key=_blame)
    return _own_words(worst) if worst.error is not None else _last_words(worst, ranks)


def _blame(rank: Rank) -> tuple[int, int]:
    """Who died without a word, then who has an error of its own, then who hangs.

    The others fail only because they wait for one of these.
    """
    if rank.error is not None:
        return (3 if rank.error.get("peer") else 1), rank.number
    return (2 if rank.process.poll() is None else 0), rank.number


def _own_words(rank: Rank) -> ConvertError:
    """The rank's error: as it is where it is about the request, which all ranks refuse alike."""
    told = rank.error or {}
    kind = getattr(errors, str(told.get("kind")), RunFailed)
    message = str(told["message"])
    if kind is RunFailed and told.get("kind") is None:
        message = f"rank {rank.number} failed while {rank.doing}: {message}"
    made: ConvertError = kind(message, where=told.get("where"), hint=told.get("hint"))
    return made


def _last_words(rank: Rank, ranks: Sequence[Rank]) -> RunFailed:
    code = rank.process.poll()
    if code is None:
        return silence([rank], ranks)
    how = f"ended with exit code {code}"
    if code < 0:
        how = f"was ended by {signal.Signals(-code).name}"
    words = rank.words()
    return RunFailed(
        f"rank {rank.number} {how} while {rank.doing}; the other ranks were ended."
        + (f"\n{words}" if words else " It said nothing."),
        hint="run it again with -v, or with --executor torch --devices cpu.",
    )


def silence(silent: Sequence[Rank], ranks: Sequence[Rank]) -> RunFailed:
    """Ranks that say nothing, and cannot be asked any more."""
    seconds = time.monotonic() - silent[0].heard
    doing = "; ".join(f"rank {r.number} was {r.doing}" for r in ranks if r.result is None)
    words = silent[0].words()
    return RunFailed(
        f"rank {', '.join(str(r.number) for r in silent)} said nothing for {seconds:.0f} s, and "
        f"all ranks were ended: {doing}." + (f"\n{words}" if words else ""),
        hint="--timeout allows more.",
    )
