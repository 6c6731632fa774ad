"""measure, trace, decompose, shard, rewrite, lower, prove, build, replay, weights.

A loaded model comes in, a manifest goes out, and the engines stand in its folder. Everything up to
``build`` is for all ranks at once; docs/pipeline.md tells the stages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .advise.hardware import read as read_hardware
from .advise.planning import cheapest
from .bundle.describe import describe
from .bundle.external import Placing
from .bundle.folder import engine_name
from .bundle.manifest import Manifest
from .cache.fingerprint import program_key
from .cache.store import Cache
from .capture.capture import capture, traced
from .engine.build import prepare
from .engine.engines import Wanted, build_all
from .engine.fold_weights import fold_weights, store
from .engine.lower import lower
from .engine.one_program import by_scatter, why_not_shared
from .engine.pool import Pool
from .errors import CannotShard
from .files import place
from .ir.program import Lowered
from .ir.proof import NetworkProof, Proof
from .ir.records import Built, Captured, Emitted, Loaded, Made, Rewritten, Traced
from .ir.source import Source
from .ir.tensors import Weight
from .job import AUTO, FUSED, Job
from .mesh import Mesh
from .progress import Clock
from .prove import (
    Stages,
    Truth,
    check_device,
    flat_inputs,
    measure,
    measure_ranks,
    prove,
    prove_networks,
)
from .sharding.shard import shard
from .strategies import CONTROL, choose
from .strategies.rewrite import rewrite
from .trt.libraries import decompositions

Table = Mapping[Any, Any]


def make(
    loaded: Loaded, trace: Traced | None, placing: Placing, cache: Cache, clock: Clock
) -> tuple[Manifest, Mapping[int, str], str | None]:
    """All stages.

    Args:
        loaded: the model and what was asked for.
        trace: its program, if it was traced already; ``None`` where it has to be measured first.
        placing: finds the external weights.
        cache: knows what was made before.
        clock: times the stages and shows them.

    Returns:
        the manifest, under which keys the cache has the engines, by rank, and the key of the
        traced program.

    Raises:
        ConvertError: see :mod:`cp_convert.errors`.
    """
    job, source = loaded.job, loaded.source
    with Pool(job.workers, job.memory_limit) as pool:  # ends before the folder does
        workarounds = prepare(loaded.backend, fused=job.strategy == FUSED)
        table = decompositions()
        truth = _measured(loaded, clock)
        trace = traced(source, clock) if trace is None else trace
        program = program_key(loaded.tool, trace) if cache.folder is not None else None
        captured = capture(source, trace, table, cache, program, clock)
        truth = truth or _measured_ranks(loaded, captured, clock)
        rewritten = _rewritten(loaded, captured, table, clock)
        emitted = _emitted(rewritten, captured, source, clock)
        proof = _proven(loaded, captured, rewritten, emitted, truth, table, clock)
        built = _built(loaded, emitted, pool, cache, clock)
    built = replace(built, workarounds=tuple(workarounds))
    networks = _replayed(loaded, emitted, proof, built, clock)
    weights = _weights(loaded, emitted, placing, clock)
    made = Made(loaded, captured, rewritten, emitted, proof, built, networks, weights)
    return describe(made, clock.seconds), built.keys, program


def _measured(loaded: Loaded, clock: Clock) -> Truth | None:
    """What the dense model returns; before it is traced, see :func:`.prove.measure`."""
    job, source = loaded.job, loaded.source
    if job.proof == "none" or source.groups:
        return None
    with clock.stage("measure"):
        return measure(source.module, source.inputs, check_device(job.proof_device))


def _measured_ranks(loaded: Loaded, captured: Captured, clock: Clock) -> Truth | None:
    """The same for a model that communicates by itself."""
    job, source = loaded.job, loaded.source
    if job.proof == "none" or not source.groups:
        return None
    with clock.stage("measure"):
        return measure_ranks(
            captured.dense, source.inputs, job.world, check_device(job.proof_device)
        )


def _rewritten(loaded: Loaded, captured: Captured, table: Table, clock: Clock) -> Rewritten:
    job, source = loaded.job, loaded.source
    axis = Mesh.line(job.world).free(source.groups.values())
    with clock.stage("shard"):
        sharded = shard(captured.dense, axis)
    if job.strategy == AUTO:
        with clock.stage("choose"):
            hardware = read_hardware(job.hardware)
            name, factor = cheapest(sharded, axis, hardware, source.bytes, table)
            job = replace(job, strategy=name, ulysses=factor)
    with clock.stage("rewrite"):
        strategy = choose(job.strategy, job.ulysses)
        program, outcomes = rewrite(sharded, strategy, job.strategy, axis, table)
    return Rewritten(job, axis, sharded, program, outcomes)


def _emitted(rewritten: Rewritten, captured: Captured, source: Source, clock: Clock) -> Emitted:
    with clock.stage("lower"):
        layout = _layout(rewritten.job, source, rewritten.program)
        program = rewritten.program
        program = by_scatter(program) if layout == "shared" else program
        names = captured.signature.parameters if source.external else {}
        folded = fold_weights(lower(program), names)
    return Emitted(program, folded.program, layout, folded.names, folded.constants)


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


def _proven(
    loaded: Loaded,
    captured: Captured,
    rewritten: Rewritten,
    emitted: Emitted,
    truth: Truth | None,
    table: Table,
    clock: Clock,
) -> Proof | None:
    if truth is None:
        return None
    job, axis = loaded.job, rewritten.axis
    with clock.stage("prove"):
        sites = [(outcome.site, outcome.node) for outcome in rewritten.outcomes]
        control, _ = rewrite(rewritten.sharded, CONTROL, "control", axis, table)
        stages = Stages(captured.dense, control, emitted.rewritten, emitted.program, sites, axis)
        device = check_device(job.proof_device)
        return prove(truth, loaded.source.inputs, stages, rtol=job.rtol, device=device)


def _built(loaded: Loaded, emitted: Emitted, pool: Pool, cache: Cache, clock: Clock) -> Built:
    """Engines of all ranks; with the layout ``shared`` one, under all their names."""
    world = Mesh.line(loaded.job.world).ranks
    ranks = world if emitted.layout == "per-rank" else range(1)
    with clock.stage("build", total=len(ranks)):
        wanted = Wanted(
            loaded.job, loaded.backend, loaded.tool, emitted.program, emitted.names, ranks
        )
        built = build_all(wanted, pool, cache, loaded.folder, clock.progress)
    engines, recalled = list(built.engines), list(built.recalled)
    for rank in world[len(engines) :]:
        twin = engines[0].path.with_name(engine_name(rank))
        place(engines[0].path, twin)
        engines.append(replace(engines[0], rank=rank, path=twin))
        recalled.extend([rank] if recalled else [])
    return replace(built, engines=tuple(engines), recalled=tuple(recalled))


def _replayed(
    loaded: Loaded, emitted: Emitted, proof: Proof | None, built: Built, clock: Clock
) -> NetworkProof | None:
    seconds = sum(engine.seconds for engine in built.engines)
    if proof is None or not _pays(loaded.job, proof, seconds):
        return None
    program = emitted.program
    with clock.stage("replay"):
        networks = [engine.network for engine in built.engines if engine.network is not None]
        inputs = flat_inputs(program, loaded.source.inputs)
        inputs |= {name: program.state[node] for node, name in emitted.names.items()}
        device = check_device(loaded.job.proof_device)
        return prove_networks(networks, inputs, proof, program, device)


def _pays(job: Job, proof: Proof, build_seconds: float) -> bool:
    """Whether the networks are proven: two runs of all ranks, against the time of building."""
    return job.proof == "network" or (
        job.proof == "auto" and 2 * proof.seconds_a_run <= build_seconds
    )


def _weights(
    loaded: Loaded, emitted: Emitted, placing: Placing, clock: Clock
) -> tuple[Weight, ...]:
    with clock.stage("weights"):
        found = placing.weights | store(emitted.constants, loaded.folder)
        return tuple(found[name] for name in emitted.names.values())
