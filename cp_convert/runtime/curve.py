"""What is measured of a GPU, as data: sizes and microseconds. No torch."""

from __future__ import annotations

import msgspec

Curve = list[tuple[float, float]]
"""Pairs of a size and microseconds, sizes ascending."""


class Curves(msgspec.Struct, frozen=True, kw_only=True):
    """Times of single kernels in a row of their like, so that starting them is in them.

    Attributes:
        processors: multiprocessors of the GPU.
        matmul: products in bfloat16, by 1e9 operations.
        attention: in bfloat16, by head size and by 1e9 operations, which count as many times as
            there are more processors than tiles of queries.
        copies: one kernel that only reads and writes, by 1e6 bytes, both counted.
        fused: one of those that stand between products, likewise.
        collectives: by operation (``ALL_GATHER``), ranks, and 1e6 bytes that one rank sends.
    """

    processors: int
    matmul: Curve
    attention: dict[str, Curve]
    copies: Curve
    fused: Curve
    collectives: dict[str, dict[str, Curve]] = {}
