"""Python numbers in a tensor's type: whether it holds them, and what it makes of them."""

from __future__ import annotations

import torch

Number = bool | int | float


def rounded(number: Number, dtype: torch.dtype) -> Number:
    """``number`` as ``dtype`` holds it: the nearest, or infinity beyond the largest."""
    if holds(number, dtype):
        return number
    return float(torch.tensor(float(number), dtype=torch.float64).to(dtype))


def holds(number: Number, dtype: torch.dtype) -> bool:
    """Whether ``dtype`` holds ``number`` exactly; a floating type holds NaN, too."""
    exact = torch.tensor(float(number), dtype=torch.float64)
    kept = exact.to(dtype).double()
    return bool(kept == exact) or bool(exact.isnan())
