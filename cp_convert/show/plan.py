"""A plan: every option as a table, and the recommendation."""

from __future__ import annotations

import msgspec
from rich.markup import escape

from ..advise.forecast import Forecast, Option
from ..mesh import AXES
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
        "", "GPUs", *AXES, "strategy", "sent", "memory", "compute", "comm.", "forward", "faster",
        right=("GPUs", *AXES, "sent", "memory", "compute", "comm.", "forward", "faster"),
    )  # fmt: skip
    table.columns[4].no_wrap = True
    table.box, table.padding, table.collapse_padding = None, (0, 1), True
    for option in found.options:
        table.add_row(*_option_row(option))
    screen.out.print(table)
    for line in dict.fromkeys(
        f"{o.title} over {o.world} ranks: {o.refused}" for o in found.options if o.refused
    ):
        screen.out.print(f"  {escape(line)}", soft_wrap=True)
    screen.out.print(
        "Bytes sent and memory (weights and activations) are one rank's; ! is more than a GPU has. "
        "Times and activations are estimated; what of the communication runs beside work takes no "
        "time of a forward.",
        soft_wrap=True,
    )
    screen.out.print(f"[bold]{escape(found.recommendation)}[/]", soft_wrap=True)


def _option_row(option: Option) -> list[str]:
    is_one = option.world == 1
    axes = [str(size) if size > 1 else "" for size in (option.cfg, option.cp, option.tp)]
    place = [str(option.world), *axes, option.sharing]
    if option.refused is not None:
        return [*place, "not possible"]
    return [
        *place,
        "" if is_one else size(option.bytes_sent),
        size(option.memory) + ("" if option.fits else " !"),
        short(option.compute),
        "" if is_one else short(option.communication),
        short(option.seconds),
        f"{option.speedup:.2f} x",
    ]
