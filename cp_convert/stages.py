"""measure, trace, decompose, shard, rewrite, lower, prove, build, replay, weights.

A loaded model comes in, a manifest goes out, and the engines stand in its folder. Everything up to
``build`` is for all ranks at once; docs/pipeline.md tells the stages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .arranging import arranged
from .bundle.external import Placing
from .cache.store import Cache
from .capture.capture import see
from .capture.combine import combine
from .capture.residual import float32_residual
from .cutting import in_pieces
from .engine.build import prepare
from .engine.engines import build_pieces, networks_of, ranks_of
from .engine.fold_weights import fold_weights
from .engine.lower import lower
from .engine.lower_pieces import lower_pieces
from .engine.one_program import by_scatter, why_not_shared
from .engine.pool import Pool
from .errors import CannotShard
from .ir.program import Lowered
from .ir.proof import NetworkProof, Proof
from .ir.records import Built, Captured, Emitted, Loaded, Made, Rewritten, Seen, Traced
from .ir.selected import Selected
from .ir.source import Source
from .job import AUTO, BLOCKS, FUSED, RESIDUAL, Job
from .model.branches import blamed_on_rows
from .progress import Clock
from .prove import (
    Stages,
    Truth,
    check_device,
    check_pieces,
    flat_inputs,
    measure,
    measure_program,
    measure_ranks,
    prove,
    prove_networks,
)
from .quantizing import quantized
from .sharding.others import Arranged
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


@dataclass(frozen=True)
class Ready:
    """A program that is proven, and from which engines can be built."""

    begun: Begun
    rewritten: Rewritten
    emitted: Emitted
    proof: Proof | None

    def made(self, built: Built) -> Made:
        """With its engines."""
        one = self.begun
        return Made(one.loaded, one.captured, self.rewritten, self.emitted, self.proof, built, None)


def begin(
    loaded: Loaded,
    trace: Traced | None,
    cache: Cache,
    clock: Clock,
    *,
    truth: Truth | None = None,
    seen: Seen | None = None,
) -> Begun:
    """Measure, trace and decompose: the same for every strategy.

    Args:
        loaded: the model and what was asked for.
        trace: of the model, where it was traced already.
        cache: where to look, and to keep.
        clock: times the stages.
        truth: see :func:`measured`, where that was done already.
        seen: the program, where another process traced it.

    Raises:
        ConvertError: the model cannot be run or traced.
    """
    workarounds = prepare(loaded.backend, fused=loaded.job.strategy == FUSED)
    table = decompositions()
    truth = truth or measured(loaded, clock)
    seen = seen or see(loaded.source, trace, table, cache, loaded.tool, clock)
    captured = seen.captured
    if RESIDUAL in loaded.job.float32:
        captured = replace(captured, dense=float32_residual(captured.dense))
    captured = replace(captured, dense=combine(captured.dense, loaded.source.branches))
    truth = _measured_further(loaded, captured, truth, clock)
    if loaded.job.quantize is not None or loaded.source.codes:
        captured = quantized(loaded, captured, clock)
    return Begun(loaded, captured, truth, table, workarounds, seen.key)


def build(
    begun: Begun, pool: Pool, cache: Cache, clock: Clock, placing: Placing | None = None
) -> Made:
    """Shard, rewrite, lower, prove and build, by the job's strategy; nothing else is made yet.

    Raises:
        ConvertError: the strategy does not fit, the proof failed, or TensorRT refused a network.
    """
    return build_engines(prove_program(begun, clock, placing), pool, cache, clock)


def build_engines(ready: Ready, pool: Pool, cache: Cache, clock: Clock) -> Made:
    """Engines of a program, built or found in the cache.

    Raises:
        BuildFailed: TensorRT refused a network, or a worker was killed.
    """
    built = _built(ready.begun.loaded, ready.emitted, pool, cache, clock)
    return ready.made(replace(built, workarounds=ready.begun.workarounds))


def prove_program(begun: Begun, clock: Clock, placing: Placing | None = None) -> Ready:
    """Shard, rewrite, lower and prove, by the job's strategy; no TensorRT builds anything yet.

    Args:
        begun: the program, and what it has to compute.
        clock: times the stages.
        placing: is told which ranks share which weights, as soon as that is known.

    Raises:
        ConvertError: the strategy or the mesh does not fit, or the proof failed.
    """
    return proven(emitted(begun, clock, placing), clock)


def emitted(begun: Begun, clock: Clock, placing: Placing | None = None) -> Ready:
    """Shard, rewrite and lower, see :func:`prove_program`; nothing is proven yet.

    Raises:
        CannotConvert: the strategy or the mesh does not fit.
    """
    loaded, one = arranged(begun.loaded, begun.captured, begun.table, clock)
    begun = replace(begun, loaded=loaded)
    rewritten = _rewritten(begun, one, clock)
    if placing is not None:
        placing.share(rewritten.divided.named(begun.captured.signature.parameters))
    lowered = _emitted(rewritten, begun.captured, begun.loaded.source, clock)
    return Ready(begun, rewritten, lowered, None)


def proven(ready: Ready, clock: Clock) -> Ready:
    """The same with a proof, where one was asked for.

    Raises:
        ProofFailed: the ranks do not compute what the dense model does.
    """
    proof = _proven(ready.begun, ready.rewritten, ready.emitted, clock)
    return replace(ready, proof=proof)


def check_networks(made: Made, clock: Clock) -> Made:
    """Replay the networks that were built, where the job wants it and it pays.

    Raises:
        ProofFailed: they do not compute what the model does.
    """
    return replace(made, network_proof=_replayed(made, clock))


def measured(loaded: Loaded, clock: Clock) -> Truth | None:
    """What the dense model returns; before it is traced, see :func:`.prove.measure`.

    Meanwhile the parameters are lent other numbers: nothing else may read them.
    """
    job, source = loaded.job, loaded.source
    if job.proof == "none" or source.groups:
        return None
    with clock.stage("measure"):
        device = check_device(job.proof_device)
        rounded = RESIDUAL not in job.float32
        with blamed_on_rows(source.branches):
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


def _rewritten(begun: Begun, arranged: Arranged, clock: Clock) -> Rewritten:
    job, table, one = begun.loaded.job, begun.table, arranged
    with clock.stage("rewrite"):
        strategy = choose(job.strategy, job.ulysses)
        program, outcomes = rewrite(
            one.sharded, strategy, job.strategy, one.axis, table, eight=job.eight
        )
    sites = [outcome.site for outcome in outcomes if outcome.site.keys_sharded]
    sent = strategy.travels(sites[0], one.axis) if sites else ""
    eight = "".join(name for name in sent if name in job.eight)
    return Rewritten(job, one.axis, one.guided, one.divided, one.sharded, program, outcomes, eight)


def _emitted(rewritten: Rewritten, captured: Captured, source: Source, clock: Clock) -> Emitted:
    with clock.stage("lower"):
        layout = _layout(rewritten.job, source, rewritten.program)
        program = rewritten.program
        program = by_scatter(program) if layout == "shared" else program
        names = captured.bindings if source.external else {}
        folded = fold_weights(program, names)
        draft = in_pieces(rewritten, folded.program, folded.names)
        lowered = lower(folded.program) if draft is None else None
        pieces, twins = (None, ()) if draft is None else lower_pieces(draft)
    apart = {} if captured.linears is None else captured.linears.weights
    codes = {apart[n]: program.state[n] for n in folded.names if n in apart}
    constants = {**folded.constants, **codes}
    return Emitted(
        program, lowered, layout, folded.names, constants, pieces, twins=twins, draft=draft
    )


def _layout(job: Job, source: Source, program: Lowered) -> str:
    """Whether all ranks share one engine; docs/adr/0011 says when that is the default."""
    refusal = why_not_shared(program)
    if job.layout == "shared" and refusal is not None:
        raise CannotShard(
            f"--layout shared: the ranks' engines differ, because {refusal}.",
            hint="--layout per-rank.",
        )
    if job.layout in (AUTO, BLOCKS):
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
        stages = Stages(*programs, sites, axis, quantized, plain, others)
        device = check_device(job.proof_device)
        if (draft := emitted.draft) is not None:
            flat = flat_inputs(draft.whole, inputs)
            check_pieces(draft.run_by_engines, draft.whole, flat, job.world, device)
        return prove(
            begun.truth, inputs, stages, rtol=job.rtol, max_loss=job.max_loss, device=device
        )


def _built(loaded: Loaded, emitted: Emitted, pool: Pool, cache: Cache, clock: Clock) -> Built:
    """Engines of all ranks, for every piece of the program."""
    count = len(ranks_of(loaded, emitted)) * len(emitted.kinds)
    with clock.stage("build", total=count):
        return build_pieces(loaded, emitted, pool, cache, clock.progress)


def _replayed(made: Made, clock: Clock) -> NetworkProof | None:
    if made.proof is None or not pays(made, made.proof):
        return None
    return replayed(made, made.proof, made.emitted.program, made.loaded.source, clock)


def replayed(
    made: Made, proof: Proof, program: Lowered, source: Source, clock: Clock
) -> NetworkProof:
    """All ranks' networks, run layer by layer.

    Args:
        made: with the networks.
        proof: of ``program``.
        program: that the networks were made from; of a range, at one size.
        source: has its inputs.
        clock: times the stage.

    Raises:
        ProofFailed: they do not compute what the model does.
    """
    job, emitted, engines = made.loaded.job, made.emitted, made.built.engines
    with clock.stage("replay"):
        first, *later = networks_of(engines, emitted)
        inputs = flat_inputs(program, source.all_inputs)
        bound = {name: node for node, name in emitted.names.items()}
        own = Selected(program.own, {name: n for name, n in bound.items() if n in program.own})
        inputs |= {name: program.state[n] for name, n in bound.items() if name not in own}
        device = check_device(job.proof_device)
        names = [twin.names for twin in emitted.twins]
        return prove_networks(first, inputs, proof, program, device, own, later=later, names=names)


def pays(made: Made, proof: Proof) -> bool:
    """Whether the networks are proven: two runs of all ranks, against the time of building."""
    job, build_seconds = made.loaded.job, sum(engine.seconds for engine in made.built.engines)
    return job.proof == "network" or (
        job.proof == "auto" and 2 * proof.seconds_a_run <= build_seconds
    )
