"""The part of the manifest that tells of a model in several engines a rank. No torch."""

from __future__ import annotations

from typing import Annotated

import msgspec

from .call import Io, Struct

Folder = Annotated[str, msgspec.Meta(pattern=r"^([A-Za-z0-9_.-]+/)+$")]


class Piece(Struct, frozen=True):
    """One of several engines that every rank runs one after another.

    It ends ``after`` the module of that path; the last has none. ``folder`` is where its engines
    lie. ``io`` are its own bindings, without weights: inputs of forward, and ``between.*``, which
    one piece hands to later ones, each rank's part of it as it lies there (the shape is a rank's).
    The outputs of the last are forward's. ``weights`` names those that its engines read.
    """

    after: str | None
    folder: Folder
    io: list[Io]
    weights: list[str]


class Stream(Struct, frozen=True):
    """What the pieces between add to: as the first piece gives it, and as the last takes it."""

    entered: str
    left: str


class Step(Struct, frozen=True):
    """What is needed to skip all pieces between the first and the last.

    ``residual`` is an output of the first piece: what its blocks add to the largest of the
    ``streams``. When the pieces between are skipped, the last takes every stream as the first
    piece gives it, plus what they added when they were computed last.
    """

    residual: str
    streams: list[Stream]
