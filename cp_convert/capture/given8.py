"""Codes and scales of linear layers: a checkpoint's, or those that largest magnitudes give.

In: a linear layer of a dense program, and its weight's numbers. Out: what its operands become.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor, fx

from ..ir.nvfp4 import PAIRS, pairs, quantize_blocks
from ..ir.program import module_path
from ..ir.quantize import FP8, LARGEST, SCALES, quantize
from ..ir.source import Codes
from .scales import scale_of


class Given(Protocol):
    """Where codes and scales come from."""

    def codes(self, node: fx.Node, numbers: Tensor) -> Codes:
        """Of a linear layer, whose weight has these ``numbers`` in the model."""


@dataclass(frozen=True)
class Measured:
    """Scales that the largest magnitudes give.

    Attributes:
        largest: of the layers' inputs, by their names.
        dtype: of the codes. FP8 has one scale for a weight, INT8 one for each of its rows, NVFP4
            one, and one for each block besides.
    """

    largest: Mapping[str, float]
    dtype: torch.dtype = FP8

    def codes(self, node: fx.Node, numbers: Tensor) -> Codes:
        """See :class:`Given`."""
        step = _scale(float(numbers.abs().max()), node, "weight", self.dtype)
        of_input = _scale(self.largest[str(node.args[0])], node, "input", self.dtype)
        if self.dtype == FP8:
            return Codes(quantize(numbers, step, FP8), step, of_input)
        if self.dtype == PAIRS:
            codes, blocks = quantize_blocks(numbers, step)
            return Codes(pairs(codes), step, of_input, blocks=blocks)
        rows = numbers.abs().amax(1).float() / LARGEST[self.dtype]
        rows = torch.where(rows >= SCALES[0], rows, step)
        return Codes(quantize(numbers.float() / rows[:, None], 1.0, self.dtype), rows, of_input)


@dataclass(frozen=True)
class Stored:
    """Those of a quantized checkpoint.

    Attributes:
        stored: by placeholder of the weight.
        largest: of inputs for which it has no scale, by their names.
    """

    stored: Mapping[str, Codes]
    largest: Mapping[str, float] = field(default_factory=dict)

    def codes(self, node: fx.Node, numbers: Tensor) -> Codes:
        """See :class:`Given`."""
        own = self.stored[str(node.args[1])]
        if own.is_multiplied:
            return own
        largest = self.largest[str(node.args[0])]
        return replace(own, input_scale=_scale(largest, node, "input", own.codes.dtype))


def _scale(largest: float, node: fx.Node, what: str, dtype: torch.dtype) -> float:
    path = module_path(node)
    return scale_of(largest, path, dtype, f"--quantize: the {what} of {path}", "the layer")
