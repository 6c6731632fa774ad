"""The part of the manifest that tells where numbers are stored. No torch, no tensorrt."""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec

from .call import Count, Positive, Sha256, Struct

SET_NAME: Final = r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$"
SetName = Annotated[str, msgspec.Meta(pattern=SET_NAME)]


class Weight(Struct, frozen=True):
    """A parameter that is an input of every engine.

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
