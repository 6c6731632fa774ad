"""``python -m cp_convert.runtime.calibrate FOLDER PIPE``: one GPU's part of a calibration.

In: a request, see :class:`Request`. Out: on rank 0, what was measured on it and between all;
:mod:`.launch` starts one process a GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Final

import msgspec
import torch
import torch.distributed as dist

from ..errors import BackendMissing, RunFailed
from ..mesh import worlds_up_to
from .curve import Curve, Curves
from .curves import Timer, Told, attention, copies, fused, matmul, processors
from .groups import everyone, members
from .join import joined
from .serve import serve
from .torch_executor import checked_device
from .wires import collectives

_IN_USE: Final = 1 << 30
"""Bytes of a GPU's memory that others hold from which on it is called busy."""
_UNSTEADY: Final = 1.25
"""How much slower the same product may be at the end than at the beginning, or the reverse."""


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What is measured.

    Attributes:
        devices: one a rank.
        store: file by which the ranks find each other.
        timeout: seconds for which a rank may say nothing.
        shrink: divides sizes; tests on a CPU.
    """

    devices: tuple[str, ...]
    store: str
    timeout: float = 60.0
    shrink: int = 1


class Found(Curves, frozen=True, kw_only=True):
    """What was measured, and on what.

    Attributes:
        gpu: the device's name.
        memory: its bytes.
        torch: torch's version.
    """

    gpu: str
    memory: int
    torch: str


def run_rank(data: bytes, rank: int, world: int, told: Told) -> Found:
    """Measure as ``rank``; collective.

    Raises:
        BackendMissing: there is no such GPU.
        RunFailed: a GPU is busy, or they are not of one kind.
    """
    request = msgspec.json.decode(data, type=Request)
    device = checked_device(request.devices[rank], rank)
    _check_free(device)
    with joined(rank, world, device, store=request.store, timeout=request.timeout):
        name, memory = _identity(device)
        _check_alike([name] if world == 1 else everyone(name))
        found = _on_one(device, request.shrink, told)
        wires: dict[str, dict[str, Curve]] = {}
        for size in worlds_up_to(world):
            group = members(dist.group.WORLD, tuple(range(size)))
            if rank < size:
                measured = collectives(device, group, told, shrink=request.shrink)
                for kind, curve in measured.items():
                    wires.setdefault(kind, {})[str(size)] = curve
            dist.barrier()
    version = str(torch.__version__)
    return Found(
        gpu=name,
        memory=memory,
        torch=version,
        processors=processors(device),
        collectives=wires,
        **found,
    )


def _on_one(device: torch.device, shrink: int, told: Told) -> dict[str, Any]:
    timer = Timer(device)
    first = _steady(timer, shrink)
    found = {
        "matmul": matmul(timer, told, shrink=shrink),
        "attention": attention(timer, told, shrink=shrink),
        "copies": copies(timer, told, shrink=shrink),
        "fused": fused(timer, told, shrink=shrink),
    }
    last = _steady(timer, shrink)
    if device.type == "cuda" and max(first, last) > _UNSTEADY * min(first, last):
        raise RunFailed(
            f"{device} is busy or slows down: the same product took {first:.0f} microseconds at "
            f"the beginning and {last:.0f} at the end.",
            hint="calibrate a GPU on which nothing else runs.",
        )
    return found


def _steady(timer: Timer, shrink: int) -> float:
    x = torch.randn(4096 // shrink, 4096 // shrink, device=timer.device, dtype=torch.bfloat16)
    return timer(lambda: x @ x)


def _identity(device: torch.device) -> tuple[str, int]:
    if device.type != "cuda":
        return "CPU", 0
    told = torch.cuda.get_device_properties(device)
    return str(told.name), int(told.total_memory)


def _check_free(device: torch.device) -> None:
    if device.type != "cuda":
        return
    free, whole = torch.cuda.mem_get_info(device)
    if whole - free > _IN_USE:
        raise RunFailed(
            f"{device} is busy: {(whole - free) / 1e9:.1f} GB of its memory are in use.",
            hint="calibrate a GPU on which nothing else runs; --devices names others.",
        )


def _check_alike(names: list[str]) -> None:
    if len(set(names)) > 1:
        told = ", ".join(f"{rank}: {name}" for rank, name in enumerate(names))
        raise RunFailed(
            f"the GPUs are not of one kind ({told}).",
            hint="--devices names those of one kind; a hardware file describes one.",
        )


def gpus() -> int:
    """How many GPUs torch sees.

    Raises:
        BackendMissing: none.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise BackendMissing(
            "torch sees no GPU here, and calibrate measures one.",
            hint="run it where the engines will run; the file it writes can be used anywhere.",
        )
    return count


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]), run_rank)
