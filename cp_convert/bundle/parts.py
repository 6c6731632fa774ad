"""What a rank runs one after another: one engine, or one of every piece. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from .call import Io
from .manifest import Engine, Manifest, Piece, Step

SAME: Final[Mapping[str, str]] = {}

TO_SKIP: Final = (
    "convert with --split-after FIRST_BLOCK --split-after LAST_BLOCK, such as transformer_blocks.0 "
    "and single_transformer_blocks.37."
)
"""What to do for a bundle in which a step cache can skip pieces."""


class Part(NamedTuple):
    """One piece of a rank's work: the engine that does it, its bindings and its weights' names.

    ``called`` tells what the engine calls them, where it was built from another piece.
    """

    engine: Engine
    io: Sequence[Io]
    weights: frozenset[str]
    called: Mapping[str, str] = SAME

    @property
    def inputs(self) -> list[str]:
        """Names of what it takes at every call."""
        return [one.name for one in self.io if one.mode == "input"]

    @property
    def outputs(self) -> list[Io]:
        """What it returns."""
        return [one for one in self.io if one.mode == "output"]

    def binding(self, name: str) -> str:
        """What the engine calls one of the part's bindings."""
        return self.called.get(name, name)


def parts_of(manifest: Manifest, rank: int) -> list[Part]:
    """All engines of ``rank``, in the order in which they run.

    Args:
        manifest: of one variant alone.
        rank: whose.
    """
    own = {engine.piece: engine for engine in manifest.engines if engine.rank == rank}
    if not manifest.pieces:
        whole = next(iter(own.values()))
        return [Part(whole, manifest.io, frozenset(one.name for one in manifest.weights))]
    return [
        Part(
            own[number if piece.kind is None else piece.kind],
            piece.io,
            frozenset(piece.weights),
            {mine: theirs for theirs, mine in piece.names.items()},
        )
        for number, piece in enumerate(manifest.pieces)
    ]


def kinds_of(manifest: Manifest) -> list[int]:
    """Of every piece, the number of the one whose engines it runs."""
    return [n if piece.kind is None else piece.kind for n, piece in enumerate(manifest.pieces)]


def numbers_of_kinds(manifest: Manifest) -> list[int | None]:
    """The pieces that have engines of their own; ``None`` is the one whole."""
    if not manifest.pieces:
        return [None]
    return [number for number, piece in enumerate(manifest.pieces) if piece.kind is None]


def kind_problem(manifest: Manifest) -> str | None:
    """What is wrong with a piece that runs another's engines, if anything: its names, its shapes.

    Args:
        manifest: of one variant alone.
    """
    weights = {one.name: (one.dtype, one.shape) for one in manifest.weights}
    for number, piece in enumerate(manifest.pieces):
        if piece.kind is None:
            continue
        first = manifest.pieces[piece.kind] if piece.kind < number else None
        if first is None or first.kind is not None:
            return f"piece {number} runs the engines of piece {piece.kind}, which has none"
        theirs, own = _bindings(first, weights), _bindings(piece, weights)
        if piece.names.keys() != theirs.keys() or sorted(piece.names.values()) != sorted(own):
            odd = [*(own.keys() ^ set(piece.names.values())), *(theirs.keys() ^ piece.names.keys())]
            return f"piece {number} does not tell of every binding what it is: {sorted(odd)[:1]}"
        for name, mine in piece.names.items():
            if theirs[name] != own[mine]:
                return (
                    f"piece {number} binds {mine}, {own[mine]}, to {name}, {theirs[name]}, of "
                    f"piece {piece.kind}"
                )
    return None


def _bindings(piece: Piece, weights: Mapping[str, Any]) -> dict[str, Any]:
    """Of all that is bound to a piece's engines: what it is, its type and its shape."""
    io = {one.name: (one.mode, one.dtype, one.shape) for one in piece.io}
    return io | {name: ("weight", *weights.get(name, ())) for name in piece.weights}


class Between(NamedTuple):
    """Where values lie that one piece hands to others: memory is used again when all have read.

    Attributes:
        places: of every part, by the name of an output, the number of a place.
        sizes: of every place, in numbers of one type each.
    """

    places: Sequence[Mapping[str, int]]
    kinds: Sequence[tuple[str, int]]

    @property
    def bytes(self) -> int:
        """Of all places."""
        return sum(count * _BYTES[dtype] for dtype, count in self.kinds)


def between(parts: Sequence[Part], step: Step | None) -> Between:
    """Places for what every part returns; what a step cache compares is never written over.

    Args:
        parts: of one variant on one rank, in their order.
        step: what a step cache may skip.
    """
    kept = {one.name for one in parts[-1].outputs}
    if step is not None:
        kept |= {step.residual, *(name for one in step.streams for name in (one.entered, one.left))}
    last = {name: number for number, part in enumerate(parts) for name in part.inputs}
    kinds, free = list[tuple[str, int]](), dict[tuple[str, int], list[int]]()
    places: list[dict[str, int]] = []
    dying: dict[int, list[str]] = {}
    held: dict[str, int] = {}
    for number, part in enumerate(parts):
        places.append({})
        for one in part.outputs:
            kind = one.dtype, math.prod(one.shape)
            waiting = free.setdefault(kind, [])
            if waiting and one.name not in kept:
                held[one.name] = waiting.pop()
            else:
                held[one.name] = len(kinds)
                kinds.append(kind)
            places[-1][one.name] = held[one.name]
            if one.name not in kept:
                dying.setdefault(last.get(one.name, number), []).append(one.name)
        for name in dying.pop(number, ()):
            free[kinds[held[name]]].append(held[name])
    return Between(places, kinds)


_BYTES: Final = {
    "bool": 1, "uint8": 1, "int8": 1, "float8_e4m3fn": 1, "float16": 2, "bfloat16": 2,
    "int32": 4, "float32": 4, "int64": 8, "float64": 8,
}  # fmt: skip


def why_no_step(manifest: Manifest) -> str | None:
    """Why no piece can be skipped, or ``None`` where some can.

    Args:
        manifest: of one variant alone.
    """
    if not manifest.pieces:
        return "every rank has one engine, and nothing can be skipped"
    return manifest.step if isinstance(manifest.step, str) else None
