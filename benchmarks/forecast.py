"""Forecasts beside measurements: ``python -m benchmarks.forecast FOLDER > docs/forecast.md``.

In: the programs of ``benchmarks.two_gpus prepare FOLDER/world-W --world W`` for the worlds 1, 2, 4
and 8, ``FOLDER/results.jsonl``, which ``benchmarks.two_gpus run`` wrote on two GPUs, and
``FOLDER/alone.jsonl``, which ``benchmarks.gpus.alone`` wrote on one. Out: a page. It forecasts by
the hardware file that is shipped for that GPU, whose curves do not come from these programs; and
the speed-ups of FLUX.1-dev, whole, that others have published for several GPUs.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cp_convert.advise.estimate import Work, estimate
from cp_convert.advise.forecast import Forecast
from cp_convert.advise.hardware import Hardware, read
from cp_convert.advise.planning import forecast
from cp_convert.bundle.program import stored_at
from cp_convert.job import Job
from cp_convert.model.preset import path_of
from cp_convert.progress import Progress

from .gpus.cases import FORECAST, STRATEGIES

_TOKENS: Final = {
    "1024": "4,096+512", "2048": "16,384+512", "4096": "65,536+512", "whole": "4,096+512, whole",
}  # fmt: skip

_PUBLISHED: Final = (
    # hardware, source, seconds on one GPU, and by strategy, world and USP's factor
    ("h100-sxm", "xDiT documentation, 28 steps", 4.30,
     {("ulysses", 2, None): 2.68, ("ring", 2, None): 2.60, ("usp", 4, 2): 1.80,
      ("ulysses", 4, None): 1.63, ("ring", 4, None): 1.98}),
    ("l20", "cache-dit documentation", 23.56,
     {("ulysses", 2, None): 13.80, ("ulysses", 4, None): 8.25, ("ring", 4, None): 9.16,
      ("usp", 4, 2): 8.55}),
)  # fmt: skip

_HEAD: Final = """# Forecasts beside measurements

`cp-convert plan` and `--strategy auto` estimate a forward from the program that would be built: every product, attention and
collective by a curve over its size, what stands between them as the kernels that compilers fuse it into
([`advise/kernels.py`](../cp_convert/advise/kernels.py)), a collective beside the work that does not wait for it. Curves are measured by
`cp-convert calibrate`, in about twenty seconds, on single kernels and collectives; this page asks what whole programs made of such kernels take.
`python -m benchmarks.forecast` prints it. FLUX.1-dev's width, 2 joint and 4 single blocks, bfloat16, torch 2.11, compiled, replayed as a CUDA graph; median of ten.

## Two GPUs, with curves that were measured on them

Two NVIDIA H200 of one host (NVLink), over NCCL; `configs/hardware/h200.toml` was measured on the same two just before.

"""
_ALONE: Final = """## A rank of more, without its wires

One NVIDIA H200: rank 0's program of 4 and of 8, **its collectives replaced by memory that is there already**, as four GPUs were not to be had. This tests the
arithmetic of a rank and the copies beside collectives. That kernels pad the heads of 136 numbers which a ring's attentions have to the next size that FlashAttention is made for, and that curves go on
below their smallest size, was put into the forecast after this table had shown the ring 28 percent too fast; no number was fitted to it.

