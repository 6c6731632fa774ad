"""How long one rank's program takes, and how much it holds: a roofline over its kernels.

A product or an attention takes the longer of its arithmetic and its memory traffic, what is fused
between them its traffic, and everything as long as starting it takes
(:class:`.hardware.Hardware`). A collective runs beside the work that does not wait for it, in the
order of the program, as torch and NCCL do it on two streams. Source of the method: Williams et al.,
*Roofline* (CACM 52(4), 2009).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from ..ir import ops
from ..ir.program import Lowered
from .hardware import Hardware
from .kernels import VIEWS, Kernel, kernels_of, operations, size_of


@dataclass(frozen=True)
class Work:
    """One forward of one rank.

    Attributes:
        collectives: how many.
        sent: bytes put on the wire, averaged over the ranks.
        operations: floating-point operations of products and attentions.
        compute, communication: seconds of all kernels, and of all collectives.
        exposed: seconds of communication that no work hides.
        activations: bytes that are held at once.
    """

    collectives: int
    sent: int
    operations: int
    compute: float
    communication: float
    exposed: float
    activations: int

    @property
    def seconds(self) -> float:
        """Of one forward."""
        return self.compute + self.exposed


def estimate(program: Lowered, hardware: Hardware) -> Work:
    """The work of one rank of an SPMD program."""
    kernels = kernels_of(program)
    seconds = [seconds_of(kernel, hardware) for kernel in kernels]
    wires = [kernel.kind == "collective" for kernel in kernels]
    compute = sum(s for s, wire in zip(seconds, wires, strict=True) if not wire)
    return Work(
        collectives=sum(wires),
        sent=sum(kernel.bytes for kernel in kernels if kernel.kind == "collective"),
        operations=sum(kernel.operations for kernel in kernels),
        compute=compute,
        communication=sum(seconds) - compute,
        exposed=max(0.0, _end(kernels, seconds) - compute),
        activations=peak(program),
    )


def seconds_of(kernel: Kernel, hardware: Hardware) -> float:
    """One kernel alone."""
    if kernel.kind == "collective":
        return hardware.collective(kernel.collective, kernel.size, kernel.bytes)
    work, size, half = kernel.operations, kernel.bytes, kernel.half
    if kernel.kind == "product":
        return hardware.product(work, size, half=half)
    if kernel.kind == "attention":
        return hardware.attention(
            work, size, head_dim=kernel.head_dim, tiles=kernel.tiles, half=half
        )
    return hardware.fused(size)


def _end(kernels: Sequence[Kernel], seconds: Sequence[float]) -> float:
    """When all are done: work on one stream, collectives on another, each in the program's order.

    A collective begins when it is met and everything that was started before is done, as streams
    wait for one another; work waits only for the collectives that it reads.
    """
    work = wire = 0.0
    done: list[float] = []
    for kernel, spent in zip(kernels, seconds, strict=True):
        if kernel.kind == "collective":
            wire = max(wire, work) + spent
            done.append(wire)
        else:
            work = max([work, *(done[one] for one in kernel.inputs)]) + spent
            done.append(work)
    return max(work, wire)


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
    if node.op != "call_function" or node.target in VIEWS:
        return False
    if node.target in ops.COLLECTIVES or operations(node) > 0 or len(node.users) > 1:
        return True
    largest = max((size_of(n.meta["val"]) for n in node.all_input_nodes), default=0)
    return 2 * size_of(node.meta["val"]) < largest


def _worst(nodes: Iterable[fx.Node], last: Mapping[fx.Node, int]) -> int:
    dying: dict[int, int] = {}
    alive = worst = 0
    for position, node in enumerate(nodes):
        if node in last:
            size = size_of(node.meta["val"])
            alive += size
            dying[last[node]] = dying.get(last[node], 0) + size
        worst = max(worst, alive)
        alive -= dying.pop(position, 0)
    return worst
