"""The only exit: every :class:`ConvertError` becomes a message and a code."""

from __future__ import annotations

import atexit
import gc
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from ..errors import ConvertError, UsageError
from .root import cli


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    args = list(sys.argv[1:] if argv is None else argv)
    # What is left of a program is not looked through at the end (FLUX.1-dev: three seconds).
    atexit.register(gc.freeze)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupted)
    try:
        sys.exit(cli.main(args, prog_name="cp-convert", standalone_mode=False) or 0)
    except click.ClickException as error:
        _show(UsageError(error.format_message().rstrip(), hint=_help_hint(error)), args)
    except ConvertError as error:
        _show(error, args)
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted; nothing was written.", err=True)
        sys.exit(130)


def _interrupted(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _help_hint(error: click.ClickException) -> str | None:
    context = getattr(error, "ctx", None)
    return f"{context.command_path} --help" if context is not None else None


def _show(error: ConvertError, args: Sequence[str]) -> NoReturn:
    # Late: rich takes a tenth of a second, which --help does without.
    from ..show.screen import Screen

    verbosity = sum(a.count("v") for a in args if a.startswith("-v")) + args.count("--verbose")
    Screen(as_json="--json" in args, verbosity=verbosity).error(error)
    sys.exit(error.exit_code)
