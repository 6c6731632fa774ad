"""The part of the manifest that tells where numbers are stored. No torch, no tensorrt."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Final, Literal

import msgspec

from .call import Count, Positive, Sha256, Struct

SET_NAME: Final = r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$"
SetName = Annotated[str, msgspec.Meta(pattern=SET_NAME)]


class Weight(Struct, frozen=True):
    """A parameter that is an input of every engine, or the part of one that is ``ranks``' input.

    Where ``ranks`` share a parameter (the axis ``tp``) it is listed once for each part, and each
    engine's input has the part's shape; an empty list means all ranks.
    ``constants.*`` are what forward computes from parameters alone. The ``bytes`` at ``offset`` of
    ``file`` are the numbers, row-major; ``file`` is a name in the bundle (``weights.safetensors``,
    ``constants.safetensors``) or the path of the user's own safetensors file.
    """

    name: str
    dtype: str
    shape: list[Count]
    file: str
    offset: Count
    bytes: Count
    sha256: Sha256
    ranks: list[Count] = msgspec.field(default_factory=list)


def of_rank(weights: Iterable[Weight], rank: int) -> list[Weight]:
    """Those that ``rank`` reads."""
    return [one for one in weights if not one.ranks or rank in one.ranks]


BundlePath = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*$")]


class BundleFile(Struct, frozen=True):
    """A file of the bundle, by its path within."""

    file: BundlePath
    bytes: Positive
    sha256: Sha256


class LoraSet(Struct, frozen=True):
    """What a LoRA file makes of the weights that it changes.

    ``weights`` are those, with the numbers at the strength ``scale``, in ``file`` of the bundle;
    ``constants.*`` among them follow from changed ones. ``factors`` holds what the file itself
    tells, from which other strengths and sums of sets are computed; sets with ``dora`` among their
    ``kinds`` are not added to others.
    """

    name: SetName
    source: str
    source_sha256: Sha256
    kinds: list[Literal["lora", "dora", "lokr", "full"]]
    scale: float
    file: BundleFile
    factors: BundleFile
    weights: list[Weight]
