"""The user's ``model.py``: imported, called, and blamed for what it raises."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from .errors import ModelFileError


@dataclass(frozen=True)
class Given:
    """What a model file, or a preset, describes.

    Attributes:
        module: the model, as it was built.
        inputs: keyword arguments of forward, as they were given.
        plan: where the sequence is split, when it says so.
        freeze: arguments whose values become part of the engines.
        keep_float32: arguments that are not cast.
    """

    module: nn.Module
    inputs: dict[str, Any]
    plan: Mapping[str, Any]
    freeze: tuple[str, ...]
    keep_float32: tuple[str, ...]


def from_file(path: Path) -> Given:
    """Import the model file at ``path`` and build what it describes.

    Raises:
        ModelFileError: it cannot be imported, lacks a function, or one of them fails.
    """
    with _importable(path.parent):
        python = _import(path)
        module = _call(python, "build_model", path)
        inputs = _call(python, "example_inputs", path)
    if not isinstance(module, nn.Module):
        raise _wrong_type(path, "build_model", "a torch.nn.Module", module)
    if not isinstance(inputs, dict) or not all(isinstance(name, str) for name in inputs):
        raise _wrong_type(path, "example_inputs", "a dict of keyword arguments", inputs)
    return Given(
        module=module,
        inputs=inputs,
        plan=getattr(python, "cp_plan", None) or {},
        freeze=tuple(getattr(python, "freeze", ())),
        keep_float32=tuple(getattr(python, "keep_float32", ())),
    )


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


def _call(python: ModuleType, name: str, path: Path) -> Any:
    function = getattr(python, name, None)
    if not callable(function):
        raise ModelFileError(
            f"{path} does not define {name}().",
            where=str(path),
            hint="a model file defines build_model() -> torch.nn.Module and "
            "example_inputs() -> dict[str, object]; examples/plain_dit.py is one.",
        )
    with _blamed_on(path, f"{name}()"):
        return function()


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
