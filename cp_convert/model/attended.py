"""Scales of attention that come with weights, as NVIDIA ModelOpt quantizes it ("quantize_mha").

In: what files hold by name. Out: the same without, and by the path of a module that attends, what
a code of 1 stands for of its queries, keys and values. Layout, of an attention ``x``::

    x.{q,k,v}_bmm_quantizer._amax   F32 []   the largest magnitude: a code of 1 stands for amax/448
    x.softmax_quantizer._amax       F32 []   left out: our probabilities are measured by one
    x.bmm2_output_quantizer._amax   F32 []   left out: what attention gives is not rounded

What a job makes of them is :func:`attending`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from ..errors import UsageError, WeightsError
from ..ir.attention8 import Steps
from ..ir.quantize import FP8, LARGEST
from ..ir.tensors import Location
from ..job import ATTENTION_FP8, PRECISION, Job, without
from .coded import Coded, scale_at
from .formats import FLOAT8
from .names import inside
from .weights import Filled

_SUFFIX: Final = "_quantizer._amax"
_NAME: Final = re.compile(r"(.+)\.(?:([qkv])_bmm|softmax|bmm2_output)_quantizer\._amax")


def without_steps(
    stored: Mapping[str, Location],
) -> tuple[dict[str, Location], dict[str, Steps]]:
    """The tensors that are no such scales, and the scales by the attention's path.

    Raises:
        WeightsError: one is missing, or none, or is of something else.
    """
    names = [name for name in stored if name.endswith(_SUFFIX)]
    found: dict[str, dict[str, str]] = {}
    for name in names:
        read = _NAME.fullmatch(name)
        if read is None:
            raise WeightsError(
                f"{name} of {stored[name].file.name} is of no quantizer that is understood: those "
                "of linear layers and of q, k and v in attention are.",
                where=str(stored[name].file),
                hint="export the checkpoint without it.",
            )
        own = found.setdefault(read[1], {})
        if read[2] is not None:
            own[read[2]] = name
    prefix, _ = inside(stored)
    steps = {
        path.removeprefix(prefix): _steps(path, own, stored) for path, own in found.items() if own
    }
    return {name: at for name, at in stored.items() if not name.endswith(_SUFFIX)}, steps


def _steps(path: str, own: Mapping[str, str], stored: Mapping[str, Location]) -> Steps:
    if lacking := [letter for letter in "qkv" if letter not in own]:
        some = stored[next(iter(own.values()))]
        raise WeightsError(
            f"{path}.{lacking[0]}_bmm{_SUFFIX} is missing: attention is computed over codes of "
            "q, k and v, or over none.",
            where=str(some.file),
            hint="export it with all three, or with none.",
        )
    q, k, v = (scale_at(own[letter], stored[own[letter]], LARGEST[FP8]) for letter in "qkv")
    return q, k, v


def attending(
    filled: Filled, job: Job, coded: Mapping[str, Coded], steps: Mapping[str, Steps]
) -> Filled:
    """``filled`` with the scales of attention, where the job wants them.

    Args:
        filled: what was done for the parameters.
        job: whose model it is.
        coded: weights that are codes, by name.
        steps: that came with them.

    Raises:
        UsageError: the job wants FP8 attention beside layers that are not quantized, or for a GPU
            that has no FP8.
    """
    if job.attention == PRECISION or FLOAT8 in job.allow_cast:
        why = "--attention precision" if job.attention == PRECISION else "--allow-cast float8"
        told = f"scales of {len(steps)} attentions left out ({why}): they compute in the precision"
        return replace(filled, told=(*filled.told, told)) if steps else filled
    if job.attention == ATTENTION_FP8 and job.quantize is None and not coded:
        raise UsageError(
            f"--attention fp8: it goes with quantized linear layers, and those of {job.model.name} "
            "are in the precision.",
            hint="add --quantize fp8 (or int8, nvfp4).",
        )
    where = job.weights or job.model
    if steps and not coded:
        raise UsageError(
            f"{where} has scales for attention over FP8 codes, and its linear layers are not "
            "quantized: the two go together.",
            hint="--attention precision leaves these scales out.",
        )
    if steps and (old := without(ATTENTION_FP8, job.compute_capabilities)):
        raise UsageError(
            f"{where} with --compute-capability {', '.join(old)}: it has scales for attention over "
            "FP8 codes, which are multiplied from 8.9 on.",
            hint="leave these targets out; --attention precision leaves the scales out.",
        )
    return replace(filled, attentions=dict(steps))
