"""Every transformer class of diffusers x every strategy: built and proven, refused, or failed.

    python -m benchmarks.models [--jobs 2] [--out docs/models.md] [CLASS ...]

The plan is inferred for all of them, also where the class has one, at world 2; classes that declare
a ``_cp_plan`` are run with that as well, at worlds 2 and 4. Each run is a process of its own;
engines are really built, every rank's, and thrown away. Precision is float32, so that nothing hides
behind rounding.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMEOUT = 900
LONGEST = 240


@dataclass(frozen=True, order=True)
class Run:
    """One class with one plan at one world."""

    name: str
    plan: str
    world: int

    @property
    def key(self) -> str:
        """How the results name it."""
        return f"{self.name} {self.plan} {self.world}"

    @classmethod
    def named(cls, key: str) -> Run:
        """The inverse of :attr:`key`."""
        name, plan, world = key.split()
        return cls(name, plan, int(world))


def main() -> None:
    """Run the classes and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("classes", nargs="*")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/models.json"))
    parser.add_argument("--out", type=Path, default=Path("docs/models.md"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(Run.named(options.one))))
        return
    from benchmarks.zoo import classes

    found = classes()
    runs = [Run(name, "inferred", 2) for name in options.classes or found]
    runs += [
        Run(name, "declared", world)
        for name in options.classes or found
        for world in (2, 4)
        if getattr(found[name], "_cp_plan", None)
    ]
    known = json.loads(options.results.read_text()) if options.results.exists() else {}
    with ThreadPoolExecutor(options.jobs) as pool:
        for run, result in zip(runs, pool.map(in_process, runs), strict=True):
            known[run.key] = result
            options.results.write_text(json.dumps(known, indent=1, sort_keys=True))
            print(run.key, json.dumps(result)[:300], flush=True)
    options.out.write_text(page({Run.named(key): result for key, result in known.items()}))


