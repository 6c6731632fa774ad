"""Reading safetensors into a module. Never pickle, never ``torch.load``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import WeightsError
from .meta import replace

_SHOWN = 8
_CHUNK: Final = 1 << 24
SAFETENSORS: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The format's names of the types that models are computed in."""


@dataclass(frozen=True)
class Location:
    """Where a file holds a tensor's numbers.

    Attributes:
        file: the safetensors file.
        offset: of the first byte.
        size: in bytes.
        dtype: as stored; ``None`` for one that torch has not.
    """

    file: Path
    offset: int
    size: int
    dtype: torch.dtype | None


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
            with _opened(file) as tensors:
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
    with _opened(file) as tensors:
        return list(tensors.keys())


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except FileNotFoundError as error:
        raise WeightsError(f"{file} is missing.", where=str(file)) from error
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{file.name} cannot be read as safetensors: {error}.",
            where=str(file),
            hint="the file is probably truncated; fetch it again.",
        ) from error


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
        with _opened(file) as tensors:
            here = set(tensors.keys())
            for name in (n for n, place in places.items() if place == file):
                if name not in here:
                    raise WeightsError(f"the index places {name} in {file.name}, which lacks it.")
                shapes[name] = tuple(tensors.get_slice(name).get_shape())
    return shapes


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def save(
    tensors: Mapping[str, Tensor], path: Path, stop: Event | None = None
) -> dict[str, tuple[int, str]]:
    """Write one safetensors file, tensor by tensor: the library would hold all of them in memory.

    Format: https://github.com/huggingface/safetensors, *Format*: the header's length in 8 bytes,
    little-endian; the header in JSON; the numbers.

    Returns:
        Offset in the file and SHA-256 of every tensor; fewer of them when ``stop`` was set.
    """
    header, begin = {}, 0
    for name, tensor in tensors.items():
        end = begin + tensor.nbytes
        dtype = next(n for n, d in SAFETENSORS.items() if d == tensor.dtype)
        header[name] = {
            "dtype": dtype,
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    written = {}
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            if stop is not None and stop.is_set():
                break
            offset, digest = file.tell(), hashlib.sha256()
            flat = numbers(tensor)
            for start in range(0, len(flat), _CHUNK):
                piece = flat[start : start + _CHUNK]
                digest.update(piece)
                file.write(piece)
            written[name] = (offset, digest.hexdigest())
    return written


def file_state(file: Path) -> tuple[object, ...]:
    """What changes when a file is written or replaced."""
    state = file.stat()
    return str(file), state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns


def numbers(tensor: Tensor) -> memoryview:
    """A tensor's numbers as bytes, in row-major order."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def mapped(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; their numbers are read when they are used.

    Raises:
        WeightsError: the file is missing or damaged.
    """
    with _opened(path) as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
