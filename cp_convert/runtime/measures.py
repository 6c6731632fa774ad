"""What is measured of a rank besides its time: memory, and the share of collectives."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from typing import Any, Final

import torch

_KERNELS: Final = ("ncclDevKernel", "ncclKernel")
_WAIT: Final = "_c10d_functional::wait_tensor"


class Memory:
    """The most memory that a rank held, in bytes, from here on.

    On a GPU torch knows its own peak, and not what TensorRT allocates: that counts as far as it is
    still there at the end, which engines and contexts are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._free = 0 if device.type != "cuda" else torch.cuda.mem_get_info(device)[0]

    def peak(self) -> int:
        """Of the GPU where there is one, else of the whole process."""
        if self.device.type != "cuda":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        gone = self._free - torch.cuda.mem_get_info(self.device)[0]
        return max(gone, torch.cuda.max_memory_allocated(self.device))


def share_of_collectives(forward: Callable[[], Any], device: torch.device) -> float:
    """How much of a forward's time this rank spends in collectives, waiting included.

    On a GPU: the time of NCCL's kernels, which may overlap with others; on the CPU that of waiting
    for gloo.
    """
    activity = torch.profiler.ProfilerActivity
    on_gpu = device.type == "cuda"
    with torch.profiler.profile(activities=[activity.CUDA if on_gpu else activity.CPU]) as profile:
        begun = time.perf_counter()
        forward()
        if on_gpu:
            torch.cuda.synchronize(device)
        whole = time.perf_counter() - begun
    spent = 0.0
    for event in profile.key_averages():
        if on_gpu and event.key.startswith(_KERNELS):
            spent += event.self_device_time_total
        elif not on_gpu and event.key.startswith(_WAIT):
            spent += event.cpu_time_total
    return min(1.0, spent * 1e-6 / whole)


def name_of(device: torch.device) -> str:
    """The device in words."""
    if device.type != "cuda":
        return "CPU"
    return f"{torch.cuda.get_device_name(device)} ({device})"
