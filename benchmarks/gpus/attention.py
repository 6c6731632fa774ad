"""One GPU: one rank's attention as strategies split it; ``python -m benchmarks.gpus.attention``.

In: random Q, K and V, 24 heads of 128, bfloat16; W chunks of keys, as they would have arrived. Out:
a line of JSON for every length, world and way: milliseconds (compiled, median of ten), and the
error of two heads against float32.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cp_convert.strategies.online import OnlineAttention
from cp_convert.strategies.parts import Fused, Joined, Parts

HEADS, DIM = 24, 128
SCALE = DIM**-0.5
CASES = (
    (4608, 2),
    (4608, 4),
    (4608, 8),
    (16896, 2),
    (16896, 4),
    (16896, 8),
    (66048, 4),
    (66048, 8),
)
KERNELS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
Chunks = tuple[Tensor, ...]


def by(parts: Parts, ks: Chunks, vs: Chunks) -> Tensor:
    """The attention over the chunks in turn."""
    start = 0
    for k, v in zip(ks, vs, strict=True):
        parts.add(k, v, [(start, start + k.shape[2])])
        start += k.shape[2]
    return parts.result()


def streamed(q: Tensor, ks: Chunks, vs: Chunks) -> Tensor:
    """Six heads at a time, as stream-kv has them."""
    k, v = torch.cat(ks, 2), torch.cat(vs, 2)
    groups = (x.split(6, 1) for x in (q, k, v))
    return torch.cat([_fused(*part) for part in zip(*groups, strict=True)], 1)


def _fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=SCALE)


WAYS: dict[str, Callable[[Tensor, Chunks, Chunks], Tensor]] = {
    "one fused attention": lambda q, ks, vs: by(Joined(q, SCALE, None), ks, vs),
    "heads in turn": streamed,
    "fused, merged": lambda q, ks, vs: by(Fused(q, ks[0], SCALE, None), ks, vs),
    "explicit": lambda q, ks, vs: by(OnlineAttention(q, SCALE, None, ks[0].shape[2]), ks, vs),
}


def milliseconds(forward: Callable[[], Tensor]) -> float:
    """Median of ten calls, after three."""
    spent = []
    for _ in range(13):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        forward()
        torch.cuda.synchronize()
        spent.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(spent[3:])


def lost(out: Tensor, truth: Tensor) -> float:
    """Relative, root mean square, of the first two heads."""
    return float((out[:, :2].float() - truth).norm() / truth.norm())


def measured(tokens: int, world: int) -> None:
    """One line a way."""
    q, k, v = (torch.randn(1, HEADS, tokens, DIM, device="cuda").bfloat16() for _ in range(3))
    q = (2 * q[:, :, : tokens // world]).contiguous()
    ks, vs = k.chunk(world, 2), v.chunk(world, 2)
    wide = [x[:, :2].float() for x in (q, k, v)]
    parts = OnlineAttention(wide[0], SCALE, None, tokens)
    parts.add(wide[1], wide[2], [])
    truth = parts.result()
    for name, way in WAYS.items():
        if name == "explicit" and (tokens, world) != (4608, 4):
            continue
        torch._dynamo.reset()
        fast = torch.compile(way, dynamic=False)
        told = {"tokens": tokens, "world": world, "way": name}
        ms, error = milliseconds(lambda: fast(q, ks, vs)), lost(fast(q, ks, vs), truth)  # noqa: B023
        print(json.dumps({"attention": told, "ms": round(ms, 3), "error": error}), flush=True)


def heads() -> None:
    """What a wider head costs."""
    for dim in (128, 136, 144, 160, 192):
        x = [torch.randn(1, HEADS, n, dim, device="cuda").bfloat16() for n in (4224, 4224, 4224)]
        ms = milliseconds(lambda: _fused(*x))  # noqa: B023
        print(json.dumps({"head": dim, "ms": round(ms, 3)}), flush=True)


if __name__ == "__main__":
    with torch.no_grad(), sdpa_kernel(KERNELS, set_priority=True):
        heads()
        for tokens, world in CASES:
            measured(tokens, world)
