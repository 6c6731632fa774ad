"""``model.py`` to a module in the wanted precision, its example inputs and its plan."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .errors import CannotShard, ModelFileError
from .job import Job
from .weights import load_weights

DTYPES: Final = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_CASTABLE: Final = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Source:
    """A model, ready to be traced.

    Attributes:
        module: the model, in eval mode and in the job's precision.
        inputs: keyword arguments of ``forward``.
        plan: where the sequence is split and gathered; empty when that is to be found, or when
            the world is 1.
        freeze: arguments whose example values become part of the engines.
        sha256: of the model file.
        parameters: how many numbers the model has learned.
        bytes: their size in memory.
    """

    module: nn.Module
    inputs: dict[str, Any]
    plan: Mapping[str, Any]
    freeze: tuple[str, ...]
    sha256: str
    parameters: int
    bytes: int


def load(job: Job) -> Source:
    """Import the job's model file and build what it describes.

    Raises:
        ModelFileError: the file cannot be imported, lacks a function, or one of them fails.
        WeightsError: the weights do not fit the model.
        CannotShard: ``--plan model``, and there is none.
    """
    dtype = DTYPES[job.precision]
    with _importable(job.model.parent):
        python = _import(job.model)
        module = _call(python, "build_model", job.model)
        inputs = _call(python, "example_inputs", job.model)
    if not isinstance(module, nn.Module):
        raise _wrong_type(job.model, "build_model", "a torch.nn.Module", module)
    if not isinstance(inputs, dict) or not all(isinstance(name, str) for name in inputs):
        raise _wrong_type(job.model, "example_inputs", "a dict of keyword arguments", inputs)
    cast_module(module.eval().requires_grad_(False), dtype)
    if job.weights is not None:
        load_weights(module, job.weights)
    return Source(
        module=module,
        inputs=cast_inputs(inputs, dtype, keep=getattr(python, "keep_float32", ())),
        plan=_plan(python, module, job),
        freeze=(*getattr(python, "freeze", ()), *job.freeze),
        sha256=hashlib.sha256(job.model.read_bytes()).hexdigest(),
        parameters=sum(p.numel() for p in module.parameters()),
        bytes=sum(p.numel() * p.element_size() for p in module.parameters()),
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


def _plan(python: ModuleType, module: nn.Module, job: Job) -> Mapping[str, Any]:
    if job.world == 1 or job.plan == "auto":
        return {}
    plan = getattr(python, "cp_plan", None) or getattr(module, "_cp_plan", None) or {}
    if not plan and job.plan == "model":
        raise CannotShard(
            f"{type(module).__name__} has no plan: neither {job.model.name} defines cp_plan nor "
            "the model a _cp_plan.",
            where=str(job.model),
            hint="leave --plan out, and the plan is found; or say in cp_plan which module inputs "
            "are split along the sequence and which outputs are gathered.",
        )
    if not isinstance(plan, Mapping):
        raise CannotShard(f"cp_plan is a {type(plan).__name__}, not a mapping of module names.")
    return plan


def cast_module(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast parameters and persistent buffers to ``dtype``, in place.

    Left as they are: integers, float64, buffers that are not part of the state dict (tables that
    the model computes, such as rotary frequencies), and what diffusers keeps in float32
    (``_keep_in_fp32_modules``); loading a published checkpoint treats them in the same way.
    """
    kept = tuple(getattr(module, "_keep_in_fp32_modules", None) or ())
    persistent = set(module.state_dict(keep_vars=True))
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if name in persistent and tensor.dtype in _CASTABLE:
                wanted = torch.float32 if _is_kept(name, kept) else dtype
                tensor.data = tensor.data.to(wanted)


def _is_kept(name: str, kept: Collection[str]) -> bool:
    return any(part in kept for part in name.split("."))


def cast_inputs(
    inputs: Mapping[str, Any], dtype: torch.dtype, *, keep: Collection[str] = ()
) -> dict[str, Any]:
    """Cast floating tensors of at most 32 bits to ``dtype``, except the arguments in ``keep``."""

    def cast(leaf: Any) -> Any:
        castable = isinstance(leaf, Tensor) and leaf.dtype in _CASTABLE
        return leaf.to(dtype) if castable else leaf

    return {
        name: value if name in keep else pytree.tree_map(cast, value)
        for name, value in inputs.items()
    }
