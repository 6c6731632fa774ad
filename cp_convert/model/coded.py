"""A weight that is stored as codes, and its scales, read and checked by name.

In: where files hold tensors. Out: what a code of 1 stands for. The formats that name these scales
differently stand beside: :mod:`.modelopt` and :mod:`.comfy`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from ..errors import WeightsError
from ..ir.tensors import Location, bytes_of, tensor_at
from .quantized import FLOATS, UNQUANTIZED

WEIGHT: Final = ".weight"


@dataclass(frozen=True)
class Coded:
    """How a stored weight is to be read.

    Attributes:
        weight_scale: what a code of 1 stands for.
        input_scale: the same for the codes of the layer's input; ``None`` where the checkpoint
            tells none, so that only the weight is quantized.
    """

    weight_scale: float
    input_scale: float | None


def scale_at(name: str, at: Location) -> float:
    """One positive number.

    Args:
        name: of the stored tensor, for messages.
        at: where it is.

    Raises:
        WeightsError: it is of another shape or type, or not positive, or not finite.
    """
    if at.shape not in ((), (1,)) or at.kind not in FLOATS:
        raise WeightsError(
            f"{name} of {at.file.name} is {at.kind}{list(at.shape)}; a scale for the whole tensor "
            "is one number.",
            where=str(at.file),
            hint="scales by rows, channels or blocks are not understood; " + UNQUANTIZED,
        )
    value = numbers_at(at)
    if not (value > 0).all() or not value.isfinite().all():
        raise WeightsError(
            f"{name} of {at.file.name} is {float(value)}; a scale is a positive number.",
            where=str(at.file),
            hint="the checkpoint is broken; fetch or export it again.",
        )
    return float(value)


def numbers_at(at: Location) -> Tensor:
    """A stored tensor's numbers in float32, in the stored shape.

    Raises:
        WeightsError: the file was changed meanwhile.
    """
    at.check_unchanged()
    return tensor_at(at, bytes_of(at.file)).to(torch.float32)


def not_quantized(scale: str, weight: str, stored: Mapping[str, Location]) -> WeightsError:
    """The complaint about a scale, or what speaks of one, whose weight is no such codes."""
    at = stored.get(weight)
    what = "is not there" if at is None else f"is stored as {at.kind} and not quantized to FP8"
    return WeightsError(
        f"{scale} is a scale, and {weight} {what}.",
        where=str(next(stored[n] for n in (scale, weight, *stored) if n in stored).file),
        hint="the checkpoint is mixed up, or of another format; " + UNQUANTIZED,
    )


def missing(scale: str, weight: str, at: Location, why: str = "", hint: str = "") -> WeightsError:
    """The complaint about codes without a scale."""
    return WeightsError(
        f"{scale} is missing: {weight} is stored in FP8, and has no such scale{why}.",
        where=str(at.file),
        hint=hint + UNQUANTIZED,
    )
