"""measure, trace, decompose, shard, rewrite, lower, prove, build, replay, weights.

A loaded model comes in, a manifest goes out, and the engines stand in its folder. Everything up to
``build`` is for all ranks at once; docs/pipeline.md tells the stages.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from .advise.hardware import read as read_hardware
from .advise.planning import cheapest
from .bundle.describe import describe
from .bundle.external import Placing
from .bundle.folder import engine_name
from .bundle.manifest import Manifest
from .bundle.program import write_program
from .cache.fingerprint import program_key
from .cache.store import Cache
from .capture import linear8
from .capture.capture import capture, traced
from .capture.combine import combine
from .capture.residual import float32_residual
from .engine.build import prepare
from .engine.engines import Wanted, build_all
from .engine.fold_weights import fold_weights, store
from .engine.lower import lower
from .engine.one_program import by_scatter, why_not_shared
from .engine.pool import Pool
from .errors import CannotShard
from .files import place
from .ir.linear8 import Layer, Linears
from .ir.program import Lowered, module_path
from .ir.proof import NetworkProof, Proof
from .ir.records import (
    Built,
    Captured,
    Emitted,
    Loaded,
    Made,
    Rewritten,
    StoredProgram,
    Traced,
)
from .ir.source import Source
from .ir.tensors import Weight
from .job import AUTO, EXTERNAL_FROM, FUSED, RESIDUAL, Job
from .progress import Clock
from .prove import (
    Stages,
    Truth,
    check_device,
    flat_inputs,
    measure,
    measure_program,
    measure_ranks,
    prove,
    prove_networks,
)
from .prove.calibrate import largest_inputs, losses, sets_of
from .releases import release_of
from .sharding.others import along_others
from .sharding.shard import shard
from .strategies import CONTROL, choose
from .strategies.rewrite import rewrite
from .strategies.rounded import rounded
from .trt.libraries import decompositions

Table = Mapping[Any, Any]


@dataclass(frozen=True)
class Begun:
    """What a conversion has before its strategy matters; several may go on from here.

    Attributes:
        loaded: the model and what was asked for.
        captured: its program.
        truth: what the dense model returns; ``None`` where no proof was asked for.
        table: the backend's decompositions.
        workarounds: the release's, their reasons by lowering.
        key: of the traced program in the cache; ``None`` for one that gets none.
    """

    loaded: Loaded
    captured: Captured
    truth: Truth | None
    table: Table
    workarounds: Mapping[str, str]
    key: str | None


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
    job = loaded.job
    with Pool(job.workers, job.memory_limit) as pool:  # ends before the folder does
        begun = begin(loaded, trace, cache, clock)
        made = build(begun, pool, cache, clock, placing)
    made = check_networks(made, clock)
    made = replace(made, weights=_weights(made, placing, clock))
    made = replace(made, program=_stored(made, placing, clock))
    return describe(made, clock.seconds), made.built.keys, begun.key


def begin(loaded: Loaded, trace: Traced | None, cache: Cache, clock: Clock) -> Begun:
    """Measure, trace and decompose: the same for every strategy.

    Args:
        loaded: the model and what was asked for.
        trace: of the model, where it was traced already.
        cache: where to look, and to keep.
        clock: times the stages.

    Raises:
        ConvertError: the model cannot be run or traced.
    """
    workarounds = prepare(loaded.backend, fused=loaded.job.strategy == FUSED)
    table = decompositions()
    truth = _measured(loaded, clock)
    trace = traced(loaded.source, clock) if trace is None else trace
    key = program_key(loaded.tool, trace) if cache.folder is not None else None
    captured = capture(loaded.source, trace, table, cache, key, clock)
    if RESIDUAL in loaded.job.float32:
        captured = replace(captured, dense=float32_residual(captured.dense))
    captured = replace(captured, dense=combine(captured.dense, loaded.source.branches))
    truth = _measured_further(loaded, captured, truth, clock)
    if loaded.job.quantize is not None or loaded.source.codes:
        captured = _quantized(loaded, captured, clock)
    return Begun(loaded, captured, truth, table, workarounds, key)


def build(
    begun: Begun, pool: Pool, cache: Cache, clock: Clock, placing: Placing | None = None
) -> Made:
    """Shard, rewrite, lower, prove and build, by the job's strategy; nothing else is made yet.

    Args:
        begun: the program, and what it has to compute.
        pool: of workers.
        cache: knows engines that were built before.
        clock: times the stages.
        placing: is told which ranks share which weights, as soon as that is known.

    Raises:
        ConvertError: the strategy does not fit, the proof failed, or TensorRT refused a network.
    """
    loaded, captured = begun.loaded, begun.captured
    rewritten, emitted, proof = program_of(begun, clock, placing)
    built = _built(loaded, emitted, pool, cache, clock)
    built = replace(built, workarounds=begun.workarounds)
    return Made(loaded, captured, rewritten, emitted, proof, built, None)


def program_of(
    begun: Begun, clock: Clock, placing: Placing | None = None
) -> tuple[Rewritten, Emitted, Proof | None]:
    """The part of :func:`build` that needs no TensorRT: the program, as it was made and proven.

    Raises:
        ConvertError: the strategy or the mesh does not fit, or the proof failed.
    """
    rewritten = _rewritten(begun, clock)
    if placing is not None:
        placing.share(rewritten.divided.named(begun.captured.signature.parameters))
    emitted = _emitted(rewritten, begun.captured, begun.loaded.source, clock)
    return rewritten, emitted, _proven(begun, rewritten, emitted, clock)


def check_networks(made: Made, clock: Clock) -> Made:
    """Replay the networks that were built, where the job wants it and it pays.

    Raises:
        ProofFailed: they do not compute what the model does.
    """
    return replace(made, network_proof=_replayed(made, clock))


def _quantized(loaded: Loaded, captured: Captured, clock: Clock) -> Captured:
    """The program with its linear layers in 8 bits: the checkpoint's, or by the job's inputs."""
    job, dense, source = loaded.job, captured.dense, loaded.source
    names, weights, sets = captured.signature.parameters, dict[str, str](), 0
    given: linear8.Given
    with clock.stage("calibrate"):
        device = check_device(job.proof_device)
        example = flat_inputs(dense, source.inputs)
        if source.codes:
            codes = {n: source.codes[name] for n, name in names.items() if name in source.codes}
            chosen, kept = linear8.stored_layers(dense, codes)
            given = linear8.Stored(codes)
        else:
            every = list(sets_of(dense, example, job.calibration))
            chosen, kept = linear8.choose(dense, job.keep)
            given = linear8.Measured(largest_inputs(dense, chosen, every, device))
            weights, sets = linear8.weights_of(chosen, names), len(every)
        program, scales = linear8.quantized(dense, chosen, given)
        lost = losses(dense, scales, example, device)
    layers = tuple(Layer(module_path(n), *scales[n.name], lost[n.name]) for n in chosen)
    linears = Linears(dense, layers, kept, weights, sets)
    return replace(captured, dense=program, linears=linears)


def _measured(loaded: Loaded, clock: Clock) -> Truth | None:
    """What the dense model returns; before it is traced, see :func:`.prove.measure`."""
    job, source = loaded.job, loaded.source
    if job.proof == "none" or source.groups:
        return None
    with clock.stage("measure"):
        device = check_device(job.proof_device)
        rounded = RESIDUAL not in job.float32
        return measure(
            source.module, source.inputs, device, rounded=rounded, branches=source.branches
        )


def _measured_further(
    loaded: Loaded, captured: Captured, truth: Truth | None, clock: Clock
) -> Truth | None:
    """The same for a model that communicates by itself, or computes more widely than it was built.

    Such a one is measured by its program.
    """
    job, source = loaded.job, loaded.source
    if job.proof == "none" or not (source.groups or RESIDUAL in job.float32):
        return truth
    device, program = check_device(job.proof_device), captured.dense
    with clock.stage("measure"):
        if truth is None:
            return measure_ranks(program, source.inputs, job.world, device)
        return measure_program(truth, program, source.all_inputs, device)


def _rewritten(begun: Begun, clock: Clock) -> Rewritten:
    job, source, table = begun.loaded.job, begun.loaded.source, begun.table
    axis = job.mesh.sequence(source.groups.values())
    mesh, dense = job.mesh, begun.captured.dense
    with clock.stage("split") if mesh.others else nullcontext():
        guided, divided = along_others(dense, mesh)
    with clock.stage("shard"):
        sharded = shard(divided.program, axis)
    if job.strategy == AUTO:
        with clock.stage("choose"):
            hardware = read_hardware(job.hardware)
            backend = begun.loaded.backend
            groups = job.unsafe_groups or release_of(backend.name, backend.version).groups
            held = source.bytes - divided.spared
            name, factor = cheapest(
                sharded, axis, hardware, held, table, groups=groups, eight=job.eight
            )
            job = replace(job, strategy=name, ulysses=factor)
    with clock.stage("rewrite"):
        strategy = choose(job.strategy, job.ulysses)
        program, outcomes = rewrite(sharded, strategy, job.strategy, axis, table, eight=job.eight)
    sites = [outcome.site for outcome in outcomes if outcome.site.keys_sharded]
    sent = strategy.travels(sites[0], axis) if sites else ""
    eight = "".join(name for name in sent if name in job.eight)
    return Rewritten(job, axis, guided, divided, sharded, program, outcomes, eight)


def _emitted(rewritten: Rewritten, captured: Captured, source: Source, clock: Clock) -> Emitted:
    with clock.stage("lower"):
        layout = _layout(rewritten.job, source, rewritten.program)
        program = rewritten.program
        program = by_scatter(program) if layout == "shared" else program
        names = captured.bindings if source.external else {}
        folded = fold_weights(program, names)
        lowered = lower(folded.program)
    apart = {} if captured.linears is None else captured.linears.weights
    codes = {apart[n]: program.state[n] for n in folded.names if n in apart}
    return Emitted(program, lowered, layout, folded.names, {**folded.constants, **codes})


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


def _proven(begun: Begun, rewritten: Rewritten, emitted: Emitted, clock: Clock) -> Proof | None:
    if begun.truth is None:
        return None
    job, axis, inputs = begun.loaded.job, rewritten.axis, begun.loaded.source.all_inputs
    with clock.stage("prove"):
        sites = [(outcome.site, outcome.node) for outcome in rewritten.outcomes]
        control, _ = rewrite(rewritten.sharded, CONTROL, "control", axis, begun.table)
        dense, linears = begun.captured.dense, begun.captured.linears
        quantized = None if linears is None else dense
        if rewritten.eight:
            quantized = rounded(dense, rewritten.sharded, rewritten.eight, axis, begun.table)
        programs = (dense, control, emitted.rewritten, emitted.program)
        plain = None if linears is None else linears.before
        others = job.mesh.others
        stages = Stages(*programs, sites, axis, others, quantized, plain)
        device = check_device(job.proof_device)
        return prove(
            begun.truth, inputs, stages, rtol=job.rtol, max_loss=job.max_loss, device=device
        )


def _built(loaded: Loaded, emitted: Emitted, pool: Pool, cache: Cache, clock: Clock) -> Built:
    """Engines of all ranks; with the layout ``shared`` one, under all their names."""
    world = loaded.job.mesh.ranks
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


def _replayed(made: Made, clock: Clock) -> NetworkProof | None:
    job, emitted, engines = made.loaded.job, made.emitted, made.built.engines
    seconds = sum(engine.seconds for engine in engines)
    if made.proof is None or not _pays(job, made.proof, seconds):
        return None
    program = emitted.program
    with clock.stage("replay"):
        networks = [engine.network for engine in engines if engine.network is not None]
        inputs = flat_inputs(program, made.loaded.source.all_inputs)
        shared = {node: name for node, name in emitted.names.items() if node in program.own}
        whole = emitted.names.keys() - shared
        inputs |= {emitted.names[node]: program.state[node] for node in whole}
        own = {name: program.own[node] for node, name in shared.items()}
        device = check_device(job.proof_device)
        return prove_networks(networks, inputs, made.proof, program, device, own)


def _pays(job: Job, proof: Proof, build_seconds: float) -> bool:
    """Whether the networks are proven: two runs of all ranks, against the time of building."""
    return job.proof == "network" or (
        job.proof == "auto" and 2 * proof.seconds_a_run <= build_seconds
    )


def _weights(made: Made, placing: Placing, clock: Clock) -> tuple[Weight, ...]:
    with clock.stage("weights"):
        found = {**placing.weights, **store(made.emitted.constants, made.loaded.folder)}
        return tuple(one for name in made.emitted.names.values() for one in found[name])


def _stored(made: Made, placing: Placing, clock: Clock) -> StoredProgram | None:
    """The program in the bundle; it refers to weights as the engines do."""
    job, source, emitted = made.loaded.job, made.loaded.source, made.emitted
    copied = 0 if source.external else source.bytes
    if job.program == "no" or (job.program == AUTO and copied >= EXTERNAL_FROM):
        return None
    with clock.stage("store"):
        names = made.captured.bindings if source.external else {}
        files = write_program(emitted.rewritten, names, made.loaded.folder)
        bound = set(emitted.names.values())
        rest = (placing.weights[name] for name in names.values() if name not in bound)
        return StoredProgram(*files, tuple(one for of_one in rest for one in of_one))
