"""Which weights of a bundle a file's changes belong to.

The file's modules are the model's own, in dots or (Kohya, LyCORIS) in underscores; or, where the
model is a part of what was converted, the model's behind one prefix; or those of the model's
authors, which diffusers knows (:mod:`.original`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from math import prod
from typing import Final

import torch
from torch import Tensor

from ..bundle.manifest import Manifest, Weight
from ..errors import WeightsError
from .change import Change, by_column
from .original import original_rows
from .parse import Module
from .read import Adapter, some

_FLOATS: Final = ("float32", "float16", "bfloat16")


def changes_of(adapter: Adapter, manifest: Manifest) -> dict[str, Change]:
    """What the file changes, by the names of the bundle's weights.

    Raises:
        WeightsError: a module is none of the model's, or a change is of another shape than its
            weight.
    """
    weights = parameters(manifest)
    modules = {name.rpartition(".")[0] for name in weights}
    asked = dict.fromkeys((*adapter.weights, *adapter.biases))
    own = _own_names(asked, modules)
    rest = [module for module in asked if module not in own]
    rows = original_rows(manifest.model.kind, _sizes(rest, adapter), modules) if rest else {}
    rest = [module for module in rest if module not in rows]
    if rest:
        raise _no_such(adapter, manifest, rest, len(asked))
    found: dict[str, Change] = {}
    for changes, part in ((adapter.weights, "weight"), (adapter.biases, "bias")):
        for module, change in changes.items():
            pieces = {own[module]: None} if module in own else rows[module]
            for name, index in pieces.items():
                _put(found, f"{name}.{part}", _piece(change, index, module, adapter), adapter)
    for name, change in found.items():
        _check(name, change, weights, adapter)
    return found


def parameters(manifest: Manifest) -> dict[str, Weight]:
    """The weights outside the engines that are parameters of the model, by name."""
    program = manifest.program
    listed = (*manifest.weights, *(program.weights if program is not None else ()))
    return {one.name: one for one in listed if not one.name.startswith("constants.")}


def _own_names(asked: Collection[Module], modules: Collection[str]) -> dict[Module, str]:
    """The model's name of every module that is one of its own, behind the prefix that fits most."""
    prefixes = {"", *(f"{name.split('.')[0]}." for name in modules)}
    found = [_behind(prefix, asked, modules) for prefix in sorted(prefixes)]
    return max(found, key=len)


def _behind(prefix: str, asked: Collection[Module], modules: Collection[str]) -> dict[Module, str]:
    inner = {name.removeprefix(prefix): name for name in modules if name.startswith(prefix)}
    count = Counter(name.replace(".", "_") for name in inner)
    flat = {name.replace(".", "_"): own for name, own in inner.items()}
    names = {m: (flat.get(m.name) if m.flat else inner.get(m.name)) for m in asked}
    return {m: own for m, own in names.items() if own and not (m.flat and count[m.name] > 1)}


def _sizes(rest: Collection[Module], adapter: Adapter) -> dict[Module, int]:
    """Rows of what is changed, by module."""
    return {m: (adapter.weights.get(m) or adapter.biases[m]).size[0] for m in rest}


def _piece(change: Change, index: Tensor | None, module: Module, adapter: Adapter) -> Change:
    """The rows of a change that one of several weights gets."""
    if index is None or torch.equal(index, torch.arange(change.size[0])):
        return change
    magnitude = change.magnitude
    if magnitude is not None:
        if by_column(magnitude, change.size):
            raise WeightsError(
                f"{adapter.file.name}: the DoRA of {module.name} has a magnitude for every column "
                "of several weights that are one in this file, and they are apart in the bundle.",
                hint="fuse it with the tool that it was trained with, and convert the result.",
            )
        magnitude = magnitude.reshape(-1)[index]
    if change.kind == "lora":
        tensors = {**change.tensors, "up": change.tensors["up"][index]}
        return replace(change, tensors=tensors, magnitude=magnitude)
    return replace(change, rows=index, magnitude=magnitude)


def _put(found: dict[str, Change], name: str, change: Change, adapter: Adapter) -> None:
    if name in found:
        raise WeightsError(
            f"{adapter.file.name}: two of its modules change {name}.", where=str(adapter.file)
        )
    found[name] = change


def _check(name: str, change: Change, weights: Mapping[str, Weight], adapter: Adapter) -> None:
    own = weights.get(name)
    if own is None:
        raise WeightsError(
            f"{adapter.file.name} changes {name}, and the bundle's model has none.",
            where=str(adapter.file),
            hint="the file belongs to a model with this bias or weight.",
        )
    rows, columns = change.size
    shape = own.shape or [1]
    if (rows, columns) != (shape[0], prod(shape[1:])):
        raise WeightsError(
            f"{adapter.file.name} changes {name} by a tensor of {[rows, columns]}, and the "
            f"weight is {own.shape}.",
            where=str(adapter.file),
            hint="the file belongs to another model; `cp-convert inspect` tells which one this is.",
        )
    magnitude = change.magnitude
    if magnitude is not None and magnitude.numel() != (
        columns if by_column(magnitude, shape) else rows
    ):
        raise WeightsError(
            f"{adapter.file.name}: the magnitude of {name} is {list(magnitude.shape)}, and the "
            f"weight is {own.shape}.",
            where=str(adapter.file),
        )
    if own.dtype not in _FLOATS:
        raise WeightsError(
            f"{name} is stored as {own.dtype}; a LoRA is added to weights in {', '.join(_FLOATS)}.",
            hint="fuse it into the model before it is quantized, and convert the result.",
        )


def _no_such(
    adapter: Adapter, manifest: Manifest, rest: Collection[Module], asked: int
) -> WeightsError:
    model = f"{manifest.model.name} ({manifest.model.kind})"
    listed = some(module.name for module in rest)
    if len(rest) == asked:
        return WeightsError(
            f"{adapter.file.name} is a LoRA of another model: none of its {asked} modules is one "
            f"of {model}; it has {listed}.",
            where=str(adapter.file),
            hint="name a LoRA of this model; names of its authors are understood where diffusers "
            "does, and is installed.",
        )
    return WeightsError(
        f"{adapter.file.name}: {len(rest)} of its {asked} modules are none of {model}: {listed}.",
        where=str(adapter.file),
        hint="the file belongs to another version of the model, or the bundle does not tell all "
        "weights: convert with --program yes.",
    )
