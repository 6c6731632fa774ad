"""Times of single collectives between the devices of a process group.

In: a process group and its ranks. Out: curves of pairs (1e6 bytes that one rank sends,
microseconds) by operation. All ranks measure together; the slowest rank's time counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, Final

import torch
import torch.distributed as dist

from ..mesh import bytes_sent
from .curve import Curve
from .curves import Told, curve_of

_PAYLOADS: Final = (0.016, 0.064, 0.25, 1, 4, 16, 64, 192)
"""1e6 bytes that a rank puts in: from FLUX.1's text on eight ranks to K and V of 66,048 tokens."""
_ROW: Final = 20
"""Collectives in a row."""

Collective = Callable[[torch.Tensor, Any, int], object]


def collectives(
    device: torch.device, group: Any, told: Told, *, shrink: int = 1
) -> dict[str, Curve]:
    """Every collective that a strategy uses; collective over ``group``.

    Args:
        device: this rank's.
        group: the process group.
        told: is called with what is measured.
        shrink: divides sizes; tests on CPUs.
    """
    return {kind: curve_of(_points(kind, device, group, told, shrink)) for kind in _OPERATIONS}


def _points(kind: str, device: torch.device, group: Any, told: Told, shrink: int) -> Curve:
    size = dist.get_world_size(group)
    found: Curve = []
    for megabytes in _PAYLOADS:
        told(f"{kind} of {megabytes:g} MB between {size}")
        rows = int(megabytes * 1e6 / 2 / size / shrink)
        x = torch.ones(size, rows, device=device, dtype=torch.bfloat16)
        spent = _slowest(_timed(_OPERATIONS[kind], x, device, group, size), device, group)
        found.append((bytes_sent(kind, x.nbytes, size) / 1e6, spent))
    return found


def _timed(work: Collective, x: torch.Tensor, device: torch.device, group: Any, size: int) -> float:
    """Microseconds of one, the median of five rows, begun together."""
    spent = []
    for _ in range(6):
        dist.barrier(group)
        _idle(device)
        begun = time.perf_counter()
        for _ in range(_ROW):
            work(x, group, size)
        _idle(device)
        spent.append((time.perf_counter() - begun) / _ROW * 1e6)
    return statistics.median(spent[1:])


def _slowest(spent: float, device: torch.device, group: Any) -> float:
    told = torch.tensor([spent], device=device)
    dist.all_reduce(told, dist.ReduceOp.MAX, group)
    return float(told)


def _idle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _all_gather(x: torch.Tensor, group: Any, size: int) -> object:
    y = x.new_empty(size * x.shape[0], x.shape[1])
    return dist.all_gather_into_tensor(y, x, group)


def _all_to_all(x: torch.Tensor, group: Any, size: int) -> object:
    return dist.all_to_all_single(torch.empty_like(x), x, group=group)


def _all_reduce(x: torch.Tensor, group: Any, size: int) -> object:
    return dist.all_reduce(x.clone(), group=group)


def _broadcast(x: torch.Tensor, group: Any, size: int) -> object:
    return dist.broadcast(x, group_src=0, group=group)


def _reduce_scatter(x: torch.Tensor, group: Any, size: int) -> object:
    return dist.reduce_scatter_tensor(x.new_empty(1, x.shape[1]), x, group=group)


_OPERATIONS: Final[dict[str, Collective]] = {
    "ALL_GATHER": _all_gather,
    "ALL_TO_ALL": _all_to_all,
    "ALL_REDUCE": _all_reduce,
    "BROADCAST": _broadcast,
    "REDUCE_SCATTER": _reduce_scatter,
}
