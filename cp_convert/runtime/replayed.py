"""A function of tensors, as a CUDA graph.

In: a function whose work is the same in every call, and its tensors. Out: the same function without
the time that Python and the driver take to start its kernels and collectives. Source: PyTorch,
*CUDA semantics*, "CUDA Graphs"; NCCL's collectives can be captured as kernels are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendMissing

Outputs = Sequence[Any]


class Replayed:
    """Calls a function once, captures it in the second call, and replays it from then on.

    All ranks of a program do so alike: a captured collective meets captured ones.

    Args:
        call: of tensors by position.
        device: a GPU.

    Raises:
        BackendMissing: the device is none.
    """

    def __init__(self, call: Callable[..., Outputs], device: torch.device) -> None:
        if device.type != "cuda":
            raise BackendMissing(
                f"a CUDA graph cannot be made on {device}.", hint="leave --cuda-graph out."
            )
        self._call, self._device = call, device
        self._fixed: list[Tensor | None] = []
        self._copies: list[Tensor] = []
        self._outputs: Outputs = ()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._is_warm = False

    def __call__(self, values: Sequence[Tensor], given: Sequence[bool]) -> Outputs:
        """The function of ``values``.

        Args:
            values: its tensors on the device.
            given: which of them may be others in every call; they are copied. The rest is read
                where it lies, and where it lies elsewhere than before, the graph is made anew.
        """
        fixed = [None if may_differ else v for v, may_differ in zip(values, given, strict=True)]
        inputs = [v for v, may_differ in zip(values, given, strict=True) if may_differ]
        if self._graph is not None and not _same(fixed, self._fixed):
            self._graph = None
        if self._graph is None:
            if not self._is_warm:  # what is made once (handles, communicators) is no part of it
                self._is_warm = True
                return self._call(*values)
            self._capture(fixed, inputs)
        for copy, tensor in zip(self._copies, inputs, strict=True):
            copy.copy_(tensor)
        assert self._graph is not None
        self._graph.replay()
        return [one.clone() if isinstance(one, Tensor) else one for one in self._outputs]

    def _capture(self, fixed: list[Tensor | None], inputs: list[Tensor]) -> None:
        self._fixed, self._copies = fixed, [one.clone() for one in inputs]
        copies = iter(self._copies)
        values = [next(copies) if one is None else one for one in fixed]
        torch.cuda.synchronize(self._device)
        self._graph = torch.cuda.CUDAGraph()
        # NCCL's watchdog, a thread, asks for events meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._outputs = self._call(*values)

    def close(self) -> None:
        """Free the graph and its memory."""
        self._graph, self._outputs, self._fixed, self._copies = None, (), [], []


def _same(ones: Sequence[Tensor | None], others: Sequence[Tensor | None]) -> bool:
    return all(one is other for one, other in zip(ones, others, strict=True))
