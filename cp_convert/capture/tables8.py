"""Numbers beside the codes of a weight: constants of the program, or parameters of their own."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from ..ir.writer import Writer


class Tables:
    """What is put beside the parameters of a graph.

    Attributes:
        held: constants, by the name of the attribute.
        apart: by placeholder of a scale that is a parameter, the weight's placeholder, and what it
            is of that layer.
    """

    def __init__(self, write: Writer, state: dict[str, Tensor]) -> None:
        """``state`` is told of parameters."""
        self.held: dict[str, Tensor] = {}
        self.apart: dict[str, tuple[str, str]] = {}
        self._write, self._state = write, state
        self._blocks: dict[str, fx.Node] = {}

    def constant(self, name: str, value: Tensor) -> fx.Node:
        """A table of the program, as an attribute."""
        name = f"_{name}"
        if name in self.held:
            name = f"{name}_{len(self.held)}"
        self.held[name] = value
        node = self._write.graph.get_attr(name)
        node.meta["val"] = self.value(value)
        return node

    def parameter(self, weight: fx.Node, value: Tensor, what: str) -> fx.Node:
        """A scale that is apart; ``what`` says which of the layer's."""
        made = self._given(weight, f"{weight.name}_{what}_apart", value.contiguous())
        self.apart[made.name] = weight.name, what
        return made

    def blocks(self, weight: fx.Node, blocks: Tensor) -> fx.Node:
        """The scales of a weight's blocks, a parameter of their own: too large for a constant."""
        if weight.name not in self._blocks:
            self._blocks[weight.name] = self._given(weight, f"{weight.name}_scale", blocks)
        return self._blocks[weight.name]

    def value(self, like: Tensor) -> Tensor:
        """What a node that gives such numbers is said to give."""
        with self._write.mode:
            return torch.empty(like.shape, dtype=like.dtype)

    def _given(self, weight: fx.Node, name: str, value: Tensor) -> fx.Node:
        with self._write.graph.inserting_after(weight):
            made = self._write.graph.placeholder(name)
        made.meta = {**weight.meta, "val": self.value(value)}
        self._state[made.name] = value
        return made
