"""What a rank runs one after another: one engine, or one of every piece. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from .call import Io
from .manifest import Engine, Manifest

TO_SKIP: Final = (
    "convert with --split-after FIRST_BLOCK --split-after LAST_BLOCK, such as transformer_blocks.0 "
    "and single_transformer_blocks.37."
)
"""What to do for a bundle in which a step cache can skip pieces."""


class Part(NamedTuple):
    """One engine of a rank, its bindings, and the names of the weights among them."""

    engine: Engine
    io: Sequence[Io]
    weights: frozenset[str]

    @property
    def inputs(self) -> list[str]:
        """Names of what it takes at every call."""
        return [one.name for one in self.io if one.mode == "input"]


def parts_of(manifest: Manifest, rank: int) -> list[Part]:
    """All engines of ``rank``, in the order in which they run.

    Args:
        manifest: of one variant alone.
        rank: whose.
    """
    own = [engine for engine in manifest.engines if engine.rank == rank]
    if not manifest.pieces:
        return [Part(own[0], manifest.io, frozenset(one.name for one in manifest.weights))]
    return [
        Part(engine, piece.io, frozenset(piece.weights))
        for engine, piece in zip(own, manifest.pieces, strict=True)
    ]


def why_no_step(manifest: Manifest) -> str | None:
    """Why no piece can be skipped, or ``None`` where some can.

    Args:
        manifest: of one variant alone.
    """
    if not manifest.pieces:
        return "every rank has one engine, and nothing can be skipped"
    return manifest.step if isinstance(manifest.step, str) else None
