"""``cp-convert presets``."""

from __future__ import annotations

from pathlib import Path

import click

from ..errors import UsageError
from ..model.preset import names, path_of, read
from ..words import near
from . import options


@click.command("presets", context_settings=options.SETTINGS)
@click.argument("name", required=False)
@options.common
def command(*, name: str | None, as_json: bool, quiet: bool, verbose: int) -> None:
    """List the models that need no file; with NAME, print that preset's TOML.

    `cp-convert NAME --tiny` converts one in small, with random weights, within a minute.
    """
    screen = options.screen(as_json=as_json, quiet=quiet, verbose=verbose)
    from ..show.presets import one, several  # late: rich

    if name is None:
        several(screen, {n: read(options.found(Path(n)).path) for n in names()})
        return
    path = path_of(name)
    if path is None:
        raise UsageError(f"there is no preset {name!r}.", hint=near(name, names()))
    one(screen, read(path), path.read_text())
