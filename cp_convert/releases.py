"""TensorRT's releases and what each can run, in one table. No torch, no tensorrt.

Building an engine and running it are two things: releases before those that run several devices
build their collectives without a word. Sources: the strings of the libraries themselves ("Only
communicator_id 0 is supported in this version" in 11.0 to 11.3 and RTX 1.6.1), NVIDIA's
TensorRT-Model-Connect (RTX 1.6 "without multi-device support"), pytorch/TensorRT #4380 (11.2.1.2
reduces over all ranks where a part of them is named).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from .errors import BackendMissing

NCCL: Final = "2.28.3"
"""The first with ``ncclAlltoAll``, which TensorRT looks up when it is given a communicator."""


@dataclass(frozen=True)
class Release:
    """What the releases of one backend in a range can do.

    Attributes:
        backend: the backend's name.
        versions: which releases.
        first: the first of them.
        devices: whether they run an engine that communicates.
        groups: whether a collective among a part of the ranks is one; they take all ranks
            otherwise, silently.
    """

    backend: str
    versions: str
    first: str
    devices: bool
    groups: bool


RELEASES: Final = (
    Release("tensorrt-rtx", "<1.7.1", "1.6", devices=False, groups=False),
    Release("tensorrt-rtx", ">=1.7.1", "1.7.1", devices=True, groups=True),
    Release("tensorrt", "<11", "10", devices=False, groups=False),
    Release("tensorrt", ">=11,<11.4", "11.0", devices=True, groups=False),
    Release("tensorrt", ">=11.4", "11.4", devices=True, groups=True),
)
NEWER: Final = {
    "tensorrt-rtx": "pip install --no-warn-conflicts 'tensorrt_rtx>=1.7.1.116,<1.8'",
    "tensorrt": "install TensorRT 11.4 or later",
}
"""How one comes to a release that can all of it (torch-tensorrt-rtx pins an older one)."""


def release_of(backend: str, version: str) -> Release:
    """The row of an installed release."""
    installed = Version(version)
    return next(
        row
        for row in RELEASES
        if row.backend == backend
        and SpecifierSet(row.versions, prereleases=True).contains(installed)
    )


def first_for(backend: str, *, devices: bool, groups: bool) -> str | None:
    """The first release that runs such engines; ``None`` where every one does.

    Args:
        backend: the backend's name.
        devices: whether the engines communicate.
        groups: whether they do so in a part of the ranks.
    """
    if not devices and not groups:
        return None
    able = (r for r in RELEASES if r.backend == backend and r.devices and r.groups >= groups)
    return next(able).first


def are_parts(groups: Iterable[Sequence[int]], world: int) -> bool:
    """Whether any of these groups is a part of the world; one rank alone communicates nothing."""
    return any(1 < len(group) < world for group in groups)


def doubt(backend: str, version: str, *, devices: bool, groups: bool) -> str | None:
    """Why engines that this release builds may not run, or not rightly; ``None``: no reason known.

    Args:
        backend: the backend's name.
        version: of the release that builds.
        devices: whether the engines communicate.
        groups: whether they do so in a part of the ranks.
    """
    row = release_of(backend, version)
    first = first_for(backend, devices=devices, groups=groups)
    if devices and not row.devices:
        return (
            f"{backend} {version} builds engines that communicate, but is not known to run them: "
            f"{first} is the first that does, and an engine belongs to the release that built it"
        )
    if groups and not row.groups:
        return (
            f"{backend} {version} lets all ranks take part in a collective of a part of them, "
            f"silently; {first} is the first with real groups"
        )
    return None


def check_groups(backend: str, version: str, what: str, *, unsafe: bool) -> None:
    """Refuse groups of ranks where the release ignores them.

    Args:
        backend: the backend's name.
        version: of the release that builds.
        what: what names groups, to begin a sentence with.
        unsafe: build all the same.

    Raises:
        BackendMissing: the engines would mix numbers of all ranks, without a word.
    """
    if unsafe or release_of(backend, version).groups:
        return
    first = first_for(backend, devices=True, groups=True)
    raise BackendMissing(
        f"{what} communicates in groups of ranks, which {backend} {version} ignores: all ranks "
        f"would take part, and outputs be wrong, silently. {first} is the first with real groups.",
        hint=f"{NEWER[backend]}; a strategy without groups (ulysses, allgather-kv, ring); or "
        "--unsafe-groups, to build what this release cannot run rightly.",
    )
