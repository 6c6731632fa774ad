"""Engines, and the pieces of a program that they are, as a person sees them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from rich.markup import escape
from rich.table import Table

from ..bundle.manifest import Io, Manifest, Piece, Step
from .mesh import place_of
from .words import plural, size, table_of

_HANDED: Final = "between."
COLUMNS: Final = ("piece", "ends after", "takes", "hands on", "each rank's numbers")


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
    """Of :data:`COLUMNS`."""
    for number, piece in enumerate(manifest.pieces):
        handed = [one for one in piece.io if one.mode == "output"]
        yield (
            str(number),
            piece.after or "",
            _names(_inputs(piece)),
            _names(handed),
            f"{sum(math.prod(one.shape) for one in handed):,}",
        )


def pieces_line(manifest: Manifest) -> str | None:
    """In one line; ``None`` where there are none."""
    if not manifest.pieces:
        return None
    ends = ", ".join(piece.after for piece in manifest.pieces if piece.after is not None)
    count = plural(len(manifest.pieces), "engine")
    return f"{count} a rank, cut after {ends}; a step cache {_skips(manifest)}"


def steps_line(manifest: Manifest) -> str:
    """What a step cache does with them."""
    return f"A step cache {_skips(manifest)}."


def _skips(manifest: Manifest) -> str:
    if isinstance(manifest.step, Step):
        last = len(manifest.pieces) - 2
        return f"may skip {'piece 1' if last == 1 else f'pieces 1 to {last}'}"
    return f"cannot skip any: {manifest.step}"


def _inputs(piece: Piece) -> Iterable[Io]:
    return (one for one in piece.io if one.mode == "input")


def _names(bindings: Iterable[Io]) -> str:
    return ", ".join(one.name.removeprefix(_HANDED) for one in bindings)
