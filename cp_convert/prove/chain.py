"""Pieces of a program, one after another, against the whole one.

In: the program that was proven, and its pieces. Out: nothing, where all ranks of the pieces come to
the very same numbers; both are the same operators on the same tensors, so nothing may be rounded
otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import ProofFailed
from ..ir.program import Lowered
from .device import Mover
from .lockstep import PerRank, merged, run
from .measure import CPU


def check_pieces(
    pieces: Sequence[Lowered],
    program: Lowered,
    inputs: Mapping[str, Tensor],
    world: int,
    device: torch.device = CPU,
) -> None:
    """Run all ranks of ``program``, and of its pieces one after another; in the job's precision.

    Args:
        pieces: in their order.
        program: what they are pieces of.
        inputs: the full inputs by binding name.
        world: how many ranks there are.
        device: where both are computed.

    Raises:
        ProofFailed: a rank's outputs are not the same, bit by bit.
    """
    mover = Mover(device)
    inputs = mover.tree(dict(inputs))
    found = run_pieces([mover.program(one) for one in pieces], inputs, world)
    wanted = run(mover.program(program), inputs, world)
    for rank, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        for binding, one, other in zip(program.outputs, ours, theirs, strict=True):
            if not torch.equal(one, other):
                raise ProofFailed(
                    f"the pieces, one after another, give another {binding.name} on rank {rank} "
                    "than the program that they were cut from.",
                    hint="it was cut wrongly; please report it, and leave --split-after out.",
                )


def run_pieces(
    pieces: Sequence[Lowered],
    inputs: Mapping[str, Tensor],
    world: int,
    *,
    widen: bool = False,
) -> list[list[Tensor]]:
    """Run every rank of all pieces, each on what the earlier ones return.

    Returns:
        Every rank's outputs, in the order of the last piece's.
    """
    between: dict[str, PerRank] = {}
    outputs: list[list[Tensor]] = []
    for piece in pieces:
        taken = {b.node: between[b.name].values for b in piece.inputs if b.name in between}
        given = tuple(b for b in piece.inputs if b.name not in between)
        of_ranks = replace(piece, inputs=given, own={**piece.own, **taken})
        outputs = run(of_ranks, inputs, world, widen=widen)
        for number, binding in enumerate(piece.outputs):
            between[binding.name] = merged([of_rank[number] for of_rank in outputs])
    return outputs
