"""Every transformer class of diffusers x every strategy: built and proven, refused, or failed.

    python -m benchmarks.models [--precision fp32,fp16,bf16] [--strategies ulysses] [CLASS ...]

The plan is inferred for all of them, also where the class has one, at world 2; classes that declare
a ``_cp_plan`` are run with that as well, at worlds 2 and 4, in float32. Each run is a process of
its own, and goes through the stages of the pipeline; engines are really built, every rank's, and
thrown away. In float32 nothing hides behind rounding; in half precision rounding is what is looked
at. Results are kept by class, plan, world and precision, so that a run replaces its own row only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from .models_page import WIDE, Run, page, whole

TIMEOUT = 900


def main() -> None:
    """Run the classes and write the table."""
    from cp_convert.strategies import STRATEGIES

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("classes", nargs="*")
    parser.add_argument("--precision", default=WIDE, help="fp32, fp16, bf16, joined by commas")
    parser.add_argument("--strategies", default=",".join(STRATEGIES), help="joined by commas")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/models.json"))
    parser.add_argument("--out", type=Path, default=Path("docs/models.md"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    strategies = options.strategies.split(",")
    if options.one:
        print(json.dumps(one(Run.named(options.one), strategies)))
        return
    known = json.loads(options.results.read_text()) if options.results.exists() else {}
    known = {Run.named(key).key: result for key, result in known.items()}
    runs = _wanted(options.classes, options.precision.split(","))
    with ThreadPoolExecutor(options.jobs) as pool:
        results = pool.map(partial(in_process, strategies=strategies), runs)
        for run, result in zip(runs, results, strict=True):
            known[run.key] = _together(known.get(run.key, {}), result)
            options.results.write_text(json.dumps(known, indent=1, sort_keys=True))
            print(run.key, json.dumps(result)[:300], flush=True)
    options.out.write_text(page({Run.named(key): result for key, result in known.items()}))


def _wanted(names: Sequence[str], precisions: Sequence[str]) -> list[Run]:
    from benchmarks.zoo import classes

    found = classes()
    runs = [Run(name, "inferred", 2, p) for p in precisions for name in names or found]
    planned = [name for name in names or found if getattr(found[name], "_cp_plan", None)]
    is_wide = WIDE in precisions
    return runs + [Run(name, "declared", w) for name in planned for w in (2, 4) if is_wide]


def _together(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The new result, with the strategies that only the old one has."""
    if whole(old) or whole(new):
        return dict(new)
    return {**old, **new}


def in_process(run: Run, strategies: Sequence[str]) -> dict[str, Any]:
    """One run in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.models", "--one", run.key]
    command += ["--strategies", ",".join(strategies)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"took longer than {TIMEOUT} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return {"failed": (done.stderr.strip().splitlines() or ["no output"])[-1][:200]}
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def one(run: Run, strategies: Sequence[str]) -> dict[str, Any]:
    """Trace once; then every strategy to engines and a proof."""
    import torch

    from benchmarks import zoo
    from cp_convert.cache.store import Cache
    from cp_convert.engine.pool import Pool
    from cp_convert.errors import ConvertError
    from cp_convert.mesh import Mesh
    from cp_convert.progress import Clock, Progress
    from cp_convert.sharding.shard import shard
    from cp_convert.stages import begin

    torch.set_num_threads(1)
    clock = Clock(Progress())
    with tempfile.TemporaryDirectory() as folder, Pool(1, 1 << 40) as pool:
        loaded = _loaded(run, strategies[0], Path(folder))
        try:
            begun = begin(loaded, None, Cache(None), clock)
            sharded = shard(begun.captured.dense, Mesh.line(run.world).whole)
        except ConvertError as error:
            return {"refused": _told(error)}
        moves = Counter(move.kind for move in sharded.moves)
        graph = begun.captured.dense.graph_module.graph
        result: dict[str, Any] = {
            "parameters": loaded.source.parameters,
            "attentions": len(list(graph.find_nodes(
                op="call_function", target=torch.ops.cp.attention.default
            ))),
            "split": len(sharded.places),
            "gathers": moves["gather"],
            "all_reduces": moves["all_reduce"],
            "freeze": list(zoo.CASES[run.name].freeze),
        }  # fmt: skip
        for strategy in strategies:
            job = replace(loaded.job, strategy=strategy)
            asked = replace(begun, loaded=replace(loaded, job=job))
            result[strategy] = _converted(asked, pool, clock)
    return result


def _loaded(run: Run, strategy: str, folder: Path) -> Any:
    """The class as the pipeline would have it after loading a model file."""
    from benchmarks import zoo
    from cp_convert.backends import select
    from cp_convert.ir.records import Loaded
    from cp_convert.ir.source import Source
    from cp_convert.job import Job
    from cp_convert.model.load import DTYPES, cast_inputs, cast_module

    dtype = DTYPES[run.precision]
    module, inputs = zoo.build(run.name), zoo.example_inputs(run.name)
    cast_module(module, dtype)
    parameters = list(module.parameters())
    source = Source(
        module=module,
        inputs=cast_inputs(inputs, dtype),
        plan=getattr(module, "_cp_plan", {}) if run.plan == "declared" else {},
        freeze=zoo.CASES[run.name].freeze,
        sha256="",
        parameters=sum(p.numel() for p in parameters),
        bytes=sum(p.nbytes for p in parameters),
    )
    job = Job(
        Path(zoo.__file__), strategy, run.world, folder, precision=run.precision, proof="network"
    )
    return Loaded(job, select("auto", ()), source, "", None, folder)


def _converted(begun: Any, pool: Any, clock: Any) -> dict[str, Any]:
    from cp_convert.cache.store import Cache
    from cp_convert.errors import CannotConvert, ConvertError
    from cp_convert.stages import build, check_networks

    start = time.perf_counter()
    try:
        made = check_networks(build(begun, pool, Cache(None), clock), clock)
        result = {"status": "proven", **_errors(made)}
    except CannotConvert as error:
        result = {"status": "refused", "reason": _told(error)}
    except ConvertError as error:
        result = {"status": "failed", "reason": _told(error)}
    return {**result, "seconds": round(time.perf_counter() - start, 1)}


def _errors(made: Any) -> dict[str, float]:
    """The largest of all ranks: with float32 arithmetic, and in the run's precision."""
    proof, networks = made.proof, made.network_proof
    return {
        "error": max(error.max for error in proof.algebra),
        "network": max(error.max for error in networks.algebra),
        "ranks": max(error.max for error in networks.ranks),
        "bound": proof.bound.max,
    }


def _told(error: Any) -> str:
    where = f" [{error.where}]" if error.where else ""
    return " ".join(f"{error}{where}".split())[:400]


if __name__ == "__main__":
    main()
