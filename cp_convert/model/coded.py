"""A weight that is stored as codes, and its scales, read and checked by name.

In: where files hold tensors. Out: what a code of 1 stands for. The formats that name these scales
differently stand beside: :mod:`.modelopt` and :mod:`.comfy`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from ..errors import WeightsError
from ..ir.nvfp4 import BLOCK, PAIRS, dequantize_blocks
from ..ir.quantize import FP8, SCALES, are_scales, dequantize
from ..ir.source import Codes
from ..ir.tensors import Location, bytes_of, opened, tensor_at
from .quantized import FLOATS, UNQUANTIZED

WEIGHT: Final = ".weight"
_NAN, _MINUS_ZERO = 0x7F, 0x80
"""Codes of E4M3; those above are less than zero, or the other NaN."""
KINDS: Final = {FP8: "FP8", torch.int8: "INT8", PAIRS: "NVFP4"}
"""What codes are called."""


@dataclass(frozen=True)
class Coded:
    """How a stored weight is to be read.

    Attributes:
        weight_scale: what a code of 1 stands for; of each row, float32 ``[N]``, or of all.
        input_scale: the same for the codes of the layer's input; ``None`` where the checkpoint
            tells none.
        by_token: whether each token of the input has a scale of its own then; if not, only the
            weight is quantized.
        by_whole: whether the whole input has one that is computed as it runs. All ranks would have
            to know it: it is not taken, and something else has to be put in its place.
        smooth: what columns of the input are multiplied with before, float32 ``[K]``.
        dtype: of the codes.
        blocks: NVFP4's scales of blocks, E4M3 ``[N, K/16]``.
        blocks_at: where a file holds them so; ``None`` where they were computed.
        low_rank: factors ``[R, K]`` and ``[N, R]`` of what is added to the weight.
        is_swapped: whether the even column is the upper half of a byte, and not the lower.
    """

    weight_scale: float | Tensor
    input_scale: float | None
    by_token: bool = False
    smooth: Tensor | None = None
    dtype: torch.dtype = FP8
    blocks: Tensor | None = None
    blocks_at: Location | None = None
    low_rank: tuple[Tensor, Tensor] | None = None
    is_swapped: bool = False
    by_whole: bool = False

    @property
    def is_multiplied(self) -> bool:
        """Whether the input becomes codes, too."""
        return self.by_token or self.input_scale is not None

    def numbers(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """What ``codes`` ``[N, K]`` stand for, in ``dtype``: the weight of the plain layer."""
        if self.blocks is not None:
            return self._of_blocks(codes).to(dtype)
        if self.smooth is None and not isinstance(self.weight_scale, Tensor):
            return dequantize(codes, self.weight_scale, dtype)
        found = codes.float()
        found *= torch.as_tensor(self.weight_scale).reshape(-1, 1)
        return (found if self.smooth is None else found.mul_(self.smooth)).to(dtype)

    def of(self, codes: Tensor) -> Codes:
        """The same with its codes."""
        given = self.weight_scale, self.input_scale, self.by_token, self.smooth
        return Codes(codes, *given, self.blocks, self.low_rank)

    def _of_blocks(self, codes: Tensor) -> Tensor:
        assert self.blocks is not None and isinstance(self.weight_scale, float)
        found = dequantize_blocks(codes, self.blocks, self.weight_scale, torch.float32)
        if self.low_rank is not None:
            down, up = (factor.float() for factor in self.low_rank)
            found += up @ down
        return found if self.smooth is None else found.mul_(self.smooth)


def shape_of(shape: tuple[int, ...], coded: Coded | None) -> tuple[int, ...]:
    """Of the numbers, where a tensor of this shape is stored: NVFP4 has two in a byte."""
    is_paired = coded is not None and coded.blocks is not None
    return (*shape[:-1], 2 * shape[-1]) if is_paired else shape


def scale_at(name: str, at: Location, of_one: float = 1.0) -> float:
    """One scale.

    Args:
        name: of the stored tensor, for messages.
        at: where it is.
        of_one: what the stored number is of it: a largest magnitude is a largest code's.

    Raises:
        WeightsError: it is of another shape or type, or none: see :data:`..ir.quantize.SCALES`.
    """
    if at.shape not in ((), (1,), (1, 1)) or at.kind not in FLOATS:
        raise WeightsError(
            f"{name} of {at.file.name} is {at.kind}{list(at.shape)}; a scale for the whole tensor "
            "is one number.",
            where=str(at.file),
            hint="scales by rows, channels or blocks are not understood here; " + UNQUANTIZED,
        )
    return float(_scales(name, at, of_one)) / of_one


def scales_at(name: str, at: Location, count: int, what: str) -> Tensor:
    """One scale for each of ``count`` rows, or columns: float32 ``[count]``.

    Args:
        name: of the stored tensor, for messages.
        at: where it is, ``[count]`` or ``[count, 1]``.
        count: how many there must be.
        what: has them, in the plural.

    Raises:
        WeightsError: it is of another shape or type, or one is none.
    """
    if at.shape not in ((count,), (count, 1)) or at.kind not in FLOATS:
        raise WeightsError(
            f"{name} of {at.file.name} is {at.kind}{list(at.shape)}; there are {count} {what}, and "
            "each has one scale.",
            where=str(at.file),
            hint="the checkpoint is broken, or of another format; " + UNQUANTIZED,
        )
    return _scales(name, at).reshape(count).clone()


def blocks_at(name: str, at: Location, shape: tuple[int, int], numbers: tuple[int, int]) -> Tensor:
    """The scale of each block of 16 columns, E4M3 in the stored ``shape``.

    Args:
        name: of the stored tensor, for messages.
        at: where it is.
        shape: that it must have.
        numbers: of the weight.

    Raises:
        WeightsError: it is of another shape or type, or one is negative, or not finite.
    """
    rows, columns = numbers
    if at.dtype != FP8 or at.shape != shape or columns % BLOCK:
        raise WeightsError(
            f"{name} of {at.file.name} is {at.kind}{list(at.shape)}; of {rows} rows of {columns} "
            f"numbers, blocks of {BLOCK} have scales F8_E4M3{list(shape)}.",
            where=str(at.file),
            hint="the checkpoint is broken, or has blocks of another size; " + UNQUANTIZED,
        )
    at.check_unchanged()
    found = tensor_at(at, bytes_of(at.file)).clone()
    bits = found.view(torch.uint8)  # casting them takes a minute a GB
    # Zero, of either sign, is a scale: that of a block of zeros. NaN, and what is less, is none.
    bad = found[(bits == _NAN) | (bits > _MINUS_ZERO)]
    if bad.numel():
        raise _no_scale(name, at, float(bad[0]))
    return found


def _scales(name: str, at: Location, of_one: float = 1.0) -> Tensor:
    value = numbers_at(at)
    bad = value[~are_scales(value / of_one)]
    if bad.numel():
        raise _no_scale(name, at, float(bad[0]))
    return value


def _no_scale(name: str, at: Location, value: float) -> WeightsError:
    what = "a positive number"
    if 0 < value < float("inf"):
        what = f"between {SCALES[0]:.1e} and {SCALES[1]:.1e}, where float32 holds one over it, too"
    return WeightsError(
        f"{name} of {at.file.name} is {value}; a scale is {what}.",
        where=str(at.file),
        hint="the checkpoint is broken; fetch or export it again.",
    )


def numbers_at(at: Location) -> Tensor:
    """A stored tensor's numbers in float32, in the stored shape.

    Raises:
        WeightsError: the file was changed meanwhile.
    """
    at.check_unchanged()
    return tensor_at(at, bytes_of(at.file)).to(torch.float32)


def metadata_of(stored: Mapping[str, Location]) -> dict[str, tuple[str, Location]]:
    """What the headers of the files say beside their tensors, and a tensor of the file."""
    every = metadata_by_file(stored)
    return {name: (text, at) for at, told in every for name, text in told.items()}


def metadata_by_file(
    stored: Mapping[str, Location],
) -> Iterator[tuple[Location, Mapping[str, str]]]:
    """The same file by file: a tensor of it, and what its header says."""
    for at in {at.file: at for at in stored.values()}.values():
        with opened(at.file) as file:
            yield at, file.metadata() or {}


def not_quantized(
    scale: str, weight: str, stored: Mapping[str, Location], kind: str = "FP8"
) -> WeightsError:
    """The complaint about a scale, or what speaks of one, whose weight is no such codes."""
    at = stored.get(weight)
    what = "is not there" if at is None else f"is stored as {at.kind} and not quantized to {kind}"
    return WeightsError(
        f"{scale} is a scale, and {weight} {what}.",
        where=str(next(stored[n] for n in (scale, weight, *stored) if n in stored).file),
        hint="the checkpoint is mixed up, or of another format; " + UNQUANTIZED,
    )


def missing(
    scale: str, weight: str, at: Location, why: str = "", hint: str = "", kind: str = "FP8"
) -> WeightsError:
    """The complaint about codes without a scale."""
    return WeightsError(
        f"{scale} is missing: {weight} is stored in {kind}, and has no such scale{why}.",
        where=str(at.file),
        hint=hint + UNQUANTIZED,
    )
