"""What NVIDIA ModelOpt calls its algorithms, and the tensors that a layer has by each.

:mod:`.modelopt` reads them, and :mod:`.mixed` what is said of single layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch

from ..ir.nvfp4 import PAIRS
from ..ir.quantize import FP8, INT8

WEIGHT_SCALE: Final = ".weight_scale"
INPUT_SCALE: Final = ".input_scale"
OF_ALL: Final = ".weight_scale_2"
SMOOTH: Final = ".pre_quant_scale"
LOW_RANK: Final = (".svdquant_lora_a", ".svdquant_lora_b")
IS_LOW_RANK: Final = "NVFP4_SVD"
_IS_SMOOTH: Final = "NVFP4_AWQ"
TYPES: Final[Mapping[str, torch.dtype]] = {
    "FP8": FP8,
    "W8A8_SQ_PER_CHANNEL": INT8,
    "NVFP4": PAIRS,
    _IS_SMOOTH: PAIRS,
    IS_LOW_RANK: PAIRS,
}
"""Of codes, by ``quant_algo``."""
NEEDED: Final = {_IS_SMOOTH: (SMOOTH,), IS_LOW_RANK: (SMOOTH, LOW_RANK[0])}
"""What makes these what they are; other algorithms may have factors, or not."""
_MORE: Final = {FP8: (SMOOTH,), INT8: (SMOOTH,), PAIRS: (OF_ALL, SMOOTH, *LOW_RANK)}


def suffixes(algorithm: str) -> tuple[str, ...]:
    """What the names of all that a layer may have besides codes end in."""
    return (WEIGHT_SCALE, INPUT_SCALE, *_MORE[TYPES[algorithm]])
