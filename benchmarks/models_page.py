"""What ``benchmarks.models`` found, as a page of the documentation."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LONGEST = 240
WIDE = "fp32"
Results = Mapping["Run", Mapping[str, Any]]


@dataclass(frozen=True, order=True)
class Run:
    """One class with one plan at one world, in one precision."""

    name: str
    plan: str
    world: int
    precision: str = WIDE

    @property
    def key(self) -> str:
        """How the results name it."""
        return f"{self.name} {self.plan} {self.world} {self.precision}"

    @classmethod
    def named(cls, key: str) -> Run:
        """The inverse of :attr:`key`; results of older releases are float32."""
        name, plan, world, *precision = key.split()
        return cls(name, plan, int(world), *precision)


def whole(result: Mapping[str, Any]) -> str | None:
    """What happened to all strategies alike."""
    return next((kind for kind in ("refused", "failed") if kind in result), None)


def page(results: Results) -> str:
    """The results as a page of the documentation."""
    from benchmarks.zoo import classes
    from cp_convert.strategies import STRATEGIES

    wide = {run: r for run, r in sorted(results.items()) if run.precision == WIDE}
    inferred = {run: r for run, r in wide.items() if run.plan == "inferred"}
    declared = {run: r for run, r in wide.items() if run.plan == "declared"}
    return PAGE.format(
        run=len(inferred), known=len(classes()), strategies=" | ".join(STRATEGIES),
        said=_said(inferred), rows="\n".join(_row(run, r) for run, r in inferred.items()),
        declared_said=_said(declared),
        declared_rows="\n".join(_row(run, r) for run, r in declared.items()),
        precisions="\n\n".join(_precisions(results, strategy) for strategy in STRATEGIES).strip(),
    )  # fmt: skip


def _said(results: Results, strategies: Sequence[str] = ()) -> str:
    from cp_convert.strategies import STRATEGIES

    cells: Counter[str] = Counter()
    for result in results.values():
        known = [s for s in strategies or STRATEGIES if whole(result) or s in result]
        cells.update(whole(result) or result[strategy]["status"] for strategy in known)
    said = ", ".join(f"{cells[kind]} {kind}" for kind in ("proven", "refused", "failed"))
    return f"{sum(cells.values())} conversions: {said}"


def _row(run: Run, result: Mapping[str, Any]) -> str:
    from cp_convert.strategies import STRATEGIES

    if kind := whole(result):
        return f"| {run.name} | {run.world} | | | | {kind}: {_short(result[kind])} | | |"
    shown = [_cell(result, strategy, "{network:.0e}") for strategy in STRATEGIES]
    frozen = " *" if result["freeze"] else ""
    reduces = f" + {result['all_reduces']} all-reduce" if result["all_reduces"] else ""
    return (
        f"| {run.name}{frozen} | {run.world} | {result['attentions']} | {result['split']} | "
        f"{result['gathers']}{reduces} | " + " | ".join(shown) + " |"
    )


def _precisions(results: Results, strategy: str) -> str:
    """One strategy in every precision in which it was run; nothing if that is float32 alone."""
    inferred = {run: r for run, r in sorted(results.items()) if run.plan == "inferred"}
    has = {run: r for run, r in inferred.items() if whole(r) or strategy in r}
    given = {run.precision for run, r in has.items() if strategy in r} - {WIDE}
    if not given:
        return ""
    columns = [WIDE, *sorted(given, reverse=True)]
    said = "; ".join(
        f"{c}: {_said({run: r for run, r in has.items() if run.precision == c}, [strategy])}"
        for c in columns
    )
    rows = [
        f"| {name} | " + " | ".join(_in_precision(has, name, c, strategy) for c in columns) + " |"
        for name in sorted({run.name for run in has})
    ]
    head = f"| class | {' | '.join(columns)} |\n|---{'|---' * len(columns)}|"
    return f"### {strategy}\n\n**{said}.**\n\n{head}\n" + "\n".join(rows)


def _in_precision(results: Results, name: str, precision: str, strategy: str) -> str:
    wide, own = (results.get(Run(name, "inferred", 2, p)) for p in (WIDE, precision))
    if own is None:
        return ""
    if kind := whole(own):
        same = precision != WIDE and wide is not None and whole(wide) == kind
        return f"{kind}, as in {WIDE}" if same else f"{kind}: {_short(own[kind])}"
    number = "{network:.0e}" if precision == WIDE else "{ranks:.0e} of {bound:.0e}"
    return _cell(own, strategy, number)


def _cell(result: Mapping[str, Any], strategy: str, number: str) -> str:
    if strategy not in result:
        return ""
    own = result[strategy]
    if own["status"] == "proven":
        return f"proven, {number.format(**own)}"
    return f"{own['status']}: {_short(own['reason'])}"


def _short(reason: str) -> str:
    """The reason's beginning, without the paths of this machine."""
    short = re.sub(r"/\S*/(site-packages|lib/python[^/]*)/", "", reason.replace("|", "\\|"))
    return short if len(short) <= LONGEST else f"{short[:LONGEST]} ..."


PAGE = """# Which models convert

Generated by `python -m benchmarks.models`; do not edit by hand. Every transformer class in
diffusers' `models/transformers` ({run} of {known}), in a small configuration with random weights
(`benchmarks/zoo.py`), float32 unless said otherwise. *Proven* means that TensorRT built every
rank's engine and that both the program and the networks, all ranks in lockstep, agree with the
dense model; the number is the networks' largest relative error. No engine was executed.

*split*: attentions whose keys are sharded, so that the strategy does its work; the others read
whole keys (a text, say) and need no communication. *gathers*: tensors gathered outside attention,
the final output among them. A star marks classes whose masks or indices decide how many tokens
there are; these arguments are frozen (`--freeze`).

## The plan inferred

**{said}.**

| class | world | attentions | split | gathers | {strategies} |
|---|---|---|---|---|---|---|---|
{rows}

## The plan that the class declares

All classes with a `_cp_plan`. **{declared_said}.**

| class | world | attentions | split | gathers | {strategies} |
|---|---|---|---|---|---|---|---|
{declared_rows}

## In half precision

The plan inferred, world 2. Numbers of fp16 and bf16 are what the networks lose in that precision,
of what they may lose (twice what the dense model loses itself). Where that is near 1, the dense
model is another one in that precision, and only the comparison in float32 arithmetic, which every
row has passed as well, proves anything: FLUX.1 and FLUX.2 multiply their guidance by 1000, and
3500 is 3504 in bfloat16, of which a cosine is taken.

{precisions}
"""
