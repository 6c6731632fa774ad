"""load -> trace -> decompose, then shard, rewrite and estimate every option; nothing is built."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace

from ..capture.decompose import decompose
from ..capture.trace import trace
from ..errors import CannotConvert, CannotShard
from ..ir.attention import Outcome
from ..ir.program import Lowered, Program
from ..ir.sharded import Sharded
from ..ir.source import Source
from ..job import Job
from ..mesh import GUIDANCE, Axis, Mesh, worlds_up_to
from ..model.cast import DTYPES
from ..model.load import load, surroundings
from ..progress import Clock, Progress
from ..sharding.branches import split_branches
from ..sharding.shard import shard
from ..strategies import STRATEGIES, choose
from ..strategies.rewrite import rewrite
from ..trt.libraries import decompositions
from .estimate import Work, estimate
from .forecast import Forecast, Option, recommend
from .hardware import Hardware


def forecast(job: Job, hardware: Hardware, name: str, progress: Progress) -> Forecast:
    """Every strategy at every world up to the job's; parameters are never allocated.

    Where the job has guidance branches, also with ranks of its own for each.

    Args:
        job: the model, precision and largest world; its strategy does not matter.
        hardware: what it would run on.
        name: what the hardware was asked for by.
        progress: where stages are shown.

    Raises:
        ConvertError: the model cannot be loaded, traced or decomposed.
    """
    clock = Clock(progress)
    source, traced = _traced(job, clock)
    with clock.stage("decompose"):
        table = decompositions()
        dense = decompose(traced, table)
    alone = estimate(dense, hardware)
    options = [_option(Option(strategy="one GPU", world=1), alone, alone, source, hardware, 0)]
    attentions = tokens = 0
    worlds = worlds_up_to(job.world)
    with clock.stage("estimate", total=len(worlds)):
        for world in worlds:
            found, sites = _at(world, dense, alone, source, hardware, job, table)
            options += found
            sharded = [outcome.site for outcome in sites if outcome.site.keys_sharded]
            if sharded:
                attentions = len(sharded)
                tokens = max(site.global_keys for site in sharded)
            progress.step("estimate")
    return Forecast(
        model=job.name,
        precision=source.precision,
        parameters=source.parameters,
        attentions=attentions,
        tokens=tokens,
        hardware_name=name,
        hardware=hardware,
        options=options,
        recommendation=recommend(options),
    )


def _traced(job: Job, clock: Clock) -> tuple[Source, Program]:
    with surroundings(job):
        with clock.stage("load"):
            source = load(job, allocate=False)
            if source.groups or source.peers:
                raise CannotConvert(
                    "a model that communicates by itself is made for one world, and plan compares "
                    "several.",
                    where=str(job.model),
                    hint="convert it; the manifest counts what is communicated.",
                )
        with clock.stage("trace"):
            program, _ = trace(source.module, source.inputs, source.plan, source.freeze)
    return source, program


def candidates(world: int) -> Iterator[tuple[str, int | None]]:
    """The strategies that are worth a look, with USP's factors that are no other strategy."""
    # Where nobody shares the sequence every strategy is none.
    yield from ((name, None) for name in (STRATEGIES if world > 1 else ["ulysses"]))
    for ulysses in range(2, world):
        if world % ulysses == 0:
            yield "usp", ulysses


@dataclass(frozen=True)
class _Tried:
    """One strategy on a sharded program: its work, or why it cannot be done."""

    name: str
    ulysses: int | None
    work: Work | None = None
    outcomes: tuple[Outcome, ...] = ()
    refused: str | None = None


def _try_all(
    split: Sharded, axis: Axis, hardware: Hardware, table: Mapping[Any, Any], eight: str
) -> Iterator[_Tried]:
    for name, ulysses in candidates(axis.size):
        try:
            strategy = choose(name, ulysses)
            done, outcomes = rewrite(split, strategy, name, axis, table, eight=eight)
        except CannotConvert as error:
            yield _Tried(name, ulysses, refused=error.message)
            continue
        yield _Tried(name, ulysses, estimate(done, hardware), outcomes)


