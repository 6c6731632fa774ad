"""What forward computes from weights alone, computed once: for weights that are engine inputs.

Embedded weights are constants, which TensorRT's builder folds by itself. As inputs they are new
numbers at every call, so ``linear(x, cat([q, k, v]))`` would join the three anew each time. Here it
becomes one input more::

    linear(x, cat([q, k, v]))  ->  linear(x, constant)      constant = cat([q, k, v]), stored beside

Only what is exact is taken: numbers that are moved, and float32 arithmetic. Half-precision results
would be rounded before the proof computes with them in float32; they stay in the engine. So do mere
views, which cost nothing there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any, Final

import torch
from torch import Tensor, fx

from ..bundle.folder import CONSTANTS
from ..ir.program import HALF, Lowered, copied, erase_dead, evaluated, module_of
from ..ir.tensors import Weight, save, weight_of

aten: Final = torch.ops.aten
_VIEWS: Final = (
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.view.default,
    aten.reshape.default,
    aten._reshape_copy.default,
    aten.unsqueeze.default,
    aten.squeeze.dims,
    aten.slice.Tensor,
    aten.select.int,
    aten.expand.default,
    torch.ops.cp.result.default,
)
_MOVES: Final = (*_VIEWS, aten.cat.default, aten.clone.default, aten.flip.default)


@dataclass(frozen=True)
class Folded:
    """A program whose weights are inputs.

    Attributes:
        program: every value that follows from weights is a placeholder of its own.
        names: by placeholder, the binding.
        constants: what was computed, by binding.
    """

    program: Lowered
    names: dict[str, str]
    constants: dict[str, Tensor]


def fold_weights(program: Lowered, names: Mapping[str, str]) -> Folded:
    """Compute what depends on weights alone; ``program`` stays as it is.

    Args:
        program: lowered, the same for all ranks.
        names: by placeholder, the binding of a weight that is an input.
    """
    if not names or not _worked(program, program.graph_module.graph, names):
        return Folded(program, dict(names), {})
    graph = copied(program.graph_module.graph)
    read = [n for n in graph.find_nodes(op="placeholder") if n.name in names and n.users]
    body = next(node for node in graph.nodes if node.op != "placeholder")
    state, bindings, constants = dict(program.state), dict(names), {}
    for node, value in _worked(program, graph, names):
        with graph.inserting_before(body):
            holder = graph.placeholder(f"constant_{node.name}")
        holder.meta = dict(node.meta)
        node.replace_all_uses_with(holder)
        name = f"constants.{node.name}"
        bindings[holder.name] = name
        state[holder.name] = constants[name] = value.contiguous()
    erase_dead(graph)
    for weight in read:
        if not weight.users:  # only what was computed is read now
            del state[weight.name], bindings[weight.name]
            graph.erase_node(weight)
    graph.lint()
    return Folded(
        replace(program, graph_module=module_of(program.graph_module, graph), state=state),
        bindings,
        constants,
    )


def _worked(
    program: Lowered, graph: fx.Graph, names: Mapping[str, str]
) -> list[tuple[fx.Node, Tensor]]:
    """What weights, with or without constants, give by more than a view, where others read it."""
    weights = [node for node in graph.find_nodes(op="placeholder") if node.name in names]
    known: dict[fx.Node, Any] = {node: program.state[node.name] for node in weights}
    for node in graph.find_nodes(op="get_attr"):
        known[node] = getattr(program.graph_module, str(node.target))
    found = evaluated(graph, known, _is_exact)
    from_weights = set(weights)
    for node in graph.nodes:
        if any(operand in from_weights for operand in node.all_input_nodes):
            from_weights.add(node)
    return [(node, x) for node, x in found if node in from_weights and not _is_view(node)]


def _is_exact(node: fx.Node) -> bool:
    values: list[Any] = [n.meta.get("val") for n in (node, *node.all_input_nodes)]
    if not all(isinstance(value, Tensor) for value in values):
        return False
    if node.target in _MOVES:
        return True
    dtypes = [value.dtype for value in values]
    if node.target is aten._to_copy.default:
        return bool(dtypes[0] == torch.float32)
    is_own = getattr(node.target, "namespace", None) == "aten"
    return bool(is_own) and not any(dtype in HALF for dtype in dtypes)


def _is_view(node: fx.Node) -> bool:
    """Whether nothing but views leads from one weight here."""
    while node.target in _VIEWS:
        node = node.all_input_nodes[0]
    return node.op != "call_function"


def store(constants: Mapping[str, Tensor], folder: Path) -> dict[str, Weight]:
    """Write them into the bundle; returns where each is."""
    if not constants:
        return {}
    places = save(constants, folder / CONSTANTS, Event())
    return {
        name: weight_of(name, constants[name], CONSTANTS, *place) for name, place in places.items()
    }
