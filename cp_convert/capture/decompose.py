"""A traced program in core operators, functional, free of complex numbers, constants folded."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.export.graph_signature import ExportGraphSignature

from ..errors import CannotLower
from ..ir.passes import (
    copies_as_values,
    fold_constants,
    interleave_strided_writes,
    share_constants,
    simplify,
)
from ..ir.program import Lowered, Program, hold, module_of, state_of
from .complex_to_real import complex_to_real
from .once import decompose_once


def decompose(program: Program, table: Mapping[Any, Any]) -> Lowered:
    """``program`` in core operators, functional, still whole and the same for every world.

    Parameters stay placeholders, so that they are neither copied nor folded; buffers and
    constants become attributes, which may be folded.

    Args:
        program: as it was traced.
        table: the decompositions; the backend's, so that its converters know what is left.

    Raises:
        CannotLower: forward writes to its own state.
    """
    exported, graph = _decomposed(program.exported, table)
    signature = exported.graph_signature
    _check_mutation(signature)
    state = state_of(exported)
    graph_module = module_of(exported.graph_module, graph)
    inputs = {binding.node for binding in program.inputs}
    named = signature.inputs_to_parameters  # made anew whenever it is asked for
    for node in list(graph_module.graph.find_nodes(op="placeholder")):
        if node.name in inputs or node.name in named:
            continue
        if node.name in state:
            hold(graph_module, node, state[node.name])
        else:
            graph_module.graph.erase_node(node)
    copies_as_values(graph_module.graph)
    interleave_strided_writes(graph_module.graph)
    simplify(graph_module.graph)
    fold_constants(graph_module)
    complex_to_real(graph_module)
    share_constants(graph_module)
    graph_module.recompile()
    parameters = {n: state[n] for n in named}
    # An output that is not returned as a tensor of its own (a constant, None) has no binding.
    values: Any = graph_module.graph.output_node().args[0]
    returned = list(values)
    names = [v.name for v in returned if isinstance(v, fx.Node)]
    outputs = tuple(replace(b, node=n) for b, n in zip(program.outputs, names, strict=True))
    return Lowered(graph_module, parameters, program.inputs, outputs, program.own)


def _decomposed(
    exported: torch.export.ExportedProgram, table: Mapping[Any, Any]
) -> tuple[torch.export.ExportedProgram, fx.Graph]:
    """The graph in the table's operators, and the program whose signature it has."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = decompose_once(exported.graph_module, table)
        if graph is None:
            exported = exported.run_decompositions(dict(table))
            graph = exported.graph_module.graph
    return exported, graph


def _check_mutation(signature: ExportGraphSignature) -> None:
    mutated = {**signature.buffers_to_mutate, **signature.user_inputs_to_mutate}
    if mutated:
        raise CannotLower(
            f"forward writes to {', '.join(sorted(set(mutated.values())))}, "
            "which an engine cannot do.",
            hint="return the new value instead of assigning it.",
        )
