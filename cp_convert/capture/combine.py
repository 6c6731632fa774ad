"""Classic guidance at the end of a dense program: the same with one branch's outputs out.

Before and after, for an output ``y`` of ``uncond`` and ``cond`` rows::

    y_B  ->  sum over branches of [1 - s, s] * y_2b,  b = B / 2        = uncond + s (cond - uncond)

Written as a weighted sum over a dimension of the branches, so that :mod:`..sharding.branches`,
which gives every rank its own rows and weight, has one all-reduce to do and no gather. Products and
sum are float32: with ``s`` of 5 the two nearly equal branches cancel, and half precision's
roundings would be left.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import torch
from torch import fx

from ..errors import CannotShard
from ..ir.program import Binding, Lowered, copied, module_of, tensor_of
from ..ir.source import Branches
from ..ir.writer import Writer

aten: Final = torch.ops.aten


def combine(program: Lowered, branches: Branches) -> Lowered:
    """``program`` with the scale as an input (float32, ``[1]``), its branches combined by it.

    Itself where there is no scale.

    Args:
        program: decomposed and still whole.
        branches: the batch, and the scale's name.

    Raises:
        CannotShard: no output has a batch.
    """
    if not branches.added:
        return program
    graph = copied(program.graph_module.graph)
    write = Writer(graph)
    (scale,) = branches.added
    weights, given = _weights(write, scale)
    end = graph.output_node()
    renamed: dict[str, fx.Node] = {}
    with graph.inserting_before(end):
        for node in dict.fromkeys(end.all_input_nodes):
            if branches.are_in(tensor_of(node).shape):
                write.origin = node
                renamed[node.name] = _sum(write, node, weights)
    if not renamed:
        raise CannotShard(f"--combine {scale}: no output has the batch of {branches.rows} rows.")
    end.args = fx.map_arg(end.args, lambda n: renamed.get(n.name, n))
    graph.lint()
    outputs = tuple(_renamed(binding, renamed) for binding in program.outputs)
    module = module_of(program.graph_module, graph)
    return replace(program, graph_module=module, inputs=(*program.inputs, given), outputs=outputs)


def _weights(write: Writer, scale: str) -> tuple[fx.Node, Binding]:
    """``[1 - s, s]``, and the new input ``s``."""
    graph = write.graph
    places = [node for node in graph.nodes if node.op == "placeholder"]
    with graph.inserting_after(places[-1]):
        given = graph.placeholder(scale)
    with write.mode:
        given.meta["val"] = torch.empty(1)
    with graph.inserting_before(given.next):
        rest = write.op(aten.sub.Tensor, write.op(aten.full.default, [1], 1.0), given)
        weights = write.op(aten.cat.default, [rest, given])
    return weights, Binding(scale, given.name, torch.float32, (1,))


def _sum(write: Writer, node: fx.Node, weights: fx.Node) -> fx.Node:
    value = tensor_of(node)
    (rows, *rest), wide = value.shape, node
    if value.dtype != torch.float32:
        wide = write.op(aten._to_copy.default, node, dtype=torch.float32)
    branches = write.op(aten._reshape_copy.default, wide, [2, rows // 2, *rest])
    by_branch = write.op(aten._reshape_copy.default, weights, [2, *[1] * value.dim()])
    total = write.op(aten.sum.dim_IntList, write.op(aten.mul.Tensor, branches, by_branch), [0])
    if value.dtype != torch.float32:
        total = write.op(aten._to_copy.default, total, dtype=value.dtype)
    return total


def _renamed(binding: Binding, renamed: dict[str, Any]) -> Binding:
    node = renamed.get(binding.node)
    if node is None:
        return binding
    return replace(binding, node=node.name, shape=tuple(tensor_of(node).shape))
