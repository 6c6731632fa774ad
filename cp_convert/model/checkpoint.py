"""Which files the tensors of a checkpoint lie in; only headers and indices are read.

What an index or a folder may lead to is decided in docs/adr/0014.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Final

from ..errors import WeightsError
from ..ir.tensors import Location
from .header import disguised, parsed, read_header

_BLOB: Final = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
"""The name of a file in a model hub's cache: the SHA of what is in it."""


def transformer_folder(path: Path) -> Path:
    """``path`` itself, or the transformer's folder where it is a whole pipeline's."""
    inner = path / "transformer"
    if not inner.is_dir():
        return path
    is_root = (path / "model_index.json").is_file() or not _has_weights(path)
    return inner if is_root else path


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) or any(folder.glob("*.safetensors.index.json"))


def locate(path: Path) -> dict[str, Location]:
    """Where the tensors at ``path`` lie.

    Args:
        path: a ``.safetensors`` file, a ``*.safetensors.index.json``, or a folder holding either.

    Raises:
        WeightsError: no such file, a damaged one, a name that stands twice, or a file outside the
            folder.
    """
    if not path.exists():
        raise WeightsError(f"there is no {path}.")
    if path.is_dir():
        return _in_folder(path)
    if path.name.endswith(".index.json"):
        return _in_index(path)
    if path.suffix == ".safetensors":
        return _some(read_header(path), path)
    with path.open("rb") as raw:
        found = disguised(raw.read(64))
    if found is not None:
        raise WeightsError(f"{path.name} is {found[0]}.", where=str(path), hint=found[1])
    raise WeightsError(
        f"{path.name} is no safetensors file.",
        hint="--weights takes a .safetensors file, a .safetensors.index.json, or a folder of them.",
    )


def _some(found: dict[str, Location], path: Path) -> dict[str, Location]:
    if not found:
        raise WeightsError(f"{path.name} holds no tensor.", where=str(path))
    return found


def _in_folder(folder: Path) -> dict[str, Location]:
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        names = ", ".join(index.name for index in indices)
        raise WeightsError(f"{folder} holds several indices: {names}.", hint="name one of them.")
    if indices:
        return _in_index(indices[0])
    found: dict[str, Location] = {}
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        _check_link(folder, file)
        for name, at in read_header(file).items():
            if name in found:
                raise WeightsError(
                    f"{name} stands in both {found[name].file.name} and {file.name} of {folder}.",
                    hint="name one file, or the index that says which one counts.",
                )
            found[name] = at
    if not files:
        raise WeightsError(f"{folder} holds no .safetensors file.")
    return _some(found, folder)


def _in_index(index: Path) -> dict[str, Location]:
    _check_link(index.parent, index)
    places = {name: _inside(index, name, file) for name, file in _weight_map(index).items()}
    headers = {file: read_header(file) for file in sorted(set(places.values()))}
    for name, file in places.items():
        if name not in headers[file]:
            raise WeightsError(
                f"the index places {name} in {file.name}, which lacks it.",
                where=str(index),
                hint="the index and the files are of different versions; fetch both again.",
            )
    return {name: headers[file][name] for name, file in places.items()}


def _weight_map(index: Path) -> dict[str, str]:
    try:
        told = parsed(index.read_bytes())
    except ValueError as error:
        raise _no_index(index, str(error)) from error
    except OSError as error:
        raise _no_index(index, error.strerror or str(error)) from error
    weight_map = told.get("weight_map") if isinstance(told, dict) else None
    if not isinstance(weight_map, dict):
        raise _no_index(index, "it has no weight_map")
    if not weight_map:
        raise _no_index(index, "its weight_map is empty")
    odd = [name for name, file in weight_map.items() if not isinstance(file, str)]
    if odd:
        raise _no_index(index, f"{odd[0]} lies in {weight_map[odd[0]]!r}, which is no file name")
    return weight_map


def _no_index(index: Path, reason: str) -> WeightsError:
    head = index.read_bytes()[:64] if index.is_file() else b"?"
    disguise = disguised(head)
    reason = "it is empty" if not head else f"it is {disguise[0]}" if disguise else reason
    return WeightsError(
        f"{index.name} is no safetensors index: {reason}.",
        where=str(index),
        hint=disguise[1] if disguise else "fetch it again.",
    )


def _inside(index: Path, name: str, file: str) -> Path:
    """The path of a shard, which has to lie in the index's folder."""
    told = PurePosixPath(file)
    leaves = told.is_absolute() or ".." in told.parts or PureWindowsPath(file).drive
    if leaves or "\\" in file or "\0" in file or not told.parts:
        raise WeightsError(
            f"the index places {name} in {file!r}, which is no path within its folder.",
            where=str(index),
            hint="an index names files beside it; correct it, or fetch it again.",
        )
    _check_link(index.parent, index.parent / file)
    return index.parent / file


def _check_link(folder: Path, file: Path) -> None:
    """A link stays in the folder, or leads to a blob of a model hub's cache."""
    try:
        target = file.resolve()
    except (OSError, RuntimeError) as error:  # links in a circle
        raise WeightsError(f"{file} leads nowhere: {error}.", where=str(file)) from error
    if target.is_relative_to(folder.resolve()) or _is_blob(target):
        return
    raise WeightsError(
        f"{file.name} is a link that leads out of {folder}, to {target}.",
        where=str(file),
        hint="name the file that it leads to with --weights, or put the files into one folder.",
    )


def _is_blob(target: Path) -> bool:
    """``models--<owner>--<name>/blobs/<sha>``: what the snapshots of a hub's cache consist of."""
    return (
        _BLOB.fullmatch(target.name) is not None
        and target.parent.name == "blobs"
        and target.parent.parent.name.startswith("models--")
    )
