"""The part of the manifest that tells of a model in several engines a rank. No torch."""

from __future__ import annotations

from typing import Annotated

import msgspec

from .call import Count, Io, Positive, Struct

Folder = Annotated[str, msgspec.Meta(pattern=r"^([A-Za-z0-9_.-]+/)+$")]


class Piece(Struct, frozen=True):
    """One of several pieces that every rank runs one after another.

    It ends ``after`` the module of that path, or ``before`` it; the last has neither. ``folder`` is
    where its engines lie. ``io`` are its own bindings, without weights: inputs of forward, and
    ``between.*``, which one piece hands to later ones, each rank's part of it as it lies there (the
    shape is a rank's). The outputs of the last are forward's. ``weights`` names those that it
    reads. Where it is of an earlier piece's kind, ``kind`` is the number of that, whose engines it
    runs, and ``names`` tells by their bindings which of ``io`` and ``weights`` are bound to them;
    null where it has engines of its own.
    """

    after: str | None
    folder: Folder
    io: list[Io]
    weights: list[str]
    before: str | None = None
    kind: Count | None = None
    names: dict[str, str] = msgspec.field(default_factory=dict)


class Stream(Struct, frozen=True):
    """What the pieces between add to: as the first pieces give it, and as the last take it."""

    entered: str
    left: str


class Step(Struct, frozen=True):
    """What is needed to skip all pieces between the ``first`` and the ``last`` so many.

    ``residual`` is an output of the first pieces: what their blocks add to the largest of the
    ``streams``. When the pieces between are skipped, the last take every stream as the first give
    it, plus what they added when they were computed last.
    """

    residual: str
    streams: list[Stream]
    first: Positive = 1
    last: Positive = 1
