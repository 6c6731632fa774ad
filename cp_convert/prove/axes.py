"""The proof's controls along the mesh's other axes: a program in, what is lost without peers out.

A rank that takes its peers on an axis for copies of itself keeps its own guidance branch, or its
own partial sum. Where that gives the same output, the proof would not have noticed a wrong group.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from torch import Tensor

from ..errors import ProofFailed
from ..ir.program import Executable
from ..ir.proof import Error
from ..mesh import GUIDANCE, TENSOR, Axis
from .errors import worst
from .lockstep import is_along, run

_WHAT: Final = {GUIDANCE: "guidance branches", TENSOR: "partial sums"}


def controls_along(
    axes: Iterable[Axis],
    program: Executable,
    inputs: Mapping[str, Tensor],
    reference: Sequence[Tensor],
    *,
    widen: bool,
    least: float,
) -> dict[str, Error]:
    """By axis, the error of rank 0 when nothing is learned from the others there.

    Args:
        axes: the mesh's, besides the sequence's; those without a collective are left out.
        program: all ranks'.
        inputs: the full inputs by binding name.
        reference: what the dense model returns.
        widen: compute in float32.
        least: that each must exceed.

    Raises:
        ProofFailed: one does not.
    """
    nodes, found = list(program.graph_module.graph.nodes), {}
    for axis in axes:
        if not any(is_along(node, axis) for node in nodes):
            continue
        outputs = run(program, inputs, len(axis.flat), widen=widen, alone=axis)
        found[axis.name] = error = worst(outputs[0], reference)
        if error.max <= least:
            raise ProofFailed(
                "nothing was proven: the output is the same even when every rank keeps its own "
                f"{_WHAT.get(axis.name, 'part')} along the axis {axis.name} (relative error "
                f"{error.max:.1e}).",
                hint="give example inputs whose branches differ, and real or random weights.",
            )
    return found
