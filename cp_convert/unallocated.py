"""Models whose parameters take no memory, for everything that only needs their shapes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import nn


@contextmanager
def unallocated() -> Iterator[None]:
    """Parameters that modules register within are put on the meta device; buffers stay real."""
    register = nn.Module.register_parameter

    def without_memory(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param)
        if param is not None:
            meta = nn.Parameter(param.to("meta"), requires_grad=False)
            self._parameters[name] = meta

    with patch.object(nn.Module, "register_parameter", without_memory):
        yield


def stand_in(module: nn.Module) -> None:
    """Put zeros that share one number of memory in the place of parameters without memory."""
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None and parameter.is_meta:
                zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
                owner._parameters[name] = nn.Parameter(zeros, requires_grad=False)
