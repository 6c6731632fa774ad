"""Operators of a network whose shapes follow a size: what a lifted program is for the converters.

They are never run: a lifted program is run at one size, filled in (:mod:`.lift`). ``cp::extent`` is
a whole number that follows from a dimension of an input; the others are core operators with such
numbers among their arguments.
"""

from __future__ import annotations

from typing import Final

import torch

_LIBRARY: Final = torch.library.Library("cp", "FRAGMENT")
# The size n is (under x.shape[dim] - offset) / scale, with own = [scale, offset, under], and the
# number (told[1] + told[2] n + the sum of told[3 + i] L_i) / told[0], where slots has five numbers
# of every L_i: those of :class:`.lift.Slots`.
_LIBRARY.define("extent(Tensor x, int dim, int[] own, int[] told, int[] slots) -> SymInt")
_LIBRARY.define("reshaped(Tensor x, SymInt[] shape) -> Tensor")
_LIBRARY.define("sliced(Tensor x, int dim, SymInt start, SymInt length) -> Tensor")
_LIBRARY.define("filled(SymInt[] shape, Scalar value, ScalarType dtype) -> Tensor")
_LIBRARY.define("expanded(Tensor x, SymInt[] shape) -> Tensor")

EXTENT: Final = torch.ops.cp.extent.default
RESHAPED: Final = torch.ops.cp.reshaped.default
SLICED: Final = torch.ops.cp.sliced.default
FILLED: Final = torch.ops.cp.filled.default
EXPANDED: Final = torch.ops.cp.expanded.default
EXTENTS: Final = (EXTENT, RESHAPED, SLICED, FILLED, EXPANDED)
