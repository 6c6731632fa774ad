"""Every transformer class of diffusers x every strategy: built and proven, refused, or failed.

    python -m benchmarks.models [--world 2] [--jobs 2] [--out docs/models.md] [CLASS ...]

The plan is inferred for all of them (``--plan auto``), also where the class has one. Each class
runs in a process of its own; engines are really built, every rank's, and thrown away. Precision is
float32, so that nothing hides behind rounding.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

TIMEOUT = 900


def main() -> None:
    """Run the classes and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("classes", nargs="*")
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/models.json"))
    parser.add_argument("--out", type=Path, default=Path("docs/models.md"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one, options.world)))
        return
    from benchmarks.zoo import classes

    names = options.classes or list(classes())
    known = json.loads(options.results.read_text()) if options.results.exists() else {}
    with ThreadPoolExecutor(options.jobs) as pool:
        for name, result in zip(
            names, pool.map(lambda n: run(n, options.world), names), strict=True
        ):
            known[name] = result
            options.results.write_text(json.dumps(known, indent=1, sort_keys=True))
            print(name, json.dumps(result)[:300], flush=True)
    options.out.write_text(table(known, options.world))


def run(name: str, world: int) -> dict[str, Any]:
    """One class in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.models", "--one", name, "--world", str(world)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"took longer than {TIMEOUT} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return {"failed": (done.stderr.strip().splitlines() or ["no output"])[-1][:200]}
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def one(name: str, world: int) -> dict[str, Any]:
    """Trace once; then every strategy to engines and a proof."""
    import torch

    from benchmarks import zoo
    from cp_convert.backends import select
    from cp_convert.decompose import decompose
    from cp_convert.engine.build import prepare
    from cp_convert.engine.runtime import decompositions
    from cp_convert.errors import ConvertError
    from cp_convert.job import STRATEGY_NAMES
    from cp_convert.mesh import Mesh
    from cp_convert.prove import measure
    from cp_convert.shard import shard
    from cp_convert.trace import trace

    torch.set_num_threads(1)
    prepare(select("auto", ()))
    if name in zoo.UNSUITABLE:
        return {"refused": zoo.UNSUITABLE[name]}
    axis = Mesh.line(world).whole
    try:
        module, inputs = zoo.build(name), zoo.example_inputs(name)
        truth = measure(module, inputs)
        traced, _ = trace(module, inputs, {}, zoo.CASES[name].freeze)
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
    for strategy in STRATEGY_NAMES:
        result[strategy] = _converted(truth, inputs, dense, sharded, strategy, axis)
    return result


def _converted(
    truth: Any, inputs: Any, dense: Any, sharded: Any, strategy: str, axis: Any
) -> dict[str, Any]:
    from cp_convert.engine.build import build
    from cp_convert.engine.lower import lower, specialise
    from cp_convert.engine.readback import constants_of
    from cp_convert.engine.runtime import decompositions
    from cp_convert.errors import CannotConvert, ConvertError, ProofFailed
    from cp_convert.prove import Stages, flat_inputs, prove, prove_networks
    from cp_convert.rewrite import rewrite
    from cp_convert.strategies import CONTROL, STRATEGIES

    table, start = decompositions(), time.perf_counter()
    result: dict[str, Any] = {}
    try:
        rewritten, outcomes = rewrite(sharded, STRATEGIES[strategy], strategy, axis, table)
        control, _ = rewrite(sharded, CONTROL, "control", axis, table)
        lowered = lower(rewritten)
        sites = [(outcome.site, outcome.node) for outcome in outcomes]
        stages = Stages(dense, control, rewritten, lowered, sites, axis.size)
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


def table(results: dict[str, Any], world: int) -> str:
    """The results as a page of the documentation."""
    from benchmarks.zoo import classes
    from cp_convert.job import STRATEGY_NAMES

    rows, cells = [], Counter[str]()
    for name, result in sorted(results.items()):
        if "refused" in result or "failed" in result:
            kind = "refused" if "refused" in result else "failed"
            cells[kind] += len(STRATEGY_NAMES)
            rows.append(f"| {name} | | | | {kind}: {_short(result[kind])} | | |")
            continue
        shown = []
        for strategy in STRATEGY_NAMES:
            own = result[strategy]
            cells[own["status"]] += 1
            shown.append(
                f"proven, {own['network']:.0e}" if own["status"] == "proven"
                else f"{own['status']}: {_short(own['reason'])}"
            )  # fmt: skip
        frozen = " *" if result["freeze"] else ""
        other = f"{result['gathers']}" + (
            f" + {result['all_reduces']} all-reduce" if result["all_reduces"] else ""
        )
        rows.append(
            f"| {name}{frozen} | {result['attentions']} | {result['split']} | {other} | "
            + " | ".join(shown) + " |"
        )  # fmt: skip
    total = sum(cells.values())
    said = ", ".join(f"{cells[kind]} {kind}" for kind in ("proven", "refused", "failed"))
    return PAGE.format(
        world=world, total=total, said=said, classes=len(results), known=len(classes()),
        strategies=" | ".join(STRATEGY_NAMES), rows="\n".join(rows),
    )  # fmt: skip


def _short(reason: str) -> str:
    path = reason.replace("|", "\\|")
    for part in path.split():
        if "/diffusers/" in part:
            path = path.replace(part, "diffusers/" + part.split("/diffusers/", 1)[1])
    return path


PAGE = """# Which models convert

Generated by `python -m benchmarks.models`; do not edit by hand. {classes} of the {known}
transformer classes in diffusers' `models/transformers` were run for this page; the others were not
run with this version. Each in a small configuration with random weights (`benchmarks/zoo.py`),
world {world}, float32, the plan inferred. *Proven* means that TensorRT built every rank's
engine and that both the program and the networks, all ranks in lockstep, agree with the dense
model; the number is the networks' largest relative error. No engine was executed.

**{total} conversions: {said}.**

*split*: attentions whose keys are sharded, so that the strategy does its work; the others read
whole keys (a text, say) and need no communication. *gathers*: tensors gathered outside attention,
the final output among them. A star marks classes whose masks or indices decide how many tokens
there are; these arguments are frozen (`--freeze`).

| class | attentions | split | gathers | {strategies} |
|---|---|---|---|---|---|---|
{rows}
"""


if __name__ == "__main__":
    main()
