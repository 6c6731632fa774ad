"""Times of single kernels on one device: products, attentions, what only reads and writes.

In: a device. Out: curves of pairs (size, microseconds), as a hardware file holds them. Every kernel
is measured in a row of its like, replayed as a CUDA graph, so that what is in a time is the kernel
and its start on the GPU, and not the Python that launches it: a TensorRT engine has no Python.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import cycle
from math import exp, log
from typing import Final

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from .curve import Curve

Told = Callable[[str], None]

_ROWS: Final = (288, 576, 1152, 2304, 4608, 8448, 16896, 33024)
"""Tokens of one rank, as FLUX.1, Wan and their like have them at one to eight ranks. Fewer would
be as long as reading the weights takes, which :func:`copies` measures."""
_WEIGHTS: Final = ((3072, 3072), (3072, 12288), (15360, 3072))
"""Inputs and outputs of a linear layer: FLUX.1's, whose width many others have as well."""
_LENGTHS: Final = (
    (288, 2304), (576, 4608), (1152, 4608), (2304, 4608), (4608, 4608),
    (4224, 16896), (8448, 16896), (16896, 16896), (16512, 66048),
)  # fmt: skip
"""Queries and keys."""
_HEADS: Final = 24
_HEAD_DIMS: Final = (64, 128)
_MEGABYTES: Final = (0.02, 0.1, 0.5, 2, 8, 32, 64, 128, 512, 1024)
_KERNELS: Final = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
TILE: Final = 128
"""Queries that one processor of the GPU attends with at a time, in the usual fused kernels."""
_COLD: Final = 256e6
"""Bytes of weights to go round in: more than any cache holds, as a model's are."""


