"""``cp-convert inspect``."""

from __future__ import annotations

from pathlib import Path

import click

from .. import bundle as bundles
from . import options


@click.command("inspect", context_settings=options.SETTINGS)
@options.bundle
@options.common
def command(*, bundle: Path, as_json: bool, quiet: bool, verbose: int) -> None:
    """Show what a BUNDLE (its folder or its manifest.json) holds and how it was made."""
    manifest, folder = bundles.read(bundle)
    screen = options.screen(as_json=as_json, quiet=quiet, verbose=verbose)
    from ..show.bundle import inspected  # late: rich

    inspected(screen, manifest, folder)
