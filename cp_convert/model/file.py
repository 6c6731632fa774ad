"""The user's ``model.py``: imported, called, and blamed for what it raises."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Final, NoReturn
from unittest.mock import patch

from torch import nn

from ..errors import ModelFileError
from ..ir.source import Example
from ..job import Variant
from ..mesh import Axis
from .home import Home, at_home, home_of
from .returned import Blame, inputs_from, model_from, names_from, required
from .variants import sized, told_variants


@dataclass(frozen=True)
class Given:
    """What a model file, or a preset, describes.

    Attributes:
        module: the model, as it was built.
        examples: keyword arguments of forward, as they were given, variant by variant.
        plan: where the sequence is split, when it says so.
        freeze: arguments whose values become part of the engines.
        keep_float32: arguments that are not cast.
        peers: rank 1, 2, ... of a model whose ranks hold different parameters.
        groups: the process groups in which the model itself communicates.
        tp_plan: which weights ranks share, when it says so.
    """

    module: nn.Module
    examples: tuple[Example, ...]
    plan: Mapping[str, Any]
    freeze: tuple[str, ...]
    keep_float32: tuple[str, ...]
    peers: tuple[nn.Module, ...] = ()
    groups: Mapping[str, Axis] = field(default_factory=dict)
    tp_plan: Mapping[str, Any] = field(default_factory=dict)


def from_file(
    path: Path,
    world: int,
    module: str | None = None,
    wanted: Sequence[str] = (),
    sizes: Sequence[Variant] = (),
    size: str = "",
) -> Given:
    """Import the model file at ``path`` and build what it describes.

    What forward imports when it is called is found only within :func:`.home.at_home`.

    Args:
        path: the model file. A ``build_model`` that takes a ``rank`` is called for every rank.
        world: the world size.
        module: its dotted name, where it was named by that.
        wanted: names of its variants; none: all.
        sizes: of a range, instead of variants.
        size: the argument of ``example_inputs`` that they are given as.

    Raises:
        ModelFileError: it cannot be imported, lacks a function, or one of them fails.
        UsageError: it has no such variant.
    """
    with at_home(path, module):
        python = _import(path, home_of(path, module))
        ranks: list[dict[str, Any]] = [{}]
        if _takes_rank(python):
            ranks = [{"rank": rank} for rank in range(world)]
        modules = [_call(python, "build_model", path, **rank) for rank in ranks]
        blame = Blame(path, "build_model", python.build_model)
        modules = [model_from(one, blame) for one in modules]
        told = sized(python, path, sizes, size) if sizes else told_variants(python, path, wanted)
        examples = [Example(one, _inputs(python, path, given, modules[0])) for one, given in told]
        inputs = examples[0].inputs
        groups = _groups(python, path, world)
    return Given(
        module=modules[0],
        examples=tuple(examples),
        plan=_plan(python, path, "cp_plan", _CP_PLAN),
        freeze=names_from(python, "freeze", inputs, path),
        keep_float32=names_from(python, "keep_float32", inputs, path),
        peers=tuple(modules[1:]),
        groups=groups,
        tp_plan=_plan(python, path, "tp_plan", _TP_PLAN),
    )


def _inputs(
    python: ModuleType, path: Path, told: Mapping[str, Any], module: nn.Module
) -> dict[str, Any]:
    given = _call(python, "example_inputs", path, **told)
    blame = Blame(path, "example_inputs", python.example_inputs, _listed(told))
    return inputs_from(given, blame, module)


def _takes_rank(python: ModuleType) -> bool:
    function = getattr(python, "build_model", None)
    return callable(function) and "rank" in inspect.signature(function).parameters


_CP_PLAN: Final = (
    'cp_plan = {"blocks.0": {"x": ContextParallelInput(split_dim=1)}, "proj_out": '
    "ContextParallelOutput(gather_dim=1)}; without it the plan is found."
)
_TP_PLAN: Final = (
    'tp_plan = {"blocks.*.attn.to_q": "colwise", "blocks.*.attn.to_out.0": "rowwise"}; without it '
    "all that can be shared is."
)


def _plan(python: ModuleType, path: Path, name: str, example: str) -> Mapping[str, Any]:
    plan = getattr(python, name, None) or {}
    if not isinstance(plan, Mapping):
        raise ModelFileError(
            f"{name} is a {type(plan).__name__}, not a dict by module names.",
            where=str(path),
            hint=example,
        )
    return plan


def _groups(python: ModuleType, path: Path, world: int) -> dict[str, Axis]:
    """The process groups that the file declares, each covering the world."""
    told = getattr(python, "process_groups", None) or {}
    if callable(told):
        with _blamed_on(path, "process_groups()"):
            told = told(world)
    groups: dict[str, Axis] = {}
    for name, ranks in told.items() if isinstance(told, Mapping) else [("", told)]:
        try:
            groups[name] = Axis(name, tuple(tuple(int(r) for r in group) for group in ranks))
        except (TypeError, ValueError) as error:
            raise ModelFileError(
                f"process_groups is {told!r}, not lists of ranks by name.",
                where=str(path),
                hint='process_groups = {"tp": [[0, 1], [2, 3]]}',
            ) from error
        equal = len({len(group) for group in groups[name].groups}) == 1
        if not equal or sorted(groups[name].flat) != list(range(world)):
            raise ModelFileError(
                f"the process group {name!r} is {ranks}, which does not divide the {world} ranks "
                "into equal groups.",
                where=str(path),
                hint="every rank stands in exactly one list; a function process_groups(world) can "
                "make them for any --world.",
            )
    return groups


def _import(path: Path, home: Home) -> ModuleType:
    """Import the file under its own name, under which ``sys.modules`` then has it."""
    spec = importlib.util.spec_from_file_location(home.name, path)
    if spec is None or spec.loader is None:
        raise ModelFileError(
            f"{path} cannot be imported as Python.", hint="the file's name must end in .py."
        )
    with _blamed_on(path, "importing it"):
        if home.package:
            importlib.import_module(home.package)
        python = importlib.util.module_from_spec(spec)
        sys.modules[home.name] = python
        spec.loader.exec_module(python)
    return python


def _call(python: ModuleType, name: str, path: Path, **arguments: Any) -> Any:
    function = getattr(python, name, None)
    if not callable(function):
        raise ModelFileError(
            f"{path} does not define {name}().",
            where=str(path),
            hint="a model file defines build_model() -> torch.nn.Module and "
            "example_inputs() -> dict[str, object]; examples/plain_dit.py is one.",
        )
    if missing := required(function, arguments):
        raise Blame(path, name, function).error(
            f"wants {', '.join(missing)}, and is called without.",
            "give defaults; only build_model(rank) is told something, once for every rank, and "
            "example_inputs() what variants names.",
        )
    with _blamed_on(path, f"{name}({_listed(arguments)})"):
        return function(**arguments)


def _listed(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in arguments.items())


class _Asked(Exception):
    """A parser of arguments that has no arguments to parse."""


def _unanswered(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    raise _Asked(message)


@contextmanager
def _blamed_on(path: Path, doing: str) -> Iterator[None]:
    """Turn whatever the user's own code raises into one message that names its line."""
    try:
        with patch.object(argparse.ArgumentParser, "error", _unanswered):
            yield
    except _Asked as error:
        raise ModelFileError(
            f"{doing} failed: its ArgumentParser wants arguments ({error}), and a model file is "
            "given none.",
            where=_line_in(error, path),
            hint='give them defaults, or parse under `if __name__ == "__main__":`.',
        ) from error
    except SystemExit as error:
        raise ModelFileError(
            f"{doing} ended the program: SystemExit({error.code!r}).",
            where=_line_in(error, path),
            hint="raise an exception that says what is wrong, and keep what belongs to a script "
            'under `if __name__ == "__main__":`.',
        ) from error
    except ImportError as error:
        raise _not_imported(error, path, doing) from error
    except KeyboardInterrupt:  # a person's, or the system's; never the file's
        raise
    # The user's code may raise anything at all, what is no Exception (GeneratorExit, a library's
    # cancellation) as well; it is theirs to mend, so it is never a traceback.
    except BaseException as error:
        if isinstance(error, SyntaxError) and error.filename and Path(error.filename).is_file():
            raise ModelFileError(
                f"{error.filename} is not valid Python: {error.msg}.",
                where=f"{error.filename}:{error.lineno}",
            ) from error
        raise ModelFileError(
            f"{doing} failed with {type(error).__name__}" + (f": {error}" if str(error) else "."),
            where=_line_in(error, path),
            hint=_advice(error),
        ) from error


