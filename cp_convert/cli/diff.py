"""``cp-convert diff``."""

from __future__ import annotations

from pathlib import Path

import click

from .. import bundle as bundles
from ..bundle.difference import differences
from . import options

DIFFERENT = 1
"""The exit code of two bundles that are not equal, as of ``diff`` and ``cmp``."""


@click.command("diff", context_settings=options.SETTINGS)
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
@options.common
def command(*, before: Path, after: Path, as_json: bool, quiet: bool, verbose: int) -> int:
    """Tell what changed between two bundles, BEFORE and AFTER (folders or manifest.json).

    Only the manifests are read: model, inputs, weights by their digests, strategy, releases,
    collectives, proof, sizes and the digests of engines. When and where a bundle was made, and how
    long it took, is no difference.

    Exits with 0 when they are equal and with 1 when they are not.
    """
    (old, _), (new, _) = bundles.read(before), bundles.read(after)
    screen = options.screen(as_json=as_json, quiet=quiet, verbose=verbose)
    from ..show.diff import compared  # late: rich

    found = differences(old, new)
    compared(screen, found)
    return DIFFERENT if found else 0
