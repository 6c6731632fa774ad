"""A key for a model: equal keys, equal traces.

A trace is decided by the code of forward, by everything that forward reads from its modules, and by
the shapes of parameters and inputs. All of that goes into the key: the sources of every imported
module that belongs to no installed package, the versions of all those, the attributes of all
submodules down to plain values, buffers and frozen inputs with their numbers. A model that holds
something of unknown kind gets no key, and is traced every time.
"""

from __future__ import annotations

import functools
import hashlib
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from enum import Enum
from importlib import metadata
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, Final

import torch
from torch import Tensor, nn

from ..ir.source import Source
from ..ir.tensors import numbers
from .store import key_of

_PLAIN: Final = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_BOOKKEEPING: Final = ("_use_default_values",)
"""What diffusers lists in an order that changes from run to run, and forward never reads."""
_OWN: Final = ("_parameters", "_buffers", "_modules")


class _Unknown(Exception):
    """A value that may decide the trace, and cannot be put into a key."""


def tool_key(*others: object) -> str:
    """Of this program's own code, and of others by name and version."""
    folder = Path(__file__).parent.parent
    files = sorted(folder.rglob("*.py"))
    return key_of([*others, sys.version, torch.__version__, *(f.read_bytes() for f in files)])


def source_key(source: Source, tool: str) -> str | None:
    """Of a model and the inputs that it is traced with; ``None`` for one that gets no key."""
    if source.peers:
        return None
    known: dict[int, int] = {}
    inputs = {
        name: _described(value, known, whole=name in source.freeze)
        for name, value in source.inputs.items()
    }
    try:
        parts = [
            tool,
            source.sha256,
            *_code(),
            _canonical(dict(source.plan), known),
            sorted(source.freeze),
            _canonical(inputs, known),
            {name: axis.groups for name, axis in source.groups.items()},
            *_modules(source.module, known),
        ]
    except _Unknown:
        return None
    return key_of(parts)


def _described(value: Any, known: dict[int, int], *, whole: bool) -> Any:
    """Tensors by shape and type, unless their values become part of the program."""
    if isinstance(value, Tensor) and not whole:
        return ("tensor", str(value.dtype), tuple(value.shape))
    if isinstance(value, list | tuple):
        return [type(value).__name__, *(_described(v, known, whole=whole) for v in value)]
    if isinstance(value, Mapping):
        return {key: _described(one, known, whole=whole) for key, one in value.items()}
    return value


def _modules(module: nn.Module, known: dict[int, int]) -> Iterator[object]:
    for path, one in module.named_modules():
        known[id(one)] = len(known)
        yield path, _name(type(one))
    for path, one in module.named_modules():
        for name, parameter in one.named_parameters(recurse=False, remove_duplicate=False):
            tie = known.setdefault(id(parameter), len(known))
            yield path, name, str(parameter.dtype), tuple(parameter.shape), tie
        for name, buffer in one.named_buffers(recurse=False, remove_duplicate=False):
            yield path, name, _canonical(buffer, known)
        yield path, _canonical({k: v for k, v in vars(one).items() if k not in _OWN}, known)


def _canonical(value: Any, known: dict[int, int]) -> object:
    """``value`` in what has a stable ``repr``."""
    if isinstance(value, Enum):
        return _name(type(value)), value.name
    if isinstance(value, Tensor):
        digest = None if value.is_meta else hashlib.sha256(numbers(value)).hexdigest()
        return str(value.dtype), tuple(value.shape), digest
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, type):
        return _name(value)
    if isinstance(value, ModuleType):
        return value.__name__
    if isinstance(value, BuiltinFunctionType):
        return value.__module__, value.__qualname__
    if id(value) in known:
        return "known", known[id(value)]
    known[id(value)] = len(known)
    return _name(type(value)), *_parts(value, known)


def _parts(value: Any, known: dict[int, int]) -> Iterator[object]:
    if isinstance(value, Mapping):
        kept = {k: v for k, v in value.items() if k not in _BOOKKEEPING}
        yield from ((_canonical(k, known), _canonical(v, known)) for k, v in kept.items())
    elif isinstance(value, list | tuple):
        yield from (_canonical(one, known) for one in value)
    elif isinstance(value, set | frozenset):
        yield from sorted(repr(_canonical(one, known)) for one in value)
    elif isinstance(value, functools.partial):
        yield from (_canonical(v, known) for v in (value.func, value.args, value.keywords))
    elif isinstance(value, MethodType):
        yield from (_canonical(v, known) for v in (value.__func__, value.__self__))
    elif isinstance(value, FunctionType):
        yield value.__module__, value.__qualname__, value.__code__.co_firstlineno
        yield _canonical(value.__defaults__, known)
        yield from (_canonical(cell.cell_contents, known) for cell in value.__closure__ or ())
    elif hasattr(value, "__wrapped__"):
        yield _canonical(value.__wrapped__, known)
    elif hasattr(value, "__dict__") and not hasattr(type(value), "__slots__"):
        yield _canonical(vars(value), known)
    else:
        raise _Unknown(_name(type(value)))


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _code() -> list[tuple[str, str]]:
    """Versions of what is installed, and the sources of every imported module that is not.

    All that is installed, imported or not: the key must not depend on what TensorRT imports later.
    """
    known = [sysconfig.get_path(n) for n in ("purelib", "platlib", "stdlib", "platstdlib")]
    known.append(str(Path(__file__).parent.parent))
    found = {one.name: one.version for one in metadata.distributions()}
    for name, module in sys.modules.items():
        file = getattr(module, "__file__", None) or ""
        # torch.classes, for one, only says that it has a file.
        if file.endswith(".py") and not file.startswith(tuple(known)) and Path(file).is_file():
            found[name] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    return sorted(found.items())
