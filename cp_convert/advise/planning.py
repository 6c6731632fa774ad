"""load -> trace -> decompose, then arrange, rewrite and estimate every option; nothing is built."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from dataclasses import replace as change

from msgspec.structs import replace

from ..capture.decompose import decompose
from ..capture.trace import trace
from ..errors import CannotConvert
from ..ir.attention import Outcome
from ..ir.program import Lowered, Program
from ..ir.source import Source
from ..job import Job
from ..mesh import GUIDANCE, TENSOR, Mesh, worlds_up_to
from ..model.branches import rows_of
from ..model.cast import DTYPES
from ..model.load import load, surroundings
from ..progress import Clock, Progress
from ..sharding.others import Arranged, arrange
from ..strategies import choose
from ..trt.libraries import decompositions
from .choosing import Terms, Tried, candidates, shared_by, try_all, try_one
from .estimate import Work, estimate
from .forecast import Forecast, Option, best, recommend
from .hardware import Hardware

_COMPARED = 2
"""How many ranks share weights in the option that says what that would cost."""


def forecast(job: Job, hardware: Hardware, name: str, progress: Progress) -> Forecast:
    """Every strategy at every world up to the job's; parameters are never allocated.

    Where the model has guidance branches, also with ranks of its own for each; and weights are
    shared as far as memory asks for it, or as the job says. At the largest world one more option
    shares them, to be compared with.

    Args:
        job: the model, precision and largest world; its strategy does not matter.
        hardware: what it would run on.
        name: what the hardware was asked for by.
        progress: where stages are shown.

    Raises:
        ConvertError: the model cannot be loaded, traced or decomposed.
    """
    clock = Clock(progress)
    source, traced = _traced(change(job, open_axes=(GUIDANCE, TENSOR)), clock)
    with clock.stage("decompose"):
        table = decompositions()
        dense = decompose(traced, table)
    plan = source.declared(traced.parameters)
    terms = Terms(hardware, source.bytes, table, eight=job.eight, plan=plan)
    planning = _Planning(job, source, dense, estimate(dense, hardware), terms)
    options, sites = [planning.one_gpu], list[Outcome]()
    worlds = worlds_up_to(job.world)
    with clock.stage("estimate", total=len(worlds)):
        for world in worlds:
            found, here = planning.at(world)
            options += found
            sites = [outcome for outcome in here if outcome.site.keys_sharded] or sites
            progress.step("estimate")
        options += planning.to_compare(options)
    return Forecast(
        model=job.name,
        precision=source.precision,
        parameters=source.parameters,
        attentions=len(sites),
        tokens=max((outcome.site.global_keys for outcome in sites), default=0),
        hardware_name=name,
        hardware=hardware,
        options=options,
        recommendation=recommend(options, hardware.memory_gb),
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


@dataclass(frozen=True)
class _Planning:
    """A model, and what its options depend on.

    Attributes:
        job: what was asked for.
        source, dense: the model and its program.
        alone: what one GPU would have to do.
        terms: the rest.
    """

    job: Job
    source: Source
    dense: Lowered
    alone: Work
    terms: Terms

    @property
    def one_gpu(self) -> Option:
        """The model as it is."""
        return self._estimated(Option(strategy="one GPU", world=1), self.alone, self.source.bytes)

    @property
    def branches(self) -> int:
        """How many the batch is taken to have: as asked, or two where its rows are even."""
        rows = rows_of(self.source.inputs, self.source.module, self.source.freeze)
        is_even = rows > 0 and rows % 2 == 0 and not self.terms.eight
        return max(self.job.cfg, 2 if is_even else 1)

    def at(self, world: int) -> tuple[list[Option], Sequence[Outcome]]:
        """All strategies on the meshes of one world that are worth a look.

        Returns:
            the options, and the attentions where most ranks share the sequence.
        """
        options: list[Option] = []
        sites: Sequence[Outcome] = ()
        for tp in self._shares(world, options):
            for cfg in dict.fromkeys((1, self.branches)):
                if world % (cfg * tp):
                    continue
                found, here = self._on(Mesh.of(world, cfg, tp))
                is_asked = cfg in (1, self.job.cfg)
                options += [o for o in found if is_asked or o.refused is None]
                sites = sites or here
        return options, sites

    def _shares(self, world: int, options: list[Option]) -> Iterator[int]:
        """How many ranks share weights: more of them while none of ``options`` is possible."""
        yield 1
        asked = [self.job.tp] * (world % self.job.tp == 0)
        wanted = asked if self.job.tp > 1 else shared_by(Mesh.line(world))
        for tp in wanted:
            if self.terms.eight:  # codes and other axes do not go together
                return
            if self.job.tp == 1 and best(options) is not None:
                return
            yield tp

    def to_compare(self, options: Sequence[Option]) -> list[Option]:
        """What sharing weights would cost and save beside the best option, if that does not."""
        there = [o for o in options if o.world == self.job.world > 1]
        chosen = best(there)
        if chosen is None or self.terms.eight or any(o.tp > 1 for o in there):
            return []
        fitting = [cfg for cfg in (chosen.cfg, 1) if chosen.world % (cfg * _COMPARED) == 0]
        if not fitting:
            return []
        mesh = Mesh.of(chosen.world, fitting[0], _COMPARED)
        try:
            arranged = arrange(self.dense, mesh, self.terms.plan)
        except CannotConvert:
            return []
        known = dict(candidates(arranged.axis.size))
        name = chosen.strategy if chosen.strategy in known else "ulysses"
        tried = try_one(arranged, self.terms, name, known[name])
        return [self._option(arranged, tried)] if tried.work is not None else []

    def _on(self, mesh: Mesh) -> tuple[list[Option], Sequence[Outcome]]:
        """All strategies on one mesh, and the attentions there."""
        try:
            arranged = arrange(self.dense, mesh, self.terms.plan)
        except CannotConvert as error:
            every = candidates(mesh.sequence().size)
            return [
                replace(_plain(mesh), strategy=name, ulysses=factor, refused=error.message)
                for name, factor in every
            ], ()
        tried = list(try_all(arranged, self.terms))
        sites = next((one.outcomes for one in reversed(tried) if one.outcomes), ())
        return [self._option(arranged, one) for one in tried], sites

    def _option(self, arranged: Arranged, tried: Tried) -> Option:
        option = replace(
            _plain(arranged.mesh),
            strategy=tried.name,
            ulysses=tried.ulysses,
            refused=tried.refused,
        )
        if tried.work is None:
            return option
        strategy, axis = choose(tried.name, tried.ulysses), arranged.axis
        held = [
            strategy.cost(o.site, axis).key_values for o in tried.outcomes if o.site.keys_sharded
        ]
        key_values = max(held, default=0) * DTYPES[self.source.precision].itemsize
        weights = self.source.bytes - arranged.divided.spared
        return replace(self._estimated(option, tried.work, weights), key_values=key_values)

    def _estimated(self, option: Option, work: Work, weights: int) -> Option:
        speedup = self.alone.seconds / work.seconds if work.seconds else 0.0
        memory = weights + work.activations
        return replace(
            option,
            collectives=work.collectives,
            bytes_sent=work.sent,
            weights=weights,
            activations=work.activations,
            memory=memory,
            compute=work.compute,
            communication=work.communication,
            exposed=work.exposed,
            speedup=speedup,
            efficiency=speedup / option.world,
            fits=self.terms.hardware.holds(memory),
        )


def _plain(mesh: Mesh) -> Option:
    """An option of which only the ranks' places are known."""
    return Option(
        strategy="",
        world=mesh.world,
        cfg=mesh.size(GUIDANCE),
        tp=mesh.size(TENSOR),
        mesh=mesh.words,
    )
