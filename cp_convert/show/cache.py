"""A cache: what it holds, what was removed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape

from ..cache.store import Held
from .screen import Screen
from .words import size


def held(screen: Screen, folder: Path, entries: Sequence[Held]) -> None:
    """What a cache holds."""
    if screen.as_json:
        kinds = {h.kind: {"entries": h.entries, "bytes": h.bytes} for h in entries}
        screen.document({"folder": str(folder), "kinds": kinds})
        return
    screen.out.print(f"[bold]{escape(str(folder))}[/]", soft_wrap=True)
    for one in entries:
        screen.out.print(f"  {one.kind:8} {one.entries:5}  {size(one.bytes)}")


def cleared(screen: Screen, folder: Path, freed: int) -> None:
    """What was removed from a cache."""
    if screen.as_json:
        screen.document({"folder": str(folder), "bytes": freed})
    else:
        screen.note(f"{size(freed)} removed from {folder}.")
