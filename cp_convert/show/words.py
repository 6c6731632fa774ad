"""Numbers, sizes and tables as a person reads them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from rich import box
from rich.table import Table

from ..advise.forecast import told


def table_of(title: str, *columns: str, right: Iterable[str] = ()) -> Table:
    """An empty table; the columns in ``right`` hold numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column in columns:
        is_number = column in right
        justify: Any = "right" if is_number else "left"
        table.add_column(column, justify=justify, overflow="fold", no_wrap=is_number)
    return table


def count(number: float) -> str:
    """``11.9 B``."""
    for unit, factor in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number:.0f}"


def plural(number: int, noun: str) -> str:
    """``1 rank``, ``2 ranks``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def size(number: float) -> str:
    """``96 MB``."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number:.0f} B"


def short(seconds: float) -> str:
    """``1.23 ms``."""
    return f"{seconds * 1e3:.3f} ms" if seconds < 1e-3 else told(seconds)


def starred(module: str) -> str:
    """``blocks.7.attn`` as ``blocks.*.attn``, so that equal blocks share a row."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", module)


def local_of(local: int, whole: int) -> str:
    """``576 of 4608``."""
    return str(whole) if local == whole else f"{local} of {whole}"
