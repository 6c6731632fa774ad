"""The variants of a bundle, one row each: what tells them apart, and what each costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from rich.markup import escape
from rich.table import Table

from ..bundle.manifest import Manifest
from ..bundle.variants import all_variants
from .words import size, table_of

COLUMNS: Final = ("variant", "inputs", "engines", "activations", "sent", "relative error")
_NUMBERS: Final = COLUMNS[2:]


def variants_table(manifest: Manifest) -> Table:
    """As a table for a terminal."""
    table = table_of("Variants", *COLUMNS, right=_NUMBERS)
    for name, *rest in variant_rows(manifest):
        table.add_row(escape(name), *map(escape, rest))
    return table


def variant_rows(manifest: Manifest) -> Iterator[Sequence[str]]:
    """Of :data:`COLUMNS`; nothing where the bundle has but one variant."""
    views = all_variants(manifest) if manifest.variants else []
    same = set.intersection(*(set(_told(one)) for one in views)) if views else set()
    for one in views:
        needs = [e.activation_bytes for e in one.engines if e.activation_bytes is not None]
        yield (
            str(one.request.variant),
            "; ".join(text for text in _told(one) if text not in same),
            size(engine_bytes(one)),
            size(max(needs)) if needs else "",
            size(sum(c.bytes_sent for c in one.collectives)),
            proof_word(one),
        )


def _told(manifest: Manifest) -> list[str]:
    """All of the inputs that a caller's arguments are compared with."""
    shapes = [
        f"{io.name} {' x '.join(map(str, io.shape)) or 'scalar'}"
        for io in manifest.io
        if io.mode == "input"
    ]
    frozen: dict[str, list[str]] = {}
    for one in manifest.frozen:
        frozen.setdefault(one.name.partition(".")[0], []).append(one.value)
    return [*shapes, *(f"{name} = {', '.join(values)}" for name, values in frozen.items())]


def engine_bytes(manifest: Manifest) -> int:
    """Of one variant's engines; equal ones are one file under several names."""
    return sum({engine.sha256: engine.bytes for engine in manifest.engines}.values())


def proof_word(manifest: Manifest) -> str:
    """The largest error that the ranks make, or that nobody looked."""
    proof = manifest.proof
    return "not proven" if proof.status == "skipped" else f"{max(e.max for e in proof.ranks):.1e}"
