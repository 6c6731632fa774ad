"""Models whose parameters take no memory, for everything that only needs their shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor, nn


@contextmanager
def unallocated() -> Iterator[None]:
    """Parameters that modules register within are put on the meta device; buffers stay real."""
    register = nn.Module.register_parameter

    def without_memory(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param)
        if param is not None and not param.is_meta:  # one that is tied has been replaced before
            self._parameters[name] = nn.Parameter(param.to("meta"), requires_grad=False)

    with patch.object(nn.Module, "register_parameter", without_memory):
        yield


def stand_in(module: nn.Module) -> None:
    """Put zeros that share one number of memory in the place of parameters without memory."""
    empty = [p for p in module.parameters() if p.is_meta]
    replace(module, {p: torch.zeros((), dtype=p.dtype).expand(p.shape) for p in empty})


@contextmanager
def with_memory(module: nn.Module) -> Iterator[None]:
    """Parameters without numbers are lent memory that nobody writes to, so that it takes none.

    Traces see a plain tensor then. Its contents mean nothing: what outlives this must not hold it.
    """
    held = [(owner, name, p) for owner in module.modules() for name, p in _empty(owner)]
    lent = {p: nn.Parameter(torch.empty(p.shape, dtype=p.dtype), False) for _, _, p in held}
    for owner, name, parameter in held:
        owner._parameters[name] = lent[parameter]
    try:
        yield
    finally:
        for owner, name, parameter in held:
            owner._parameters[name] = parameter


def _empty(owner: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in owner._parameters.items() if p is not None and p.is_meta]


def replace(module: nn.Module, values: Mapping[nn.Parameter, Tensor]) -> None:
    """Put a value in the place of each of the parameters wherever it stands, so that ties stay."""
    new = {held: nn.Parameter(value, requires_grad=False) for held, value in values.items()}
    for owner in module.modules():
        for name, held in owner._parameters.items():
            if held in new:
                owner._parameters[name] = new[held]
