"""What the stages found, as a manifest."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

import msgspec
import torch

from ..ir.attention import Outcome
from ..ir.engine import Engine
from ..ir.records import Made, StoredProgram
from ..ir.sharded import Move
from ..ir.signature import Applied, Signature
from ..ir.source import Source
from ..ir.tensors import Weight
from ..job import Job, Variant, without
from ..mesh import AXES, SEQUENCE, Axis, bytes_sent
from ..releases import NCCL, are_parts, doubt, first_for
from ..version import __version__
from . import manifest as m
from .describe_dynamic import dynamic_entry
from .describe_pieces import io_entries, pieces_entry, step_entry
from .describe_proof import proof_entry
from .describe_quantized import quantization
from .describe_tensor import tensor_entry
from .folder import piece_folder

REFERENCE: Final = "the dense model in float32 on the same inputs and weights"
OWN_REFERENCE: Final = "the model's own ranks together in float32, before the sequence was sharded"


def describe(made: Made, timings: Mapping[str, float]) -> m.Manifest:
    """The manifest of a conversion that has come to its end; ``timings`` are seconds by stage."""
    job, source, axis = made.rewritten.job, made.loaded.source, made.rewritten.axis
    program, signature = made.emitted.whole, made.captured.signature
    return m.Manifest(
        schema_version=m.SCHEMA_VERSION,
        tool=m.Tool(name="cp-convert", version=__version__),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model=model_entry(job, source),
        request=_request(job, source),
        strategy=job.strategy,
        axes=_axes(job, axis),
        groups={name: [list(g) for g in own.groups] for name, own in source.groups.items()},
        guidance=_guidance(made),
        tensor=tensor_entry(made),
        world=job.world,
        precision=job.precision,  # type: ignore[arg-type]
        float32=list(job.float32),
        backend=_backend(made),
        runs_on=_runs_on(made),
        torch=str(torch.__version__),
        torch_tensorrt=made.loaded.backend.torch_tensorrt_version,
        io=io_entries(program),
        frozen=[
            m.Frozen(name=name, value=value, sha256=signature.digests.get(name))
            for name, value in signature.frozen.items()
        ],
        forward=_forward(source, signature),
        plan_source=_plan_source(axis, signature.applied),  # type: ignore[arg-type]
        plan=[_plan_entry(a) for a in signature.applied],
        sharding=[_sharding(move) for move in _moves(made)],
        attention=[_attention(outcome) for outcome in made.rewritten.outcomes],
        collectives=_collectives(_engines_run(made)),
        layout=made.emitted.layout,  # type: ignore[arg-type]
        weights_mode="external" if source.external else "embedded",
        weights=[weight_entry(w) for w in made.weights],
        program=None if made.program is None else _program(made.program),
        lora=[],
        quantization=quantization(made),
        engines=[_engine(e, made) for e in made.built.engines],
        proof=proof_entry(
            made.proof, made.network_proof, OWN_REFERENCE if source.groups else REFERENCE
        ),
        variants=[],
        timings=dict(timings),
        command=job.command,
        pieces=pieces_entry(made),
        step=step_entry(made),
        dynamic=dynamic_entry(made),
    )


def _forward(source: Source, signature: Signature) -> m.Forward:
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(source.module.forward).parameters
    names = [name for name, one in parameters.items() if one.kind in positional]
    defaults = {n: repr(p.default) for n, p in parameters.items() if p.default is not p.empty}
    tree = msgspec.convert(msgspec.to_builtins(signature.returned), m.Returned)
    return m.Forward(arguments=names, defaults=defaults, returned=tree)


def _backend(made: Made) -> m.Backend:
    backend, job = made.loaded.backend, made.loaded.job
    used = {one.instead for engine in made.built.first for one in engine.collectives}
    return m.Backend(
        name=backend.name,  # type: ignore[arg-type]
        version=backend.version,
        compute_capabilities=list(job.compute_capabilities) or _targets(made),
        workarounds=[text for name, text in made.built.workarounds.items() if name in used],
    )


def _targets(made: Made) -> list[str]:
    """Of the backend's own choice, those that have the types."""
    usual = made.loaded.backend.default_targets
    linears = made.captured.linears
    kinds = [] if linears is None else list(linears.kinds)
    if made.captured.attentions is not None:
        kinds.append("fp8")
    old = [one for kind in kinds for one in without(kind, usual)]
    return [one for one in usual if one not in old]


def _runs_on(made: Made) -> m.RunsOn:
    name, version = made.loaded.backend.name, made.loaded.backend.version
    own, world = made.built.first, made.loaded.job.world
    devices = world > 1
    groups = are_parts((one.group for engine in own for one in engine.collectives), world)
    return m.RunsOn(
        release=first_for(name, devices=devices, groups=groups),
        nccl=NCCL if devices else None,
        compute_capabilities=_capabilities(own) or _backend(made).compute_capabilities,
        doubt=doubt(name, version, devices=devices, groups=groups),
    )


def _capabilities(engines: Sequence[Engine]) -> list[str]:
    """Of GPUs that run all of a rank's engines."""
    first, *others = (engine.capabilities for engine in engines)
    if any(one.endswith("+") for of_one in (first, *others) for one in of_one):
        least = [of_one[0] for of_one in (first, *others) if of_one]
        return [max(least, key=lambda one: tuple(map(int, one.rstrip("+").split("."))))]
    return [one for one in first if all(one in other for other in others)]


def _guidance(made: Made) -> m.Guidance | None:
    job, known = made.loaded.job, made.loaded.source.branches
    if job.cfg == 1:
        return None
    return m.Guidance(
        branches=job.cfg,
        rows=known.rows // job.cfg,
        inputs=list(made.rewritten.guided.inputs),
        combine=job.combine,
        pairs=known.widened,
    )


