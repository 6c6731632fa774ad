"""A model file or a preset to a module in the wanted precision, its inputs and its plan."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CannotShard, ModelFileError, UsageError
from ..ir.attention8 import Steps
from ..ir.source import Branches, Example, Source
from ..ir.tensors import Location
from ..job import AUTO, BLOCKS, EXTERNAL_FROM, Job, Variant
from .adapters import check_no_adapters
from .attended import attending, without_steps
from .branches import branched
from .cast import DTYPES, cast_inputs, cast_module, usual_precision
from .checkpoint import locate, transformer_folder
from .checks import check_no_step_cache, check_plain_tensors
from .coded import Coded
from .file import Given, from_file
from .formats import check_codes, check_loses, told, without_scales
from .home import at_home
from .instantiate import build, example_inputs, published_config
from .live import Live, taken_off
from .meta import stand_in, unallocated
from .preset import Preset, read
from .returned import check_has_numbers
from .ties import Ties
from .tp_plan import taken
from .unread import are_unread
from .variants import check_alone, check_apart, with_variants
from .weights import Filled, check_finite, load_weights


def surroundings(job: Job) -> AbstractContextManager[None]:
    """What a model file needs around it for as long as its model is in use."""
    return nullcontext() if job.is_preset else at_home(job.model, job.module)


def load(job: Job, *, allocate: bool = True) -> Source:
    """Build what the job's model file, or its preset, describes.

    Args:
        job: which model, precision and weights.
        allocate: whether parameters have values; without, they take no memory (:mod:`.meta`)
            and weights are not read.

    Raises:
        UsageError: the preset cannot be read, or lacks what is asked of it.
        CannotTrace: a preset's model does not fit into this machine's memory.
        ModelFileError: the file cannot be imported, lacks a function, or one of them fails; or a
            step cache is on.
        WeightsError: the weights do not fit the model.
        CannotShard: ``--plan model``, and there is none.
        UsageError: process groups leave no equal share of the world, or branches of the batch.
    """
    located, coded, steps = _located(job) if allocate else ({}, {}, {})
    given = _given(job, allocate, located, coded)
    live = _live(given, job)
    precision = job.precision or _usual(job, _ranks(given), located)
    ties = _cast(given, job, dtype := DTYPES[precision])
    size = sum(p.nbytes for p in given.module.parameters())
    external = allocate and _is_external(job, size)
    filled = _filled_in(given, job, located, ties, coded, external) if allocate else _bare(given)
    filled = _with_scales(filled, given, job, live, coded, steps) if allocate else filled
    freeze = (*given.freeze, *job.freeze)
    examples = _examples(given, job, dtype, freeze, coded=bool(filled.codes))
    inputs, branches = _branched(examples[0].inputs, given, job, freeze)
    source = Source(
        module=given.module,
        inputs=inputs,
        plan=_plan(given, job),
        freeze=freeze,
        sha256=hashlib.sha256(job.model.read_bytes()).hexdigest(),
        parameters=sum(p.numel() for p in given.module.parameters()),
        bytes=size,
        external=external,
        located=filled.located,
        casts=filled.casts,
        codes=filled.codes,
        attentions=filled.attentions,
        told=(*_entered(job), *filled.told),
        peers=given.peers,
        groups=given.groups,
        precision=precision,
        branches=branches,
        tp_plan=taken(given.tp_plan, given.module, job),
    )
    return with_variants(source, examples)


def _live(given: Given, job: Job) -> Live:
    """What ``build_model()`` has quantized, and the module has no more."""
    live = taken_off(given.module, job, alone=not given.peers)
    check_codes(job, live.coded)
    return live


def _with_scales(
    filled: Filled,
    given: Given,
    job: Job,
    live: Live,
    coded: Mapping[str, Coded],
    steps: Mapping[str, Steps],
) -> Filled:
    """The same with what ``build_model()`` has quantized, and with scales of attention."""
    filled, coded = live.fill(filled, given.module), coded or live.coded
    check_loses(job, coded=bool(filled.codes))
    filled = replace(filled, told=(*filled.told, *told(job, coded)))
    return attending(filled, job, coded, {**steps, **live.steps})


def _bare(given: Given) -> Filled:
    stand_in(given.module)
    return Filled({}, (), ())


def _examples(
    given: Given, job: Job, dtype: torch.dtype, freeze: Collection[str], *, coded: bool
) -> list[Example]:
    """Every variant's inputs in the job's precision."""
    keep = given.keep_float32
    found = [Example(e.variant, cast_inputs(e.inputs, dtype, keep=keep)) for e in given.examples]
    check_apart(found, freeze, job.model)
    check_alone(found, job, coded=coded)
    return found


def _branched(
    inputs: dict[str, Any], given: Given, job: Job, freeze: Collection[str]
) -> tuple[dict[str, Any], Branches]:
    """The example inputs with all guidance branches."""
    kept, combine = job.unbatched, job.combine
    return branched(inputs, given.module, job.cfg, combine, kept=kept, frozen=freeze)


def _given(
    job: Job, allocate: bool, located: Mapping[str, Location], coded: Mapping[str, Coded]
) -> Given:
    """The model as it is described; where its numbers come from files, it takes no memory yet."""
    is_large = _is_external(job, sum(at.size for at in located.values()))
    mapped = job.weights is not None and (job.is_preset or is_large)
    with unallocated() if mapped or not allocate else nullcontext():
        if job.is_preset:
            return _from_preset(job, allocate, located, coded)
        size = "" if job.dynamic is None else job.dynamic.name
        return from_file(job.model, job.world, job.module, job.variants, job.sizes, size)


def _ranks(given: Given) -> tuple[nn.Module, ...]:
    return given.module, *given.peers


def _cast(given: Given, job: Job, dtype: torch.dtype) -> Ties:
    """To the job's precision; returns what is tied, found before casting takes views apart."""
    ties = Ties.of(given.module)
    for one in _ranks(given):
        check_no_step_cache(one, str(job.model))
        check_plain_tensors(one, str(job.model))
        cast_module(one.eval().requires_grad_(False), dtype, job.float32)
    _check_peers(given)
    return ties


