"""The model's own arguments as an engine's bindings, and back. No TensorRT."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..bundle.manifest import Io, Manifest
from ..errors import UsageError
from ..ir.frozen_value import leaves
from .frozen import check_frozen


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
    frozen = {one.name: one for one in manifest.frozen}
    found: dict[str, Tensor] = {}
    for argument, whole in arguments.items():
        if argument in frozen:
            check_frozen(argument, whole, [frozen[argument]])
            continue
        for name, value in leaves(whole, argument):
            if name in wanted and isinstance(value, Tensor):
                found[name] = value
            elif name in frozen:
                check_frozen(name, value, [frozen[name]])
            elif value is not None or name in wanted:
                raise unknown(name, value, wanted)
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


def unknown(name: str, value: Any, wanted: Mapping[str, Io]) -> UsageError:
    """What is said of an argument that the bundle does not take."""
    if name in wanted:
        return UsageError(f"{name} is {value!r}, and the engines take a tensor there.")
    near = difflib.get_close_matches(name, wanted, 1)
    known = f"did you mean {near[0]}?" if near else f"the bundle takes {', '.join(wanted)}."
    return UsageError(f"the bundle has no input {name!r}.", hint=known)
