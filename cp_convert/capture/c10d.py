"""Collectives that the model calls itself, ``torch.ops._c10d_functional.*``, as ``cp::*``.

Tensor-parallel layers communicate through functional collectives (PyTorch documentation,
*torch.distributed*). They name a process group by a string; the model file's ``process_groups``
says which ranks that is, since nothing here is distributed while it is traced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
import torch.distributed._functional_collectives
from torch import fx

from ..errors import CannotTrace
from ..ir.program import module_path, source_line, tensor_of
from ..mesh import Axis

_NAMESPACES: Final = ("_c10d_functional", "_c10d_functional_autograd")


def is_own_collective(node: fx.Node) -> bool:
    """Whether the node is a collective of torch.distributed's."""
    return getattr(node.target, "namespace", None) in _NAMESPACES


def own_collectives(graph: fx.Graph, groups: Mapping[str, Axis]) -> None:
    """Put the ``cp::`` operator of the same meaning in the place of every functional collective.

    ::

        all_reduce(x, kind, group)                          ->  cp::all_reduce
        all_gather_into_tensor(x, size, group)              ->  cp::all_gather
        reduce_scatter_tensor(x, kind, size, group)         ->  cp::reduce_scatter
        all_to_all_single(x, [n, ..], [n, ..], group)       ->  cp::all_to_all
        broadcast(x, root, group)                           ->  cp::broadcast
        wait_tensor(x)                                      ->  alias(x)

    Args:
        graph: of a traced program, changed in place.
        groups: by name.

    Raises:
        CannotTrace: a group that the model file does not declare, uneven blocks, or a collective
            that changes its operand or several tensors at once.
    """
    for node in graph.nodes:
        if is_own_collective(node):
            _replace(node, groups)


def _replace(node: fx.Node, groups: Mapping[str, Axis]) -> None:
    """In place, so that an output keeps its name in the program's signature."""
    name = node.target._schema.name.split("::")[1]  # type: ignore[union-attr]
    if name == "wait_tensor":
        node.target = torch.ops.aten.alias.default
        return
    if name not in _RULES:
        raise _refused(node, f"forward calls {node.target}, which is not understood.", _FUNCTIONAL)
    given: dict[str, Any] = dict(
        zip((a.name for a in node.target._schema.arguments), node.args, strict=False)  # type: ignore[union-attr]
    )
    given.update(node.kwargs)
    group = str(given["group_name"])
    if group not in groups:
        raise _refused(
            node,
            f"forward communicates in a process group called {group!r}, and it is not known which "
            "ranks that is.",
            f"say so in the model file: process_groups = {{{group!r}: [[0, 1], [2, 3]]}}, all "
            "ranks of the world, or a function of the world size that returns such a dict.",
        )
    axis = groups[group]
    node.target, rest = _RULES[name](node, given, axis)
    node.args, node.kwargs = (given["input"], *rest, axis.flat, axis.size), {}


_FUNCTIONAL: Final = (
    "known are all_reduce, all_gather_into_tensor, reduce_scatter_tensor, all_to_all_single and "
    "broadcast, the forms that return a new tensor."
)


def _refused(node: fx.Node, message: str, hint: str) -> CannotTrace:
    return CannotTrace(message, where=f"{module_path(node)} ({source_line(node)})", hint=hint)


Call = tuple[Any, list[Any]]


def _sized(node: fx.Node, told: int, axis: Axis) -> None:
    if told != axis.size:
        raise _refused(
            node,
            f"forward says that the group has {told} ranks, and process_groups gives it "
            f"{axis.size}.",
            "make both the same; the world is given by --world.",
        )


def _all_reduce(node: fx.Node, given: Mapping[str, Any], axis: Axis) -> Call:
    return torch.ops.cp.all_reduce.default, [given["reduce_op"].lower()]


def _all_gather(node: fx.Node, given: Mapping[str, Any], axis: Axis) -> Call:
    _sized(node, given["group_size"], axis)
    return torch.ops.cp.all_gather.default, []


def _reduce_scatter(node: fx.Node, given: Mapping[str, Any], axis: Axis) -> Call:
    _sized(node, given["group_size"], axis)
    return torch.ops.cp.reduce_scatter.default, [given["reduce_op"].lower()]


def _all_to_all(node: fx.Node, given: Mapping[str, Any], axis: Axis) -> Call:
    even = [tensor_of(given["input"]).shape[0] // axis.size] * axis.size
    sizes = [list(given[f"{way}_split_sizes"] or even) for way in ("input", "output")]
    if sizes != [even, even] or sum(even) != tensor_of(given["input"]).shape[0]:
        raise _refused(
            node,
            f"all_to_all_single sends blocks of {sizes[0]} and receives {sizes[1]}.",
            f"TensorRT exchanges {axis.size} equal blocks; pad them.",
        )
    return torch.ops.cp.all_to_all.default, []


def _broadcast(node: fx.Node, given: Mapping[str, Any], axis: Axis) -> Call:
    return torch.ops.cp.broadcast.default, [given["src"]]


_RULES: Final[Mapping[str, Callable[[fx.Node, Mapping[str, Any], Axis], Call]]] = {
    "all_reduce": _all_reduce,
    "all_gather_into_tensor": _all_gather,
    "reduce_scatter_tensor": _reduce_scatter,
    "all_to_all_single": _all_to_all,
    "broadcast": _broadcast,
}