def _filled_in(
    given: Given,
    job: Job,
    located: Mapping[str, Location],
    ties: Ties,
    coded: Mapping[str, Coded],
    external: bool,
) -> Filled:
    """Every rank's parameters have their numbers, from files where ``--weights`` names some."""
    filled = Filled({}, (), ())
    if job.weights is not None:
        lazily = external and not job.copy_weights
        filled = _filled(given, job, located, ties, coded, lazily=lazily)
    if not job.is_preset:
        check_has_numbers(given.module, job.model, besides=filled.codes)
    if job.weights is None:
        for one in _ranks(given):
            check_finite(one)
    if external and given.peers:
        raise UsageError(
            "--weights-mode external: every rank has parameters of its own here.",
            hint="--weights-mode embedded.",
        )
    return filled


def _usual(job: Job, modules: Collection[nn.Module], located: Mapping[str, Location]) -> str:
    """The precision of a job that names none."""
    known = read(job.model).precision if job.is_preset else None
    stored = [(at.dtype, at.size) for at in located.values()]
    return usual_precision(known, modules, stored, job.compute_capabilities)


def _located(job: Job) -> tuple[dict[str, Location], dict[str, Coded], dict[str, Steps]]:
    """Where the files hold the model's tensors, which are codes, and the scales of attention."""
    if job.weights is None:
        return {}, {}, {}
    stored, steps = without_steps(locate(_folder(job)))
    located, coded = without_scales(stored, _folder(job))
    check_codes(job, coded)
    return located, coded, steps


def _folder(job: Job) -> Path:
    assert job.weights is not None
    return transformer_folder(job.weights)


def _entered(job: Job) -> tuple[str, ...]:
    """What is told where weights are found deeper than they were asked for."""
    if job.weights is None or _folder(job) == job.weights:
        return ()
    return (f"weights are those in {_folder(job)}",)


