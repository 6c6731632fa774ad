"""The program in a bundle: ``program/program.json`` and ``program/tensors.safetensors``.

It is the very program that was handed to the lowering, the same for all ranks, in canonical JSON;
no pickle. Numbers stand in the safetensors file, but for weights that the engines read from other
files: those are named, and the manifest says where they are. The JSON is that of
:mod:`cp_convert.ir.serialize`, with numbers that JSON lacks (infinities, NaN) as tagged strings.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from ..errors import DamagedBundle
from ..files import sha256
from ..ir.lift import fill, range_of
from ..ir.program import Lowered
from ..ir.records import StoredFile
from ..ir.serialize import Packed, unpack
from ..ir.tensors import mapped, save
from .folder import PROGRAM, file_problem
from .manifest import Manifest

DOCUMENT: Final = f"{PROGRAM}/program.json"
TENSORS: Final = f"{PROGRAM}/tensors.safetensors"
_FLOAT: Final = "float"


@dataclass(frozen=True)
class Stored:
    """A program that was read from a bundle.

    Attributes:
        program: parameters that stand in other files are on the ``meta`` device.
        names: of those, by placeholder.
        lifted: the program for a range of sizes, of which ``program`` is the largest.
    """

    program: Lowered
    names: Mapping[str, str]
    lifted: Packed | None = None

    def at(self, size: int | None) -> Stored:
        """The program at one size of its range; itself where that is fixed."""
        if self.lifted is None or size is None:
            return self
        return Stored(unpack(fill(self.lifted, size)), self.names)


def write_program(
    packed: Packed, names: Mapping[str, str], folder: Path, within: str = ""
) -> tuple[StoredFile, StoredFile]:
    """Write a program into the bundle at ``folder``.

    Args:
        packed: of all ranks, before Torch-TensorRT's lowering; lifted where it is for a range of
            sizes (:mod:`cp_convert.ir.lift`).
        names: by placeholder, parameters whose numbers stand elsewhere; others are copied.
        folder: the bundle's.
        within: the folder in it, ending in a slash, of the variant that this is; none: the bundle.

    Returns:
        what the manifest says of the two files.

    """
    (folder / within / PROGRAM).mkdir(parents=True, exist_ok=True)
    document = {"names": dict(names), **msgspec.msgpack.decode(packed.document)}
    text = json.dumps(_to_json(document), sort_keys=True, separators=(",", ":"), allow_nan=False)
    (folder / within / DOCUMENT).write_text(text)
    save(dict(sorted(packed.tensors.items())), folder / within / TENSORS)
    return _file(folder, within + DOCUMENT), _file(folder, within + TENSORS)


def read_program(manifest: Manifest, folder: Path, *, verify: bool = True) -> Stored:
    """The program of the bundle at ``folder``; its constants are mapped.

    Args:
        manifest: of the bundle, which has a program.
        folder: where it is.
        verify: whether the files are compared with the manifest's SHA-256.

    Raises:
        DamagedBundle: a file is missing, or is not what it should be.
    """
    assert manifest.program is not None
    for file in (manifest.program.document, manifest.program.tensors):
        problem = file_problem(folder / file.file, file, digest=verify)
        if problem is not None:
            raise DamagedBundle(
                f"{folder / file.file}: {problem}.",
                hint="copy the bundle again, or convert again with --force."
                + ("" if "SHA" not in problem else " --no-verify runs it as it is."),
            )
    return stored_at((folder / manifest.program.document.file).parent.parent)


def stored_at(folder: Path) -> Stored:
    """The program of the bundle, or of its variant, at ``folder``; its constants are mapped.

    Raises:
        DamagedBundle: it cannot be read.
    """
    try:
        document = _from_json(json.loads((folder / DOCUMENT).read_bytes()))
        names = document.pop("names")
        packed = Packed(msgspec.msgpack.encode(document), mapped(folder / TENSORS))
        sizes = range_of(document)
        if sizes is None:
            return Stored(unpack(packed), names)
        return Stored(unpack(fill(packed, sizes.last)), names, packed)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedBundle(
            f"{folder / DOCUMENT} cannot be read: {error!r}.",
            hint="copy the bundle again, or convert again with --force.",
        ) from error


def _file(folder: Path, name: str) -> StoredFile:
    path = folder / name
    return StoredFile(name, path.stat().st_size, sha256(path))


def _to_json(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT: repr(value)}
    if isinstance(value, list | tuple):
        return [_to_json(one) for one in value]
    if isinstance(value, dict):
        return {key: _to_json(one) for key, one in value.items()}
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_from_json(one) for one in value]
    if isinstance(value, dict):
        if set(value) == {_FLOAT}:
            return float(value[_FLOAT])
        return {key: _from_json(one) for key, one in value.items()}
    return value
