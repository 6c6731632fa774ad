"""A program in core operators, then in TensorRT's; at last each rank's own."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.export.graph_signature import ExportGraphSignature

from .. import ops
from ..errors import CannotLower
from ..mesh import split_groups
from ..program import (
    Binding,
    Lowered,
    Program,
    copied,
    hold,
    module_path,
    source_line,
    state_of,
    tensor_of,
)
from .complexes import without_complex
from .passes import interleave_strided_writes, simplify
from .runtime import DYNAMO_CONVERTERS, decompositions, post_lowering, settings

_SHARD = torch.ops.cp.shard.default


def decompose(program: Program) -> Lowered:
    """``program`` in core operators, functional, still whole and the same for every world.

    Parameters stay placeholders, so that they are neither copied nor folded; buffers and
    constants become attributes, which may be folded.

    Raises:
        CannotLower: forward writes to its own state.
    """
    with _quiet():
        exported = program.exported.run_decompositions(decompositions())
    signature = exported.graph_signature
    _check_mutation(signature)
    state = state_of(exported)
    graph_module = fx.GraphModule(exported.graph_module, exported.graph_module.graph)
    inputs = {binding.node for binding in program.inputs}
    for node in list(graph_module.graph.find_nodes(op="placeholder")):
        if node.name in inputs or node.name in signature.inputs_to_parameters:
            continue
        if node.name in state:
            hold(graph_module, node, state[node.name])
        else:
            graph_module.graph.erase_node(node)
    interleave_strided_writes(graph_module.graph)
    simplify(graph_module.graph)
    without_complex(graph_module)
    graph_module.recompile()
    parameters = {n: state[n] for n in signature.inputs_to_parameters}
    # An output that is not returned as a tensor of its own (a constant, None) has no binding.
    returned = [v for v in _flat(graph_module.graph.output_node().args[0])]
    names = [v.name for v in returned if isinstance(v, fx.Node)]
    outputs = tuple(replace(b, node=n) for b, n in zip(program.outputs, names, strict=True))
    return Lowered(graph_module, parameters, program.inputs, outputs)


def lower(program: Lowered) -> Lowered:
    """Apply Torch-TensorRT's lowering passes; still SPMD. ``program`` stays as it is.

    Raises:
        CannotLower: an operator has no converter.
    """
    module = program.graph_module
    own = fx.GraphModule(module, copied(module.graph))
    with _quiet():
        own = post_lowering(own, settings())
        _make_contiguous(own)
    lowered = Lowered(own, program.state, program.inputs, _outputs(program, own))
    _check_converters(lowered)
    return lowered


def _make_contiguous(graph_module: fx.GraphModule) -> None:
    """Torch-TensorRT copies other layouts and forgets the copy before TensorRT has read it."""
    for tensor in [*graph_module.parameters(), *graph_module.buffers()]:
        tensor.data = tensor.data.contiguous()


def _check_mutation(signature: ExportGraphSignature) -> None:
    mutated = {**signature.buffers_to_mutate, **signature.user_inputs_to_mutate}
    if mutated:
        raise CannotLower(
            f"forward writes to {', '.join(sorted(set(mutated.values())))}, "
            "which an engine cannot do.",
            hint="return the new value instead of assigning it.",
        )


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _outputs(program: Lowered, graph_module: fx.GraphModule) -> tuple[Binding, ...]:
    """Return tensors only, each as a tensor of its own, and name them in the bindings."""
    graph, node = graph_module.graph, graph_module.graph.output_node()
    values = [value for value in _flat(node.args[0]) if isinstance(value, fx.Node)]
    with graph.inserting_before(node):
        returned = [graph.call_function(torch.ops.cp.result.default, (v,)) for v in values]
    for result, value in zip(returned, values, strict=True):
        result.meta = dict(value.meta)
    node.args = (tuple(returned),)
    graph_module.recompile()
    return tuple(
        replace(binding, node=value.name)
        for binding, value in zip(program.outputs, returned, strict=True)
    )


def _flat(returned: Any) -> list[Any]:
    return list(returned) if isinstance(returned, tuple | list) else [returned]


def _check_converters(lowered: Lowered) -> None:
    for node in lowered.graph_module.graph.nodes:
        if node.op != "call_function" or node.target is _SHARD:
            continue
        if DYNAMO_CONVERTERS.get(node) is None:
            raise CannotLower(
                f"TensorRT has no converter for {node.target}({_call(node)}).",
                where=f"{module_path(node)} ({source_line(node) or 'source unknown'})",
                hint="replace the operation in the model, or move it out of forward.",
            )


def _call(node: fx.Node) -> str:
    """The arguments in words: what they are, and keywords such as a dtype that has no converter."""
    given = [_shape(argument) for argument in node.all_input_nodes]
    return ", ".join(given + [f"{k}={v}" for k, v in node.kwargs.items() if v is not None])


def _shape(node: fx.Node) -> str:
    value = node.meta.get("val")
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, Tensor) else str(node)


def specialise(lowered: Lowered, rank: int) -> Lowered:
    """The program of one rank: shards become slices, and collectives name the rank's own group.

    ``lowered`` stays as it is; parameters are shared.
    """
    graph = copied(lowered.graph_module.graph)
    for node in list(graph.nodes):
        if node.target is _SHARD:
            _slice(node, rank)
        elif node.target in ops.COLLECTIVES:
            *rest, flat, size = node.args
            node.args = (*rest, list(_own_group(flat, size, rank)), size)
    graph.lint()
    return Lowered(
        fx.GraphModule(lowered.graph_module, graph),
        lowered.state,
        lowered.inputs,
        lowered.outputs,
    )


def _slice(node: fx.Node, rank: int) -> None:
    x, dim, flat, size = node.args
    assert isinstance(x, fx.Node) and isinstance(dim, int)
    length = tensor_of(node).shape[dim]
    start = _own_group(flat, size, rank).index(rank) * length
    node.target = torch.ops.aten.slice.Tensor
    node.args = (x, dim, start, start + length)


def _own_group(flat: object, size: object, rank: int) -> tuple[int, ...]:
    assert isinstance(flat, Sequence) and isinstance(size, int)
    return next(group for group in split_groups(list(flat), size) if rank in group)