def _filled(
    given: Given,
    job: Job,
    located: Mapping[str, Location],
    ties: Ties,
    coded: Mapping[str, Coded],
    *,
    lazily: bool,
) -> Filled:
    if given.peers:
        raise UsageError(
            f"--weights: {job.model.name} builds every rank with parameters of its own.",
            hint="let build_model(rank) read them.",
        )
    check_no_adapters(given.module)
    return load_weights(
        given.module,
        located,
        _folder(job),
        ties,
        coded=coded,
        allowed=job.allow_cast,
        lazily=lazily,
        unread=are_unread(job, coded),
    )


def _is_external(job: Job, size: int) -> bool:
    is_large = size >= EXTERNAL_FROM or job.layout == BLOCKS
    return job.weights_mode == "external" or (job.weights_mode == AUTO and is_large)


def _check_peers(given: Given) -> None:
    """Ranks may differ in the values of parameters, and in nothing else."""
    first = _signature(given.module)
    tables = dict(given.module.named_buffers())
    for rank, module in enumerate(given.peers, 1):
        others = _signature(module)
        different = [n for n in {**first, **others} if first.get(n) != others.get(n)]
        different += [
            n for n, t in module.named_buffers() if n in first and not torch.equal(t, tables[n])
        ]
        if different:
            raise ModelFileError(
                f"build_model(rank={rank}) differs from rank 0's in {', '.join(different[:4])}.",
                hint="ranks may have other numbers in their parameters, but not other names, "
                "shapes, dtypes or buffers: one program is made for all of them.",
            )


def _signature(module: nn.Module) -> dict[str, tuple[Any, ...]]:
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {name: (tuple(t.shape), t.dtype) for name, t in tensors}


def _from_preset(
    job: Job, allocate: bool, located: Mapping[str, Location], coded: Mapping[str, Coded]
) -> Given:
    preset = read(job.model)
    config = preset.config
    if job.weights is not None:
        if job.tiny:
            raise UsageError("--tiny has no published weights.", hint="leave --weights out.")
        config = published_config(preset, transformer_folder(job.weights))
    examples = [_example(preset, config, asked, tiny=job.tiny) for asked in job.shapes]
    return Given(
        module=build(
            preset,
            config,
            tiny=job.tiny,
            random=allocate and job.weights is None,
            bytes_each=_bytes_each(job, located, coded) if allocate else 0,
        ),
        examples=tuple(examples),
        plan={},
        freeze=tuple(preset.freeze),
        keep_float32=tuple(preset.keep_float32),
    )


def _example(preset: Preset, config: Mapping[str, Any], asked: Variant, *, tiny: bool) -> Example:
    resolution = asked.resolution or preset.resolution
    return Example(
        asked,
        example_inputs(preset, config, resolution, tiny=tiny, batch=asked.batch, text=asked.text),
    )


def _bytes_each(job: Job, located: Mapping[str, Location], coded: Mapping[str, Coded]) -> int:
    """Memory that a parameter takes while the model is loaded; none where a file is mapped."""
    dtype = DTYPES[job.precision or _usual(job, (), located)]
    if job.weights is None:
        return torch.float32.itemsize
    in_place = _is_external(job, sum(at.size for at in located.values()))
    unread = coded if are_unread(job, coded) else {}
    others = [at for name, at in located.items() if name not in unread]
    return 0 if in_place and all(at.dtype == dtype for at in others) else dtype.itemsize


def _plan(given: Given, job: Job) -> Mapping[str, Any]:
    shares = job.mesh.sequence(given.groups.values()).size
    if shares == 1 or job.plan == "auto":
        return {}
    module = given.module
    plan = given.plan or getattr(module, "_cp_plan", None) or {}
    if not plan and job.plan == "model":
        raise CannotShard(
            f"{type(module).__name__} has no plan: neither {job.model.name} defines cp_plan nor "
            "the model a _cp_plan.",
            where=str(job.model),
            hint="leave --plan out, and the plan is found; or say in cp_plan which module inputs "
            "are split along the sequence and which outputs are gathered.",
        )
    if not isinstance(plan, Mapping):
        raise CannotShard(f"cp_plan is a {type(plan).__name__}, not a mapping of module names.")
    return plan
