"""Bundles for the run-time's tests: all stages but TensorRT's build, whose engines nobody opens."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import cp_convert.stages as stages
from cp_convert.backends import select
from cp_convert.bundle import engine_name, sha256
from cp_convert.bundle.manifest import Manifest
from cp_convert.ir.engine import Engine
from cp_convert.ir.records import Built
from cp_convert.job import Job
from cp_convert.pipeline import convert
from cp_convert.progress import Progress


def _stand_ins(loaded: Any, *_: Any) -> Built:
    engines = []
    for rank in range(loaded.job.world):
        path = loaded.folder / engine_name(rank)
        path.write_bytes(b"engine of rank %d" % rank)
        engines.append(
            Engine(rank=rank, path=path, size=path.stat().st_size, sha256=sha256(path),
                   activations=1024, seconds=0.0, collectives={}, network=None)
        )  # fmt: skip
    return Built(tuple(engines), (), {})


def converted(model: Path, out: Path, strategy: str, world: int, **options: Any) -> Manifest:
    """A bundle of ``model`` in float32 at ``out``."""
    job = Job(
        model=model, out=out, strategy=strategy, world=world, precision="fp32", proof="none",
        program="yes", command="cp-convert", **options,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "_built", _stand_ins)
        return convert(replace(job), select("auto"), Progress())
