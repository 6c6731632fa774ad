"""``cp-convert cache``."""

from __future__ import annotations

from pathlib import Path

import click

from ..cache.store import Cache, default_folder
from . import options


@click.group("cache", context_settings=options.SETTINGS)
def command() -> None:
    """What earlier conversions made and later ones need not make again."""


@command.command("info", context_settings=options.SETTINGS)
@options.common
@options.cache("Which.")
def info(*, cache: Path | None, as_json: bool, quiet: bool, verbose: int) -> None:
    """Show where the cache is, and how much it holds."""
    folder = cache or default_folder()
    screen = options.screen(as_json=as_json, quiet=quiet, verbose=verbose)
    from ..show.cache import held  # late: rich

    held(screen, folder, Cache(folder).held())


@command.command("clear", context_settings=options.SETTINGS)
@options.common
@options.cache("Which.")
def clear(*, cache: Path | None, as_json: bool, quiet: bool, verbose: int) -> None:
    """Remove everything from the cache. Bundles stay as they are."""
    folder = cache or default_folder()
    freed = Cache(folder).clear()
    screen = options.screen(as_json=as_json, quiet=quiet, verbose=verbose)
    from ..show.cache import cleared  # late: rich

    cleared(screen, folder, freed)
