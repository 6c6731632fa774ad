"""Where the proof computes: programs and networks whose tensors lie on another device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..errors import UsageError
from ..ir.network import Network
from ..ir.program import Executable, Lowered, copied, module_of


def check_device(name: str) -> torch.device:
    """The device called ``name``.

    Raises:
        UsageError: there is no such device here.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "--proof-device cuda: torch sees no CUDA GPU here.",
            hint="leave it out; the proof then runs on the CPU.",
        )
    return torch.device(name)


class Mover:
    """Copies tensors to a device, each once: what programs share stays shared there.

    Attributes:
        device: where to.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # The original is kept as well, so that its id is not given to another tensor.
        self._moved: dict[int, tuple[Tensor, Tensor]] = {}

    def tensor(self, tensor: Tensor) -> Tensor:
        """``tensor`` there; itself if it is there already."""
        if tensor.device == self.device:
            return tensor
        if id(tensor) not in self._moved:
            self._moved[id(tensor)] = tensor, tensor.to(self.device)
        return self._moved[id(tensor)][1]

    def tree(self, values: Any) -> Any:
        """Every tensor in nested containers there."""
        return pytree.tree_map(lambda x: self.tensor(x) if isinstance(x, Tensor) else x, values)

    def program(self, program: Executable) -> Lowered:
        """A program that computes there; ``program`` stays as it is."""
        graph = copied(program.graph_module.graph)
        module = module_of(program.graph_module, graph)
        for node in graph.nodes:
            if node.op == "get_attr":
                self._move_attribute(module, str(node.target))
            node.args, node.kwargs = pytree.tree_map(
                self._device, (node.args, node.kwargs), is_leaf=_is_node
            )
            if _makes_tensors(node):
                node.kwargs = {**node.kwargs, "device": self.device}
        return Lowered(
            module,
            {name: self.tensor(value) for name, value in program.state.items()},
            program.inputs,
            program.outputs,
            self.of_ranks(program.own),
        )

    def of_ranks(self, own: Mapping[str, tuple[Tensor, ...]]) -> Mapping[str, tuple[Tensor, ...]]:
        """On the CPU as they are: those of large models are made one by one, when they are read."""
        if self.device.type == "cpu":
            return own
        return {name: tuple(map(self.tensor, of)) for name, of in own.items()}

    def _move_attribute(self, module: nn.Module, path: str) -> None:
        """Parameters become buffers: which of both an attribute is means nothing in a graph."""
        *parents, name = path.split(".")
        owner = module.get_submodule(".".join(parents))
        held = getattr(owner, name)
        if self.tensor(held) is not held:
            delattr(owner, name)
            owner.register_buffer(name, self.tensor(held).detach(), persistent=False)

    def networks(self, networks: Sequence[Network]) -> list[Network]:
        """Networks whose constants lie there."""

        def moved(parameters: Mapping[str, Any]) -> dict[str, Any]:
            return {
                name: self.tensor(value) if isinstance(value, Tensor) else value
                for name, value in parameters.items()
            }

        return [
            replace(
                network,
                layers=tuple(
                    replace(layer, parameters=moved(layer.parameters)) for layer in network.layers
                ),
            )
            for network in networks
        ]

    def _device(self, leaf: Any) -> Any:
        return self.device if isinstance(leaf, torch.device) else leaf


def _is_node(leaf: Any) -> bool:
    return isinstance(leaf, fx.Node)


def _makes_tensors(node: fx.Node) -> bool:
    """Whether it takes none and is told a device, which is the CPU where it is not."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    told = node.target._schema.arguments
    takes = any(isinstance(one.type, torch.TensorType) for one in told)
    return not takes and any(one.name == "device" for one in told)


@contextmanager
def on(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Keep ``module`` on ``device`` for the duration of the block."""
    home = next((p.device for p in module.parameters()), device)
    module.to(device)
    try:
        yield
    finally:
        module.to(home)


@contextmanager
def exact() -> Iterator[None]:
    """float32 products in float32: a GPU would round their operands to TF32 in convolutions."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    convolution: Any = getattr(cudnn, "conv")  # noqa: B009  torch's types do not know it
    before = matmul.fp32_precision, convolution.fp32_precision
    matmul.fp32_precision = convolution.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision, convolution.fp32_precision = before
