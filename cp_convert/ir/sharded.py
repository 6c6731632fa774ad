"""A program whose sequence is spread over the ranks, and how that came about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..mesh import SEQUENCE
from .layout import Layout
from .program import Lowered


@dataclass(frozen=True)
class Move:
    """A split of a whole tensor, or communication outside attention.

    Attributes:
        kind: ``split``, ``gather`` or ``all_reduce``.
        operator: for a split, the operator or input whose value is split; otherwise the operator
            that needs the whole tensor, or whose partial results are combined.
        module, source: where the model calls it.
        dim: of the tensor.
        layout: how its tokens are spread.
        elements: how many numbers the whole tensor has.
        axis: of the mesh, whose ranks hold the parts.
    """

    kind: str
    operator: str
    module: str
    source: str | None
    dim: int
    layout: Layout
    elements: int
    axis: str = SEQUENCE

    @property
    def where(self) -> str:
        """Module path and source line, for messages."""
        return f"{self.module} ({self.source})" if self.source else self.module


@dataclass(frozen=True)
class Sharded:
    """A program in which every attention over sharded keys still sees its own rank's keys only.

    Attributes:
        program: the program; masks of such attentions are whole and in the model's order.
        places: by the attention's node name, the layouts of its queries and of its keys.
        moves: what was split, gathered and reduced on the way.
    """

    program: Lowered
    places: Mapping[str, tuple[Layout, Layout]]
    moves: tuple[Move, ...]


@dataclass(frozen=True)
class Guided:
    """A program in which every rank computes the branches of its place on the ``cfg`` axis.

    Attributes:
        program: still dense along the sequence.
        inputs: names of the bindings that have the branches on dimension 0.
        moves: what was split, gathered and reduced on the way.
    """

    program: Lowered
    inputs: tuple[str, ...] = ()
    moves: tuple[Move, ...] = ()
