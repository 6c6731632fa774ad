"""Engines, and the pieces of a program that they are, as a person sees them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Final

from rich.markup import escape
from rich.table import Table

from ..bundle.manifest import Io, Manifest, Piece, Step
from ..bundle.parts import kinds_of
from .mesh import place_of
from .words import plural, size, table_of

_HANDED: Final = "between."
COLUMNS: Final = ("piece", "ends after", "engines", "takes", "hands on", "each rank's numbers")


def engines_table(manifest: Manifest) -> Table:
    """Every engine's file, rank by rank, for a terminal."""
    places, pieces = int(len(manifest.axes) > 1), int(bool(manifest.pieces))
    table = table_of(
        "Engines",
        "rank",
        *["place"] * places,
        *["piece"] * pieces,
        "file",
        "size",
        "activations",
        "sha256",
        right=("rank", "size", "activations"),
    )
    for engine in manifest.engines:
        table.add_row(
            str(engine.rank),
            *[place_of(manifest, engine.rank)] * places,
            *[str(engine.piece)] * pieces,
            escape(engine.file),
            size(engine.bytes),
            "" if engine.activation_bytes is None else size(engine.activation_bytes),
            engine.sha256[:16] + "...",
        )
    return table


def pieces_table(manifest: Manifest) -> Table:
    """As a table for a terminal."""
    table = table_of("Pieces", *COLUMNS, right=("piece", COLUMNS[-1]))
    for row in piece_rows(manifest):
        table.add_row(*map(escape, row))
    return table


def piece_rows(manifest: Manifest) -> Iterator[Sequence[str]]:
    """Of :data:`COLUMNS`; neighbours that run the same engines have one row."""
    for numbers in _neighbours(manifest):
        first, last = numbers[0], numbers[-1]
        piece = manifest.pieces[first]
        handed = [one for one in piece.io if one.mode == "output"]
        ends = [_end(manifest.pieces[n]) for n in (first, last)]
        yield (
            str(first) if first == last else f"{first} to {last}",
            ends[0] if first == last else f"{ends[0]} to {ends[1].rpartition('.')[2]}",
            _own(manifest, first),
            _names(_inputs(piece)),
            _names(handed),
            f"{sum(math.prod(one.shape) for one in handed):,}",
        )


def _neighbours(manifest: Manifest) -> Iterator[list[int]]:
    """Numbers of pieces that follow one another and run the same engines."""
    kinds = kinds_of(manifest)
    for _, group in groupby(range(len(kinds)), key=kinds.__getitem__):
        yield list(group)


def _end(piece: Piece) -> str:
    """Where it ends."""
    return piece.after or (f"before {piece.before}" if piece.before else "")


def _own(manifest: Manifest, number: int) -> str:
    """Whose engines a piece runs."""
    kind = manifest.pieces[number].kind
    return "own" if kind is None else f"piece {kind}'s"


def pieces_line(manifest: Manifest) -> str | None:
    """In one line; ``None`` where there are none."""
    if not manifest.pieces:
        return None
    pieces, kinds = manifest.pieces, set(kinds_of(manifest))
    if len(kinds) < len(pieces):
        count = f"{plural(len(pieces), 'piece')} run by {plural(len(kinds), 'engine')} a rank"
        return f"{count}; a step cache {_skips(manifest)}"
    ends = ", ".join(_end(piece) for piece in pieces[:-1])
    return f"{plural(len(pieces), 'engine')} a rank, cut after {ends}; a step cache " + (
        _skips(manifest)
    )


def steps_line(manifest: Manifest) -> str:
    """What a step cache does with them."""
    return f"A step cache {_skips(manifest)}."


def _skips(manifest: Manifest) -> str:
    if isinstance(manifest.step, Step):
        first, last = manifest.step.first, len(manifest.pieces) - manifest.step.last - 1
        return f"may skip {f'piece {first}' if last == first else f'pieces {first} to {last}'}"
    return f"cannot skip any: {manifest.step}"


def _inputs(piece: Piece) -> Iterable[Io]:
    return (one for one in piece.io if one.mode == "input")


def _names(bindings: Iterable[Io]) -> str:
    return ", ".join(one.name.removeprefix(_HANDED) for one in bindings)
