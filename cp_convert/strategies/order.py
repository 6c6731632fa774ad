"""When something is issued, where no number says so. In and out: tensors, numbers unchanged.

A compiler orders a program by its data: what depends on nothing may be issued first, and what it
returned is held until it is used. A strategy whose point is that little is alive has to give later
collectives a reason to wait.
"""

from __future__ import annotations

import torch
from torch import Tensor


def after(done: Tensor | None, x: Tensor) -> Tensor:
    """``x`` itself, which is not there before ``done`` is; no compiler knows that it always is."""
    if done is None:
        return x
    number = done.flatten()[:1].reshape([1] * x.dim())
    return torch.where(number <= number.abs(), x, 0.0)
