"""Scales that the largest magnitudes give, and the messages about those that are none."""

from __future__ import annotations

import torch

from ..errors import CannotConvert
from ..ir.nvfp4 import LARGEST_NUMBER
from ..ir.quantize import SCALES, TINY
from ..ir.source import Codes


def scale_of(largest: float, path: str, dtype: torch.dtype, told: str, kept: str) -> float:
    """What a code of 1 stands for.

    Args:
        largest: magnitude of what is coded.
        path: of the module that reads it.
        dtype: of the codes.
        told: for a message, the option and what is coded.
        kept: what ``--keep`` would leave.

    Raises:
        CannotConvert: it is none, see :data:`..ir.quantize.SCALES`.
    """
    if not SCALES[0] <= largest / LARGEST_NUMBER[dtype] <= SCALES[1]:
        raise CannotConvert(
            f"{told} has no scale: its largest magnitude is {largest}.",
            where=path,
            hint=f"--keep leaves {kept} as it is; --calibration names other inputs.",
        )
    return largest / LARGEST_NUMBER[dtype]


def check_products(own: Codes, like: torch.dtype, path: str, *, apart: bool) -> None:
    """Refuse a layer whose numbers would all be zeros, whatever its codes are.

    TensorRT multiplies the two scales of a product in float32, and takes the product for nothing
    where they give zero.

    Args:
        own: its operands.
        like: what codes stand for is in this type.
        path: of the layer.
        apart: whether its product is multiplied by the scales afterwards.

    Raises:
        CannotConvert: the product of the scales is less than float32's normal numbers, or what the
            largest code stands for is zero in ``like``.
    """
    scales = {"weight": own.step}
    if own.input_scale is not None:
        scales["input"] = own.input_scale
        if own.input_scale * own.step < TINY:
            told = f"{own.input_scale:.3g} * {own.step:.3g} is zero in float32"
            raise _of_zeros(path, "input and its weight", told, "")
    if apart and own.is_multiplied:
        return
    for what, scale in scales.items():
        if not torch.tensor(scale * LARGEST_NUMBER[own.codes.dtype]).to(like):
            kind = str(like).removeprefix("torch.")
            told = f"{scale:.3g} times the largest code is zero in {kind}"
            raise _of_zeros(path, what, told, "-p bf16 or -p fp32; ")


def _of_zeros(path: str, what: str, told: str, hint: str) -> CannotConvert:
    return CannotConvert(
        f"the scales of {path} leave zeros of its {what}: {told}.",
        where=path,
        hint=f"{hint}--keep leaves a layer as it is; a checkpoint that is broken can be fetched or "
        "exported again.",
    )
