"""LoRA sets of a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.markup import escape
from rich.table import Table

from ..bundle.manifest import LoraSet
from .screen import Screen
from .words import plural, size, table_of


def added(screen: Screen, bundle: Path, told: LoraSet, others: int) -> None:
    """A set was added; ``others`` tensors of the file belong to other models."""
    if screen.as_json:
        document = {"status": "ok", "bundle": str(bundle), "set": msgspec.to_builtins(told)}
        screen.document({**document, "tensors_of_other_models": others})
        return
    if others:
        screen.note(f"{plural(others, 'tensor')} of other models in the file are not used.")
    if screen.verbosity >= 0:
        screen.out.print(
            f"[bold green]{escape(told.name)}[/] changes {plural(len(told.weights), 'weight')}, "
            f"{size(told.file.bytes)} in [bold]{escape(str(bundle / told.file.file))}[/]; "
            f"`cp-convert run {escape(str(bundle))} --lora {escape(told.name)}` uses it",
            soft_wrap=True,
        )


def removed(screen: Screen, bundle: Path, name: str) -> None:
    """A set was removed."""
    if screen.as_json:
        screen.document({"status": "ok", "bundle": str(bundle), "removed": name})
    else:
        screen.note(f"{name} is removed from {bundle}.")


def sets_table(sets: Sequence[LoraSet]) -> Table:
    """One line a set."""
    numbers = ("scale", "weights", "size")
    table = table_of("LoRA sets", "name", "kind", *numbers, "from", right=numbers)
    for one in sets:
        table.add_row(
            escape(one.name), ", ".join(one.kinds), f"{one.scale:g}", str(len(one.weights)),
            size(one.file.bytes), escape(one.source),
        )  # fmt: skip
    return table
