"""``cp-convert calibrate``."""

from __future__ import annotations

import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from ..advise.measured import like, measured, to_toml
from ..bundle.folder import whole
from ..errors import OutputError, UsageError
from ..version import __version__
from . import options


@click.command("calibrate", context_settings=options.SETTINGS)
@click.option(
    "--devices", metavar="LIST",
    help="GPUs of one kind, such as 0,1; collectives are measured between them.  [default: all]",
)  # fmt: skip
@click.option(
    "-o", "--out", type=click.Path(path_type=Path, dir_okay=False), default="my-gpu.toml",
    show_default=True, help="The hardware file.",
)  # fmt: skip
@click.option(
    "--like", "base", metavar="NAME|FILE",
    help="Published rates of the same GPU, for what is not measured.  [default: by its name]",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Replace the file.")
@click.option(
    "--timeout", type=options.Seconds(), default=60.0, show_default=True, metavar="SECONDS",
    help="End all when a GPU's process says nothing for so long.",
)  # fmt: skip
@options.common
def command(
    *,
    devices: str | None,
    out: Path,
    base: str | None,
    force: bool,
    timeout: float,
    as_json: bool,
    quiet: bool,
    verbose: int,
) -> None:
    """Measure this machine's GPUs, and write a hardware file for `plan` and `--strategy auto`.

    Products, attentions, reading and writing, and every collective between 2, 4, ... GPUs, each
    alone and over a range of sizes; about a minute. Nothing else should run on them meanwhile.
    """
    screen = options.screen(as_json=as_json, quiet=quiet, verbose=verbose)
    _check_out(out, force=force)
    if base is not None:
        like("", base)  # what cannot be read is told before a minute is spent
    from ..runtime.calibrate import gpus  # late: torch

    named = options.gpus_named(devices) if devices is not None else list(range(gpus()))
    found = _measured([f"cuda:{number}" for number in named], timeout, screen)
    by = (
        f"cp-convert calibrate {__version__} on {len(named)} x {found['gpu']}, torch "
        f"{found['torch']}, {datetime.now(UTC):%Y-%m-%d}"
    )
    text = to_toml(measured(found, like(found["gpu"], base), by))
    with whole(out) as beside:
        beside.write_text(text)
    from ..show.calibrate import calibrated  # late: rich

    calibrated(screen, out, found)


def _measured(devices: list[str], timeout: float, screen: Any) -> dict[str, Any]:
    from ..runtime.launch import launch  # late: other commands start quickly
    from ..show.progress import running  # late: rich

    with tempfile.TemporaryDirectory(prefix="cp-convert-calibrate-") as scratch:
        request = {"devices": devices, "store": str(Path(scratch, "store")), "timeout": timeout}
        with running(screen) as told:
            reports = launch(
                request,
                len(devices),
                timeout=timeout,
                told=told,
                module="cp_convert.runtime.calibrate",
            )
    return reports[0]


def _check_out(out: Path, *, force: bool) -> None:
    if out.suffix != ".toml":
        raise UsageError(
            f"--out {out}: a hardware file ends in .toml.", hint=f"{out.with_suffix('.toml')}"
        )
    if out.exists() and not force:
        raise OutputError(f"{out} exists.", hint="--force replaces it; --out names another.")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"--out: there is no folder {out.absolute().parent}.")