def _at(
    world: int,
    dense: Lowered,
    alone: Work,
    source: Source,
    hardware: Hardware,
    job: Job,
    table: Mapping[Any, Any],
) -> tuple[list[Option], tuple[Outcome, ...]]:
    """All strategies on all meshes of one world, and the attentions where all share a sequence."""
    options, sites = _on(Mesh.of(world), dense, alone, source, hardware, table, job.eight)
    if job.cfg > 1 and world % job.cfg == 0:
        mesh = Mesh.of(world, job.cfg)
        guided, _ = _on(mesh, dense, alone, source, hardware, table, job.eight)
        options += guided
    return options, sites


def _on(
    mesh: Mesh,
    dense: Lowered,
    alone: Work,
    source: Source,
    hardware: Hardware,
    table: Mapping[Any, Any],
    eight: str,
) -> tuple[list[Option], tuple[Outcome, ...]]:
    """All strategies on one mesh, and the attentions there."""
    axis, plain = mesh.sequence(), Option(strategy="", world=mesh.world, cfg=mesh.size(GUIDANCE))
    try:
        split = shard(split_branches(dense, mesh.axis(GUIDANCE)).program, axis)
    except CannotConvert as error:
        return [
            replace(plain, strategy=name, ulysses=factor, refused=error.message)
            for name, factor in candidates(axis.size)
        ], ()
    options: list[Option] = []
    sites: tuple[Outcome, ...] = ()
    for tried in _try_all(split, axis, hardware, table, eight):
        option = replace(plain, strategy=tried.name, ulysses=tried.ulysses, refused=tried.refused)
        if tried.work is None:
            options.append(option)
            continue
        sites, strategy = tried.outcomes, choose(tried.name, tried.ulysses)
        held = [strategy.cost(o.site, axis).key_values for o in sites if o.site.keys_sharded]
        key_values = max(held, default=0) * DTYPES[source.precision].itemsize
        options.append(_option(option, tried.work, alone, source, hardware, key_values))
    return options, sites


def cheapest(
    split: Sharded,
    axis: Axis,
    hardware: Hardware,
    weights: int,
    table: Mapping[Any, Any],
    *,
    groups: bool = True,
    eight: str = "",
) -> tuple[str, int | None]:
    """The strategy, and USP's factor, with the shortest estimated forward among those that fit.

    Args:
        split: the sharded program.
        axis: the ranks that share the sequence.
        hardware: what it will run on.
        weights: bytes of them that a rank holds.
        table: see :func:`cp_convert.strategies.rewrite.rewrite`.
        groups: whether a strategy may name groups of ranks, which some releases ignore.
        eight: which of q, k, v and o travel in 8 bits.

    Raises:
        CannotShard: no strategy can split every attention, or none that can fits into memory.
    """
    every = _try_all(split, axis, hardware, table, eight)
    tried = [one for one in every if groups or not one.ulysses]
    found = [
        (one.work.seconds, one.work, one.name, one.ulysses) for one in tried if one.work is not None
    ]
    if not found:
        reasons = " ".join(one.refused for one in tried if one.refused)
        raise CannotShard("no strategy can split this model.", hint=reasons)
    fitting = [one for one in found if _fits(weights, one[1], hardware)]
    if not fitting:
        needed = min(weights + work.activations for _, work, *_ in found)
        raise CannotShard(
            f"no strategy fits into the {hardware.memory_gb:.0f} GB of {hardware.title}: the least "
            f"needs about {needed / 1e9:.1f} GB a rank.",
            hint="a larger --world, other --hardware, or name the --strategy to convert anyway.",
        )
    _, _, name, ulysses = min(fitting, key=lambda one: (one[0], one[2]))
    return name, ulysses


def _fits(weights: int, work: Work, hardware: Hardware) -> bool:
    return weights + work.activations <= hardware.memory_gb * 1e9


def _option(
    option: Option, work: Work, alone: Work, source: Source, hardware: Hardware, key_values: int
) -> Option:
    speedup = alone.seconds / work.seconds if work.seconds else 0.0
    return replace(
        option,
        collectives=work.collectives,
        bytes_sent=work.sent,
        weights=source.bytes,
        activations=work.activations,
        key_values=key_values,
        compute=work.compute,
        communication=work.communication,
        exposed=work.exposed,
        speedup=speedup,
        efficiency=speedup / option.world,
        fits=_fits(source.bytes, work, hardware),
    )
