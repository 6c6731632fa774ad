"""``cp::*`` operators of one rank as torch's functional collectives, to be run over a wire.

Source: ``torch.distributed._functional_collectives`` (*functional collectives*, traceable by
``torch.compile``). A collective is issued where the program has it and waited for just before its
first reader, so that what stands between overlaps with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Final

import torch
from torch import fx

from ..ir import ops
from ..ir.program import Lowered, copied, module_of, tensor_of
from ..mesh import split_groups
from .groups import members

Group = tuple[int, ...]
Names = Mapping[Group, str]
"""Names of torch's process groups, by their ranks in the order of the group."""
aten: Final = torch.ops.aten
c10d: Final = torch.ops._c10d_functional


def groups_of(program: Lowered) -> list[Group]:
    """Every group of ranks that communicates in ``program``, in one order for all ranks."""
    found: dict[Group, None] = {}
    for node in program.graph_module.graph.nodes:
        if node.op == "call_function" and ops.is_spmd(node.target):
            flat, size = node.args[-2:]
            found.update(dict.fromkeys(split_groups(flat, size)))
    return sorted(found)


def make_groups(groups: Iterable[Group], rank: int, world: Any) -> dict[Group, str]:
    """Process groups for those of ``groups`` that ``rank`` is in.

    Collective: every rank of the process group ``world`` calls it alike.
    """
    made = {ranks: members(world, ranks) for ranks in groups}
    return {ranks: group.group_name for ranks, group in made.items() if rank in ranks}


def over_the_wire(program: Lowered, rank: int, names: Names) -> Lowered:
    """The program of one rank, its collectives torch's own; ``program`` stays as it is.

    Args:
        program: specialised for ``rank``, see :mod:`cp_convert.engine.specialise`.
        rank: whose program it is.
        names: of process groups, see :func:`make_groups`.
    """
    graph = copied(program.graph_module.graph)
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in _WRITERS:
            with graph.inserting_before(node):
                new = _WRITERS[node.target](_Call(graph, node, rank, names))
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            graph.erase_node(node)
    views_again(graph)
    _wait_late(graph)
    graph.lint()
    outputs = _renamed(program, graph)
    return replace(program, graph_module=module_of(program.graph_module, graph), outputs=outputs)


def views_again(graph: fx.Graph) -> None:
    """Reshapes that copied look at the same memory again where they can; in place.

    Decomposition writes ``_reshape_copy``, which TensorRT shuffles and torch copies; TorchInductor
    has no lowering for it, and leaves it to a kernel of its own.
    """
    for node in graph.find_nodes(op="call_function", target=aten._reshape_copy.default):
        node.target = aten.reshape.default


def _renamed(program: Lowered, graph: fx.Graph) -> tuple[Any, ...]:
    returned: Any = graph.output_node().args[0]
    before: Any = program.graph_module.graph.output_node().args[0]
    names = {o.name: n.name for o, n in zip(before, returned, strict=True) if o is not None}
    return tuple(replace(b, node=names[b.node]) for b in program.outputs)


class _Call:
    """One ``cp::*`` operator and the means to write others in its place."""

    def __init__(self, graph: fx.Graph, node: fx.Node, rank: int, names: Names) -> None:
        self.graph, self.node = graph, node
        self.x: Any = node.args[0]
        given: Any = node.args
        if ops.is_spmd(node.target):
            *self.rest, groups, self.size = given[1:]
            own = tuple(groups[: self.size])  # the rank's own come first
            self.name = names[own]
            self.member = own.index(rank)

    def op(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)

    def sent(self, target: Any, *args: Any) -> fx.Node:
        """A collective on the operand, laid out contiguously, as NCCL and gloo need it."""
        whole = self.op(aten.contiguous.default, self.x)
        return self.op(c10d.wait_tensor.default, self.op(target, whole, *args, self.name))

    def own_block(self, whole: fx.Node) -> fx.Node:
        length = tensor_of(self.x).shape[0] // self.size
        start = self.member * length
        return self.op(aten.slice.Tensor, whole, 0, start, start + length)


def _all_gather(call: _Call) -> fx.Node:
    return call.sent(c10d.all_gather_into_tensor.default, call.size)


def _all_to_all(call: _Call) -> fx.Node:
    even = [tensor_of(call.x).shape[0] // call.size] * call.size
    return call.sent(c10d.all_to_all_single.default, even, even)


def _broadcast(call: _Call) -> fx.Node:
    return call.sent(c10d.broadcast.default, call.rest[0])


def _all_reduce(call: _Call) -> fx.Node:
    return call.sent(c10d.all_reduce.default, _KINDS[call.rest[0]])


def _reduce_scatter(call: _Call) -> fx.Node:
    return call.sent(c10d.reduce_scatter_tensor.default, _KINDS[call.rest[0]], call.size)


def _scatter(call: _Call) -> fx.Node:
    """The root's tensor on every rank, then cut; torch has no functional scatter."""
    return call.own_block(_broadcast(call))


def _attention(call: _Call) -> fx.Node:
    """One over codes stays what it is, for :mod:`.codes`."""
    if call.node.kwargs.get("steps"):
        return call.op(ops.ATTENTION, *call.node.args, **call.node.kwargs)
    return call.op(aten.scaled_dot_product_attention.default, *call.node.args, **call.node.kwargs)


def _result(call: _Call) -> fx.Node:
    return call.op(aten.clone.default, call.x)


_KINDS: Final = {"sum": "sum", "avg": "avg", "max": "max", "min": "min", "prod": "product"}
_WRITERS: Final[Mapping[Any, Callable[[_Call], fx.Node]]] = {
    torch.ops.cp.all_gather.default: _all_gather,
    torch.ops.cp.all_to_all.default: _all_to_all,
    torch.ops.cp.broadcast.default: _broadcast,
    torch.ops.cp.all_reduce.default: _all_reduce,
    torch.ops.cp.reduce.default: _all_reduce,  # defined on more ranks than it must be
    torch.ops.cp.reduce_scatter.default: _reduce_scatter,
    torch.ops.cp.gather.default: _all_gather,
    torch.ops.cp.scatter.default: _scatter,
    ops.ATTENTION: _attention,
    torch.ops.cp.result.default: _result,
}


def _wait_late(graph: fx.Graph) -> None:
    """Every wait just before the first reader of what it waits for."""
    order = {node: place for place, node in enumerate(graph.nodes)}
    for wait in list(graph.find_nodes(op="call_function", target=c10d.wait_tensor.default)):
        first = min(wait.users, key=order.__getitem__, default=None)
        if first is not None:
            first.prepend(wait)


def unsupported(program: Lowered) -> Iterator[str]:
    """Operators of ``program`` that only TensorRT has."""
    if any(n.target is ops.FUSED for n in program.graph_module.graph.nodes):
        yield "its attention is TensorRT's own multi-device layer (--strategy fused)"
