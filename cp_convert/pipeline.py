"""load -> measure -> trace -> decompose -> shard -> rewrite -> lower -> prove -> build -> emit."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
from torch import Tensor

from .advise.hardware import read as read_hardware
from .backends import Backend
from .bundle.describe import describe
from .bundle.external import Placing, to_write
from .bundle.folder import check_space, check_target, engine_name, publish, staged
from .bundle.manifest import Manifest
from .cache.fingerprint import source_key, tool_key
from .cache.store import Cache, place
from .capture.capture import capture
from .engine.fold_weights import settle, store
from .engine.one_program import by_scatter, why_not_shared
from .errors import CannotShard
from .ir.program import Lowered
from .job import AUTO, FUSED, Job
from .mesh import Mesh
from .model.load import Source, load
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
from .recall import job_key, keep, recall
from .sharding.shard import shard
from .strategies import CONTROL, choose
from .strategies.rewrite import rewrite
from .trt.offline import check_gpu


def convert(job: Job, backend: Backend, progress: Progress) -> Manifest:
    """Convert the job's model into one engine per rank, or take them from the cache.

    Raises:
        ConvertError: see :mod:`cp_convert.errors`; nothing has been written then.
    """
    clock, cache = Clock(progress), Cache(job.cache)
    check_device(job.proof_device)
    check_target(job.out, force=job.force)
    check_gpu(backend, fused=job.strategy == FUSED)
    with staged(job.out) as folder, ExitStack() as work:
        with clock.stage("load"):
            source = load(job)
            check_space(job.out, _needed(job, source))
            tool = tool_key(backend.name, backend.version, backend.torch_tensorrt_version)
            trace_key = source_key(source, tool) if cache.folder is not None else None
            placing = work.enter_context(_placing(job, source, folder, cache))
            key = job_key(job, source, trace_key)
            manifest = recall(cache, key, job, source, placing, folder)
        if manifest is None:
            given = _Given(job, backend, source, tool, trace_key, placing, folder)
            manifest, keys = _made(given, cache, clock, work)
            keep(cache, key, manifest, keys, folder)
        else:
            manifest = msgspec.structs.replace(manifest, timings=dict(clock.seconds))
        publish(folder, job.out, manifest)
    return manifest


@dataclass(frozen=True)
class _Given:
    """What a conversion starts from.

    Attributes:
        job, backend: what was asked for.
        source: the model, loaded.
        tool: key of our own code and of the versions below it.
        trace_key: of the model's trace.
        placing: finds the external weights.
        folder: where the bundle is put together.
    """

    job: Job
    backend: Backend
    source: Source
    tool: str
    trace_key: str | None
    placing: Placing
    folder: Path


def _made(
    given: _Given, cache: Cache, clock: Clock, work: ExitStack
) -> tuple[Manifest, dict[int, str]]:
    """All stages; docs/pipeline.md tells them. Everything up to ``build`` is for all ranks at once.

    Returns:
        the manifest, and under which keys the cache has the engines, by rank.
    """
    # Here, because it takes seconds to import TensorRT, which a job that is recalled does without.
    from .advise.planning import cheapest
    from .engine.build import prepare
    from .engine.engines import Wanted, built
    from .engine.lower import lower
    from .engine.pool import Pool
    from .trt.libraries import decompositions

    job, backend, source, folder = given.job, given.backend, given.source, given.folder
    mesh, device = Mesh.line(job.world), check_device(job.proof_device)
    axis = mesh.free(source.groups.values())
    pool = work.enter_context(Pool(job.workers, job.memory_limit))  # ends before the folder does
    workarounds = prepare(backend, fused=job.strategy == FUSED)
    truth = None
    if job.proof != "none" and not source.groups:
        with clock.stage("measure"):
            truth = measure(source.module, source.inputs, device)
    table = decompositions()
    captured = capture(source, table, cache, given.trace_key, clock)
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
        names = captured.signature.parameters if source.external else {}
        settled = settle(lower(rewritten), names)
        lowered, names = settled.program, settled.names
    proof = None
    if truth is not None:
        with clock.stage("prove"):
            sites = [(outcome.site, outcome.node) for outcome in outcomes]
            control, _ = rewrite(sharded, CONTROL, "control", axis, table)
            stages = Stages(dense, control, rewritten, lowered, sites, axis)
            proof = prove(truth, source.inputs, stages, rtol=job.rtol, device=device)
    ranks = mesh.ranks if layout == "per-rank" else range(1)
    with clock.stage("build", total=len(ranks)):
        wanted = Wanted(job, backend, given.tool, lowered, names, ranks)
        done = built(wanted, pool, cache, folder, clock.progress)
        engines = done.engines
    for rank in mesh.ranks[len(engines) :]:
        twin = engines[0].path.with_name(engine_name(rank))
        place(engines[0].path, twin)
        engines.append(replace(engines[0], rank=rank, path=twin))
        done.recalled.extend([rank] if done.recalled else [])
    network_proof = None
    if proof is not None and _pays(job, proof, sum(engine.seconds for engine in engines)):
        with clock.stage("replay"):
            networks = [engine.network for engine in engines if engine.network is not None]
            inputs = flat_inputs(lowered, source.inputs)
            inputs |= {name: lowered.state[node] for node, name in names.items()}
            network_proof = prove_networks(networks, inputs, proof, lowered, device)
    with clock.stage("weights"):
        found = given.placing.weights | store(settled.constants, folder)
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
        recalled=done.recalled,
    )
    return manifest, done.keys


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


def _pays(job: Job, proof: Proof, build_seconds: float) -> bool:
    """Whether the networks are proven: two runs of all ranks, against the time of building."""
    return job.proof == "network" or (
        job.proof == "auto" and 2 * proof.seconds_a_run <= build_seconds
    )
