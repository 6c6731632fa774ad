"""A run: what every rank did, and how far apart they are."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape

from ..bundle.manifest import Manifest
from .screen import Screen
from .words import plural, size, table_of


def ran(
    screen: Screen,
    manifest: Manifest,
    reports: Sequence[Mapping[str, Any]],
    checked: Mapping[str, Any] | None,
    outputs: Path | None,
    lora: Mapping[str, float | None],
    variant: str | None,
) -> None:
    """The end of a run: ranks as a table, times, comparisons."""
    times = forwards(reports)
    if screen.as_json:
        screen.document(
            {
                "status": "ok",
                "ranks": list(reports),
                "forward": _statistics(times),
                "check": checked,
                "lora": dict(lora),
                "variant": variant,
                "outputs": None if outputs is None else str(outputs),
            }
        )
        return
    if screen.verbosity < 0:
        return
    first = reports[0]
    print_ = screen.out.print
    print_(
        f"[bold green]{plural(manifest.world, 'rank')}[/] of {escape(manifest.model.name)} "
        f"({manifest.precision}, {manifest.strategy}) ran together by {first['executor']}",
        soft_wrap=True,
    )
    print_(_ranks(reports))
    for name, line in (
        ("ranks", _alike(reports)),
        ("torch", _torch(reports)),
        ("dense", _dense(checked)),
        ("forward", _times(times)),
        ("step cache", _steps(first)),
        ("LoRA", _sets(lora)),
        ("variant", variant or ""),
    ):
        if line:
            print_(f"  {name:10} {escape(line)}", soft_wrap=True)
    if outputs is not None:
        print_(f"  {'outputs':10} {escape(str(outputs))}", soft_wrap=True)


def forwards(reports: Sequence[Mapping[str, Any]]) -> list[float]:
    """Seconds of every forward after the first: that of the rank that took longest."""
    return [max(each) for each in zip(*(r["forwards"] for r in reports), strict=True)]


def _ranks(reports: Sequence[Mapping[str, Any]]) -> Any:
    numbers = ("rank", "load s", "first s", "median ms", "peak", "collectives")
    table = table_of("", "rank", "device", *numbers[1:], right=numbers)
    for one in reports:
        share = one["collectives"]
        table.add_row(
            str(one["rank"]),
            escape(one["device"]),
            f"{one['load']:.1f}",
            f"{one['first']:.2f}",
            f"{statistics.median(one['forwards']) * 1e3:.1f}" if one["forwards"] else "",
            size(one["peak"]),
            "" if share is None else f"{share:.0%}",
        )
    return table


def _alike(reports: Sequence[Mapping[str, Any]]) -> str:
    apart = reports[0]["apart"]
    return f"agree, at most {max(apart):.1e} apart" if apart else "not compared"


def _dense(checked: Mapping[str, Any] | None) -> str:
    if checked is None:
        return "not compared"
    if checked["reason"] is not None:
        return f"not compared: {checked['reason']}"
    return f"relative error {checked['error']:.1e} (bound {checked['bound']:.1e})"


def _steps(first: Mapping[str, Any]) -> str:
    skipped = first["skipped"]
    if skipped is None:
        return ""
    return f"{plural(skipped, 'forward')} skipped the pieces between the first and the last"


def _sets(lora: Mapping[str, float | None]) -> str:
    return ", ".join(n if value is None else f"{n} at {value:g}" for n, value in lora.items())


def _statistics(times: Sequence[float]) -> dict[str, Any] | None:
    """In seconds; the spread is that of the slowest over the fastest, less one."""
    if not times:
        return None
    return {
        "seconds": list(times),
        "median": statistics.median(times),
        "minimum": min(times),
        "spread": max(times) / min(times) - 1,
    }


def _times(times: Sequence[float]) -> str:
    told = _statistics(times)
    if told is None:
        return ""
    return (
        f"median {told['median'] * 1e3:.1f} ms, minimum {told['minimum'] * 1e3:.1f} ms, spread "
        f"{told['spread']:.0%}, of {len(times)}; each is that of the slowest rank"
    )


def _torch(reports: Sequence[Mapping[str, Any]]) -> str:
    errors = [one["torch"] for one in reports if one["torch"] is not None]
    return f"the engines are within {max(errors):.1e} of the stored program" if errors else ""
