"""How a bundle's ranks are arranged, and what their guidance branches are, in words."""

from __future__ import annotations

from ..bundle.manifest import Manifest
from ..mesh import Mesh
from .words import plural


def ranks_of(manifest: Manifest) -> str:
    """``4 ranks``, or ``4 ranks (cfg 2 x cp 2)``."""
    ranks = plural(manifest.world, "rank")
    return f"{ranks} ({axes_of(manifest)})" if len(manifest.axes) > 1 else ranks


def axes_of(manifest: Manifest) -> str:
    """``cfg 2 x cp 2``."""
    return " x ".join(f"{name} {length}" for name, length in manifest.axes.items())


def place_of(manifest: Manifest, rank: int) -> str:
    """``cfg 1, cp 0``: where a rank stands; nothing where the model's own groups are axes too."""
    mesh = Mesh(tuple(manifest.axes.items()))
    if mesh.world != manifest.world:
        return ""
    return ", ".join(f"{name} {place}" for name, place in mesh.coordinates(rank).items())


def axes_rows(manifest: Manifest) -> list[tuple[str, str]]:
    """Every axis that communicates, with its groups of ranks."""
    mesh = Mesh(tuple(manifest.axes.items()))
    if mesh.world != manifest.world:
        return []
    return [
        (name, " ".join(str(list(group)) for group in mesh.axis(name).groups))
        for name, length in mesh.axes
        if length > 1
    ]


def tensor_line(manifest: Manifest) -> str | None:
    """How much of the weights ranks share; ``None`` where each holds all."""
    known = manifest.tensor
    if known is None:
        return None
    percent = 100 * known.bytes / max(1, known.of_bytes)
    line = f"{plural(len(known.weights), 'weight')}, {percent:.0f} % of all bytes"
    if known.whole:
        first = known.whole[0]
        line += f"; {plural(len(known.whole), 'attention')} whole: {first.reason} ({first.module})"
    return line


def guidance_line(manifest: Manifest) -> str | None:
    """What the engines do with guidance branches; ``None`` where ranks do not share them."""
    known = manifest.guidance
    if known is None:
        return None
    line = (
        f"{known.branches} branches of {plural(known.rows, 'row')} each, on dimension 0 of "
        f"{', '.join(known.inputs)}"
    )
    if known.combine is not None:
        line += f"; combined to uncond + {known.combine} * (cond - uncond), uncond first"
    return line
