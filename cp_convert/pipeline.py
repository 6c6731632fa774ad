"""A job to a bundle: load, recall, or make and keep, publish. ``stages.py`` holds the stages."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import msgspec

from .backends import Backend
from .bundle.external import Placing, bytes_needed
from .bundle.folder import check_space, check_target, publish, staged
from .bundle.manifest import Manifest
from .cache.fingerprint import source_key, tool_key
from .cache.store import Cache
from .ir.records import Loaded
from .job import FUSED, Job
from .model.load import load, surroundings
from .progress import Clock, Progress
from .prove import check_device
from .recall import job_key, keep, recall
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
        work.enter_context(surroundings(job))
        with clock.stage("load"):
            source = load(job)
            job = replace(job, precision=source.precision)
            for told in source.told:
                progress.note(told)
            check_space(job.out, bytes_needed(job, source))
            tool = tool_key(backend.name, backend.version, backend.torch_tensorrt_version)
            trace_key = source_key(source, tool) if cache.folder is not None else None
            # Large files are read while the model is traced.
            placing = Placing(
                source.parameters_outside,
                source.located,
                folder,
                copy=job.copy_weights,
                cache=cache,
            )
            work.enter_context(placing)
            key = job_key(job, source, trace_key)
            manifest = recall(cache, key, job, source, placing, folder)
        if manifest is None:
            # Late: TensorRT takes seconds to import, which a job that is recalled does without.
            from .stages import make

            loaded = Loaded(job, backend, source, tool, trace_key, folder)
            with placing.to_blame():
                manifest, engine_keys = make(loaded, placing, cache, clock)
            keep(cache, key, manifest, engine_keys, folder)
        else:
            manifest = msgspec.structs.replace(manifest, timings=dict(clock.seconds))
        publish(folder, job.out, manifest)
    return manifest
