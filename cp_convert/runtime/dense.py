"""A run's outputs against the dense model, where that can be built again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import msgspec
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..asked import ALLOW_CASTS
from ..bundle.manifest import Manifest
from ..errors import ConvertError, RunFailed
from ..ir.proof import Error
from ..ir.tensors import mapped
from ..job import Job
from ..lora.base import Base
from ..lora.choose import Asked, changes_at, chosen
from ..lora.compute import Changed
from ..model.load import load, surroundings
from ..prove.bounds import MARGIN, judged_by
from ..prove.errors import worst
from ..prove.measure import Truth, measure
from .given import asked_variant, given_inputs
from .original import Original, original_of
from .reached import beyond, watched
from .session import Request


def compare(
    manifest: Manifest, request: Mapping[str, Any], by: str, named: Original | None = None
) -> dict[str, Any]:
    """How far the outputs that rank 0 wrote are from the dense model's on the same inputs.

    The bound is the proof's: twice what the dense model itself loses in the bundle's precision,
    and twice what quantization lost in the proof. Where the error is larger and inputs reach beyond
    what scales were made for (:mod:`.reached`), nothing is said.

    Args:
        manifest: of the bundle.
        request: of the run; its ``outputs`` are there.
        by: which executor ran it.
        named: where the model's file and its weights are, where the user says so.

    Returns:
        ``error`` and ``bound``, or the ``reason`` why there is nothing to compare with.

    Raises:
        RunFailed: the error is beyond the bound.
    """
    asked = msgspec.convert(dict(request), Request)
    manifest = asked_variant(manifest, asked.variant, asked.inputs)
    found = _why_not(manifest) or original_of(manifest, Path(asked.bundle), named or Original())
    if isinstance(found, str):
        return {"reason": found, "error": None, "bound": None}
    job = _job(manifest, found)
    given = given_inputs(manifest, asked.inputs, asked.seed)
    with surroundings(job):
        try:
            source = load(job)
        except ConvertError as refusal:
            return {"reason": refusal.message, "error": None, "bound": None}
        inputs = {name: _filled(value, name, given) for name, value in source.inputs.items()}
        added = {name: given[name] for name in source.branches.added}
        _put(source.module, manifest, Path(asked.bundle), asked.lora)
        branches = replace(source.branches, added=added)
        with watched(source.module, manifest.quantization, source.codes) as reached:
            truth = measure(source.module, inputs, branches=branches)
    error, bound = _judged(manifest, Path(str(asked.outputs)), truth)
    if not error.within(bound):
        if (reason := beyond(reached)) is not None:
            return {"reason": reason, "error": None, "bound": None}
        raise RunFailed(
            f"the ranks together return something else than the dense model: relative error "
            f"{error.max:.1e} (bound {bound.max:.1e}).",
            hint=_NOT_TORCHS if by == "torch" else _NOT_THE_ENGINES,
        )
    return {"reason": None, "error": error.max, "bound": bound.max}


_NOT_THE_ENGINES: Final = (
    "the engines or weights are not those that were proven, or the run-time computes them "
    "differently; --executor torch tells the two apart."
)
_NOT_TORCHS: Final = (
    "torch ran the stored program, so no engine is at fault: program or weights are not those that "
    "were proven, or the model's file builds others each time; `cp-convert verify` looks at them."
)


def _judged(manifest: Manifest, file: Path, truth: Truth) -> tuple[Error, Error]:
    """How far the outputs in ``file`` are from the dense model's, and how far they may be."""
    returned = mapped(file)
    outputs = [returned[io.name] for io in manifest.io if io.mode == "output"]
    against, bound = judged_by(truth, None)
    return worst(outputs, against), _with_loss(bound, manifest)


def _with_loss(bound: Error, manifest: Manifest) -> Error:
    told = manifest.quantization
    if told is None or told.loss is None:
        return bound
    return Error(bound.max + MARGIN * told.loss.max, bound.rms + MARGIN * told.loss.rms)


def _why_not(manifest: Manifest) -> str | None:
    if manifest.groups:
        return "the model communicates by itself"
    if manifest.quantization is not None and manifest.quantization.loss is None:
        return "the bundle is quantized, and was not proven: what that costs is not known"
    if sum(w.bytes for w in manifest.weights) > _LARGE:
        return "the model is large; --executor torch on GPUs is the reference then"
    return None


_LARGE = 4 << 30


def _job(manifest: Manifest, original: Original) -> Job:
    request, guidance = manifest.request, manifest.guidance
    branches = 1 if guidance is None else guidance.branches
    assert original.model is not None
    # Of codes and of what was merely cast only the numbers are wanted.
    is_cast = manifest.quantization is not None or bool(manifest.model.casts)
    return Job(
        model=original.model,
        strategy="ulysses",
        world=branches,
        cfg=branches,
        combine=None if guidance is None else guidance.combine,
        out=Path(),
        precision=manifest.precision,
        float32=tuple(manifest.float32),
        weights=original.weights,
        weights_mode=manifest.weights_mode,
        allow_cast=ALLOW_CASTS if is_cast and original.weights is not None else (),
        freeze=tuple(request.freeze),
        tiny=request.tiny,
        resolutions=_listed(request.resolution),
        batches=_listed(request.batch),
        texts=_listed(request.text),
        variants=()
        if original.model.suffix == ".toml" or manifest.dynamic is not None
        else _listed(request.variant),
    )


def _listed(value: Any) -> tuple[Any, ...]:
    return () if value is None else (value,)


def _put(module: nn.Module, manifest: Manifest, folder: Path, asked: Asked) -> None:
    """The dense model with the same LoRA sets, in place."""
    changes = changes_at(manifest, folder, chosen(manifest, asked))
    changed = Changed(manifest, Base(folder), changes)
    own = dict(module.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name in changed:
            own[name].copy_(changed[name])


def _filled(value: Any, name: str, given: Mapping[str, Tensor]) -> Any:
    """The argument with the run's tensors in the places of the example's."""
    leaves, spec = pytree.tree_flatten_with_path(value)
    new = []
    for path, leaf in leaves:
        own = ".".join([name, *(str(getattr(k, "key", getattr(k, "idx", k))) for k in path)])
        new.append(given.get(own, leaf) if isinstance(leaf, torch.Tensor) else leaf)
    return pytree.tree_unflatten(new, spec)
