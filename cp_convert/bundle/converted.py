"""The part of the manifest that tells which model was converted, and by what. No torch."""

from __future__ import annotations

from typing import Any

from .call import Count, Positive, Sha256
from .call import Struct as _Struct


class Tool(_Struct, frozen=True):
    """The program that wrote the manifest."""

    name: str
    version: str


class Cast(_Struct, frozen=True):
    """How many ``tensors`` of the weights' files are computed with in another type."""

    stored: str
    computed: str
    tensors: Positive


class Model(_Struct, frozen=True):
    """The model that was converted.

    ``matched`` says how its names were found in the files of ``weights`` where they are others
    there, and ``casts`` which types were changed.
    ``kind`` is the module's class, ``config`` its whole configuration if it is one of diffusers'.
    """

    name: str
    kind: str
    source: str
    source_sha256: Sha256
    parameters: Count
    weights: str | None
    matched: list[str]
    casts: list[Cast]
    config: dict[str, Any] | None
