"""The proof at network level: what TensorRT's builder is given, against the same reference.

It covers what the proof of the program cannot see: the converters, ours and Torch-TensorRT's, and
each rank's own slices and groups. The same two comparisons are made, with the same bounds.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import ProofFailed
from ..ir.network import Network
from ..ir.program import Executable
from ..ir.proof import FLOOR, Error, NetworkProof, Proof
from .bounds import nothing_shown
from .device import Mover
from .errors import ROUNDING, deviation, worst
from .lockstep import run
from .measure import CPU
from .quantizers import check_codes, unrounded
from .replay import NOTHING, replay_pieces


def prove_networks(
    networks: Sequence[Network],
    inputs: Mapping[str, Tensor],
    proof: Proof,
    lowered: Executable,
    device: torch.device = CPU,
    own: Mapping[str, tuple[Tensor, ...]] = NOTHING,
    *,
    later: Sequence[Sequence[Network]] = (),
    names: Sequence[Mapping[str, str]] = (),
) -> NetworkProof:
    """Replay all ranks' networks and compare them with the reference of ``proof``.

    Args:
        networks: one for every rank, rank 0 first.
        inputs: the full inputs by binding name.
        proof: the proof of the program, with its reference and bounds.
        lowered: the program that the networks were made from.
        device: where the layers are computed.
        own: inputs that differ from rank to rank, by binding name.
        later: where the program is cut into pieces, the networks of all but the first.
        names: of every piece, by its networks' binding, what is bound to it.

    Raises:
        ProofFailed: an error beyond its bound, a layer that is not understood, or networks that
            are not of one program.
    """
    start, mover = time.perf_counter(), Mover(device)
    pieces, inputs = _moved(mover, (networks, *later)), mover.tree(dict(inputs))
    own = mover.of_ranks(own)
    lowered = mover.program(lowered)
    with unrounded(proof.codes is not None):
        wide = replay_pieces(pieces, inputs, own=own, widen=not proof.is_wide, names=names)
        algebra = tuple(worst(of_rank, proof.reference) for of_rank in wide)
        if not all(error.within(proof.algebra_bound) for error in algebra):
            _check_against_program(wide, inputs, proof, lowered)
    codes: tuple[Error, ...] = ()
    if proof.codes is not None:
        outputs = replay_pieces(pieces, inputs, own=own, widen=not proof.is_wide, names=names)
        codes = check_codes(proof.codes, outputs, "the networks")
    outputs = replay_pieces(pieces, inputs, own=own, names=names)
    ranks = tuple(worst(of_rank, proof.against) for of_rank in outputs)
    if not all(error.within(proof.bound) for error in ranks):
        if proof.rounded is not None:
            lost = max(error.max for error in (proof.dense, *proof.spread))
            raise nothing_shown(lost, max(error.max for error in ranks))
        raise ProofFailed(
            f"the networks go astray: {deviation(ranks, proof.bound)}.", hint=ROUNDING
        )
    return NetworkProof(algebra, ranks, time.perf_counter() - start, codes)


def _moved(mover: Mover, pieces: Sequence[Sequence[Network]]) -> list[Sequence[Network]]:
    """The same on the device; those that several pieces have in common stay in common."""
    moved: dict[int, Sequence[Network]] = {}
    for networks in pieces:
        if id(networks) not in moved:
            moved[id(networks)] = mover.networks(networks)
    return [moved[id(networks)] for networks in pieces]


def _check_against_program(
    wide: Sequence[Sequence[Tensor]],
    inputs: Mapping[str, Tensor],
    proof: Proof,
    lowered: Executable,
) -> None:
    """The networks must do exactly what the lowered program does, and that lose no more than dense.

    Lowering folds what depends on constants in the job's precision, so that even with float32
    arithmetic a half-precision program may differ from the reference, as the dense model in that
    precision does; the networks have the same constants.
    """
    program = run(lowered, inputs, len(wide), widen=True)
    floor = Error(FLOOR, FLOOR)
    apart = [worst(ours, theirs) for ours, theirs in zip(wide, program, strict=True)]
    if not all(error.within(floor) for error in apart):
        raise ProofFailed(
            "the networks go astray, although the program they were made from does not: "
            f"{deviation(apart, floor)}.",
            hint="a converter and PyTorch disagree on what an operator means; please report it.",
        )
    folded = [worst(of_rank, proof.reference) for of_rank in program]
    if not all(error.within(proof.lost) for error in folded):
        raise ProofFailed(
            f"lowering changed what the program computes: {deviation(folded, proof.lost)}.",
            hint="a lowering pass and PyTorch disagree on an operator; please report it.",
        )
