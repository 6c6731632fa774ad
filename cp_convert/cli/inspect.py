"""``cp-convert inspect``."""

from __future__ import annotations

from pathlib import Path

import click

from .. import bundle as bundles
from ..bundle.variants import variant_of
from ..errors import UsageError
from . import options


@click.command("inspect", context_settings=options.SETTINGS)
@options.bundle
@click.option(
    "--html", type=options.Page(), metavar="FILE",
    help="Write it as a page with charts to this file as well.",
)  # fmt: skip
@click.option("--variant", metavar="NAME", help="Show this one of the bundle's variants.")
@options.common
def command(
    *,
    bundle: Path,
    html: Path | None,
    variant: str | None,
    as_json: bool,
    quiet: bool,
    verbose: int,
) -> None:
    """Show what a BUNDLE (its folder or its manifest.json) holds and how it was made."""
    manifest, folder = bundles.read(bundle)
    manifest = manifest if variant is None else variant_of(manifest, variant)
    screen = options.screen(as_json=as_json, quiet=quiet, verbose=verbose)
    from ..show.bundle import inspected  # late: rich

    if html is not None:
        from ..show.bundle_page import bundle_page  # late: rich

        try:
            html.write_text(bundle_page(manifest), encoding="utf-8")
        except OSError as error:
            raise UsageError(f"--html {html}: {error.strerror}.") from error
    inspected(screen, manifest, folder)
