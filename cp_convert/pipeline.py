"""load -> measure -> trace -> decompose -> shard -> rewrite -> lower -> prove -> build -> emit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from torch import Tensor

from .backends import Backend
from .bundle import check_space, check_target, engine_name, publish, staged
from .cache import Cache, key_of, place
from .capture import capture
from .describe import describe
from .engine.build import Engine, prepare
from .engine.lower import lower
from .engine.pool import Pool
from .engine.runtime import decompositions
from .engine.worker import Task, answered
from .errors import CannotShard
from .external import Placing, to_write
from .fingerprint import source_key, tool_key
from .hardware import read as read_hardware
from .job import AUTO, FUSED, Job
from .load import Source, load
from .manifest import Manifest
from .mesh import Mesh
from .packed import pack
from .planning import cheapest
from .program import Lowered
from .progress import Clock, Progress
from .prove import (
    Proof,
    Stages,
    check_device,
    flat_inputs,
    measure,
    measure_ranks,
    prove,
    prove_networks,
)
from .rewrite import rewrite
from .shard import shard
from .shared import by_scatter, why_not_shared
from .strategies import CONTROL, choose

_ENGINE: Final = "engine"
_ANSWER: Final = "answer.pickle"


def convert(job: Job, backend: Backend, progress: Progress) -> Manifest:
    """Convert the job's model into one engine per rank; docs/pipeline.md tells the stages.

    Everything up to ``build`` happens once for all ranks.

    Raises:
        ConvertError: see :mod:`cp_convert.errors`; nothing has been written then.
    """
    mesh, clock, cache = Mesh.line(job.world), Clock(progress), Cache(job.cache)
    device = check_device(job.proof_device)
    check_target(job.out, force=job.force)
    workarounds = prepare(backend, fused=job.strategy == FUSED)
    with (
        staged(job.out) as folder,
        Pool(job.workers, job.memory_limit) as pool,  # workers end before their folder does
        ExitStack() as work,
    ):
        with clock.stage("load"):
            source = load(job)
            check_space(job.out, _needed(job, source))
            axis = mesh.free(source.groups.values())
            tool = tool_key(backend.version, backend.torch_tensorrt_version)
            trace_key = source_key(source, tool) if cache.folder is not None else None
            placing = work.enter_context(_placing(job, source, folder, cache))
        truth = None
        if job.proof != "none" and not source.groups:
            with clock.stage("measure"):
                truth = measure(source.module, source.inputs, device)
        table = decompositions()
        captured = capture(source, table, cache, trace_key, clock)
        dense = captured.dense
        if job.proof != "none" and source.groups:
            with clock.stage("measure"):
                truth = measure_ranks(dense, source.inputs, mesh.world, device)
        with clock.stage("shard"):
            sharded = shard(dense, axis)
        if job.strategy == AUTO:
            with clock.stage("choose"):
                hardware = read_hardware(job.hardware)
                name, factor = cheapest(sharded, axis, hardware, source.bytes, table)
                job = replace(job, strategy=name, ulysses=factor)
        with clock.stage("rewrite"):
            strategy = choose(job.strategy, job.ulysses)
            rewritten, outcomes = rewrite(sharded, strategy, job.strategy, axis, table)
        with clock.stage("lower"):
            layout = _layout(job, source, rewritten)
            rewritten = by_scatter(rewritten) if layout == "shared" else rewritten
            lowered = lower(rewritten)
        proof = None
        if truth is not None:
            with clock.stage("prove"):
                sites = [(outcome.site, outcome.node) for outcome in outcomes]
                control, _ = rewrite(sharded, CONTROL, "control", axis, table)
                stages = Stages(dense, control, rewritten, lowered, sites, axis)
                proof = prove(truth, source.inputs, stages, rtol=job.rtol, device=device)
        names = captured.signature.parameters if source.external else {}
        ranks = mesh.ranks if layout == "per-rank" else range(1)
        with clock.stage("build", total=len(ranks)):
            wanted = _Wanted(job, backend, tool, lowered, names, ranks)
            engines, recalled = _built(wanted, pool, cache, folder, progress)
        for rank in mesh.ranks[len(engines) :]:
            twin = engines[0].path.with_name(engine_name(rank))
            place(engines[0].path, twin)
            engines.append(replace(engines[0], rank=rank, path=twin))
        network_proof = None
        if proof is not None and _pays(job, proof, sum(engine.seconds for engine in engines)):
            with clock.stage("replay"):
                networks = [engine.network for engine in engines if engine.network is not None]
                inputs = flat_inputs(lowered, source.inputs)
                inputs |= {name: lowered.state[node] for node, name in names.items()}
                network_proof = prove_networks(networks, inputs, proof, lowered, device)
        with clock.stage("weights"):
            found = placing.weights
            weights = [found[name] for name in names.values()]
        manifest = describe(
            job,
            source,
            lowered,
            captured.signature,
            sharded,
            outcomes,
            axis,
            proof,
            network_proof,
            engines,
            layout,
            weights,
            backend,
            workarounds,
            clock.seconds,
            recalled=recalled,
        )
        publish(folder, job.out, manifest)
    return manifest


def _needed(job: Job, source: Source) -> int:
    """Bytes that weights take in the bundle, at most."""
    if not source.external:
        return job.world * source.bytes
    own = to_write(_parameters(source), source.located, copy=job.copy_weights)
    return sum(tensor.nbytes for tensor in own.values())


def _parameters(source: Source) -> dict[str, Tensor]:
    """What external weights are, tied ones under all their names."""
    return dict(source.module.named_parameters(remove_duplicate=False)) if source.external else {}


def _placing(job: Job, source: Source, folder: Path, cache: Cache) -> Placing:
    """Begins to find, or to write, what external weights are; nothing where they are embedded."""
    copy = job.copy_weights
    return Placing(_parameters(source), source.located, folder, copy=copy, cache=cache)


def _layout(job: Job, source: Source, program: Lowered) -> str:
    """Whether all ranks share one engine; docs/adr/0011 says when that is the default."""
    refusal = why_not_shared(program)
    if job.layout == "shared" and refusal is not None:
        raise CannotShard(
            f"--layout shared: the ranks' engines differ, because {refusal}.",
            hint="--layout per-rank.",
        )
    if job.layout == AUTO:
        return "shared" if source.external and refusal is None else "per-rank"
    return job.layout


@dataclass(frozen=True)
class _Wanted:
    """Engines to be built: all that decides their bytes.

    Attributes:
        job, backend: what was asked for.
        tool: our own code and the versions of others.
        program: of all ranks.
        names: by placeholder, the binding of a parameter that becomes an input.
        ranks: of which.
    """

    job: Job
    backend: Backend
    tool: str
    program: Lowered
    names: Mapping[str, str]
    ranks: Sequence[int]

    def key(self, task: Task, program: str) -> str:
        """For the cache; ``program`` is the digest of the packed one."""
        told = (task.rank, task.backend, task.fused, task.targets, task.external, task.network)
        return key_of((self.tool, program, *told))


def _built(
    wanted: _Wanted, pool: Pool, cache: Cache, folder: Path, progress: Progress
) -> tuple[list[Engine], list[int]]:
    """The engines, and which ranks' were in the cache; networks share the model's weights."""
    job, file = wanted.job, folder / "program.safetensors"
    packed = pack(wanted.program, described=wanted.names, provenance=False)
    digest = packed.digest() if cache.folder is not None else ""
    engines, tasks = [], []
    for rank in wanted.ranks:
        task = Task(
            rank=rank,
            program=file,
            path=folder / engine_name(rank),
            backend=wanted.backend,
            fused=job.strategy == FUSED,
            targets=job.compute_capabilities,
            external=dict(wanted.names),
            network=job.proof in ("auto", "network"),
        )
        entry = cache.find("engines", wanted.key(task, digest))
        if entry is None:
            tasks.append(task)
            continue
        place(entry / _ENGINE, task.path)
        known, _ = answered((entry / _ANSWER).read_bytes(), packed.tensors)
        engines.append(replace(known, path=task.path))
        progress.step("build")
    recalled = [engine.rank for engine in engines]
    if tasks:
        packed.write(file)
    by_rank = {task.rank: task for task in tasks}
    for engine, answer in pool.build(tasks, packed.nbytes, packed.tensors, progress):
        key = wanted.key(by_rank[engine.rank], digest)
        with cache.store("engines", key, {_ENGINE: engine.sha256}) as kept:
            place(engine.path, kept / _ENGINE)
            (kept / _ANSWER).write_bytes(answer)
        engines.append(engine)
        progress.step("build")
    file.unlink(missing_ok=True)
    return sorted(engines, key=lambda engine: engine.rank), recalled


def _pays(job: Job, proof: Proof, build_seconds: float) -> bool:
    """Whether the networks are proven: two runs of all ranks, against the time of building."""
    return job.proof == "network" or (
        job.proof == "auto" and 2 * proof.seconds_a_run <= build_seconds
    )
