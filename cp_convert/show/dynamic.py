"""A range of sizes, as a person sees it: which, with what shapes, and where it was proven."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..bundle.manifest import Dynamic, Extent, Io, Manifest, ProvenSize


def range_rows(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """A line of what the sizes are and one of the proof; nothing where engines have one size."""
    told = manifest.dynamic
    if told is None:
        return
    yield "sizes", f"{told.words}, one engine for all; what follows is of {told.last}"
    yield "proven at", "; ".join(map(_proven, told.proven))


def _proven(one: ProvenSize) -> str:
    if one.algebra is None:
        return f"{one.size} not"
    network = "" if one.network is None else f", network {one.network:.1e}"
    return f"{one.size} ({one.algebra:.1e}{network})"


def shape_of(io: Io, told: Dynamic | None) -> str:
    """A shape as ``1 x 64..512 x 4096``."""
    extents: Mapping[int, Extent] = {}
    if told is not None:
        extents = {one.dim: one for one in told.shapes.get(io.name, ())}
    sizes = [_dimension(length, extents.get(dim), told) for dim, length in enumerate(io.shape)]
    return " x ".join(sizes) or "scalar"


def _dimension(length: int, extent: Extent | None, told: Dynamic | None) -> str:
    if extent is None or told is None:
        return str(length)
    return f"{extent.at(told.first)}..{extent.at(told.last)}"