def in_process(run: Run) -> dict[str, Any]:
    """One run in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.models", "--one", run.key]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"took longer than {TIMEOUT} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return {"failed": (done.stderr.strip().splitlines() or ["no output"])[-1][:200]}
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def one(run: Run) -> dict[str, Any]:
    """Trace once; then every strategy to engines and a proof."""
    import torch

    from benchmarks import zoo
    from cp_convert.backends import select
    from cp_convert.capture.decompose import decompose
    from cp_convert.capture.trace import trace
    from cp_convert.engine.build import prepare
    from cp_convert.errors import ConvertError
    from cp_convert.mesh import Mesh
    from cp_convert.prove import measure
    from cp_convert.sharding.shard import shard
    from cp_convert.strategies import STRATEGIES
    from cp_convert.trt.libraries import decompositions

    torch.set_num_threads(1)
    prepare(select("auto", ()))
    name, axis = run.name, Mesh.line(run.world).whole
    try:
        module, inputs = zoo.build(name), zoo.example_inputs(name)
        truth = measure(module, inputs)
        plan = getattr(module, "_cp_plan", {}) if run.plan == "declared" else {}
        traced, _ = trace(module, inputs, plan, zoo.CASES[name].freeze)
        dense = decompose(traced, decompositions())
        sharded = shard(dense, axis)
    except ConvertError as error:
        return {"refused": _told(error)}
    moves = Counter(move.kind for move in sharded.moves)
    result: dict[str, Any] = {
        "parameters": sum(p.numel() for p in module.parameters()),
        "attentions": len(list(dense.graph_module.graph.find_nodes(
            op="call_function", target=torch.ops.cp.attention.default
        ))),
        "split": len(sharded.places),
        "gathers": moves["gather"],
        "all_reduces": moves["all_reduce"],
        "freeze": list(zoo.CASES[name].freeze),
    }  # fmt: skip
    for strategy in STRATEGIES:
        result[strategy] = _converted(truth, inputs, dense, sharded, strategy, axis)
    return result


def _converted(
    truth: Any, inputs: Any, dense: Any, sharded: Any, strategy: str, axis: Any
) -> dict[str, Any]:
    from cp_convert.engine.build import build
    from cp_convert.engine.lower import lower
    from cp_convert.engine.readback import constants_of
    from cp_convert.engine.specialise import specialise
    from cp_convert.errors import CannotConvert, ConvertError, ProofFailed
    from cp_convert.prove import Stages, flat_inputs, prove, prove_networks
    from cp_convert.strategies import CONTROL, STRATEGIES
    from cp_convert.strategies.rewrite import rewrite
    from cp_convert.trt.libraries import decompositions

    table, start = decompositions(), time.perf_counter()
    result: dict[str, Any] = {}
    try:
        rewritten, outcomes = rewrite(sharded, STRATEGIES[strategy], strategy, axis, table)
        control, _ = rewrite(sharded, CONTROL, "control", axis, table)
        lowered = lower(rewritten)
        sites = [(outcome.site, outcome.node) for outcome in outcomes]
        stages = Stages(dense, control, rewritten, lowered, sites, axis)
        proof = prove(truth, inputs, stages)
        result["error"] = max(error.max for error in proof.algebra)
        networks: list[Any] = []
        with tempfile.TemporaryDirectory() as folder:
            for rank in range(axis.size):
                known = [*lowered.state.values(), *constants_of(networks)]
                path = Path(folder, f"rank{rank}.engine")
                engine = build(specialise(lowered, rank), rank, path, (), known=known)
                networks.append(engine.network)
        network = prove_networks(networks, flat_inputs(lowered, inputs), proof, lowered)
        result["network"] = max(error.max for error in network.algebra)
        result["status"] = "proven"
    except (CannotConvert, ProofFailed) as error:
        kind = "refused" if isinstance(error, CannotConvert) else "failed"
        result |= {"status": kind, "reason": _told(error)}
    except ConvertError as error:
        result |= {"status": "failed", "reason": _told(error)}
    result["seconds"] = round(time.perf_counter() - start, 1)
    return result


def _told(error: Any) -> str:
    where = f" [{error.where}]" if error.where else ""
    return " ".join(f"{error}{where}".split())[:400]


def page(results: dict[Run, dict[str, Any]]) -> str:
    """The results as a page of the documentation."""
    from benchmarks.zoo import classes
    from cp_convert.strategies import STRATEGIES

    inferred = {run: r for run, r in sorted(results.items()) if run.plan == "inferred"}
    declared = {run: r for run, r in sorted(results.items()) if run.plan == "declared"}
    return PAGE.format(
        run=len(inferred), known=len(classes()), strategies=" | ".join(STRATEGIES),
        said=_said(inferred), rows="\n".join(_row(run, r) for run, r in inferred.items()),
        declared_said=_said(declared),
        declared_rows="\n".join(_row(run, r) for run, r in declared.items()),
    )  # fmt: skip


def _said(results: dict[Run, dict[str, Any]]) -> str:
    from cp_convert.strategies import STRATEGIES

    cells: Counter[str] = Counter()
    for result in results.values():
        whole = next((kind for kind in ("refused", "failed") if kind in result), None)
        cells.update(whole or result[strategy]["status"] for strategy in STRATEGIES)
    said = ", ".join(f"{cells[kind]} {kind}" for kind in ("proven", "refused", "failed"))
    return f"{sum(cells.values())} conversions: {said}"


def _row(run: Run, result: dict[str, Any]) -> str:
    from cp_convert.strategies import STRATEGIES

    for kind in ("refused", "failed"):
        if kind in result:
            return f"| {run.name} | {run.world} | | | | {kind}: {_short(result[kind])} | | |"
    shown = []
    for strategy in STRATEGIES:
        own = result[strategy]
        shown.append(
            f"proven, {own['network']:.0e}" if own["status"] == "proven"
            else f"{own['status']}: {_short(own['reason'])}"
        )  # fmt: skip
    frozen = " *" if result["freeze"] else ""
    reduces = f" + {result['all_reduces']} all-reduce" if result["all_reduces"] else ""
    return (
        f"| {run.name}{frozen} | {run.world} | {result['attentions']} | {result['split']} | "
        f"{result['gathers']}{reduces} | " + " | ".join(shown) + " |"
    )


def _short(reason: str) -> str:
    """The reason's beginning, without the paths of this machine."""
    short = re.sub(r"/\S*/(site-packages|lib/python[^/]*)/", "", reason.replace("|", "\\|"))
    return short if len(short) <= LONGEST else f"{short[:LONGEST]} ..."


PAGE = """# Which models convert

Generated by `python -m benchmarks.models`; do not edit by hand. Every transformer class in
diffusers' `models/transformers` ({run} of {known}), in a small configuration with random weights
(`benchmarks/zoo.py`), float32. *Proven* means that TensorRT built every rank's engine and that both
the program and the networks, all ranks in lockstep, agree with the dense model; the number is the
networks' largest relative error. No engine was executed.

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
"""


if __name__ == "__main__":
    main()
