"""Scales that the largest magnitudes give, and the message where there is none."""

from __future__ import annotations

from typing import Final

import torch

from ..errors import CannotConvert
from ..ir.nvfp4 import LARGEST_OF_ALL, PAIRS
from ..ir.quantize import LARGEST

_LARGEST: Final = {**LARGEST, PAIRS: LARGEST_OF_ALL}


def scale_of(largest: float, path: str, dtype: torch.dtype, told: str, kept: str) -> float:
    """What a code of 1 stands for.

    Args:
        largest: magnitude of what is coded.
        path: of the module that reads it.
        dtype: of the codes.
        told: for a message, the option and what is coded.
        kept: what ``--keep`` would leave.

    Raises:
        CannotConvert: it is zero, or not finite.
    """
    if not 0 < largest < float("inf"):
        raise CannotConvert(
            f"{told} has no scale: its largest magnitude is {largest}.",
            where=path,
            hint=f"--keep leaves {kept} as it is; --calibration names other inputs.",
        )
    return largest / _LARGEST[dtype]
