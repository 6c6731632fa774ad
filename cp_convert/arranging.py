"""A captured program to the ranks' mesh: the job's own, or for ``auto`` the one that is chosen.

What comes in has come as far as no strategy matters; what goes out has its ranks on a mesh, and a
job that says which mesh and which strategy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from .advise.choosing import Choice, Terms, cheapest, shared_by
from .advise.hardware import read as read_hardware
from .ir.records import Captured, Loaded
from .ir.shares import Declared
from .ir.source import Branches
from .job import AUTO, Job
from .mesh import GUIDANCE, TENSOR, Mesh
from .model.branches import rows_of
from .progress import Clock
from .releases import release_of
from .sharding.others import Arranged, along_others
from .sharding.shard import shard


def arranged(
    loaded: Loaded, captured: Captured, table: Mapping[Any, Any], clock: Clock
) -> tuple[Loaded, Arranged]:
    """Split guidance branches, weights and the sequence, by the job's mesh or by the best one.

    Args:
        loaded: the model and what was asked for.
        captured: its program.
        table: see :func:`cp_convert.strategies.rewrite.rewrite`.
        clock: times the stages, and is told what ``auto`` takes.

    Returns:
        the model with a job that leaves nothing open, and the program on its mesh.

    Raises:
        CannotShard: an axis has nothing to split, or nothing that can be chosen fits.
    """
    job, own, dense = loaded.job, loaded.source.groups.values(), captured.dense
    plan = loaded.source.declared(captured.signature.parameters)
    if job.strategy == AUTO:
        with clock.stage("choose"):
            terms = _terms(loaded, table, plan)
            choice = cheapest(dense, _rounds(loaded, groups=terms.groups), terms, tuple(own))
        clock.progress.note(choice.why(terms.hardware, job.tp))
        return _decided(loaded, choice), choice.arranged
    mesh, axis = job.mesh, replace(job.mesh.sequence(own), unit=job.unit)
    with clock.stage("split") if mesh.others else nullcontext():
        guided, divided = along_others(dense, mesh, plan)
    with clock.stage("shard"):
        sharded = shard(divided.program, axis)
    return loaded, Arranged(mesh, axis, guided, divided, sharded)


def _terms(loaded: Loaded, table: Mapping[Any, Any], plan: Mapping[str, Declared]) -> Terms:
    job, backend = loaded.job, loaded.backend
    groups = job.unsafe_groups or release_of(backend.name, backend.version).groups
    hardware = read_hardware(job.hardware)
    return Terms(hardware, loaded.source.bytes, table, groups, job.eight, plan)


def _rounds(loaded: Loaded, *, groups: bool) -> Iterator[list[Mesh]]:
    """Meshes to choose from: the job's, and those with the axes that it leaves open.

    A mesh that shares weights among more ranks is in a later round: that costs an all-reduce for
    every pair of matrices, and is for models that do not fit otherwise.
    """
    job, open_axes = loaded.job, _open(loaded)
    sizes = [job.tp, *(shared_by(job.mesh) if TENSOR in open_axes else ())]
    branches = [job.cfg, *([2] if GUIDANCE in open_axes and _rows(loaded) % 2 == 0 else ())]
    for tp in sizes:
        every = [Mesh.of(job.world, n, tp) for n in branches if job.world % (n * tp) == 0]
        yield [mesh for mesh in every if groups or mesh == job.mesh or not mesh.names_groups]


def _open(loaded: Loaded) -> tuple[str, ...]:
    """The axes that may be chosen; none where codes, groups or variants go with one mesh only."""
    job, source = loaded.job, loaded.source
    is_fixed = job.exchange or job.quantize or source.codes or source.groups or source.others
    if is_fixed:
        return ()
    whole = {TENSOR} if job.layout == "shared" else set()
    return tuple(name for name in job.open_axes if name not in whole)


def _rows(loaded: Loaded) -> int:
    """Of the batch; 1 where there is none."""
    source = loaded.source
    return rows_of(source.inputs, source.module, source.freeze) or 1


def _decided(loaded: Loaded, choice: Choice) -> Loaded:
    mesh, source = choice.arranged.mesh, loaded.source
    job: Job = replace(
        loaded.job,
        strategy=choice.strategy,
        ulysses=choice.ulysses,
        cfg=mesh.size(GUIDANCE),
        tp=mesh.size(TENSOR),
        open_axes=(),
    )
    if job.cfg != loaded.job.cfg:
        source = replace(source, branches=Branches(_rows(loaded)))
    return replace(loaded, job=job, source=source)
