"""load -> trace -> rewrite -> lower -> prove -> build -> emit."""

from __future__ import annotations

from .backends import Backend
from .bundle import check_space, check_target, engine_name, publish, staged
from .describe import describe
from .engine.build import build, prepare
from .engine.lower import lower, specialise
from .job import Job
from .load import load
from .manifest import Manifest
from .mesh import Mesh
from .progress import Clock, Progress
from .prove import Stages, prove
from .rewrite import rewrite
from .strategies import STRATEGIES
from .trace import trace


def convert(job: Job, backend: Backend, progress: Progress) -> Manifest:
    """Convert the job's model into one engine per rank; docs/pipeline.md tells the stages.

    Everything up to ``build`` happens once for all ranks.

    Raises:
        ConvertError: see :mod:`cp_convert.errors`; nothing has been written then.
    """
    mesh, clock = Mesh.line(job.world), Clock(progress)
    check_target(job.out, force=job.force)
    workarounds = prepare(backend)
    with staged(job.out) as folder:
        with clock.stage("load"):
            source = load(job)
            check_space(job.out, mesh.world * source.bytes)
        with clock.stage("trace"):
            traced, applied = trace(source.module, source.inputs, source.plan, mesh.whole)
        with clock.stage("rewrite"):
            strategy = STRATEGIES[job.strategy]
            rewritten, outcomes = rewrite(traced, strategy, job.strategy, mesh.whole)
        with clock.stage("lower"):
            lowered = lower(rewritten)
        proof = None
        if job.proof:
            with clock.stage("prove"):
                sites = [(outcome.site, outcome.node) for outcome in outcomes]
                stages = Stages(traced, rewritten, lowered, sites, mesh.world)
                proof = prove(source.module, source.inputs, stages, rtol=job.rtol)
        engines = []
        with clock.stage("build", total=mesh.world):
            for rank in mesh.ranks:
                path = folder / engine_name(rank)
                program = specialise(lowered, rank)
                engines.append(build(program, rank, path, job.compute_capabilities))
                progress.step("build")
        manifest = describe(
            job,
            source,
            traced,
            applied,
            outcomes,
            proof,
            engines,
            backend,
            workarounds,
            clock.seconds,
        )
        publish(folder, job.out, manifest)
    return manifest
