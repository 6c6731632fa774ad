"""How far apart two results are, in two norms, and in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from ..ir.proof import Error


def worst(outputs: Sequence[Tensor], reference: Sequence[Tensor]) -> Error:
    """The largest errors over all output tensors."""
    errors = [error_of(x, r) for x, r in zip(outputs, reference, strict=True)]
    return Error(max((e.max for e in errors), default=0), max((e.rms for e in errors), default=0))


def error_of(x: Tensor, reference: Tensor) -> Error:
    """Both relative errors of ``x``; infinite where ``x`` is not finite or of another shape."""
    if x.shape != reference.shape:
        return Error(math.inf, math.inf)
    x, reference = x.double(), reference.double()
    difference = x - reference
    if not bool(torch.isfinite(difference).all()):
        return Error(math.inf, math.inf)
    top, mean = reference.abs().amax().item(), reference.square().mean().sqrt().item()
    tiny = torch.finfo(torch.float64).tiny
    return Error(
        difference.abs().amax().item() / max(top, tiny),
        difference.square().mean().sqrt().item() / max(mean, tiny),
    )


ROUNDING: Final = (
    "with float32 arithmetic all ranks are right, so this is rounding or overflow: try another "
    "--precision, or allow more with --rtol."
)


def deviation(errors: Sequence[Error], bound: Error) -> str:
    """Who is beyond the bound, and by how much, in words."""
    bad = {rank: error for rank, error in enumerate(errors) if not error.within(bound)}
    rank = max(bad, key=lambda r: bad[r].max)
    which = "every rank" if len(bad) == len(errors) else f"rank {', '.join(map(str, bad))}"
    return (
        f"{which} is beyond the bound of {bound.max:.1e} (rms {bound.rms:.1e}); rank {rank} has a "
        f"relative error of {bad[rank].max:.1e} (rms {bad[rank].rms:.1e})"
    )