def _moves(made: Made) -> tuple[Move, ...]:
    rewritten = made.rewritten
    return rewritten.guided.moves + rewritten.divided.moves + rewritten.sharded.moves


def _program(stored: StoredProgram) -> m.Program:
    document, tensors = (
        m.BundleFile(file=f.file, bytes=f.size, sha256=f.sha256)
        for f in (stored.document, stored.tensors)
    )
    weights = [weight_entry(w) for w in stored.weights]
    return m.Program(document=document, tensors=tensors, weights=weights)


def _request(job: Job, source: Source) -> m.Request:
    own = Variant() if job.dynamic else source.variant
    return m.Request(
        tiny=job.tiny,
        resolution=own.resolution,
        freeze=list(job.freeze),
        variant=own.name,
        batch=own.batch,
        text=own.text,
    )


def _engine(engine: Engine, made: Made) -> m.Engine:
    return m.Engine(
        rank=engine.rank,
        file=f"{made.loaded.within}{piece_folder(engine.piece)}{engine.path.name}",
        bytes=engine.size,
        sha256=engine.sha256,
        activation_bytes=engine.activations,
        recalled=engine.recalled,
        piece=engine.piece,
    )


def model_entry(job: Job, source: Source) -> m.Model:
    """Which model this is."""
    return m.Model(
        name=job.name,
        kind=type(source.module).__name__,
        source=str(job.model),
        source_sha256=source.sha256,
        parameters=source.parameters,
        weights=None if job.weights is None else str(job.weights),
        config=_config(source),
        matched=list(source.told),
        casts=[
            m.Cast(stored=c.stored, computed=c.computed, tensors=c.tensors) for c in source.casts
        ],
    )


def _config(source: Source) -> dict[str, Any] | None:
    """The model's configuration in JSON's types, as diffusers would write it."""
    config = getattr(source.module, "config", None)
    if not isinstance(config, Mapping):
        return None
    told: dict[str, Any] = json.loads(json.dumps(dict(config), default=str))
    return told


def weight_entry(weight: Weight) -> m.Weight:
    """Where one external weight is."""
    return m.Weight(
        name=weight.name,
        dtype=weight.dtype,
        shape=list(weight.shape),
        file=weight.file,
        offset=weight.offset,
        bytes=weight.size,
        sha256=weight.sha256,
        ranks=list(weight.ranks),
    )


def _axes(job: Job, axis: Axis) -> dict[str, int]:
    """The mesh: row-major, the last being neighbours; guidance and weights where they are split."""
    sequence = {SEQUENCE: axis.size}
    if job.ulysses is not None:
        sequence = {"ring": axis.size // job.ulysses, "ulysses": job.ulysses}
    sizes = {name: {name: size} for name, size in job.mesh.axes if size > 1} | {SEQUENCE: sequence}
    return {name: size for axis in AXES for name, size in sizes.get(axis, {}).items()}


def _plan_source(axis: Axis, applied: Sequence[Applied]) -> str:
    if axis.size == 1:
        return "none"
    return "model" if applied else "inferred"


def _plan_entry(applied: Applied) -> m.PlanEntry:
    cut = applied.cut
    return m.PlanEntry(
        kind=cut.kind,  # type: ignore[arg-type]
        module=cut.module,
        tensor=cut.tensor,
        dim=cut.dim,
        applied=applied.reason is None,
        reason=applied.reason,
        global_size=applied.global_size,
    )


def _sharding(move: Move) -> m.Sharding:
    layout = move.layout
    return m.Sharding(
        kind=move.kind,  # type: ignore[arg-type]
        axis=move.axis,
        operator=move.operator,
        module=move.module,
        source=move.source,
        dim=move.dim,
        tokens=layout.length,
        local=layout.local,
        segments=[s.length for s in layout.segments],
        padding=layout.padding,
        padding_percent=_percent(layout.size * layout.local, layout.length),
    )


def _percent(done: int, needed: int) -> float:
    return round(100 * (done - needed) / needed, 2)


def _attention(outcome: Outcome) -> m.Attention:
    site, heads = outcome.site, outcome.heads
    queries, keys = site.query_layout, site.key_layout
    slots = site.queries if queries is None else queries.size * queries.local
    return m.Attention(
        module=site.module,
        source=site.source,
        batch=site.batch,
        heads=site.heads,
        kv_heads=site.kv_heads,
        head_dim=site.head_dim,
        local_query=site.queries,
        global_query=site.global_queries,
        local_key=site.keys,
        global_key=site.global_keys,
        mask=None if site.mask is None else list(site.mask),
        causal=site.causal,
        rewritten=outcome.kept is None,
        reason=outcome.kept,
        way=outcome.way,
        codes=None if outcome.site.steps is None else "fp8",
        padded_heads=heads - site.heads,
        padded_queries=slots - site.global_queries,
        padded_keys=0 if keys is None else keys.padding,
        padding_percent=_percent(slots * heads, site.global_queries * site.heads),
    )


def _engines_run(made: Made) -> list[Engine]:
    """What rank 0 runs in a forward: an engine once for every piece of its kind."""
    by_piece = {engine.piece: engine for engine in made.built.first}
    return [by_piece[twin.of] for twin in made.emitted.twins] or list(made.built.first)


def _collectives(engines: Sequence[Engine]) -> list[m.Collective]:
    groups: dict[tuple[str, str], list[int]] = {}
    for one in (one for engine in engines for one in engine.collectives):
        groups.setdefault((one.operator, one.kind), []).append(
            bytes_sent(one.kind, one.payload, len(one.group))
        )
    return [
        m.Collective(kind=operator, layer=layer, count=len(sent), bytes_sent=sum(sent))
        for (operator, layer), sent in groups.items()
    ]
