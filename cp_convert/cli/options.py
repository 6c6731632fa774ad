"""What several commands share: options, their types, and how a model is found."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

import click

from ..advise.hardware import names as hardware_names
from ..errors import UsageError
from ..job import PLANS, PRECISIONS
from ..model.preset import names as preset_names
from ..model.preset import path_of as preset_path

if TYPE_CHECKING:  # rich takes a tenth of a second to import
    from ..show.screen import Screen

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
SETTINGS: Final = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class Bytes(click.ParamType[int]):
    """A number of bytes with a unit."""

    name = "size"
    _units: ClassVar = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
    _binary: ClassVar = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """``8GiB``, ``500 MB`` or a plain number of bytes."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", str(value).strip().lower())
        if found is None or (found[3] and not found[2]):
            self.fail(f"{value!r} is no size; write 8GiB, 500MB or a number of bytes.", param, ctx)
        units = self._binary if found[3] else self._units
        return int(float(found[1]) * units[found[2]])


def _all(*options: Decorator) -> Decorator:
    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


common: Final = _all(
    click.option(
        "--json", "as_json", is_flag=True,
        help="One JSON document on stdout, everything else on stderr.",
    ),
    click.option("-q", "--quiet", is_flag=True, help="Say nothing but errors."),
    click.option("-v", "--verbose", count=True, help="Say more; twice: tracebacks as well."),
)  # fmt: skip
"""The options that every command has."""

model: Final = click.argument("model", type=click.Path(path_type=Path))
bundle: Final = click.argument("bundle", type=click.Path(path_type=Path))
precision: Final = click.option(
    "-p", "--precision", type=click.Choice(PRECISIONS),
    help="Of parameters and floating inputs.  [default: the preset's; else the half type that the "
    "model, or its --weights, is in; else bf16; fp16 for a GPU that has no bf16]",
)  # fmt: skip


def float32(purpose: str) -> Decorator:
    """``--float32``."""
    return click.option("--float32", multiple=True, metavar="PATTERN", help=purpose)


def hardware(purpose: str) -> Decorator:
    """``--hardware``, with what it is for."""
    return click.option(
        "--hardware", default="h200", show_default=True, metavar="NAME|FILE", help=purpose
    )


def hardware_list() -> str:
    """The hardware that is known, in words."""
    return f"{', '.join(hardware_names())}, or a TOML file."


def plan(purpose: str) -> Decorator:
    """``--plan``."""
    return click.option("--plan", type=click.Choice(PLANS), help=purpose)


def freeze(purpose: str) -> Decorator:
    """``--freeze``."""
    return click.option("--freeze", multiple=True, metavar="ARGUMENT", help=purpose)


def cache(purpose: str) -> Decorator:
    """``--cache``."""
    return click.option(
        "--cache", type=click.Path(path_type=Path), metavar="FOLDER",
        help=f"{purpose}  [default: the platform's cache folder]",
    )  # fmt: skip


def near(word: str, known: Iterable[str]) -> str:
    """A hint: the known word that is nearest, or all of them."""
    known = list(known)
    found = difflib.get_close_matches(word, known, 1)
    return f"did you mean {found[0]}?" if found else f"there are {', '.join(known)}."


def resolved(path: Path, commands: Iterable[str] = ()) -> Path:
    """The file itself, or that of the preset of this name.

    Args:
        path: as it was typed.
        commands: what else might have been meant.

    Raises:
        UsageError: neither, but something like it is known.
    """
    if path.is_file():
        return path
    found = preset_path(str(path))
    if found is None:
        known = [*commands, *preset_names()]
        if like := difflib.get_close_matches(str(path), known, 1):
            raise UsageError(
                f"there is no file {path}.", hint=f"did you mean `cp-convert {like[0]}`?"
            )
    return found or path


def screen(*, as_json: bool, quiet: bool, verbose: int) -> Screen:
    """Where this command shows what it has to show."""
    # Late: rich takes a tenth of a second, which --help does without.
    from ..show.screen import Screen

    return Screen(as_json=as_json, verbosity=-1 if quiet else verbose)


@contextmanager
def others_on_stderr(*, as_json: bool) -> Iterator[None]:
    """What the model's own code prints is not the JSON document."""
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        yield
