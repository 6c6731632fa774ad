"""Every transformer class of diffusers x meshes: proven, refused, or failed.

    python -m benchmarks.meshes [--meshes cfg=2,tp=2+cp=2] [CLASS ...]

The classes are those of :mod:`.zoo`, float32, the plan inferred, Ulysses where ranks share the
sequence. The example has one row, which is repeated for every guidance branch as ``--cfg`` does.
Proven is the program, all ranks in lockstep against the dense model, with the controls of every
axis; no engine is built. A process measures and traces a class once for all meshes with as many
branches. Results are kept by class and mesh, so that a run replaces its own cells only.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .classes import in_process
from .meshes_page import page

TIMEOUT = 600
MESHES = "cfg=2,cfg=2+cp=2,tp=2,tp=2+cp=2"
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
        for meshes in _alike(options.meshes.split(",")):
            found = in_process(name, meshes, _begun, _proven, timeout=TIMEOUT, first="diffusers")
            known.setdefault(name, {}).update(found)
            options.results.write_text(json.dumps(known, indent=1, sort_keys=True))
            for mesh, result in found.items():
                print(name, mesh, json.dumps(result)[:300], flush=True)
    options.out.write_text(page(known, len(classes())))


def _alike(meshes: Iterable[str]) -> list[list[str]]:
    """The meshes in groups with as many branches."""
    groups: dict[int, list[str]] = {}
    for mesh in meshes:
        groups.setdefault(_sizes(mesh)["cfg"], []).append(mesh)
    return list(groups.values())


def _sizes(mesh: str) -> dict[str, int]:
    from cp_convert.mesh import AXES, Mesh

    return dict.fromkeys(AXES, 1) | Mesh.sizes(mesh.replace("+", ","))


def _begun(name: str, meshes: Sequence[str]) -> Any:
    from benchmarks.models import Run, _loaded
    from cp_convert import stages
    from cp_convert.cache.store import Cache
    from cp_convert.model.branches import branched
    from cp_convert.progress import Clock, Progress

    cfg = _sizes(meshes[0])["cfg"]
    loaded = _loaded(Run(name, "inferred", cfg), "ulysses", Path())
    inputs, branches = branched(
        loaded.source.inputs, loaded.source.module, cfg,
        kept=UNBATCHED.get(name, ()), frozen=loaded.source.freeze,
    )  # fmt: skip
    source = replace(loaded.source, inputs=inputs, branches=branches)
    job = replace(loaded.job, cfg=cfg, proof="program")
    asked = replace(loaded, job=job, source=source)
    return stages.begin(asked, None, Cache(None), Clock(Progress()))


def _proven(begun: Any, mesh: str) -> dict[str, Any]:
    from cp_convert import stages
    from cp_convert.progress import Clock, Progress

    loaded, sizes = begun.loaded, _sizes(mesh)
    world = sizes["cfg"] * sizes["cp"] * sizes["tp"]
    job = replace(loaded.job, world=world, cfg=sizes["cfg"], tp=sizes["tp"])
    asked = replace(begun, loaded=replace(loaded, job=job))
    ready = stages.prove_program(asked, Clock(Progress()))
    proof, guided, divided = ready.proof, ready.rewritten.guided, ready.rewritten.divided
    assert proof is not None
    return {
        "error": max(error.max for error in proof.algebra),
        "controls": {axis: error.max for axis, error in proof.controls.items()},
        "gathers": sum(move.kind == "gather" for move in guided.moves),
        "held": 1 - divided.spared / loaded.source.bytes,
        "whole": [kept.reason for kept in divided.kept],
    }


if __name__ == "__main__":
    main()
