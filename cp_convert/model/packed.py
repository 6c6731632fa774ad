"""The packed words of a ``tp_plan``, which model files import (:mod:`.tp_plan`); without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PackedColwiseParallel:
    """Several matrices in one, each by its output columns.

    Attributes:
        blocks: how long they are in proportion; ``None``: as the module's
            ``_tp_packed_col_blocks`` says.
    """

    blocks: Sequence[int] | None = None


@dataclass(frozen=True)
class PackedRowwiseParallel:
    """A matrix that reads several values in one, each by its input rows.

    Attributes:
        blocks: how long they are in proportion; ``None``: as the module's
            ``_tp_packed_row_blocks`` says.
    """

    blocks: Sequence[int] | None = None
