"""What the TensorRT executor asks of CUDA, NCCL and torch; tests stand in for this class."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Gpu:
    """One rank's GPU, by torch.

    Args:
        device: such as ``cuda:1``.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: torch.cuda.Stream | None = None

    def use(self) -> None:
        """Make it CUDA's current device, on which TensorRT puts what it makes."""
        torch.cuda.set_device(self.device)

    @staticmethod
    def count() -> int:
        """How many GPUs torch sees."""
        return torch.cuda.device_count() if torch.cuda.is_available() else 0

    def capability(self) -> tuple[int, int]:
        """Compute capability."""
        major, minor = torch.cuda.get_device_capability(self.device)
        return major, minor

    def free(self) -> int:
        """Bytes that can be had."""
        free, _ = torch.cuda.mem_get_info(self.device)
        return free

    def nccl(self) -> tuple[int, ...]:
        """The version of NCCL that torch has loaded, which TensorRT takes as well."""
        return tuple(torch.cuda.nccl.version())

    def stream(self) -> int:
        """An own stream's handle: TensorRT synchronises more on the default one."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        return self._stream.cuda_stream

    def before(self) -> None:
        """What was put on torch's stream is done before our stream goes on."""
        assert self._stream is not None
        self._stream.wait_stream(torch.cuda.current_stream(self.device))

    def after(self) -> None:
        """Our stream is done before torch's goes on."""
        assert self._stream is not None
        torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def communicator(self, group: Any) -> int:
        """Address of the group's ``ncclComm_t``; there is none before a first collective."""
        dist.all_reduce(torch.zeros(1, device=self.device), group=group)
        torch.cuda.synchronize(self.device)
        backend: Any = group._get_backend(self.device)
        return int(backend._comm_ptr())

    def empty(self, shape: list[int], dtype: torch.dtype) -> Tensor:
        """Memory, aligned as torch does: to 512 bytes, where TensorRT wants 256."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def synchronize(self) -> None:
        """Wait for all that is under way."""
        torch.cuda.synchronize(self.device)

    def captured(self, work: Any) -> Any:
        """``work``, which puts something on our stream, as a CUDA graph that can be replayed.

        Other threads go on: NCCL's watchdog asks for events while the graph is captured.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            work()
        return graph

    def replay(self, graph: Any) -> None:
        """A captured graph again, on our stream."""
        with torch.cuda.stream(self._stream):
            graph.replay()


def capsule(address: int) -> object:
    """The address in a ``PyCapsule``, as TensorRT's Python API takes a communicator."""
    new = ctypes.pythonapi.PyCapsule_New
    new.restype = ctypes.py_object
    new.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return new(address, None, None)
