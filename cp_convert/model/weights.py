"""Reading safetensors into a module. Never pickle, never ``torch.load``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from ..errors import WeightsError
from ..ir.tensors import SAFETENSORS, Location, opened
from .meta import replace

_SHOWN = 8
_CHUNK: Final = 1 << 24


def locate(path: Path) -> dict[str, Location]:
    """Where the tensors at ``path`` lie; only headers are read.

    Raises:
        WeightsError: no such file, or a damaged one.
    """
    places = _places(path)
    found: dict[str, Location] = {}
    for file in sorted(set(places.values())):
        for name, (offset, size, dtype) in _header(file).items():
            if places.get(name) == file:
                found[name] = Location(file, offset, size, SAFETENSORS.get(dtype))
    return found


def _header(file: Path) -> dict[str, tuple[int, int, str]]:
    """Offset in the file, size and type of every tensor; the library checks the file first."""
    _names(file)
    with file.open("rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        header = json.loads(raw.read(length))
    header.pop("__metadata__", None)
    return {
        name: (8 + length + told["data_offsets"][0],
               told["data_offsets"][1] - told["data_offsets"][0], told["dtype"])
        for name, told in header.items()
    }  # fmt: skip


def load_weights(module: nn.Module, path: Path) -> None:
    """Put the tensors at ``path`` into ``module``, in the module's own dtypes.

    Parameters without memory (:mod:`.unallocated`) are given it, one at a time; others are copied
    into.

    Args:
        module: the model; its ``state_dict`` names what is expected.
        path: a ``.safetensors`` file, a ``*.safetensors.index.json``, or a folder holding either.

    Raises:
        WeightsError: no such file, a damaged file, or names and shapes that differ from the
            model's; nothing is copied in that case.
    """
    places = _places(path)
    wanted = module.state_dict(keep_vars=True)
    _compare(wanted, places, path)
    with torch.no_grad():
        for file in sorted(set(places.values())):
            with opened(file) as tensors:
                for name in (n for n, place in places.items() if place == file):
                    own = wanted[name]
                    if own.is_meta:
                        replace(module, own, tensors.get_tensor(name).to(own.dtype))
                    else:
                        own.copy_(tensors.get_tensor(name))


def _places(path: Path) -> dict[str, Path]:
    """Which file holds which tensor."""
    if not path.exists():
        raise WeightsError(f"there is no {path}.")
    if path.is_dir():
        return _in_folder(path)
    if path.name.endswith(".index.json"):
        return _in_index(path)
    if path.suffix == ".safetensors":
        return dict.fromkeys(_names(path), path)
    raise WeightsError(
        f"{path.name} is no safetensors file.",
        hint="--weights takes a .safetensors file, a .safetensors.index.json, or a folder of them.",
    )


def _in_folder(folder: Path) -> dict[str, Path]:
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        names = ", ".join(index.name for index in indices)
        raise WeightsError(f"{folder} holds several indices: {names}.", hint="name one of them.")
    if indices:
        return _in_index(indices[0])
    places: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name in _names(file):
            if name in places:
                raise WeightsError(
                    f"{name} stands in both {places[name].name} and {file.name} of {folder}.",
                    hint="name one file, or the index that says which one counts.",
                )
            places[name] = file
    if not places:
        raise WeightsError(f"{folder} holds no .safetensors file.")
    return places


def _in_index(index: Path) -> dict[str, Path]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        return {str(name): index.parent / str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index} is no safetensors index: {error!r}.") from error


def _names(file: Path) -> list[str]:
    with opened(file) as tensors:
        return list(tensors.keys())


def _compare(wanted: dict[str, Tensor], places: dict[str, Path], path: Path) -> None:
    """Every name and shape must fit; a missing name is fine when it is tied to a present one."""
    present = {_identity(wanted[name]) for name in places if name in wanted}
    missing = [
        name
        for name, tensor in wanted.items()
        if name not in places and _identity(tensor) not in present
    ]
    unexpected = [name for name in places if name not in wanted]
    shapes = _shapes({n: f for n, f in places.items() if n in wanted})
    misshaped = [
        f"{name}: {list(shapes[name])} in the file, {list(wanted[name].shape)} in the model"
        for name in shapes
        if shapes[name] != tuple(wanted[name].shape)
    ]
    complaints = [
        f"{len(names)} {what}: {_some(names)}"
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", misshaped),
        )
        if names
    ]
    if complaints:
        raise WeightsError(
            f"the tensors of {path.name} are not those of the model. "
            + ". ".join(complaints)
            + ".",
            where=str(path),
            hint="check that the file belongs to this model and build_model() to this file.",
        )


def _identity(tensor: Tensor) -> int:
    """The same for tied tensors only."""
    return id(tensor) if tensor.is_meta else tensor.data_ptr()


def _shapes(places: dict[str, Path]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(set(places.values())):
        with opened(file) as tensors:
            here = set(tensors.keys())
            for name in (n for n, place in places.items() if place == file):
                if name not in here:
                    raise WeightsError(f"the index places {name} in {file.name}, which lacks it.")
                shapes[name] = tuple(tensors.get_slice(name).get_shape())
    return shapes


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
