"""A program, or one piece of it, as torch computes it on one rank.

In: what a bundle stores, or what computes another piece of its kind. Out: a function of inputs and
weights by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, fx

from ..bundle.program import Stored
from ..engine.specialise import specialise
from ..ir.program import Lowered
from ..prove.device import Mover
from .codes import by_torch, multiplies_codes
from .collectives import over_the_wire
from .replayed import Replayed

AS_WRITTEN: Final[dict[str, Any]] = {"emulate_precision_casts": True}
"""For ``torch.compile``: round where the program rounds. Fused kernels leave roundings to half
precision out, and what a model multiplies by 1000 (times, guidance) becomes other numbers then than
those that were proven."""


class Kind:
    """A program on one rank, which may serve several pieces.

    Args:
        stored: as the bundle holds it.
        rank: whose.
        groups: names of torch's process groups, by ranks.
        device: where it runs.
        compiled: whether it goes through ``torch.compile``.

    Attributes:
        names: of weights that it is called with, by placeholder.
        program: as the device computes it.
        own: constants and parameters that it holds, by placeholder.
        device: where it runs.
        held: its placeholders.
        call: computes it, of their values.
    """

    def __init__(
        self,
        stored: Stored,
        rank: int,
        groups: Mapping[tuple[int, ...], str],
        device: torch.device,
        *,
        compiled: bool,
    ) -> None:
        program = over_the_wire(specialise(stored.program, rank), rank, groups)
        self.names, self.device = stored.names, device
        self.program = on_device(program, device, stored.names)
        self.own = {n: t for n, t in self.program.state.items() if n not in stored.names}
        module = self.program.graph_module
        self.held = [n.name for n in module.graph.find_nodes(op="placeholder")]
        self.call: Callable[..., Any] = fx.GraphModule(module, module.graph)
        if compiled:
            self.call = torch.compile(self.call, dynamic=False, options=AS_WRITTEN)


class Called:
    """One piece on one rank.

    Args:
        kind: what computes it.
        names: by the binding of that, what it is called here, where that is another name.
        graph: whether calls after the first are replayed as a CUDA graph.

    Attributes:
        inputs: names of what it takes at every call.

    Raises:
        BackendMissing: a CUDA graph is asked for, and the device has none.
    """

    def __init__(self, kind: Kind, names: Mapping[str, str], *, graph: bool) -> None:
        self._kind, self._names = kind, names
        self.inputs = [self._called(b.name) for b in kind.program.inputs]
        self._replayed = Replayed(kind.call, kind.device) if graph else None

    @torch.no_grad()
    def __call__(
        self, given: Mapping[str, Tensor], weights: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Outputs by name, of inputs and weights by name."""
        kind, called = self._kind, self._called
        taken = {b.node: given[called(b.name)] for b in kind.program.inputs}
        inputs = {node: tensor.to(kind.device) for node, tensor in taken.items()}
        own = {node: weights[called(name)] for node, name in kind.names.items()}
        bound = inputs | kind.own | own
        values = [bound[name] for name in kind.held]
        if self._replayed is None:
            returned = kind.call(*values)
        else:
            returned = self._replayed(values, [name in inputs for name in kind.held])
        return self._named(returned)

    def _called(self, name: str) -> str:
        """What a binding of the program is called here."""
        return self._names.get(name, name)

    def _named(self, returned: Sequence[Any]) -> dict[str, Tensor]:
        names = {b.node: self._called(b.name) for b in self._kind.program.outputs}
        nodes: Any = self._kind.program.graph_module.graph.output_node().args[0]
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
    fused = device.type == "cuda"
    program = by_torch(program, products=multiplies_codes(device), fused=fused)
    own = {name: t for name, t in program.state.items() if name not in elsewhere}
    return Mover(device).program(
        Lowered(program.graph_module, own, program.inputs, program.outputs, program.own)
    )
