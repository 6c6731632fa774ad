"""What forward computes from weights alone, computed once.

As inputs, weights are new numbers at every call, so ``linear(x, cat([q, k, v]))`` would join the
three anew each time. Here it becomes one input more::

    linear(x, cat([q, k, v]))  ->  linear(x, constant)      constant = cat([q, k, v]), stored beside

What is exact is taken as it is: numbers that are moved, and float32 arithmetic. Half-precision
arithmetic (weight_norm, spectral_norm, ``1 + weight``) would be rounded before the proof computes
with it in float32; so it is done in float32, and rounded once, in the engine::

    linear(x, weight_norm(v, g))  ->  linear(x, cast(constant))   constant = weight_norm(v, g)

Embedded weights are constants, whose arithmetic TensorRT's builder could fold by itself, if it had
a converter for every operator; that is taken as well, and mere moves are left to the builder. Views
cost nothing and stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any, Final

import torch
from torch import Tensor, fx

from ..bundle.folder import CONSTANTS
from ..ir.program import HALF, Lowered, copied, erase_dead, evaluated, module_of, tensor_of
from ..ir.tensors import Weight, save, weight_of
from ..ir.writer import Writer
from .in_float32 import MOVES, VIEWS, in_float32

aten: Final = torch.ops.aten


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
        program: the same for all ranks; what differs from rank to rank is left as it is.
        names: by placeholder, the binding of a weight that is an input; empty where weights are
            embedded. Those that nothing reads are no inputs of the result.
    """
    graph = copied(program.graph_module.graph)
    weights = {
        node: program.state[node.name]
        for node in graph.find_nodes(op="placeholder")
        if node.name in (names or program.state) and node.name not in program.own
    }
    moved = _exact(program, graph, weights) if names else {}
    found = {**moved, **in_float32(program.graph_module, graph, weights, moved)}
    read = (n for n in graph.find_nodes(op="placeholder") if n.name in names and n.users)
    bindings = {n.name: names[n.name] for n in read}
    if not found and len(bindings) == len(names):
        return Folded(program, dict(names), {})
    state, constants = dict(program.state), {}
    holders = {_put(graph, node, value): (node, value) for node, value in found.items()}
    erase_dead(graph)
    for holder, (node, value) in holders.items():
        if not holder.users:  # only another computed one has read it
            graph.erase_node(holder)
            continue
        state[holder.name] = value.contiguous()
        if names:
            bindings[holder.name] = f"constants.{node.name}"
            constants[bindings[holder.name]] = state[holder.name]
    for weight in weights:
        if not weight.users and names:  # only what was computed is read now
            del state[weight.name]
            bindings.pop(weight.name, None)
            graph.erase_node(weight)
    graph.lint()
    module = module_of(program.graph_module, graph)
    return Folded(replace(program, graph_module=module, state=state), bindings, constants)


def _put(graph: fx.Graph, node: fx.Node, value: Tensor) -> fx.Node:
    """A placeholder of ``value`` instead of ``node``, cast to its type."""
    body = next(one for one in graph.nodes if one.op != "placeholder")
    like, write = tensor_of(node), Writer(graph)
    write.origin = node
    with graph.inserting_before(body):
        holder = result = graph.placeholder(f"constant_{node.name}")
        holder.meta = dict(node.meta)
        if value.dtype != like.dtype:
            with write.mode:
                holder.meta["val"] = like.to(value.dtype)
            result = write.op(aten._to_copy.default, holder, dtype=like.dtype)
    node.replace_all_uses_with(result)
    return holder


def _exact(
    program: Lowered, graph: fx.Graph, weights: Mapping[fx.Node, Tensor]
) -> dict[fx.Node, Tensor]:
    """What weights, with or without constants, give by more than a view, where others read it."""
    known: dict[fx.Node, Any] = dict(weights)
    for node in graph.find_nodes(op="get_attr"):
        known[node] = getattr(program.graph_module, str(node.target))
    found = evaluated(graph, known, _is_exact)
    from_weights = _followers(graph, weights)
    return {node: x for node, x in found if node in from_weights and not _is_view(node)}


def _followers(graph: fx.Graph, weights: Iterable[fx.Node]) -> set[fx.Node]:
    found = set(weights)
    for node in graph.nodes:
        if any(operand in found for operand in node.all_input_nodes):
            found.add(node)
    return found


def _is_exact(node: fx.Node) -> bool:
    values: list[Any] = [n.meta.get("val") for n in (node, *node.all_input_nodes)]
    if not all(isinstance(value, Tensor) for value in values):
        return False
    if node.target in MOVES:
        return True
    dtypes = [value.dtype for value in values]
    if node.target is aten._to_copy.default:
        return bool(dtypes[0] == torch.float32)
    is_own = getattr(node.target, "namespace", None) == "aten"
    return bool(is_own) and not any(dtype in HALF for dtype in dtypes)


def _is_view(node: fx.Node) -> bool:
    """Whether nothing but views leads from one weight here."""
    while node.target in VIEWS:
        node = node.all_input_nodes[0]
    return node.op != "call_function"


def store(
    constants: Mapping[str, Tensor], folder: Path, file: str = CONSTANTS
) -> dict[str, tuple[Weight, ...]]:
    """Write them into ``file`` of the bundle at ``folder``; returns where each is."""
    if not constants:
        return {}
    places = save(constants, folder / file, Event())
    return {
        name: (weight_of(name, constants[name], file, *place),) for name, place in places.items()
    }
