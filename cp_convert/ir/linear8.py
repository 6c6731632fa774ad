"""What became of every linear layer of a model whose products are computed in 8 bits, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

import torch

from .nvfp4 import PAIRS
from .program import Lowered
from .quantize import FP8, INT8

Scales = Literal["both", "weight", "none"]
Kind = Literal["fp8", "int8", "nvfp4"]
TYPES: Final[Mapping[Kind, torch.dtype]] = {"nvfp4": PAIRS, "int8": INT8, "fp8": FP8}
"""Of codes."""


@dataclass(frozen=True)
class Layer:
    """A linear layer that multiplies codes.

    Attributes:
        module: its path.
        input_scale, weight_scale: what a code of 1 stands for; the input's is ``None`` where each
            token has its own.
        loss: its own: the root mean square of what its output differs by, over the output's;
            ``None`` where nothing was computed.
        given: which of the two scales are the checkpoint's.
        rows: whether each row of the weight has a scale, of which ``weight_scale`` is the largest.
        smooth: whether the input's columns are multiplied by the checkpoint's factors before.
        codes: their type.
    """

    module: str
    input_scale: float | None
    weight_scale: float
    loss: float | None
    given: Scales = "none"
    rows: bool = False
    smooth: bool = False
    codes: Kind = "fp8"


@dataclass(frozen=True)
class Kept:
    """A linear layer that is left in the precision of the model, and why."""

    module: str
    reason: str


@dataclass(frozen=True)
class Linears:
    """A dense program whose linear layers multiply codes.

    Attributes:
        before: the same program without.
        layers, kept: what became of each linear layer.
        weights: by placeholder, the binding of the codes of a weight that is stored apart.
        blocks: by placeholder, the binding of scales of blocks that are the checkpoint's.
        sets: how many sets of inputs were looked at for scales; 0: the checkpoint has them all.
        kinds: types of codes, of weights that are not multiplied among them.
    """

    before: Lowered
    layers: tuple[Layer, ...]
    kept: tuple[Kept, ...]
    weights: Mapping[str, str]
    blocks: Mapping[str, str]
    sets: int
    kinds: tuple[Kind, ...]
