"""``--summary``: a file for CI systems, written whether or not the command succeeds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from ..errors import ConvertError, UsageError

if TYPE_CHECKING:  # what shows is imported late
    from ..show.summary import Case

option: Final = click.option(
    "--summary", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="Write what was found to this file as well, for a CI system: JUnit's format (.xml) or "
    "Markdown (.md).",
)  # fmt: skip


@contextmanager
def summarised(path: Path | None, suite: str) -> Iterator[list[Case]]:
    """A list of cases that is written to ``path`` at the block's end; an error is one of them.

    Raises:
        UsageError: before the block, ``path`` has neither suffix or its folder is missing; after
            it, the file cannot be written.
    """
    from ..show.summary import Case, failure_of  # late: not every run has one

    cases: list[Case] = []
    _check(path)
    try:
        yield cases
    except ConvertError as error:
        cases.append(Case(type(error).__name__, failure=failure_of(error)))
        _write(path, suite, cases)
        raise
    _write(path, suite, cases)


def _check(path: Path | None) -> None:
    from ..show.summary import SUFFIXES  # late: not every run has one

    if path is None:
        return
    if path.suffix not in SUFFIXES:
        raise UsageError(
            f"--summary {path}: its suffix is neither of {', '.join(SUFFIXES)}.",
            hint=".xml is JUnit's format, .md Markdown.",
        )
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--summary: there is no folder {path.absolute().parent}.")


def _write(path: Path | None, suite: str, cases: list[Case]) -> None:
    from ..show.summary import summary  # late: not every run has one

    if path is None:
        return
    try:
        path.write_text(summary(path, suite, cases), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--summary {path}: {error.strerror}.") from error
