"""``cp-convert verify``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from .. import bundle as bundles
from ..errors import DamagedBundle
from . import options
from .summary import option as summary_option
from .summary import summarised


@click.command("verify", context_settings=options.SETTINGS)
@options.bundle
@summary_option
@options.common
def command(
    *, bundle: Path, summary: Path | None, as_json: bool, quiet: bool, verbose: int
) -> None:
    """Check a BUNDLE: every file present, sizes and SHA-256 right, schema valid.

    Exits with 6 when something is wrong.
    """
    screen = options.screen(as_json=as_json, quiet=quiet, verbose=verbose)
    from ..show.bundle import verified  # late: rich
    from ..show.summary import Case

    with summarised(summary, f"verify {bundle.name}") as cases:
        checks = list(bundles.verify(bundle))
        cases += [Case(check.subject, failure=check.problem) for check in checks]
    verified(screen, checks)
    damaged = [c for c in checks if c.problem]
    if damaged and as_json:
        sys.exit(DamagedBundle.exit_code)
    if damaged:
        raise DamagedBundle(
            f"{bundle}: {'; '.join(f'{c.subject} {c.problem}' for c in damaged)}.",
            hint="copy the bundle again, or convert again with --force.",
        )
    if not as_json:
        screen.note(f"{bundle} is whole.")
