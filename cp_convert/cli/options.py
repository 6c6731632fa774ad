"""What several commands share: options, their types, and how a model is found."""

from __future__ import annotations

import difflib
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

import click

from ..advise.hardware import names as hardware_names
from ..errors import UsageError
from ..job import EXCHANGES, PLANS, PRECISIONS, Span
from ..model.home import find_module
from ..model.preset import names as preset_names
from ..model.preset import path_of as preset_path

if TYPE_CHECKING:  # rich takes a tenth of a second to import
    from ..show.screen import Screen

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
SETTINGS: Final = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class Word(click.Choice[str]):
    """One of several words; one that is nearly one of them is recognised."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The word itself."""
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            like = difflib.get_close_matches(str(value), self.choices, 1)
            meant = f" Did you mean {like[0]}?" if like else ""
            raise click.BadParameter(error.message + meant, ctx, param) from error


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


class Numbers(click.ParamType[tuple[int, ...]]):
    """Whole numbers with commas between them."""

    name = "numbers"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """``1,2,4``, each of them at least 1."""
        words = [word.strip() for word in str(value).split(",")]
        if not all(word.isdecimal() for word in words):
            self.fail(f"{value!r} is no list of numbers; write 1,2,4.", param, ctx)
        return tuple(map(int, words))


class Finite(click.FloatRange):
    """A number within a range, infinity and NaN being none."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The number."""
        found = super().convert(value, param, ctx)
        if not isfinite(found):
            self.fail(f"{value} is no finite number.", param, ctx)
        return float(found)


class Seconds(Finite):
    """A time to wait for others: what the system's clocks can count."""

    def __init__(self) -> None:
        super().__init__(1, 1e6)


class Page(click.Path):
    """A file for a page; what cannot be one is told before anything is done."""

    def __init__(self) -> None:
        super().__init__(path_type=Path, dir_okay=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The path; no manifest, and no model, is written over by mistake."""
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        if path.suffix.lower() not in (".html", ".htm"):
            self.fail(f"{path}: the name of a page ends in .html.", param, ctx)
        if not path.absolute().parent.is_dir():
            self.fail(f"there is no folder {path.absolute().parent}.", param, ctx)
        return path


class Range(click.ParamType[Span]):
    """A range of sizes."""

    name = "range"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Span:
        """``text=64:512``."""
        return value if isinstance(value, Span) else Span.read(str(value))


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
    "-p", "--precision", type=Word(PRECISIONS),
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
    return click.option("--plan", type=Word(PLANS), help=purpose)


exchange: Final = click.option(
    "--exchange", type=Word(EXCHANGES),
    help="Send attention's queries, keys and values in 8 bits, each head of each token with its "
    "own scale; int8:kv leaves queries as they are, int8:qkvo sends outputs so as well. What a "
    "strategy does not send is not rounded.  [default: as they are]",
)  # fmt: skip


def freeze(purpose: str) -> Decorator:
    """``--freeze``."""
    return click.option("--freeze", multiple=True, metavar="ARGUMENT", help=purpose)


def gpus_named(given: str, otherwise: str = "") -> list[int]:
    """The GPUs of ``--devices``.

    Args:
        given: as it was typed.
        otherwise: what else the option takes, for the hint.

    Raises:
        UsageError: no list of different numbers.
    """
    names = [name.strip() for name in given.split(",") if name.strip()]
    if not names or not all(name.isdecimal() for name in names):
        raise UsageError(
            f"--devices {given}: not a list of GPUs.", hint=f"--devices 0,1,2,3{otherwise}."
        )
    if len({int(name) for name in names}) < len(names):
        raise UsageError(
            f"--devices {given}: a GPU is named twice.", hint="NCCL wants one GPU for each rank."
        )
    return [int(name) for name in names]


def proof_level(proof: str, none: bool) -> str:
    """``--proof``, unless ``--no-proof`` says otherwise.

    Raises:
        UsageError: both are given.
    """
    source = click.get_current_context().get_parameter_source("proof")
    if none and proof != "none" and source is click.core.ParameterSource.COMMANDLINE:
        raise UsageError(f"--no-proof with --proof {proof}.", hint="leave one of the two out.")
    return "none" if none else proof


def cache(purpose: str) -> Decorator:
    """``--cache``."""
    return click.option(
        "--cache", type=click.Path(path_type=Path), metavar="FOLDER",
        help=f"{purpose}  [default: the platform's cache folder]",
    )  # fmt: skip


@dataclass(frozen=True)
class Found:
    """A model as it was named on the command line.

    Attributes:
        path: its file, or that of a preset.
        module: its dotted name, where it was named by that.
    """

    path: Path
    module: str | None = None


def found(path: Path, commands: Iterable[str] = ()) -> Found:
    """The file itself, that of the preset of this name, or that of the module of this name.

    Args:
        path: as it was typed.
        commands: what else might have been meant.

    Raises:
        UsageError: none of them, but something like it is known.
    """
    name = str(path)
    if path.is_file():
        return Found(path)
    if (preset := preset_path(name)) is not None:
        return Found(preset)
    if _is_dotted(name) and (file := find_module(name)) is not None:
        return Found(file, name)
    if not path.exists() and path.name and path.with_name(f"{path.name}.py").is_file():
        raise UsageError(f"there is no file {path}.", hint=f"did you mean `cp-convert {path}.py`?")
    beside = [str(file) for file in path.parent.glob("*.py")] if path.suffix == ".py" else []
    known = [*commands, *preset_names(), *beside]
    if not path.exists() and (like := difflib.get_close_matches(name, known, 1)):
        raise UsageError(f"there is no file {path}.", hint=f"did you mean `cp-convert {like[0]}`?")
    return Found(path)


def _is_dotted(name: str) -> bool:
    parts = name.split(".")
    return len(parts) > 1 and all(part.isidentifier() for part in parts)


def screen(*, as_json: bool, quiet: bool, verbose: int) -> Screen:
    """Where this command shows what it has to show."""
    # Late: rich takes a tenth of a second, which --help does without.
    from ..show.screen import Screen

    return Screen(as_json=as_json, verbosity=-1 if quiet else verbose)


@contextmanager
def others_aside(screen: Screen) -> Iterator[None]:
    """Keep apart what the model's own code prints, and what libraries warn of.

    With ``--json`` stdout is for the one document: all else, native code too, goes to stderr.
    Warnings of Python's and of loggers are for those who ask for more (``-v``).
    """
    with ExitStack() as stack:
        if screen.as_json:
            stack.enter_context(_stdout_is_stderr())
        if screen.verbosity < 1:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            stack.callback(logging.disable, logging.root.manager.disable)
            logging.disable(logging.WARNING)
        yield


@contextmanager
def _stdout_is_stderr() -> Iterator[None]:
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
