"""Shard a whole program: one SPMD program in which every rank holds a part of the sequence.

The dense program is walked once. Every value is held whole, or as this rank's part of one
dimension, or both. An operator for which :mod:`.rules` knows how to work on parts does so when its
operands are parts; any other is given whole tensors. A whole tensor becomes a part by a slice,
which costs nothing; a part becomes whole by an all-gather, which is right wherever it happens. So
no wrong program can come out of a missing rule, only one that communicates more, and
:class:`..ir.sharded.Move` tells where.

Where splitting begins is said by the plan's marks (``cp::mark``) or found by :mod:`.propagation`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import fx

from ..errors import CannotShard
from ..ir.ops import ATTENTION, MARK
from ..ir.program import Lowered, copied, module_of
from ..ir.sharded import Sharded
from ..mesh import Axis
from .propagation import Rules, Want, wants
from .rules import Rule, rules_of
from .walk import Walk


def shard(program: Lowered, axis: Axis) -> Sharded:
    """Spread the sequence of ``program`` over the ranks of ``axis``.

    The program's own marks say where; without any they are inferred.

    Raises:
        CannotShard: nothing can be sharded, or a marked length is too short.
    """
    if axis.size == 1:
        return Sharded(_unmarked(program), {}, ())
    rules = rules_by_node(program)
    walk = Walk(program, axis, rules, _wanted(program, rules, axis))
    walk.run()
    if not any(move.kind == "split" for move in walk.moves):
        raise _nothing(program)
    return Sharded(
        replace(program, graph_module=walk.module(), outputs=walk.outputs),
        walk.places,
        tuple(walk.moves),
    )


def _unmarked(program: Lowered) -> Lowered:
    """Without the plan's marks, where nobody shares the sequence; ``program`` stays as it is."""
    graph = copied(program.graph_module.graph)
    names: dict[str, str] = {}
    for node in graph.find_nodes(op="call_function", target=MARK):
        (value,) = node.all_input_nodes
        names[node.name] = value.name
        node.replace_all_uses_with(value)
        graph.erase_node(node)
    if not names:
        return program
    outputs = tuple(replace(b, node=names.get(b.node, b.node)) for b in program.outputs)
    return replace(program, graph_module=module_of(program.graph_module, graph), outputs=outputs)


def _wanted(program: Lowered, rules: Rules, axis: Axis) -> Mapping[fx.Node, Want]:
    """What the walk splits of itself: nothing where the plan's marks say it."""
    graph, inputs = program.graph_module.graph, (binding.node for binding in program.inputs)
    marked = any(n.target is MARK for n in graph.nodes)
    return {} if marked else wants(graph, rules, inputs, axis.size)


def rules_by_node(
    program: Lowered, rules: Callable[[fx.Node], list[Rule]] = rules_of
) -> dict[fx.Node, list[Rule]]:
    """Every way in which every operator of ``program`` can be computed in parts."""
    calls = (n for n in program.graph_module.graph.nodes if n.op == "call_function")
    return {n: rules(n) for n in calls}


def _nothing(program: Lowered) -> CannotShard:
    attentions = program.graph_module.graph.find_nodes(op="call_function", target=ATTENTION)
    if not list(attentions):
        return CannotShard(
            "the model has no attention that is recognised, so there is no sequence to shard.",
            hint="recognised are torch's scaled_dot_product_attention, MultiheadAttention and "
            "matmul, softmax, matmul; otherwise say in cp_plan what to split.",
        )
    return CannotShard(
        "no attention's queries are as many as there are ranks, so nothing would be sharded.",
        hint="give example inputs of a real size.",
    )
