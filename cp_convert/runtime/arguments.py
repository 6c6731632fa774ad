"""The model's own arguments as an engine's bindings, and back. No TensorRT."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from ..bundle.manifest import Io, Manifest
from ..errors import UsageError


def inputs_of(manifest: Manifest) -> dict[str, Io]:
    """The bindings that are given, by name."""
    return {io.name: io for io in manifest.io if io.mode == "input"}


def flattened(manifest: Manifest, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """Keyword arguments of the model's forward as tensors by binding name.

    Nested containers are joined with dots, as in the manifest. Arguments that are no tensors, and
    those that were frozen, are part of the engines: they are compared with what is in there.

    Raises:
        UsageError: a name, shape or type that is not the engine's, or another frozen value.
    """
    wanted = inputs_of(manifest)
    frozen = {one.name: one.value for one in manifest.frozen}
    found: dict[str, Tensor] = {}
    for name, value in _leaves(arguments):
        if name in wanted and isinstance(value, Tensor):
            found[name] = value
        elif name in frozen:
            _check_frozen(name, value, frozen[name])
        elif value is not None or name in wanted:
            raise _unknown(name, value, wanted)
    missing = [name for name in wanted if name not in found]
    if missing:
        raise UsageError(
            f"the input {missing[0]} is missing; the bundle takes {', '.join(wanted)}.",
            hint="name it as the manifest does; `cp-convert inspect` lists the bindings.",
        )
    for name, tensor in found.items():
        check_tensor(name, tensor, wanted[name])
    return found


def check_tensor(name: str, tensor: Tensor, io: Io) -> None:
    """Refuse a tensor that is not what the binding takes.

    Raises:
        UsageError: its shape or type is another.
    """
    dtype = str(tensor.dtype).removeprefix("torch.")
    if list(tensor.shape) != io.shape:
        raise UsageError(
            f"{name} has the shape {list(tensor.shape)}; the engines were built for {io.shape}.",
            hint="an engine's shapes are fixed: convert with example inputs of this size.",
        )
    if dtype != io.dtype:
        raise UsageError(
            f"{name} is {dtype}; the engines take {io.dtype}.",
            hint=f"pass {name}.to(torch.{io.dtype}).",
        )


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    pairs: Iterator[tuple[str, Any]]
    if isinstance(tree, Mapping):
        pairs = ((str(key), value) for key, value in tree.items())
    elif is_dataclass(tree) and not isinstance(tree, type):
        pairs = ((field.name, getattr(tree, field.name)) for field in fields(tree))
    elif isinstance(tree, list | tuple):
        names = getattr(tree, "_fields", None) or map(str, range(len(tree)))
        pairs = zip(names, tree, strict=True)
    else:
        yield path, tree
        return
    for key, value in pairs:
        yield from _leaves(value, f"{path}.{key}" if path else key)


def _check_frozen(name: str, value: Any, inside: str) -> None:
    if isinstance(value, Tensor) or repr(value) == inside:
        return  # a frozen tensor's numbers are in the engine, and not in the manifest
    raise UsageError(
        f"{name} is {value!r}; the engines were built with {inside}, which is part of them.",
        hint="leave it out, or convert again with this value.",
    )


def _unknown(name: str, value: Any, wanted: Mapping[str, Io]) -> UsageError:
    if name in wanted:
        return UsageError(f"{name} is {value!r}, and the engines take a tensor there.")
    near = difflib.get_close_matches(name, wanted, 1)
    known = f"did you mean {near[0]}?" if near else f"the bundle takes {', '.join(wanted)}."
    return UsageError(f"the bundle has no input {name!r}.", hint=known)
