"""The two files of a set: changed weights ready to be bound, and the factors they come from."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

import torch
from torch import Tensor

from ..bundle.folder import LORA
from ..bundle.manifest import BundleFile, Manifest, Weight
from ..files import sha256, sweep, sync_folder
from ..ir.tensors import save
from .base import Base
from .change import Change
from .compute import Changed
from .constants import changed_constants, constants_of
from .factors import write_factors

FACTORS: Final = "factors"
"""The folder of factors, within that of the sets."""
_PARTIAL: Final = ".partial-"


class Written(NamedTuple):
    """What the manifest tells of the files."""

    file: BundleFile
    factors: BundleFile
    weights: list[Weight]


def write(
    manifest: Manifest, folder: Path, changes: Mapping[str, Change], name: str, scale: float
) -> Written:
    """Write a set's files into the bundle at ``folder``; none stays where one cannot be written.

    Raises:
        WeightsError: a changed weight is beyond its type.
        DamagedBundle: a file of the bundle is missing or altered.
        OSError: the disk is full, or the folder cannot be written.
    """
    with _staged(folder / LORA) as partial:
        weights = _weights(manifest, folder, changes, scale, partial / "weights", name)
        write_factors(changes, partial / "factors")
        for source, target in (
            (partial / "weights", _file(name)),
            (partial / "factors", _factors(name)),
        ):
            with source.open("rb") as file:
                os.fsync(file.fileno())
            (folder / target).parent.mkdir(exist_ok=True)
            source.replace(folder / target)
            sync_folder((folder / target).parent)
    return Written(_told(folder, _file(name)), _told(folder, _factors(name)), weights)


def _file(name: str) -> str:
    return f"{LORA}/{name}.safetensors"


def _factors(name: str) -> str:
    return f"{LORA}/{FACTORS}/{name}.safetensors"


@contextmanager
def _staged(parent: Path) -> Iterator[Path]:
    """A folder within ``parent`` that is removed in the end."""
    parent.mkdir(exist_ok=True)
    sweep(parent, _PARTIAL)
    partial = Path(tempfile.mkdtemp(prefix=f"{_PARTIAL}{os.getpid()}-", dir=parent))
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _told(folder: Path, file: str) -> BundleFile:
    path = folder / file
    return BundleFile(file=file, bytes=path.stat().st_size, sha256=sha256(path))


def _weights(
    manifest: Manifest,
    folder: Path,
    changes: Mapping[str, Change],
    scale: float,
    file: Path,
    name: str,
) -> list[Weight]:
    """Write the changed weights into ``file``, one after the other; what is tied, once."""
    base = Base(folder)
    found = Changed(manifest, base, {key: [(one, scale)] for key, one in changes.items()})
    constants = changed_constants(manifest, folder, found, base)
    told = {key: found.told(key) for key in found}
    told |= {one.name: one for one in constants_of(manifest) if one.name in constants}
    first: dict[tuple[str, int], str] = {}
    for key, one in told.items():
        first.setdefault((one.file, one.offset), key)
    described = {key: _described(told[key]) for key in first.values()}

    def made(key: str) -> tuple[Tensor]:
        return (constants[key] if key in constants else found[key],)

    places = save(described, file, made=made)
    return [
        _weight(one, _file(name), *places[first[one.file, one.offset]]) for one in told.values()
    ]


def _described(told: Weight) -> Tensor:
    return torch.empty(told.shape, dtype=getattr(torch, told.dtype), device="meta")


def _weight(told: Weight, file: str, offset: int, digest: str) -> Weight:
    return Weight(
        name=told.name, dtype=told.dtype, shape=told.shape, file=file, offset=offset,
        bytes=told.bytes, sha256=digest,
    )  # fmt: skip