def processors(device: torch.device) -> int:
    """Of a GPU; a CPU counts as one."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


class Timer:
    """Microseconds of a kernel.

    Args:
        device: a GPU, or the CPU (for tests).
        seconds: for which each kernel is repeated at least.
    """

    def __init__(self, device: torch.device, seconds: float = 0.03) -> None:
        self.device, self.seconds = device, seconds

    def __call__(self, work: Callable[[], object]) -> float:
        """Of one ``work()``: the median of five rows of them."""
        for _ in range(3):
            work()
        if self.device.type != "cuda":
            return self._by_clock(work)
        once = max(self._replayed(self._captured(work, 4), 1) / 4, 1e-7)
        count = max(4, min(200, int(0.005 / once)))
        graph = self._captured(work, count)
        times = max(1, round(self.seconds / 5 / (count * once)))
        spent = [self._replayed(graph, times) / (count * times) for _ in range(5)]
        return statistics.median(spent) * 1e6

    def _captured(self, work: Callable[[], object], count: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for _ in range(count):
                work()
        return graph

    def _replayed(self, graph: torch.cuda.CUDAGraph, times: int) -> float:
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()
        begun.record()
        for _ in range(times):
            graph.replay()
        ended.record()
        torch.cuda.synchronize(self.device)
        return float(begun.elapsed_time(ended)) / 1e3

    def _by_clock(self, work: Callable[[], object]) -> float:
        spent = []
        for _ in range(5):
            begun = time.perf_counter()
            work()
            spent.append(time.perf_counter() - begun)
        return statistics.median(spent) * 1e6


def matmul(timer: Timer, told: Told, *, shrink: int = 1) -> Curve:
    """Products in bfloat16, by 1e9 operations.

    Args:
        timer: of the device.
        told: is called with what is measured.
        shrink: divides every dimension; tests on a CPU.
    """
    found: Curve = []
    for inputs, outputs in ((a // shrink, b // shrink) for a, b in _WEIGHTS):
        count = max(1, round(_COLD / shrink / (2 * inputs * outputs)))
        weights = [_random(timer, outputs, inputs) for _ in range(count)]
        for rows in (max(1, n // shrink) for n in _ROWS):
            told(f"products of {rows} tokens")
            x, one = _random(timer, rows, inputs), cycle(weights)
            spent = timer(lambda: torch.nn.functional.linear(x, next(one)))  # noqa: B023
            found.append((2e-9 * rows * inputs * outputs, spent))
    return curve_of(found)


def attention(timer: Timer, told: Told, *, shrink: int = 1) -> dict[str, Curve]:
    """Fused attentions over 24 heads in bfloat16, by head size and 1e9 operations.

    Where there are fewer tiles of queries than processors, operations count as if there were as
    many: see :meth:`cp_convert.advise.hardware.Hardware.attention`.
    """
    return {str(dim): curve_of(_attention(timer, told, dim, shrink)) for dim in _HEAD_DIMS}


def _attention(timer: Timer, told: Told, dim: int, shrink: int) -> Iterator[tuple[float, float]]:
    for queries, keys in ((max(1, q // shrink), max(1, k // shrink)) for q, k in _LENGTHS):
        told(f"attention of {queries} queries over {keys} keys, heads of {dim}")
        q = _random(timer, 1, _HEADS, queries, dim)
        k, v = (_random(timer, 1, _HEADS, keys, dim) for _ in range(2))
        with _fused(timer):
            spent = timer(lambda: scaled_dot_product_attention(q, k, v))  # noqa: B023
        tiles = _HEADS * -(-queries // TILE)
        idle = max(1.0, processors(timer.device) / tiles)
        yield 4e-9 * _HEADS * queries * keys * dim * idle, spent


def _fused(timer: Timer) -> AbstractContextManager[None]:
    if timer.device.type != "cuda":
        return nullcontext()
    chosen: AbstractContextManager[None] = sdpa_kernel(_KERNELS, set_priority=True)
    return chosen


def copies(timer: Timer, told: Told, *, shrink: int = 1) -> Curve:
    """An addition in memory, by 1e6 bytes read and written: what bounds any other kernel."""
    found: Curve = []
    for size in _MEGABYTES:
        told(f"reading and writing {size:g} MB")
        x = _random(timer, max(1, int(size * 1e6 / 4 / shrink)))
        y = torch.empty_like(x)
        found.append((4e-6 * x.numel(), timer(lambda: torch.add(x, 1, out=y))))  # noqa: B023
    return curve_of(found)


def fused(timer: Timer, told: Told, *, shrink: int = 1) -> Curve:
    """What stands between products, by 1e6 bytes read and written.

    The mean of three kernels over rows of 3072 numbers: a GELU, a layer norm, and an addition.
    """
    width = 3072 // shrink
    found: Curve = []
    for size in _MEGABYTES:
        told(f"activations of {size:g} MB")
        x = _random(timer, max(1, int(size * 1e6 / 4 / 3072)), width)
        kernels: tuple[Callable[[], Tensor], ...] = (
            lambda: torch.nn.functional.gelu(x, approximate="tanh"),  # noqa: B023
            lambda: torch.nn.functional.layer_norm(x, (width,)),  # noqa: B023
            lambda: x + 1,  # noqa: B023
        )
        found.append((4e-6 * x.numel(), sum(timer(kernel) for kernel in kernels) / len(kernels)))
    return curve_of(found)


def curve_of(points: Iterable[tuple[float, float]]) -> Curve:
    """Ascending; of points within a hundredth of the same size one, their geometric mean."""
    found: list[list[tuple[float, float]]] = []
    for point in sorted(points):
        if found and point[0] < 1.01 * found[-1][0][0]:
            found[-1].append(point)
        else:
            found.append([point])
    return [(_rounded(group[0][0]), _rounded(_mean([us for _, us in group]))) for group in found]


def _mean(values: list[float]) -> float:
    return exp(sum(map(log, values)) / len(values))


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _random(timer: Timer, *shape: int) -> Tensor:
    return torch.randn(shape, device=timer.device, dtype=torch.bfloat16)