"""
_TABLE: Final = """| tokens | ranks | program | measured ms | forecast ms | off by |
|---|---|---|---|---|---|
"""
_REPLAYED: Final = ", replayed"


@dataclass(frozen=True)
class Row:
    """One program: milliseconds measured, and forecast."""

    tokens: str
    ranks: int
    what: str
    measured: float
    told: float

    @property
    def off(self) -> float:
        """Relative."""
        return self.told / self.measured - 1

    @property
    def line(self) -> str:
        """Of the table."""
        return (
            f"| {self.tokens} | {self.ranks} | {self.what} | {self.measured:.2f} | {self.told:.2f} "
            f"| {self.off:+.0%} |"
        )


def over_wires(folder: Path, hardware: Hardware) -> list[Row]:
    """Every program that ran on one GPU or on all, over the wire."""
    found = []
    for one in _lines(folder / "results.jsonl"):
        what, _, replayed = str(one["what"]).partition(_REPLAYED)
        if one["case"] in FORECAST and "ms" in one and not replayed and what != one["what"]:
            ranks = 1 if what == "dense" else int(one["world"])
            if what == "dense" or what in STRATEGIES:
                told = _work(folder, one["case"], what, ranks, hardware).seconds
                found.append(_row(one, what, ranks, told))
    return found


def alone(folder: Path, hardware: Hardware) -> list[Row]:
    """Every rank's arithmetic that was measured."""
    return [
        _row(one, one["what"], one["ranks"],
             _work(folder, one["case"], one["what"], one["ranks"], hardware).compute)
        for one in _lines(folder / "alone.jsonl")
        if one["case"] in FORECAST and "ms" in one and "ranks" in one
    ]  # fmt: skip


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    return map(json.loads, path.read_text().splitlines())


def _work(folder: Path, case: str, what: str, ranks: int, hardware: Hardware) -> Work:
    """Of what is stored; alone, every strategy's is the dense program."""
    what = "ulysses" if what == "dense" else what
    program = stored_at(folder / f"world-{ranks}" / case / what).program
    return estimate(program, hardware)


def _row(one: Mapping[str, Any], what: str, ranks: int, seconds: float) -> Row:
    tokens = _TOKENS[str(one["case"]).rpartition("-")[2]]
    return Row(tokens, ranks, what, float(one["ms"]), seconds * 1e3)


def orders(found: Sequence[Row]) -> tuple[int, int]:
    """Pairs of strategies that differ by more than a tenth, and how many stand in that order."""
    pairs = [
        (one, other)
        for one in found
        for other in found
        if (one.tokens, one.ranks) == (other.tokens, other.ranks)
        and other.measured > 1.1 * one.measured
    ]
    return len(pairs), sum(one.told < other.told for one, other in pairs)


def published() -> Iterable[str]:
    """Lines of the second table."""
    path = path_of("flux.1-dev")
    assert path is not None
    job = Job(path, "ulysses", 4, Path(), proof="none", precision="bf16")
    for name, source, alone, times in _PUBLISHED:
        told = forecast(job, read(name), name, Progress())
        for (strategy, world, ulysses), seconds in times.items():
            said, own = alone / seconds, speedup(told, strategy, world, ulysses)
            title = strategy if ulysses is None else f"{strategy} {ulysses}x{world // ulysses}"
            yield f"| {name} | {source} | {world} | {title} | {said:.2f} | {own:.2f} | {own / said - 1:+.0%} |"


def speedup(told: Forecast, strategy: str, world: int, ulysses: int | None) -> float:
    """Of one option of a forecast."""
    (option,) = (
        o
        for o in told.options
        if (o.strategy, o.world, o.ulysses, o.tp) == (strategy, world, ulysses, 1)
    )
    return option.speedup


def table(found: Sequence[Row]) -> str:
    """Rows, and what they say together."""
    off = [abs(row.off) for row in found]
    pairs, right = orders(found)
    order = (
        f"Of {pairs} pairs of strategies that differ by more than a tenth, {right} stand in the measured order."
        if pairs
        else "No two strategies differ by more than a tenth."
    )
    lines = "\n".join(row.line for row in found)
    told = f"Median {statistics.median(off):.0%}, largest {max(off):.0%}. {order}"
    return f"{_TABLE}{lines}\n\n{told}\n"


def main() -> int:
    """The command line."""
    folder, hardware = Path(sys.argv[1]), read("h200")
    print(_HEAD + table(over_wires(folder, hardware)))
    print(_ALONE + table(alone(folder, hardware)))
    print(
        "## Several GPUs, as others published them\n\nFLUX.1-dev whole at 1024x1024; speed-ups over one GPU. "
        "These hardware files hold published rates and assumed shares, no curves.\n\n"
        "| hardware | source | GPUs | strategy | published | forecast | off by |\n|---|---|---|---|---|---|---|"
    )
    for line in published():
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
