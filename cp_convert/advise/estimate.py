"""How long one rank's program takes, and how much it holds: a roofline over its operators.

A product takes the longer of its arithmetic and its memory traffic; what lies between products is
assumed to be fused into them. Communication is not overlapped. Source of the method: Williams et
al., *Roofline* (CACM 52(4), 2009).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..ir import ops
from ..ir.program import HALF, Lowered
from ..mesh import bytes_sent
from .hardware import Hardware

aten: Final = torch.ops.aten
_PRODUCTS: Final[Mapping[Any, int]] = {
    # position of the left operand, whose last dimension is contracted
    aten.mm.default: 0,
    aten.bmm.default: 0,
    aten.matmul.default: 0,
    aten.linear.default: 0,
    aten.addmm.default: 1,
    aten.baddbmm.default: 1,
}
_VIEWS: Final = {
    aten.view.default, aten._reshape_copy.default, aten.reshape.default, aten.permute.default,
    aten.transpose.int, aten.expand.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.squeeze.dims, aten.slice.Tensor, aten.select.int, aten.alias.default, aten.t.default,
    aten.split_with_sizes.default, aten.unbind.int,
}  # fmt: skip


@dataclass(frozen=True)
class Work:
    """One forward of one rank.

    Attributes:
        collectives: how many.
        sent: bytes put on the wire, averaged over the ranks.
        operations: floating-point operations of products and attentions.
        compute, communication: seconds.
        activations: bytes that are held at once.
    """

    collectives: int
    sent: int
    operations: int
    compute: float
    communication: float
    activations: int

    @property
    def seconds(self) -> float:
        """Of one forward; nothing overlaps."""
        return self.compute + self.communication


def estimate(program: Lowered, hardware: Hardware) -> Work:
    """The work of one rank of an SPMD program."""
    compute = communication = 0.0
    collectives = sent = operations = 0
    for node in program.graph_module.graph.nodes:
        if node.target in ops.COLLECTIVES:
            size = int(node.args[-1])
            payload = _bytes(node.args[0].meta["val"])
            own = bytes_sent(str(node.target).split(".")[1].upper(), payload, size)
            collectives, sent = collectives + 1, sent + own
            communication += hardware.collective_us * 1e-6
            communication += own / (hardware.link_gb_per_s * 1e9 * hardware.link_share)
        elif (work := _operations(node)) > 0:
            operations += work
            compute += _seconds(node, work, hardware)
    return Work(collectives, sent, operations, compute, communication, peak(program))


def _operations(node: fx.Node) -> int:
    """Floating-point operations of a product; zero for anything else."""
    args: Any = node.args
    if node.target in _PRODUCTS:
        left = args[_PRODUCTS[node.target]].meta["val"]
        return 2 * int(node.meta["val"].numel()) * int(left.shape[-1])
    if node.target is aten.convolution.default:
        return 2 * int(node.meta["val"].numel()) * int(prod(args[1].meta["val"].shape[1:]))
    if node.target is ops.ATTENTION:
        return 4 * int(args[0].meta["val"].numel()) * int(args[1].meta["val"].shape[2])
    return 0


def _seconds(node: fx.Node, operations: int, hardware: Hardware) -> float:
    value = node.meta["val"]
    is_half = value.dtype in HALF
    peak_rate = hardware.half_tflops if is_half else hardware.tf32_tflops
    moved = sum(_bytes(n.meta["val"]) for n in node.all_input_nodes) + _bytes(value)
    return max(
        operations / (peak_rate * 1e12 * hardware.matmul_share),
        moved / (hardware.memory_gb_per_s * 1e9 * hardware.memory_share),
    )


def _bytes(value: Any) -> int:
    leaves = pytree.tree_leaves(value)
    return sum(x.numel() * x.element_size() for x in leaves if isinstance(x, Tensor))


def peak(program: Lowered) -> int:
    """Bytes of activations that are alive at once, at the worst moment.

    Held are inputs, results of products, collectives and reductions, and what several operators
    read; views and single-use elementwise results are part of their neighbours.
    """
    graph = program.graph_module.graph
    weights = set(program.state)
    roots: dict[fx.Node, set[fx.Node]] = {}
    last: dict[fx.Node, int] = {}
    for position, node in enumerate(graph.nodes):
        sources = set().union(*(roots.get(n, set()) for n in node.all_input_nodes))
        for source in sources:
            last[source] = position
        if node.name not in weights and _is_held(node):
            roots[node], last[node] = {node}, position
        else:
            roots[node] = sources
    return _worst(graph.nodes, last)


def _is_held(node: fx.Node) -> bool:
    if node.op == "placeholder":
        return True
    if node.op != "call_function" or node.target in _VIEWS:
        return False
    if node.target in ops.COLLECTIVES or _operations(node) > 0 or len(node.users) > 1:
        return True
    largest = max((_bytes(n.meta["val"]) for n in node.all_input_nodes), default=0)
    return 2 * _bytes(node.meta["val"]) < largest


def _worst(nodes: Iterable[fx.Node], last: Mapping[fx.Node, int]) -> int:
    dying: dict[int, int] = {}
    alive = worst = 0
    for position, node in enumerate(nodes):
        if node in last:
            size = _bytes(node.meta["val"])
            alive += size
            dying[last[node]] = dying.get(last[node], 0) + size
        worst = max(worst, alive)
        alive -= dying.pop(position, 0)
    return worst
