"""A program, or one piece of it, as torch computes it on one rank.

In: what a bundle stores, or what computes another piece of its kind. Out: a function of inputs and
weights by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..bundle.program import Stored
from ..engine.specialise import specialise
from ..ir.program import Lowered
from ..prove.device import Mover
from .codes import by_torch, multiplies_codes
from .collectives import over_the_wire
from .replayed import Replayed


class Called:
    """A program on one rank.

    Args:
        stored: as the bundle holds it; or what computes another piece of its kind.
        called: by the binding of the program, what that is called here, where it is another name.
        rank: whose.
        groups: names of torch's process groups, by ranks.
        device: where it runs.
        compiled: whether it goes through ``torch.compile``.
        graph: whether calls after the first are replayed as a CUDA graph.

    Attributes:
        inputs: names of what it takes at every call.

    Raises:
        BackendMissing: a CUDA graph is asked for, and the device has none.
    """

    def __init__(
        self,
        stored: Stored | Called,
        called: Mapping[str, str],
        rank: int,
        groups: Mapping[tuple[int, ...], str],
        device: torch.device,
        *,
        compiled: bool,
        graph: bool,
    ) -> None:
        self._renamed, self._device = called, device
        if isinstance(stored, Called):
            self._names, self._program, self._own = stored._names, stored._program, stored._own
            self._call = stored._call
        else:
            program = over_the_wire(specialise(stored.program, rank), rank, groups)
            self._names, self._program = stored.names, on_device(program, device, stored.names)
            self._own = {n: t for n, t in self._program.state.items() if n not in stored.names}
            module = self._program.graph_module
            self._call: Callable[..., Any] = fx.GraphModule(module, module.graph)
            if compiled:
                self._call = torch.compile(self._call, dynamic=False)
        self.inputs = [self._called(b.name) for b in self._program.inputs]
        self._replayed = Replayed(self._call, device) if graph else None

    @torch.no_grad()
    def __call__(
        self, given: Mapping[str, Tensor], weights: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Outputs by name, of inputs and weights by name."""
        called, taken = self._called, self._program.inputs
        inputs = {b.node: given[called(b.name)].to(self._device) for b in taken}
        own = {node: weights[called(name)] for node, name in self._names.items()}
        bound = inputs | self._own | own
        graph = self._program.graph_module.graph
        names = [node.name for node in graph.find_nodes(op="placeholder")]
        values = [bound[name] for name in names]
        if self._replayed is None:
            returned = self._call(*values)
        else:
            returned = self._replayed(values, [name in inputs for name in names])
        return self._named(returned)

    def _called(self, name: str) -> str:
        """What a binding of the program is called here."""
        return self._renamed.get(name, name)

    def _named(self, returned: Sequence[Any]) -> dict[str, Tensor]:
        names = {b.node: self._called(b.name) for b in self._program.outputs}
        nodes: Any = self._program.graph_module.graph.output_node().args[0]
        return {
            names[node.name]: value
            for node, value in zip(nodes, returned, strict=True)
            if isinstance(node, fx.Node) and node.name in names
        }

    def close(self) -> None:
        """Free its graph."""
        if self._replayed is not None:
            self._replayed.close()


def on_device(program: Lowered, device: torch.device, elsewhere: Mapping[str, str]) -> Lowered:
    """The program as ``device`` computes it, with its constants and own parameters there."""
    program = by_torch(program, products=multiplies_codes(device))
    own = {name: t for name, t in program.state.items() if name not in elsewhere}
    return Mover(device).program(
        Lowered(program.graph_module, own, program.inputs, program.outputs, program.own)
    )
