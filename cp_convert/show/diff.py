"""Two bundles side by side: what is not the same."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Final

from rich.markup import escape

from ..bundle.difference import Difference
from .screen import Screen

_SHOWN: Final = 12
"""Lines of a part; the others are counted, and all are in ``--json`` and with ``-v``."""


def compared(screen: Screen, found: Sequence[Difference]) -> None:
    """The differences, part by part."""
    if screen.as_json:
        told = [one._asdict() for one in found]
        screen.document({"status": "different" if found else "equal", "differences": told})
        return
    if screen.verbosity < 0:
        return
    if not found:
        screen.note("The bundles are equal.")
    for part, own in groupby(found, key=lambda one: one.part):
        _part(screen, part, list(own))


def _part(screen: Screen, part: str, found: Sequence[Difference]) -> None:
    screen.out.print(f"[bold]{part}[/]")
    shown = found if screen.verbosity > 0 else found[:_SHOWN]
    for one in shown:
        screen.out.print(f"  {escape(one.name)}", soft_wrap=True)
        screen.out.print(f"    [red]-[/] {_value(one.before)}", soft_wrap=True)
        screen.out.print(f"    [green]+[/] {_value(one.after)}", soft_wrap=True)
    if len(found) > len(shown):
        screen.out.print(f"  and {len(found) - len(shown)} more; -v and --json tell all")


def _value(value: str | None) -> str:
    return "[dim]absent[/]" if value is None else escape(value)
