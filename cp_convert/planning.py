"""load -> trace -> decompose, then shard, rewrite and estimate every option; nothing is built."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from .decompose import decompose
from .engine.runtime import decompositions
from .errors import CannotConvert, CannotShard
from .estimate import Work, estimate
from .forecast import Forecast, Option, recommend
from .hardware import Hardware
from .job import Job
from .load import Source, load
from .mesh import Axis, Mesh
from .program import Lowered
from .progress import Clock, Progress
from .rewrite import Outcome, rewrite
from .shard import Sharded, shard
from .strategies import STRATEGIES, choose
from .trace import trace

BYTES: Final = {"fp16": 2, "bf16": 2, "fp32": 4}


def forecast(job: Job, hardware: Hardware, name: str, progress: Progress) -> Forecast:
    """Every strategy at every world up to the job's; parameters are never allocated.

    Args:
        job: the model, precision and largest world; its strategy does not matter.
        hardware: what it would run on.
        name: what the hardware was asked for by.
        progress: where stages are shown.

    Raises:
        ConvertError: the model cannot be loaded, traced or decomposed.
    """
    clock = Clock(progress)
    with clock.stage("load"):
        source = load(job, allocate=False)
    with clock.stage("trace"):
        traced, _ = trace(source.module, source.inputs, source.plan, source.freeze)
    with clock.stage("decompose"):
        table = decompositions()
        dense = decompose(traced, table)
    alone = estimate(dense, hardware)
    options = [_option(Option(strategy="one GPU", world=1), alone, alone, source, hardware, 0)]
    attentions = tokens = 0
    worlds = _worlds(job.world)
    with clock.stage("estimate", total=len(worlds)):
        for world in worlds:
            found, sites = _at(world, dense, alone, source, hardware, job)
            options += found
            sharded = [outcome.site for outcome in sites if outcome.site.keys_sharded]
            if sharded:
                attentions = len(sharded)
                tokens = max(site.global_keys for site in sharded)
            progress.step("estimate")
    return Forecast(
        model=job.name,
        precision=job.precision,
        parameters=source.parameters,
        attentions=attentions,
        tokens=tokens,
        hardware_name=name,
        hardware=hardware,
        options=options,
        recommendation=recommend(options),
    )


def _worlds(largest: int) -> list[int]:
    """Powers of two up to the largest world, and that itself."""
    return sorted({2**i for i in range(1, largest.bit_length())} | {largest}) if largest > 1 else []


def candidates(world: int) -> Iterator[tuple[str, int | None]]:
    """The strategies that are worth a look, with USP's factors that are no other strategy."""
    yield from ((name, None) for name in STRATEGIES)
    for ulysses in range(2, world):
        if world % ulysses == 0:
            yield "usp", ulysses


def _at(
    world: int, dense: Lowered, alone: Work, source: Source, hardware: Hardware, job: Job
) -> tuple[list[Option], tuple[Outcome, ...]]:
    """All strategies at one world, and the attentions there."""
    axis, table = Mesh.line(world).whole, decompositions()
    blank = [Option(strategy=n, world=world, ulysses=u) for n, u in candidates(world)]
    try:
        split: Sharded = shard(dense, axis)
    except CannotConvert as error:
        return [_refused(option, error) for option in blank], ()
    options: list[Option] = []
    sites: tuple[Outcome, ...] = ()
    for option in blank:
        strategy = choose(option.strategy, option.ulysses)
        try:
            done, sites = rewrite(split, strategy, option.strategy, axis, table)
        except CannotConvert as error:
            options.append(_refused(option, error))
            continue
        held = [strategy.cost(o.site, axis).key_values for o in sites if o.site.keys_sharded]
        key_values = max(held, default=0) * BYTES[job.precision]
        work = estimate(done, hardware)
        options.append(_option(option, work, alone, source, hardware, key_values))
    return options, sites


def cheapest(
    split: Sharded, axis: Axis, hardware: Hardware, table: Mapping[Any, Any]
) -> tuple[str, int | None]:
    """The strategy, and USP's factor, with the shortest estimated forward.

    Args:
        split: the sharded program.
        axis: the ranks that share the sequence.
        hardware: what it will run on.
        table: see :func:`.rewrite.rewrite`.

    Raises:
        CannotShard: no strategy can split every attention.
    """
    found: list[tuple[float, str, int | None]] = []
    reasons: list[str] = []
    for name, ulysses in candidates(axis.size):
        try:
            done, _ = rewrite(split, choose(name, ulysses), name, axis, table)
        except CannotConvert as error:
            reasons.append(error.message)
            continue
        work = estimate(done, hardware)
        found.append((work.compute + work.communication, name, ulysses))
    if not found:
        raise CannotShard("no strategy can split this model.", hint=" ".join(reasons))
    _, name, ulysses = min(found)
    return name, ulysses


def _refused(option: Option, error: CannotConvert) -> Option:
    return Option(
        strategy=option.strategy, world=option.world, ulysses=option.ulysses, refused=error.message
    )


def _option(
    option: Option, work: Work, alone: Work, source: Source, hardware: Hardware, key_values: int
) -> Option:
    seconds = work.compute + work.communication
    speedup = (alone.compute + alone.communication) / seconds if seconds else 0.0
    needed = source.bytes + work.activations
    return Option(
        strategy=option.strategy,
        world=option.world,
        ulysses=option.ulysses,
        collectives=work.collectives,
        bytes_sent=work.sent,
        weights=source.bytes,
        activations=work.activations,
        key_values=key_values,
        compute=work.compute,
        communication=work.communication,
        speedup=speedup,
        efficiency=speedup / option.world,
        fits=needed <= hardware.memory_gb * 1e9,
    )
