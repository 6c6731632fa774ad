"""A calibration: the best rates that were seen, and where the file is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.markup import escape

from .screen import Screen


def calibrated(screen: Screen, out: Path, found: Mapping[str, Any]) -> None:
    """A few numbers by which one sees whether it went well."""
    if screen.as_json:
        screen.document({"status": "ok", "out": str(out), **found})
        return
    print_ = screen.out.print
    print_(f"[bold]{escape(found['gpu'])}[/], torch {found['torch']}")
    print_(f"  products up to {_best(found['matmul']):.0f} TFLOP/s")
    for dim, curve in found["attention"].items():
        print_(f"  attention, heads of {dim}, up to {_best(curve):.0f} TFLOP/s")
    print_(f"  memory up to {_best(found['copies']):.0f} GB/s")
    print_(f"  a kernel takes at least {found['copies'][0][1]:.1f} microseconds")
    for kind, by_size in found["collectives"].items():
        for size, curve in by_size.items():
            print_(
                f"  {kind} between {size}: {curve[0][1]:.0f} microseconds at least, up to "
                f"{_best(curve):.0f} GB/s"
            )
    print_(f"wrote {escape(str(out))}: --hardware takes it, in plan and convert", soft_wrap=True)


def _best(curve: list[tuple[float, float]]) -> float:
    """1e12 operations, or 1e9 bytes, a second: the best of a curve in 1e9, or 1e6, by us."""
    return max(size / spent for size, spent in curve) * 1e3
