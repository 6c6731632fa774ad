"""Whether all ranks' outputs are one another's, and the reference's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..bundle.manifest import Manifest
from ..errors import RunFailed
from ..prove.errors import error_of

SAME: float = 1e-5
"""Relative error up to which ranks agree: all of them were given the same tensor by a gather."""


def check_finite(outputs: Mapping[str, Tensor], rank: int) -> None:
    """Refuse infinities and NaN.

    Raises:
        RunFailed: an output has some.
    """
    for name, value in outputs.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            count = int((~torch.isfinite(value)).sum())
            raise RunFailed(
                f"the output {name} of rank {rank} has {count} infinities or NaN among "
                f"{value.numel()} numbers.",
                hint="half precision may overflow: convert with --precision bf16, or look at the "
                "inputs; --no-check shows them all the same.",
            )


def apart(outputs: Mapping[str, Tensor], device: torch.device) -> list[float]:
    """By rank, how far its outputs are from rank 0's; collective.

    Args:
        outputs: this rank's.
        device: where the process group's collectives want tensors.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [0.0]
    worst = 0.0
    for name in sorted(outputs):
        own = outputs[name].to(device).contiguous()
        first = own.clone()
        dist.broadcast(first, 0)
        worst = max(worst, error_of(own, first).max)
    told: list[float] = [0.0] * dist.get_world_size()
    dist.all_gather_object(told, worst)
    return told


def against_torch(
    outputs: Mapping[str, Tensor], reference: Mapping[str, Tensor], manifest: Manifest
) -> float:
    """How far an engine's outputs are from what torch makes of the stored program.

    The bound is the proof's, where there was one: twice what a rounding may cost covers two.

    Raises:
        RunFailed: they are further apart than that.
    """
    error = max((error_of(outputs[name], reference[name]).max for name in outputs), default=0.0)
    bound = manifest.proof.bound
    if bound is not None and not error <= bound.max:
        raise RunFailed(
            f"the engines return something else than the stored program: relative error "
            f"{error:.1e} (bound {bound.max:.1e}).",
            hint="the run-time computes them differently than they were proven; is it the release "
            "that the manifest names?",
        )
    return error


def check_alike(errors: Sequence[float]) -> None:
    """Refuse ranks that disagree.

    Raises:
        RunFailed: some do; they are named.
    """
    lying = [rank for rank, error in enumerate(errors) if not error <= SAME]
    if lying:
        names = ", ".join(map(str, lying))
        largest = max((errors[r] for r in lying), key=lambda e: math.inf if math.isnan(e) else e)
        raise RunFailed(
            f"rank {names} of {len(errors)} returns something else than rank 0: relative error "
            f"{largest:.1e}.",
            hint="ranks were given other inputs or weights, or communicate with the wrong peers; "
            "on TensorRT before 11.4 and RTX before 1.7.1 groups are ignored silently.",
        )
