"""``cp-convert plan``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..advise.hardware import read as read_hardware
from ..errors import UsageError
from ..job import Job
from . import options


@click.command("plan", context_settings=options.SETTINGS)
@options.model
@click.option("-w", "--world", type=int, default=8, show_default=True, help="The largest world.")
@click.option(
    "--cfg", type=int, default=1, show_default=True,
    help="How many guidance branches a batch has: meshes that give each its own ranks as well. An "
    "even batch is taken to have two.",
)  # fmt: skip
@click.option(
    "--tp", type=int, default=1, show_default="as far as memory asks, and once to compare",
    help="Meshes whose ranks share every weight, this many of them, as well.",
)  # fmt: skip
@click.option(
    "--unbatched", multiple=True, metavar="ARGUMENT",
    help="As for convert.",
)  # fmt: skip
@options.hardware(options.hardware_list())
@options.precision
@options.exchange
@options.plan("As for convert.")
@options.freeze("As for convert.")
@click.option("--tiny", is_flag=True, help="A preset's structure in small.")
@click.option(
    "--resolution", "resolutions", metavar="NAME", help="One of the preset's.",
    callback=lambda _ctx, _parameter, name: () if name is None else (name,),
)  # fmt: skip
@click.option(
    "--html", type=options.Page(),
    help="Write a page with charts to this file as well.",
)  # fmt: skip
@options.common
def command(
    *,
    model: Path,
    hardware: str,
    html: Path | None,
    as_json: bool,
    quiet: bool,
    verbose: int,
    **rest: Any,
) -> None:
    """Compare meshes and strategies for MODEL at worlds 2, 4, ... up to --world; nothing is built.

    Collectives and bytes are those of the very programs that convert would build; times and
    activations are estimated, kernel by kernel, by curves that `cp-convert calibrate` measured or
    by published rates and the shares of them that the hardware's file assumes. A model of any
    size is planned without memory for its weights.
    """
    screen = options.screen(as_json=as_json, quiet=quiet, verbose=verbose)
    from ..show.plan import planned  # late: rich
    from ..show.progress import shown

    told, found = read_hardware(hardware), options.found(model)
    job = Job(
        model=found.path, strategy="ulysses", out=Path(), proof="none", module=found.module, **rest
    )
    with options.others_aside(screen), shown(screen) as progress:
        from ..advise.planning import forecast  # late: torch

        forecasted = forecast(job, told, hardware, progress)
    if html is not None:
        from ..show.page import page  # late: not every plan has one

        try:
            html.write_text(page(forecasted), encoding="utf-8")
        except OSError as error:
            raise UsageError(f"--html {html}: {error.strerror}.") from error
    planned(screen, forecasted)
