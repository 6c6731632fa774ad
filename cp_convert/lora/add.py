"""A LoRA file is added to a bundle as a named set, or a set is removed; all of it or nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from .. import bundle as bundles
from ..bundle.folder import WRITABLE, output_error, replace_manifest
from ..bundle.lock import alone
from ..bundle.manifest import LoraSet, Manifest
from ..bundle.stored import SET_NAME
from ..errors import UsageError, WeightsError
from ..files import sha256
from .base import Base
from .change import Change
from .compute import tied
from .constants import check_constants
from .read import read
from .targets import changes_of, parameters
from .write import write

_LONGEST: Final = 100
"""Of a set's name, which is that of files, and file systems want these short."""


class Added(NamedTuple):
    """A set that was added, and how many tensors of its file belong to other models."""

    told: LoraSet
    others: int


def add(path: Path, file: Path, *, scale: float = 1.0, name: str | None = None) -> Added:
    """Apply a LoRA file to the bundle at ``path`` and keep the result in it, as a set.

    Args:
        path: the bundle.
        file: safetensors.
        scale: the strength that the set has when it is used without one.
        name: of the set; ``None``: after the file.

    Raises:
        UsageError: the bundle's weights are inside its engines or shared by ranks, the name is none
            or taken, or a constant could not follow.
        WeightsError: the file is damaged, or no LoRA of this model.
        DamagedBundle: the bundle is.
        OutputError: the bundle's folder cannot be written.
    """
    manifest, folder = bundles.read(path)
    _check_external(manifest)
    name = _name(name, file)
    if not isfinite(scale):
        raise UsageError(f"--scale {scale}: not a finite number.", hint="--scale 0.8.")
    _check_free(manifest, name)
    check_constants(manifest)
    adapter = read(file)
    changes = changes_of(adapter, manifest)
    _check_tied(manifest, changes, file)
    _check_twins(manifest, folder, changes)
    with _locked(folder):
        manifest, _ = bundles.read(folder)  # another may have been added meanwhile
        _check_free(manifest, name)
        told = LoraSet(
            name=name,
            source=str(file),
            source_sha256=sha256(file),
            kinds=_kinds(changes),  # type: ignore[arg-type]
            scale=scale,
            **write(manifest, folder, changes, name, scale)._asdict(),
        )
        replace_manifest(folder, msgspec.structs.replace(manifest, lora=[*manifest.lora, told]))
    return Added(told, adapter.others)


def remove(path: Path, name: str) -> None:
    """Remove the set of this name from the bundle at ``path``.

    Raises:
        UsageError: there is none.
        OutputError: the bundle's folder cannot be written.
    """
    _, folder = bundles.read(path)
    with _locked(folder):
        manifest, _ = bundles.read(folder)
        gone = set_of(manifest, name)
        left = [one for one in manifest.lora if one is not gone]
        replace_manifest(folder, msgspec.structs.replace(manifest, lora=left))
        for own in (gone.file, gone.factors):
            (folder / own.file).unlink(missing_ok=True)


def set_of(manifest: Manifest, name: str) -> LoraSet:
    """The set of this name.

    Raises:
        UsageError: there is none.
    """
    for one in manifest.lora:
        if one.name == name:
            return one
    known = ", ".join(one.name for one in manifest.lora)
    raise UsageError(
        f"the bundle has no LoRA set {name!r}.",
        hint=f"it has {known}." if known else "`cp-convert lora BUNDLE FILE` adds one.",
    )


def _check_external(manifest: Manifest) -> None:
    if manifest.tensor is not None:
        raise UsageError(
            f"{manifest.axes['tp']} ranks share the bundle's weights, and the numbers of a LoRA "
            "are not cut yet.",
            hint="convert without --tp; or fuse the LoRA into the model, and convert that.",
        )
    if manifest.weights_mode == "embedded":
        raise UsageError(
            "the bundle's weights are inside its engines, where a LoRA cannot reach them.",
            hint="convert with --weights-mode external; or fuse the LoRA into the model, and "
            "convert that.",
        )
    if manifest.quantization is not None and manifest.quantization.linears is not None:
        raise UsageError(
            "the bundle's linear layers multiply codes of 8 bits, to which a LoRA cannot be added.",
            hint="fuse the LoRA into the model, and convert that with --quantize.",
        )


def _name(given: str | None, file: Path) -> str:
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", file.stem).lstrip(".-") if given is None else given
    if re.fullmatch(SET_NAME, name) is None or len(name) > _LONGEST:
        raise UsageError(
            f"{name!r} is no name of a set: up to {_LONGEST} letters, digits, and _ . - behind the "
            "first.",
            hint="--as NAME.",
        )
    return name


def _check_free(manifest: Manifest, name: str) -> None:
    for one in manifest.lora:
        if one.name.lower() != name.lower():
            continue
        capitals = "" if one.name == name else ", and not every file system tells capitals apart"
        raise UsageError(
            f"the bundle already has a LoRA set {one.name}{capitals}.",
            hint="--as gives another name; --remove removes a set.",
        )


def _check_tied(manifest: Manifest, changes: Mapping[str, Change], file: Path) -> None:
    groups = tied(manifest)
    for name in changes:
        twice = [one.name for one in groups[name] if one.name in changes]
        if len(twice) > 1:
            raise WeightsError(
                f"{file.name} changes {twice[0]} and {twice[1]}, which are one tensor in the "
                "model.",
                where=str(file),
            )


def _check_twins(manifest: Manifest, folder: Path, changes: Mapping[str, Change]) -> None:
    """Tied weights that a conversion has written twice; which these are, the manifest lacks."""
    own, base, groups = parameters(manifest), Base(folder), tied(manifest)
    for name in changes:
        one = own[name]
        twins = [t.name for t in own.values() if t.sha256 == one.sha256 and t.shape == one.shape]
        known = {t.name for t in groups[name]}
        apart = [twin for twin in twins if twin not in known]
        if not apart:
            continue
        values = base.tensor(one)
        if bool((values != values.flatten()[0]).any()):  # zeros and ones are alike without a tie
            raise UsageError(
                f"{name} and {apart[0]} hold the same numbers; if they are one tensor in the "
                "model, both would have to change, and the bundle does not tell.",
                hint="fuse the LoRA into the model, and convert the result.",
            )


def _kinds(changes: Mapping[str, Change]) -> list[str]:
    found = {one.kind for one in changes.values()}
    return sorted(found | ({"dora"} if any(not c.additive for c in changes.values()) else set()))


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Alone with the bundle: no conversion and no other set is written meanwhile."""
    try:
        with alone(folder.resolve()):
            yield
    except OSError as error:
        raise output_error(error, folder, WRITABLE) from error
