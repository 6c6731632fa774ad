"""What :mod:`.quantized_formats` found, as a page of the documentation: Markdown goes out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any, Final

STRATEGIES: Final = ("ulysses", "allgather-kv", "ring")
WORLDS: Final = (2, 4)
Cells = Mapping[str, Mapping[str, Any]]
"""By strategy and world: what is known of the proof, or of what stopped it."""
Results = Mapping[str, Mapping[str, Cells]]
"""By model and format."""
_OUTCOMES: Final = ("proven", "refused", "failed")
_SHORT: Final = {"fp8_e4m3": "fp8", "fp4_e2m1": "fp4"}


def page(results: Results, formats: Mapping[str, str]) -> str:
    """The page; ``formats`` says what each is."""
    every = [cell for row in results.values() for cells in row.values() for cell in cells.values()]
    proofs = [cell["proven"] for cell in every if "proven" in cell]
    return _PAGE.format(
        tried=len(every),
        whole=len(results) * len(formats) * len(STRATEGIES) * len(WORLDS),
        counted=", ".join(f"{sum(k in c for c in every)} {k}" for k in _OUTCOMES),
        control=f"{min((one['control'] for one in proofs), default=0):.0e}",
        error=f"{max((one['error'] for one in proofs), default=0):.0e}",
        formats="\n".join(f"| {name} | {told} |" for name, told in formats.items()),
        counts="\n".join(_counts(every_of(results, key), key) for key in _keys()),
        tables="\n\n".join(_table(model, results[model], formats) for model in results),
        ran=_all_runs(every),
        old=_lines(_without(results)),
        narrow=_lines(_narrow(results)) or "None.",
        told=_lines(_stopped(results)),
    )


def _all_runs(every: Sequence[Mapping[str, Any]]) -> str:
    """Of all bundles that were run: how many, how far ranks are apart, what was not compared."""
    runs = [cell["ran"] for cell in every if "ran" in cell]
    if not runs:
        return "No bundle was run."
    apart = max((one["apart"] for one in runs if "apart" in one), default=0)
    failed = [one["failed"] for one in runs if "failed" in one]
    compared = sum("error" in one for one in runs)
    return (
        f"{len(runs)} bundles were run, {len(failed)} of them failed, {compared} were compared; "
        f"ranks are {apart:.0e} apart at most"
    )


def _keys() -> list[str]:
    return [f"{strategy} {world}" for strategy, world in product(STRATEGIES, WORLDS)]


def every_of(results: Results, key: str) -> list[Mapping[str, Any]]:
    """The cells of one strategy and world."""
    return [cells[key] for row in results.values() for cells in row.values() if key in cells]


def _counts(cells: Sequence[Mapping[str, Any]], key: str) -> str:
    strategy, world = key.split()
    numbers = [str(sum(kind in cell for cell in cells)) for kind in _OUTCOMES]
    return f"| {strategy} | {world} | {' | '.join(numbers)} |"


_HEAD: Final = (
    "format", "proven", "refused", "failed", "without rounding", "with, of bound", "may flip",
    "loss", "linear layers multiply", "attentions read", "built for", "run",
)  # fmt: skip


def _table(model: str, row: Mapping[str, Cells], formats: Mapping[str, str]) -> str:
    lines = [f"| {kind} | {' | '.join(_cells(row[kind]))} |" for kind in formats if kind in row]
    head = [f"| {' | '.join(_HEAD)} |", "|---" * len(_HEAD) + "|"]
    return "\n".join([f"### {model}", "", *head, *lines])


def _cells(cells: Cells) -> list[str]:
    """A row: the largest errors of all strategies and worlds, and what their engines multiply."""
    counts = [str(sum(kind in cell for cell in cells.values()) or "") for kind in _OUTCOMES]
    runs = [cell["ran"] for cell in cells.values() if "ran" in cell]
    proofs = [cell["proven"] for cell in cells.values() if "proven" in cell]
    if not proofs:
        return [*counts, *("" for _ in range(len(_HEAD) - 1 - len(counts)))]
    targets = sorted({target for one in proofs for target in one["targets"]}, key=float)
    return [
        *counts, f"{max(one['error'] for one in proofs):.0e}",
        _nearest(proofs, "rounded", "rounded_bound", ".0e"),
        _nearest(proofs, "flipped", "codes", ","), _loss(proofs), _products(proofs),
        _attentions(proofs), ", ".join(targets), _ran(runs),
    ]  # fmt: skip


def _ran(runs: Sequence[Mapping[str, Any]]) -> str:
    """How many, and of those that were compared the one that comes nearest to its bound."""
    if not runs:
        return ""
    failed = sum("failed" in one for one in runs)
    told = [f"{failed} of {len(runs)} failed" if failed else str(len(runs))]
    compared = [one for one in runs if "error" in one]
    if compared:
        most = max(compared, key=lambda one: one["error"] / one["bound"])
        told.append(f"{most['error']:.0e} of {most['bound']:.0e}")
    return ": ".join(told)


def _nearest(proofs: Sequence[Mapping[str, Any]], part: str, whole: str, digits: str) -> str:
    """Of the cell that has most of a whole: of its bound, of its codes."""
    known = [one for one in proofs if one.get("codes")]
    if not known:
        return ""
    most = max(known, key=lambda one: one[part] / one[whole])
    return f"{most[part]:{digits}} of {most[whole]:{digits}}"


def _loss(proofs: Sequence[Mapping[str, Any]]) -> str:
    known = [one["loss"] for one in proofs if "loss" in one]
    return f"{max(known):.1%}" if known else ""


def _products(proofs: Sequence[Mapping[str, Any]]) -> str:
    """Of all linear layers how many multiply codes, as every engine says of itself."""
    told = {_joined(one.get("linears", {})) for one in proofs}
    return " or ".join(sorted(told)) if told != {""} else "precision"


def _joined(linears: Mapping[str, int]) -> str:
    whole = sum(linears.values())
    coded = [f"{kind} {count} of {whole}" for kind, count in linears.items() if kind != "bf16"]
    return ", ".join(coded) or ("precision" if linears else "")


def _attentions(proofs: Sequence[Mapping[str, Any]]) -> str:
    """Kernels differ by strategy; what is told is which types are read."""
    told: Counter[str] = Counter()
    for one in proofs:
        told.update(one.get("attending", {}))
    if not told:
        return "precision"
    most = max(proofs, key=lambda one: sum(one.get("attending", {}).values()))["attending"]
    return ", ".join(f"{kind} {n} of {sum(most.values())}" for kind, n in most.items() if n)


def _without(results: Results) -> Iterator[tuple[str, str, str]]:
    for model, row in results.items():
        for kind, cells in row.items():
            for cell in cells.values():
                for target, words in cell.get("without", {}).items():
                    yield f"{target}: {words.split(' Hint: ')[0]}", kind, model


def _narrow(results: Results) -> Iterator[tuple[str, str, str]]:
    """What was proven in float16, and what is said of bfloat16."""
    for model, row in results.items():
        for kind, cells in row.items():
            for key, cell in cells.items():
                if "bf16" in cell:
                    yield f"{kind}: {cell['bf16'].split(' Hint: ')[0]}", key, model


def _stopped(results: Results) -> Iterator[tuple[str, str, str]]:
    for model, row in results.items():
        for kind, cells in row.items():
            for key, cell in cells.items():
                if (what := next(iter(cell))) != "proven":
                    words = re.sub(r" \[[^]]*\]", "", cell[what])  # where: every model's own
                    yield f"{what}, {kind}: {words}", key, model


def _lines(found: Iterator[tuple[str, str, str]]) -> str:
    """A line for each reason, with where it was given."""
    reasons: dict[str, dict[str, list[str]]] = {}
    for reason, at, model in found:
        known = reasons.setdefault(reason, {}).setdefault(at, [])
        if model not in known:
            known.append(model)
    return "\n".join(
        f"- {reason.replace('|', '/')} ({_places(places)})" for reason, places in reasons.items()
    )


def _places(places: Mapping[str, Sequence[str]]) -> str:
    """Where, with the models; those that differ in nothing else are told once."""
    by_models: dict[tuple[str, ...], list[str]] = {}
    for at, models in places.items():
        by_models.setdefault(tuple(models), []).append(at)
    return "; ".join(f"{', '.join(at)}: {', '.join(m)}" for m, at in by_models.items())


_PAGE: Final = """# Every quantized format, by model, strategy and world

