"""A job to a bundle: load, trace and recall, or make and keep; publish. ``making.py`` makes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import msgspec

from .backends import Backend
from .bundle.external import Placing, bytes_needed
from .bundle.folder import check_space, check_target, publish, staged
from .bundle.manifest import Manifest
from .cache.fingerprint import program_key, tool_key
from .cache.store import Cache
from .capture.capture import traced
from .collecting import set_aside
from .common import Common
from .early import check_named
from .ir.records import Loaded
from .job import FUSED, Job
from .mesh import TENSOR
from .model.load import load, surroundings
from .progress import Clock, Progress
from .prove import check_device
from .recall import job_key, keep, recall, request_key, values_key
from .releases import NEWER, are_parts, check_groups, doubt
from .trt.offline import check_gpu


def convert(
    job: Job, backend: Backend, progress: Progress, common: Common | None = None
) -> Manifest:
    """Convert the job's model into one engine per rank, or take them from the cache.

    Args:
        job: what is asked for.
        backend: which TensorRT builds.
        progress: is told what is done.
        common: where jobs of the same model keep it for one another.

    Raises:
        ConvertError: see :mod:`cp_convert.errors`; nothing has been written then.
    """
    clock, cache = Clock(progress), Cache(job.cache)
    check_device(job.proof_device)
    check_target(job.out, force=job.force)
    check_gpu(backend, fused=job.strategy == FUSED)
    if job.named_groups is not None:
        _check_groups(job, backend, job.named_groups)
    with staged(job.out) as folder:
        manifest = _converted(job, backend, folder, cache, clock, common or Common())
        publish(folder, job.out, manifest, force=job.force)
    return manifest


def _converted(
    job: Job, backend: Backend, folder: Path, cache: Cache, clock: Clock, common: Common
) -> Manifest:
    tool = tool_key(backend)
    request = request_key(job, tool)
    with ExitStack() as work:
        opened = partial(_loaded, job, backend, tool, folder, cache, clock, common)
        loaded, placing = work.enter_context(opened())
        _check_own_groups(loaded, clock.progress)
        for told in (*loaded.source.told, *_repeated(loaded), *_costs(loaded)):
            clock.progress.note(told)
        if cache.find("requests", request) is not None:
            programs = _programs(loaded, common, clock)
            with clock.stage("recall"):
                key = job_key(loaded.job, loaded.values, programs)
                manifest = recall(cache, key, loaded.job, loaded.source, placing, folder)
            if manifest is not None:
                return msgspec.structs.replace(manifest, timings=dict(clock.seconds))
            cache.forget("requests", request)
            if job.proof != "none" and not common.begun:
                # The model must not have been traced when it is measured.
                common.forget()
                work.close()
                loaded, placing = work.enter_context(opened())
        # Late: TensorRT takes seconds to import, which a job that is recalled does without.
        from .making import make

        with set_aside(), placing.to_blame():
            manifest, engine_keys, programs = make(loaded, common, placing, cache, clock)
        key = job_key(loaded.job, loaded.values, programs)
        keep(cache, request, key, manifest, engine_keys, folder)
        return manifest


def _programs(loaded: Loaded, common: Common, clock: Clock) -> list[str | None]:
    """The keys of the variants' programs, traced now unless an earlier job did."""
    if known := common.taken(loaded):
        return [begun.key for begun in known]
    if common.traces is None:
        common.traces = [traced(one.source, clock) for one in loaded.variants]
    with clock.stage("recall"):
        return [program_key(loaded.tool, trace) for trace in common.traces]


def _check_groups(job: Job, backend: Backend, what: str) -> None:
    check_groups(backend.name, backend.version, what, unsafe=job.unsafe_groups)


def _repeated(loaded: Loaded) -> Iterator[str]:
    """What was made of example inputs of one branch; forward may not take it."""
    if loaded.source.branches.widened:
        yield (
            f"the example inputs have one row, which --cfg {loaded.job.cfg} repeats for every "
            "branch; --unbatched ARGUMENT keeps one as it is"
        )


def _check_own_groups(loaded: Loaded, progress: Progress) -> None:
    """Refuse a model's own groups where they are ignored; tell where the result may not run."""
    job, backend, own = loaded.job, loaded.backend, loaded.source.groups.values()
    ranks = [group for axis in own for group in axis.groups]
    ranks += job.mesh.sequence(own).groups
    parts = job.named_groups is not None or are_parts(ranks, job.world)
    if own and parts:
        _check_groups(job, backend, f"{job.model} has process_groups and")
    if why := doubt(backend.name, backend.version, devices=job.world > 1, groups=parts):
        progress.note(f"{why} ({NEWER[backend.name]}).")


def _costs(loaded: Loaded) -> Iterator[str]:
    """What several variants cost where engines hold the weights."""
    source, variants = loaded.source, loaded.variants
    if len(variants) > 1 and not source.external and loaded.job.dynamic is None:
        size = source.bytes * len(variants) * loaded.job.world
        yield (
            f"{len(variants)} variants for {loaded.job.world} ranks hold the weights in each of "
            f"their engines, {size / 1e9:.2f} GB; --weights-mode external has them once."
        )


@contextmanager
def _loaded(
    job: Job,
    backend: Backend,
    tool: str,
    folder: Path,
    cache: Cache,
    clock: Clock,
    common: Common,
) -> Iterator[tuple[Loaded, Placing]]:
    """The model; large files of weights are read on a thread while it is traced."""
    with surroundings(job):
        with clock.stage("load"):
            is_new = common.source is None
            source = common.source = common.source or load(job)
            check_named(job, source)
            job = replace(job, precision=source.precision)
            check_space(job.out, bytes_needed(job, source))
            outside, located = source.parameters_outside, source.located
            waits = job.tp > 1 or TENSOR in job.open_axes
            placing = Placing(
                outside, located, folder, copy=job.copy_weights, cache=cache, waits=waits
            )
            if is_new:
                common.job = job
                common.values = values_key(job, source) if cache.folder is not None else None
        with placing:
            yield Loaded(job, backend, source, tool, common.values, folder), placing
