"""Every transformer class of diffusers x meshes: proven, refused, or failed.

    python -m benchmarks.meshes [--meshes cfg=2,cfg=2+cp=2] [CLASS ...]

The classes are those of :mod:`.zoo`, float32, the plan inferred. The example has one row, which is
repeated for every guidance branch as ``--cfg`` does. Proven is the program, all ranks in lockstep
against the dense model, with the controls of every axis; no engine is built. Each run is a process
of its own. Results are kept by class and mesh, so that a run replaces its own row only.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

TIMEOUT = 300
MESHES = "cfg=2"
UNBATCHED = {"CosmosTransformer3DModel": ("padding_mask",)}
"""Arguments that have one row whatever the batch is, by class."""


def main() -> None:
    """Run the classes and write the table."""
    from benchmarks.zoo import classes

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("classes", nargs="*")
    parser.add_argument("--meshes", default=MESHES, help="axes joined by +, meshes by commas")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/meshes.json"))
    parser.add_argument("--out", type=Path, default=Path("docs/meshes.md"))
    options = parser.parse_args()
    known = json.loads(options.results.read_text()) if options.results.exists() else {}
    for name in options.classes or classes():
        for mesh in options.meshes.split(","):
            result = in_process(name, mesh)
            known.setdefault(name, {})[mesh] = result
            options.results.write_text(json.dumps(known, indent=1, sort_keys=True))
            print(name, mesh, json.dumps(result)[:300], flush=True)
    options.out.write_text(page(known))


def in_process(name: str, mesh: str) -> dict[str, Any]:
    """One run in a process of its own, forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.zoo", "diffusers", "cp_convert.stages"])
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(writer, name, mesh))
    process.start()
    writer.close()
    try:
        found: dict[str, Any] = (
            reader.recv() if reader.poll(TIMEOUT) else {"failed": f"took longer than {TIMEOUT} s"}
        )
    except EOFError:
        process.join()
        found = {"failed": f"ended with exit code {process.exitcode}"}
    process.kill()
    return found


def _answer(writer: Any, name: str, mesh: str) -> None:
    writer.send(one(name, mesh))


def one(name: str, mesh: str) -> dict[str, Any]:
    """What became of the class ``name`` on ``mesh``."""
    import torch

    from cp_convert.errors import CannotConvert, ConvertError, UsageError

    torch.set_num_threads(1)
    try:
        return {"proven": _proven(name, mesh)}
    except (CannotConvert, UsageError) as error:
        return {"refused": _told(error)}
    except ConvertError as error:
        return {"failed": _told(error)}


def _proven(name: str, mesh: str) -> dict[str, Any]:
    from benchmarks.models import Run, _loaded
    from cp_convert import stages
    from cp_convert.cache.store import Cache
    from cp_convert.mesh import Mesh
    from cp_convert.model.branches import branched
    from cp_convert.progress import Clock, Progress

    sizes = Mesh.sizes(mesh.replace("+", ","))
    cfg, tp = sizes.get("cfg", 1), sizes.get("tp", 1)
    world = cfg * tp * sizes.get("cp", 1)
    loaded = _loaded(Run(name, "inferred", world), "ulysses", Path())
    inputs, branches = branched(
        loaded.source.inputs, loaded.source.module, cfg,
        kept=UNBATCHED.get(name, ()), frozen=loaded.source.freeze,
    )  # fmt: skip
    source = replace(loaded.source, inputs=inputs, branches=branches)
    job = replace(loaded.job, cfg=cfg, tp=tp, proof="program")
    clock = Clock(Progress())
    begun = stages.begin(replace(loaded, job=job, source=source), None, Cache(None), clock)
    ready = stages.prove_program(begun, clock)
    rewritten, proof = ready.rewritten, ready.proof
    assert proof is not None
    moves = Counter(m.kind for m in rewritten.guided.moves)
    return {
        "error": max(error.max for error in proof.algebra),
        "controls": {axis: error.max for axis, error in proof.controls.items()},
        "inputs": list(rewritten.guided.inputs),
        "gathers": moves["gather"],
    }


def _told(error: Any) -> str:
    where = f" [{error.where}]" if error.where else ""
    text = re.sub(r" at 0x\w+|/\S*site-packages/", "", f"{error}{where}")  # this machine's
    return " ".join(text.split())[:400]


def page(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The results as a page of the documentation."""
    from benchmarks.zoo import classes

    meshes = list(dict.fromkeys(mesh for row in results.values() for mesh in row))
    parts = []
    for mesh in meshes:
        rows = {name: row[mesh] for name, row in sorted(results.items()) if mesh in row}
        kinds = Counter(next(iter(result)) for result in rows.values())
        said = ", ".join(f"{kinds[kind]} {kind}" for kind in ("proven", "refused", "failed"))
        said = f"{len(rows)} of {len(classes())} classes: {said}"
        table = "\n".join(_row(name, result) for name, result in rows.items())
        parts.append(f"## {mesh.replace('+', ', ')}\n\n**{said}.**\n\n{_HEAD}\n{table}\n")
    return _PAGE + "\n".join(parts)


_HEAD = "| class | proof | without the others' branches | gathers |\n|---|---|---|---|"
_PAGE = """# Which models share guidance branches

Generated by `python -m benchmarks.meshes`; do not edit by hand. The classes of
[models.md](models.md), small, float32, random weights. The example has one row, which `--cfg`
repeats for every branch. *Proven*: the program, all ranks in lockstep, against the dense model,
with its largest relative error; beside it what is lost when every rank keeps its own branch, and
how often something is gathered along `cfg` (the output: 1).

"""


def _row(name: str, result: Mapping[str, Any]) -> str:
    kind, told = next(iter(result.items()))
    if kind != "proven":
        text = str(told).replace("|", "\\|")
        return f"| {name} | {kind}: {text[:240]} | | |"
    control = ", ".join(f"{error:.0e}" for error in told["controls"].values())
    return f"| {name} | proven, {told['error']:.0e} | {control} | {told['gathers']} |"


if __name__ == "__main__":
    main()