Generated by `python -m benchmarks.quantized_formats`; do not edit by hand. {tried} of {whole}
cells were run: {counted} (`--missing` runs the others). A cell is
a whole conversion of a small model (`benchmarks/small/`: a block of each kind, eight heads, random
weights) in bfloat16 (float16 where the end of this page says so) with external weights: the
checkpoint is written in the format and read
(`benchmarks/formats.py`), TensorRT-RTX builds one engine for all compute capabilities that the row
names, and program and networks are proven. What the formats are, and what is proven, is told in
[quantized.md](quantized.md). No engine was executed.

*Without rounding* is the largest relative error of all ranks, of program and networks, in float32
arithmetic against the dense model ({error} at most in all cells; without communication it is
{control} at least). *With* is the same with quantizers that round, against the dense model that
rounds alike, and its bound: what codes next to a tie may do; the cell that comes nearest to its
bound. *May flip* counts those codes. *Loss* is that model against the one without quantizers (root
mean square): of random weights, and in checkpoints of scales that nobody calibrated, so it says
nothing about pictures. *Multiply* is what the manifest says, and the engine's own text says it
too, or the cell has failed: that many products have both operands of that type, and none has two
types; attentions likewise. *Run* (`--ran`): by `cp-convert run` with torch's executor, one process
a rank over gloo: how many of the row's cells, and the largest error against the model without
rounding of activations, of its bound, which allows twice the loss and what the precision costs.
{ran}.

| format | |
|---|---|
{formats}

| strategy | world | proven | refused | failed |
|---|---|---|---|---|
{counts}

{tables}

## What a target refuses

Before anything is traced:

{old}

## In float16

{narrow}

## What stopped the others

{told}
"""
