"""The user's ``model.py``: imported, called, and blamed for what it raises."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from ..errors import ModelFileError
from ..mesh import Axis


@dataclass(frozen=True)
class Given:
    """What a model file, or a preset, describes.

    Attributes:
        module: the model, as it was built.
        inputs: keyword arguments of forward, as they were given.
        plan: where the sequence is split, when it says so.
        freeze: arguments whose values become part of the engines.
        keep_float32: arguments that are not cast.
        peers: rank 1, 2, ... of a model whose ranks hold different parameters.
        groups: the process groups in which the model itself communicates.
    """

    module: nn.Module
    inputs: dict[str, Any]
    plan: Mapping[str, Any]
    freeze: tuple[str, ...]
    keep_float32: tuple[str, ...]
    peers: tuple[nn.Module, ...] = ()
    groups: Mapping[str, Axis] = field(default_factory=dict)


def from_file(path: Path, world: int) -> Given:
    """Import the model file at ``path`` and build what it describes.

    Args:
        path: the model file. A ``build_model`` that takes a ``rank`` is called for every rank.
        world: the world size.

    Raises:
        ModelFileError: it cannot be imported, lacks a function, or one of them fails.
    """
    with _importable(path.parent):
        python = _import(path)
        ranks: list[dict[str, Any]] = [{}]
        if _takes_rank(python):
            ranks = [{"rank": rank} for rank in range(world)]
        modules = [_call(python, "build_model", path, **rank) for rank in ranks]
        inputs = _call(python, "example_inputs", path)
        groups = _groups(python, path, world)
    for module in modules:
        if not isinstance(module, nn.Module):
            raise _wrong_type(path, "build_model", "a torch.nn.Module", module)
    if not isinstance(inputs, dict) or not all(isinstance(name, str) for name in inputs):
        raise _wrong_type(path, "example_inputs", "a dict of keyword arguments", inputs)
    return Given(
        module=modules[0],
        inputs=inputs,
        plan=getattr(python, "cp_plan", None) or {},
        freeze=tuple(getattr(python, "freeze", ())),
        keep_float32=tuple(getattr(python, "keep_float32", ())),
        peers=tuple(modules[1:]),
        groups=groups,
    )


def _takes_rank(python: ModuleType) -> bool:
    function = getattr(python, "build_model", None)
    return callable(function) and "rank" in inspect.signature(function).parameters


def _groups(python: ModuleType, path: Path, world: int) -> dict[str, Axis]:
    """The process groups that the file declares, each covering the world."""
    told = getattr(python, "process_groups", None) or {}
    if callable(told):
        with _blamed_on(path, "process_groups()"):
            told = told(world)
    groups: dict[str, Axis] = {}
    for name, ranks in dict(told).items():
        try:
            groups[name] = Axis(name, tuple(tuple(int(r) for r in group) for group in ranks))
        except TypeError as error:
            raise _wrong_type(path, "process_groups", "lists of ranks by name", told) from error
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


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let the model file import its neighbours, as ``python model.py`` would."""
    entry = str(folder.resolve())
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        sys.path.remove(entry)


def _import(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"cp_convert_model_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ModelFileError(
            f"{path} cannot be imported as Python.", hint="the file's name must end in .py."
        )
    python = importlib.util.module_from_spec(spec)
    with _blamed_on(path, "importing it"):
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
    with _blamed_on(path, f"{name}()"):
        return function(**arguments)


@contextmanager
def _blamed_on(path: Path, doing: str) -> Iterator[None]:
    """Turn whatever the user's own code raises into one message that names its line."""
    try:
        yield
    except SyntaxError as error:
        raise ModelFileError(
            f"{path} is not valid Python: {error.msg}.", where=f"{error.filename}:{error.lineno}"
        ) from error
    except ModuleNotFoundError as error:
        known = {"diffusers": "pip install 'cp-convert[models]'"}
        hint = known.get(error.name or "", f"install {error.name} beside cp-convert.")
        raise ModelFileError(
            f"{path} needs the module {error.name}, which is not installed.",
            where=_line_in(error, path),
            hint=hint,
        ) from error
    # The user's code may raise anything at all; it is theirs to mend, so it is never a traceback.
    except Exception as error:
        raise ModelFileError(
            f"{doing} failed with {type(error).__name__}: {error}", where=_line_in(error, path)
        ) from error


def _line_in(error: BaseException, path: Path) -> str:
    """The last line of ``path`` that the error passed through."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename) == path or Path(frame.filename) == path.absolute()
    ]
    return f"{path}:{lines[-1]}" if lines else str(path)


def _wrong_type(path: Path, name: str, wanted: str, got: object) -> ModelFileError:
    return ModelFileError(f"{name}() returned {type(got).__name__}, not {wanted}.", where=str(path))
