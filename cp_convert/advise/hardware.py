"""What a GPU can do, from one TOML file: published rates, and curves that were measured. No torch.

Peak rates are published ones, and every file says where. The shares of them that a real program
reaches are assumptions; they stand in the same file and can be changed there. A file with a table
``measured``, as ``cp-convert calibrate`` writes it, needs none of them for what was measured.
"""

from __future__ import annotations

import math
import tomllib
from bisect import bisect
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from ..errors import UsageError
from ..model.shipped import shipped
from ..runtime.curve import Curve, Curves
from ..words import near

_HEADS: Final = (32, 64, 96, 128, 192, 256)
"""Sizes that FlashAttention has kernels for (``csrc/flash_attn/src/static_switch.h``)."""
_NOTHING: Final = 1e-9


class Measured(Curves, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """What was measured, with ``by``: on what, when and with which torch."""

    by: str

    def __post_init__(self) -> None:
        tables = [self.matmul, self.copies, self.fused, *self.attention.values()]
        tables += [curve for by_size in self.collectives.values() for curve in by_size.values()]
        for curve in tables:
            sizes = [size for size, _ in curve]
            if not curve or sizes != sorted(set(sizes)) or min(min(pair) for pair in curve) <= 0:
                raise ValueError("a curve's sizes ascend, and it has positive numbers only")


class Hardware(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """One kind of GPU and what joins several of them.

    Attributes:
        title: its name in words.
        source: where the rates are published.
        half_tflops: dense matrix products in float16 or bfloat16, 1e12 operations a second.
        tf32_tflops: the same in float32 arithmetic (TF32).
        memory_gb: of one GPU, 1e9 bytes.
        memory_gb_per_s: memory bandwidth.
        link_gb_per_s: what one GPU sends to its peers, one direction.
        matmul_share: of the peak that matrix products reach; assumed, an H200 was measured at
            0.64 to 0.76.
        attention_share: of the peak that attention reaches; assumed, likewise at 0.56 to 0.7.
        memory_share: of the memory bandwidth that is reached; assumed.
        link_share: of the link that a collective reaches; assumed.
        collective_us: microseconds that a collective takes besides its bytes; assumed.
        kernel_us: microseconds that a kernel takes at least; assumed.
        measured: curves, which go before all of these.
    """

    title: str
    source: str
    half_tflops: float
    tf32_tflops: float
    memory_gb: float
    memory_gb_per_s: float
    link_gb_per_s: float
    matmul_share: float = 0.65
    attention_share: float = 0.6
    memory_share: float = 0.8
    link_share: float = 0.7
    collective_us: float = 20.0
    kernel_us: float = 2.0
    measured: Measured | None = None

    def holds(self, size: int) -> bool:
        """Whether one GPU has memory for ``size`` bytes."""
        return size <= self.memory_gb * 1e9

    def product(self, operations: int, size: int, *, half: bool) -> float:
        """Seconds of a matrix product: the longer of its arithmetic and its ``size`` bytes."""
        if half and self.measured is not None:
            return max(at(self.measured.matmul, operations / 1e9), self.traffic(size))
        return max(operations / self._rate(self.matmul_share, half), self.traffic(size))

    def attention(
        self, operations: int, size: int, *, head_dim: int, tiles: int, half: bool
    ) -> float:
        """Seconds of a fused attention.

        Args:
            operations: of all heads.
            size: bytes that are read and written.
            head_dim: numbers of a head.
            tiles: of 128 queries of one head; each is one processor's work, and where there are
                fewer of them, processors are idle.
            half: whether it computes in float16 or bfloat16.
        """
        operations = round(operations * padded(head_dim) / head_dim)
        if half and self.measured is not None:
            known = {int(name): curve for name, curve in self.measured.attention.items()}
            nearest = min(known, key=lambda dim: abs(dim - head_dim))
            idle = max(1.0, self.measured.processors / tiles)
            return max(at(known[nearest], operations * idle / 1e9), self.traffic(size))
        return max(operations / self._rate(self.attention_share, half), self.traffic(size))

    def fused(self, size: int) -> float:
        """Seconds of a kernel that stands between products and reads and writes ``size`` bytes."""
        if self.measured is not None:
            return at(self.measured.fused, size / 1e6)
        return self.traffic(size)

    def traffic(self, size: int) -> float:
        """Seconds of a kernel that does nothing but read and write ``size`` bytes."""
        if self.measured is not None:
            return at(self.measured.copies, size / 1e6)
        rate = self.memory_gb_per_s * 1e9 * self.memory_share
        return max(size / rate, self.kernel_us * 1e-6)

    def collective(self, kind: str, ranks: int, sent: int) -> float:
        """Seconds of a collective of ``ranks``, each of which sends ``sent`` bytes."""
        curve = self._collective(kind, ranks)
        if curve is not None:
            return at(curve, sent / 1e6)
        return self.collective_us * 1e-6 + sent / (self.link_gb_per_s * 1e9 * self.link_share)

    def _collective(self, kind: str, ranks: int) -> Curve | None:
        if self.measured is None:
            return None
        by_size = self.measured.collectives.get(kind, {})
        return by_size.get(str(ranks))

    def _rate(self, share: float, half: bool) -> float:
        return (self.half_tflops if half else self.tf32_tflops) * 1e12 * share


def at(curve: Sequence[tuple[float, float]], size: float) -> float:
    """Seconds at ``size``: along straight lines between logarithms; beyond the ends, as there.

    Below the smallest size it goes on as between the first two, and what does not get faster there
    stays as it is; beyond the largest time grows as the size does.
    """
    sizes = [one for one, _ in curve]
    if len(curve) == 1 or size >= sizes[-1]:
        return curve[-1][1] * 1e-6 * max(1.0, size / sizes[-1])
    first = max(bisect(sizes, size) - 1, 0)
    (x0, y0), (x1, y1) = curve[first : first + 2]
    if size < x0 and y1 <= y0:
        return y0 * 1e-6
    share = math.log(max(size, _NOTHING) / x0) / math.log(x1 / x0)
    return float(y0 * (y1 / y0) ** share * 1e-6)


def padded(head_dim: int) -> int:
    """The head that a kernel computes with: shorter ones are padded."""
    return next((size for size in _HEADS if size >= head_dim), head_dim)


def names() -> list[str]:
    """Of all hardware that is described."""
    return sorted(shipped("cp_convert.configs.hardware"))


def read(name: str) -> Hardware:
    """The hardware of this name, or in the TOML file of this path.

    Raises:
        UsageError: there is none, or the file describes none.
    """
    path = shipped("cp_convert.configs.hardware").get(name, Path(name))
    if path.suffix != ".toml":
        raise UsageError(
            f"--hardware {name}: not known.",
            hint=f"{near(name, names())} A TOML file can be named, too.",
        )
    try:
        return msgspec.convert(tomllib.loads(path.read_text()), Hardware)
    except OSError as error:
        raise UsageError(f"--hardware {path}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise UsageError(f"--hardware {path} describes no hardware: {error}.") from error