def _not_imported(error: ImportError, path: Path, doing: str) -> ModelFileError:
    where, name = _line_in(error, path), error.name or ""
    if "relative import" in str(error):
        return ModelFileError(
            f"{path} imports relatively, and is not part of a package.",
            where=where,
            hint="name it as a module, from the folder that holds its package: "
            f"cp-convert package.{path.stem}",
        )
    if name == path.stem:
        return ModelFileError(
            f"{path.name} hides the package {name}, which it imports itself: {error}.",
            where=where,
            hint="give the model file another name.",
        )
    if isinstance(error, ModuleNotFoundError) and name:
        known = {"diffusers": "pip install 'cp-convert[models]'"}
        return ModelFileError(
            f"{path} needs the module {name}, which is not installed.",
            where=where,
            hint=known.get(name, f"install {name} beside cp-convert."),
        )
    return ModelFileError(f"{doing} failed with {type(error).__name__}: {error}", where=where)


def _advice(error: BaseException) -> str | None:
    text = str(error)
    if isinstance(error, EOFError):
        return "take it from a default, a file or the environment."
    if "CUDA" in text or "NVIDIA driver" in text:
        return "build the model and its inputs on the CPU; converting needs no GPU."
    return None


def _line_in(error: BaseException, path: Path) -> str:
    """The last line of ``path`` that the error passed through."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename) == path or Path(frame.filename) == path.absolute()
    ]
    return f"{path}:{lines[-1]}" if lines else str(path)
