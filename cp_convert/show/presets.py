"""Presets: all as a table, one as its file says it."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from ..model.preset import TINY, Preset
from .screen import Screen
from .words import count, table_of


def several(screen: Screen, presets: Mapping[str, Preset]) -> None:
    """All presets as a table."""
    if screen.as_json:
        screen.document({name: msgspec.to_builtins(one) for name, one in presets.items()})
        return
    table = table_of(
        "", "preset", "parameters", "resolution", "tokens", "strategy", "world",
        right=("parameters", "tokens", "world"),
    )  # fmt: skip
    for name, one in presets.items():
        facts = (name, count(one.parameters), one.strategy, str(one.world))
        for resolution in (r for r in one.resolutions if r != TINY):
            title, parameters, strategy, world = facts
            tokens = f"{one.numbers(resolution, one.config)['tokens']:,}"
            table.add_row(title, parameters, resolution, tokens, strategy, world)
            facts = ("", "", "", "")
    screen.out.print(table)


def one(screen: Screen, preset: Preset, text: str) -> None:
    """One preset, as its file says it."""
    if screen.as_json:
        screen.document(msgspec.to_builtins(preset))
    else:
        screen.out.print(text, end="", markup=False, soft_wrap=True)
