"""The stored program, run by torch: NCCL between GPUs, gloo between CPUs.

It is what the engines are compared with, and what runs where no TensorRT does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from ..bundle.manifest import Manifest, of_rank
from ..bundle.program import read_program
from ..engine.specialise import specialise
from ..errors import BackendMissing
from ..ir.program import Lowered
from ..lora.choose import Asked
from ..prove.device import Mover
from .arguments import flattened
from .collectives import groups_of, make_groups, over_the_wire, unsupported
from .groups import checked_world, group_of
from .lora import Sets
from .replayed import Replayed
from .weights import bound_weights

Told = Callable[[str], None]


class TorchExecutor:
    """See :class:`.executors.Executor`.

    Raises:
        BackendMissing: the program has what only TensorRT has, or too few GPUs are here.
        UsageError: ``torch.distributed`` has another world than the bundle.
        DamagedBundle: a file is missing or altered.
    """

    name = "torch"

    def __init__(
        self,
        manifest: Manifest,
        folder: Path,
        rank: int,
        device: str | None,
        communicator: Any = None,
        *,
        compiled: bool = False,
        graph: bool = False,
        verify: bool = True,
        told: Told = lambda _: None,
    ) -> None:
        self.manifest, self.rank = manifest, rank
        self.device = device_of(rank, device)
        self._replayed = Replayed(self._called, self.device) if graph else None
        checked_world(manifest.world, communicator)
        stored = read_program(manifest, folder, verify=verify)
        for reason in unsupported(stored.program):
            raise BackendMissing(f"torch cannot run this program: {reason}.")
        told("program")
        names = make_groups(groups_of(stored.program), rank, group_of(communicator))
        told("groups")
        program = over_the_wire(specialise(stored.program, rank), rank, names)
        self._program = on_device(program, self.device, stored.names)
        self._names = stored.names
        self._weights = self._bound(folder, stored.names, verify=verify, told=told)
        bound = {name: self._weights[node] for node, name in stored.names.items()}
        self._sets = Sets(manifest, folder, bound, communicator, verify=verify, told=told)
        module = self._program.graph_module
        self._call: Callable[..., Any] = fx.GraphModule(module, module.graph)
        if compiled:
            self._call = torch.compile(self._call, dynamic=False)

    def _bound(
        self, folder: Path, names: Mapping[str, str], *, verify: bool, told: Told
    ) -> dict[str, Tensor]:
        """By placeholder: weights from their files, the others out of the bundle's program."""
        assert self.manifest.program is not None
        wanted = set(names.values())
        every = (*self.manifest.weights, *self.manifest.program.weights)
        listed = of_rank(every, self.rank)
        weights = [w for w in listed if w.name in wanted]
        found = bound_weights(weights, folder, self.device, verify=verify, told=told)
        own = {name: t for name, t in self._program.state.items() if name not in names}
        return own | {node: found[name] for node, name in names.items()}

    @torch.no_grad()
    def __call__(self, **arguments: Any) -> dict[str, Tensor]:
        """See :class:`.executors.Executor`."""
        given = flattened(self.manifest, arguments)
        bound = {b.node: given[b.name] for b in self._program.inputs}
        placeholders = self._program.graph_module.graph.find_nodes(op="placeholder")
        given_here = [n.name not in self._weights for n in placeholders]
        values = [
            bound[n.name].to(self.device) if is_given else self._weights[n.name]
            for n, is_given in zip(placeholders, given_here, strict=True)
        ]
        if self._replayed is not None:
            returned = self._replayed(values, given_here)
        else:
            returned = self._called(*values)
        names = {b.node: b.name for b in self._program.outputs}
        nodes: Any = self._program.graph_module.graph.output_node().args[0]
        return {
            names[node.name]: value
            for node, value in zip(nodes, returned, strict=True)
            if isinstance(node, fx.Node) and node.name in names
        }

    def _called(self, *values: Tensor) -> Any:
        return self._call(*values)

    def use_lora(self, asked: Asked) -> None:
        """See :class:`.executors.Executor`."""
        found = {**self._sets.bound, **self._sets.tensors(asked)}
        self._weights |= {node: found[name] for node, name in self._names.items()}

    def close(self) -> None:
        """Free the weights, and the graph that reads them."""
        if self._replayed is not None:
            self._replayed.close()
        self._weights = {}
        self._sets.close()

    def __enter__(self) -> TorchExecutor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def device_of(rank: int, device: str | None) -> torch.device:
    """The device of a rank: the one that is named, else a GPU if there is any.

    Raises:
        BackendMissing: there is none of that name.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device is None:
        device = f"cuda:{rank % count}" if count else "cpu"
    return checked_device(device, rank)


def checked_device(device: str, rank: int) -> torch.device:
    """The device of this name, for ``rank``.

    Raises:
        BackendMissing: there is none.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = torch.device(device)
    if found.type == "cuda" and (found.index or 0) >= count:
        raise BackendMissing(
            f"rank {rank} is to run on {device}, and torch sees {count} GPUs here.",
            hint="--devices names the GPUs of this machine, one a rank; --devices cpu runs slowly "
            "without.",
        )
    return found


def on_device(program: Lowered, device: torch.device, elsewhere: Mapping[str, str]) -> Lowered:
    """The program with its constants and own parameters on ``device``."""
    own = {name: t for name, t in program.state.items() if name not in elsewhere}
    return Mover(device).program(
        Lowered(program.graph_module, own, program.inputs, program.outputs, program.own)
    )
