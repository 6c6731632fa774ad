"""Which format a quantized checkpoint is in, what it can be converted for, and what is told of it.

In: what the files hold by name. Out: the model's tensors, and which of them are codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from ..errors import UsageError
from ..ir.quantize import FP8
from ..ir.tensors import Location
from ..job import MULTIPLIED_FROM, Job, without
from . import comfy, modelopt, rowwise
from .coded import KINDS, Coded
from .names import inside
from .quantized import check_maker

FLOAT8: Final = "float8"
"""The cast that takes codes for what they stand for, in the job's precision."""


def without_scales(
    stored: Mapping[str, Location], folder: Path
) -> tuple[dict[str, Location], dict[str, Coded]]:
    """The tensors that are the model's, and those among them that are codes.

    Raises:
        WeightsError: a scale is missing, none, or belongs to no codes; or another format.
    """
    check_maker({name: stored[name] for name in inside(stored)[1]})
    modelopt.check_order(stored)
    for taken in (rowwise.of_torchao, comfy.without_scales):
        if (found := taken(stored)) is not None:
            return found
    if not modelopt.is_said(folder) and (found := rowwise.of_bfl(stored)) is not None:
        return found
    return modelopt.without_scales(stored, folder)


def check_loses(job: Job, *, coded: bool) -> None:
    """Refuse a bound of what quantization loses where nothing is quantized.

    Args:
        job: what was asked for.
        coded: whether the model's own weights are codes.

    Raises:
        UsageError: neither the model nor its exchange is.
    """
    if job.max_loss is not None and not (job.exchange or job.quantize or coded):
        raise UsageError(
            "--max-loss: nothing is quantized that could lose anything.",
            hint="it goes with --exchange, --quantize and quantized checkpoints.",
        )


def check_codes(job: Job, coded: Mapping[str, Coded]) -> None:
    """Refuse what a quantized checkpoint was never proven with, or cannot be built for.

    Raises:
        UsageError: other axes, quantizing twice, or a GPU that has no FP8.
    """
    kinds = kinds_of(coded)
    if not coded or (FLOAT8 in job.allow_cast and kinds == ["FP8"]):
        return
    whole = next((name for name, one in coded.items() if one.by_whole), None)
    if whole is not None and job.quantize is None:
        raise UsageError(
            f"{_named(job)} scales the input of {whole} as a whole, as it runs (torchao's "
            "PerTensor): ranks that have a part of it each cannot.",
            hint="--quantize fp8 takes a constant scale from the example inputs (--calibration); "
            "--allow-cast float8 computes in the job's precision; or quantize it with PerRow.",
        )
    if job.mesh.others:
        raise UsageError(
            f"{_named(job)} is quantized, and --mesh {job.mesh.words}: codes and other axes than "
            "the sequence's were never proven together.",
            hint="a checkpoint that is not quantized, or no --cfg and --tp.",
        )
    if job.quantize is not None and all(one.is_multiplied for one in coded.values()):
        raise UsageError(
            f"--quantize {job.quantize}: {_named(job)} is quantized already.",
            hint="leave one of the two out.",
        )
    if job.quantize is not None and job.quantize.upper() not in kinds:
        raise UsageError(
            f"--quantize {job.quantize}: the weights of {_named(job)} are "
            f"{' and '.join(kinds)} codes.",
            hint=f"--quantize {kinds[0].lower()} gives their inputs scales.",
        )
    for own in kinds:
        if old := without(own.lower(), job.compute_capabilities):
            first = ".".join(map(str, MULTIPLIED_FROM[own.lower()]))
            raise UsageError(
                f"{_named(job)} with --compute-capability {', '.join(old)}: its weights are {own}, "
                f"which is multiplied from {first} on.",
                hint="leave these targets out, name the checkpoint that is not quantized, or take "
                "the numbers in the job's precision (--allow-cast float8).",
            )


def _named(job: Job) -> str:
    """Who has quantized the weights: a checkpoint, or the model file."""
    return str(job.weights or job.model)


def kinds_of(coded: Mapping[str, Coded]) -> list[str]:
    """The types of a checkpoint's codes; a few have two."""
    return sorted({KINDS[one.dtype] for one in coded.values()})


def told(job: Job, coded: Mapping[str, Coded]) -> tuple[str, ...]:
    """What a person should know of the codes, and the manifest keeps."""
    if not coded:
        return ()
    if FLOAT8 in job.allow_cast and (count := sum(one.dtype == FP8 for one in coded.values())):
        cast = (
            f"{count} weights in FP8 multiplied by their scales once, and computed with in "
            "the job's precision (--allow-cast float8)"
        )
        rest = {name: one for name, one in coded.items() if one.dtype != FP8}
        return (cast, *told(job, rest))
    alone = {name: one for name, one in coded.items() if not one.is_multiplied}
    if not alone:
        return ()
    own = kinds_of(alone)
    what = f"{len(alone)} weights in {' and '.join(own)} without a scale for the layer's input"
    if job.quantize is not None:
        return (f"{what}: it is taken from the example inputs, as --quantize does",)
    half = (
        f"{what}: they stay codes, and the layers multiply in the job's precision; --quantize "
        f"{own[0].lower()} takes the scale from the example inputs"
    )
    return (half,)
