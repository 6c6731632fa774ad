"""The model itself in float32, for the duration of one block.

No copy of it: a forward that is wrapped on the instance, a hook, a registry of hooks hold on to the
module that they were made for, and would go on computing with that one's half-precision numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..ir.program import HALF


def is_wide(module: nn.Module) -> bool:
    """Whether nothing that the module holds is in half precision."""
    return not any(tensor.dtype in HALF for tensor in _held(module))


@contextmanager
def in_float32(module: nn.Module) -> Iterator[None]:
    """Hold the same rounded numbers in float32; float64 tables stay float64.

    Parameters and buffers stay the objects that they are, so whoever refers to them sees the wide
    numbers. Afterwards they are the very half-precision tensors that they were, in the memory (or
    the mapped file) in which they were; and what forward left behind in attributes and buffers of
    the module, tables in float32 among it, is taken back. Between, both copies are in memory.
    """
    tensors = _held(module)
    narrow = [(tensor, tensor.data) for tensor in tensors if tensor.dtype in HALF]
    others = [(t, t._version, t.clone()) for t in module.buffers() if t.dtype not in HALF]
    attributes = [(one, _snapshot(vars(one))) for one in module.modules()]
    wide: dict[tuple[Any, ...], Tensor] = {}
    try:
        for tensor, data in narrow:
            # Two names of one memory stay that: a forward may write by one, and read by the other.
            place = (data.data_ptr(), data.shape, data.stride(), data.dtype)
            tensor.data = wide.setdefault(place, data.float())
        yield
    finally:
        for tensor, data in narrow:
            tensor.data = data
        for one, before in attributes:
            _restore(vars(one), before)
        with torch.no_grad():
            for tensor, version, values in others:
                if tensor._version != version:
                    tensor.copy_(values)


def _held(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _snapshot(attributes: dict[str, Any]) -> dict[str, Any]:
    """Attributes as they are, with copies of those that are containers beside them."""
    return {name: (value, _copied(value)) for name, value in attributes.items()}


def _copied(value: Any) -> Any:
    return value.copy() if type(value) in (dict, list, set) else None


def _restore(attributes: dict[str, Any], before: dict[str, Any]) -> None:
    """The same attributes again; containers are the same objects with the same items."""
    for name in attributes.keys() - before.keys():
        del attributes[name]
    for name, (value, items) in before.items():
        attributes[name] = value
        if isinstance(items, list):
            value[:] = items
        elif items is not None:
            value.clear()
            value.update(items)
