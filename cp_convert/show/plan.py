"""A plan: every option as a table, and the recommendation."""

from __future__ import annotations

import msgspec
from rich.markup import escape

from ..advise.forecast import Forecast, Option
from .screen import Screen
from .words import count, plural, short, size, table_of


def planned(screen: Screen, found: Forecast) -> None:
    """All options as a table, and the recommendation."""
    if screen.as_json:
        screen.document({**msgspec.to_builtins(found), "status": "ok"})
        return
    screen.out.print(
        f"[bold]{escape(found.model)}[/], {count(found.parameters)} parameters in "
        f"{found.precision}, {plural(found.attentions, 'sharded attention')}, "
        f"{found.tokens:,} tokens; {escape(found.hardware.title)}",
        soft_wrap=True,
    )
    table = table_of(
        "", "GPUs", "strategy", "coll.", "sent", "memory", "compute", "comm.", "hidden",
        "forward", "faster",
        right=(
            "GPUs", "coll.", "sent", "memory", "compute", "comm.", "hidden", "forward",
            "faster",
        ),
    )  # fmt: skip
    table.columns[1].no_wrap = True
    table.box, table.padding, table.collapse_padding = None, (0, 1), True
    for option in found.options:
        table.add_row(*_option_row(option))
    screen.out.print(table)
    for line in dict.fromkeys(
        f"{o.title} over {o.world} ranks: {o.refused}" for o in found.options if o.refused
    ):
        screen.out.print(f"  {escape(line)}", soft_wrap=True)
    screen.out.print(
        "Collectives, bytes sent and memory (weights and activations) are one rank's; times "
        "and activations are estimated; hidden is the share of communication that runs beside "
        "work.",
        soft_wrap=True,
    )
    screen.out.print(f"[bold]{escape(found.recommendation)}[/]", soft_wrap=True)


def _option_row(option: Option) -> list[str]:
    if option.refused is not None:
        return [str(option.world), option.title, "not possible"]
    memory = option.weights + option.activations
    is_one = option.world == 1
    hidden = 1 - option.exposed / option.communication if option.communication else 0.0
    return [
        str(option.world),
        option.title,
        "" if is_one else str(option.collectives),
        "" if is_one else size(option.bytes_sent),
        size(memory) + ("" if option.fits else " !"),
        short(option.compute),
        "" if is_one else short(option.communication),
        "" if is_one else f"{hidden:.0%}",
        short(option.seconds),
        f"{option.speedup:.2f} x",
    ]
