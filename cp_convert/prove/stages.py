"""The programs that a proof compares, as one record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..ir.program import Executable
from ..mesh import Axis
from ..strategies import Site
from .device import Mover


@dataclass(frozen=True)
class Stages:
    """The same program at three stages, all for the same ranks.

    Attributes:
        dense: whole, before it was sharded.
        control: sharded, but every rank attends to its own keys alone.
        rewritten: with the strategy in it.
        lowered: as it will be built.
        sites: the attentions, and the nodes of ``rewritten`` that hold their results.
        axis: the ranks that share the sequence.
        quantized: ``dense`` with the quantizers that the others have; ``None`` where there are
            none.
        plain: ``dense`` before its linear layers were quantized, weights included; ``None`` where
            they were not.
        others: the mesh's other axes.
    """

    dense: Executable
    control: Executable
    rewritten: Executable
    lowered: Executable
    sites: Sequence[tuple[Site, str]]
    axis: Axis
    quantized: Executable | None = None
    plain: Executable | None = None
    others: tuple[Axis, ...] = ()

    @property
    def world(self) -> int:
        """How many ranks there are, those that share no sequence included."""
        return len(self.axis.flat)

    def on(self, mover: Mover) -> Stages:
        """The same programs on another device."""
        return replace(
            self,
            dense=mover.program(self.dense),
            control=mover.program(self.control),
            rewritten=mover.program(self.rewritten),
            lowered=mover.program(self.lowered),
            quantized=None if self.quantized is None else mover.program(self.quantized),
            plain=None if self.plain is None else mover.program(self.plain),
        )
