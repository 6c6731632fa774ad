"""Guidance: a dense program in, the same with a batch's branches shared by the ``cfg`` axis out.

The batch is a dimension like the tokens: the walk of :mod:`.shard` carries it by the same rules,
and its result is a dense program to the walk over the sequence that follows (docs/adr/0020). Every
attention's batch and every output's dimension 0 ask to be split; inputs without a batch (positions,
frequencies) are not reached and stay whole. Nothing is communicated but the outputs at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import fx

from ..errors import CannotShard
from ..ir.layout import Layout
from ..ir.ops import ATTENTION
from ..ir.program import Lowered, module_path, shape, source_line
from ..ir.sharded import Guided
from ..mesh import Axis
from .propagation import Seeds, Want, is_tensor, wants
from .rules import elements, operands, rules_of
from .shard import rules_by_node
from .walk import Walk


def split_branches(program: Lowered, axis: Axis) -> Guided:
    """Give every rank of ``axis`` its own rows of the batch.

    Raises:
        CannotShard: nothing has a batch, or an attention sees all branches at once.
    """
    if axis.size == 1:
        return Guided(program)
    walk = _BatchWalk(program, axis)
    walk.run()
    split = {move.operator for move in walk.moves if move.kind == "split" and move.dim == 0}
    inputs = tuple(binding.name for binding in program.inputs if binding.node in split)
    _check(walk, inputs)
    graph_module = walk.module()
    done = replace(program, graph_module=graph_module, outputs=walk.outputs)
    return Guided(done, inputs, tuple(walk.moves))


def _batches(size: int) -> Seeds:
    """Every attention's batch and every output's, where the branches divide it."""

    def seeds(node: fx.Node) -> Iterator[tuple[fx.Node, Want]]:
        if node.target is not ATTENTION and node.op != "output":
            return
        for operand in operands(node):
            whole = shape(operand) if is_tensor(operand) else ()
            if whole and whole[0] > 1 and whole[0] % size == 0:
                yield operand, Want(0, elements(operand))

    return seeds


class _BatchWalk(Walk):
    """The walk over the batch, to which the plan's marks mean nothing; it leaves them in."""

    def __init__(self, program: Lowered, axis: Axis) -> None:
        # No strategy completes an attention whose keys are spread over the branches.
        rules = rules_by_node(program, lambda n: [r for r in rules_of(n) if not r.context])
        graph, inputs = program.graph_module.graph, (b.node for b in program.inputs)
        wanted = wants(graph, rules, inputs, axis.size, _batches(axis.size))
        super().__init__(program, axis, rules, wanted)

    def _mark(self, node: fx.Node) -> None:
        self._call(node)

    def _even(self, length: int, cuts: frozenset[int]) -> Layout:
        return super()._even(length, frozenset())


def _check(walk: _BatchWalk, inputs: tuple[str, ...]) -> None:
    """Refuse a program that guidance would not make any faster."""
    if not inputs:
        raise CannotShard(
            f"--cfg {walk.axis.size}: no input has as many rows, or a multiple of them, that an "
            "attention or an output has too.",
            hint="example inputs whose first dimension is the batch: every branch once or more.",
        )
    mixed = [m for m in walk.moves if m.kind == "gather" and m.operator != "the output"]
    for node in walk.dense.find_nodes(op="call_function", target=ATTENTION):
        held = [dim for dim, _ in walk.env[node].parts]
        has_batch = shape(node)[0] % walk.axis.size == 0
        if 0 not in held and (held or mixed or has_batch):
            first = f" (the first to mix them is {mixed[0].operator})" if mixed else ""
            raise CannotShard(
                f"--cfg {walk.axis.size}: this attention sees all branches at once{first}.",
                where=mixed[0].where if mixed else f"{module_path(node)} ({source_line(node)})",
                hint="leave --cfg out: this model's branches cannot be computed apart.",
            )
