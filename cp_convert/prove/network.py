"""The proof at network level: what TensorRT's builder is given, against the same reference.

It covers what the proof of the program cannot see: the converters, ours and Torch-TensorRT's, and
each rank's own slices and groups. The same two comparisons are made, with the same bounds.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..errors import ProofFailed
from ..network import Network
from .program import ROUNDING, Error, Proof, deviation, worst
from .replay import replay


@dataclass(frozen=True)
class NetworkProof:
    """A proof of the networks that passed.

    Attributes:
        algebra: every rank's error with float32 arithmetic.
        ranks: every rank's error in the job's precision.
        seconds: how long it took.
    """

    algebra: tuple[Error, ...]
    ranks: tuple[Error, ...]
    seconds: float


def prove_networks(
    networks: Sequence[Network], inputs: Mapping[str, Tensor], proof: Proof
) -> NetworkProof:
    """Replay all ranks' networks and compare them with the reference of ``proof``.

    Args:
        networks: one for every rank, rank 0 first.
        inputs: the full inputs by binding name.
        proof: the proof of the program, with its reference and bounds.

    Raises:
        ProofFailed: an error beyond its bound, a layer that is not understood, or networks that
            are not of one program.
    """
    start = time.perf_counter()
    algebra = _errors(networks, inputs, proof, widen=True)
    if not all(error.within(proof.algebra_bound) for error in algebra):
        raise ProofFailed(
            "the networks go astray, although the program they were made from does not: "
            f"{deviation(algebra, proof.algebra_bound)}.",
            hint="a converter and PyTorch disagree on what an operator means; please report it.",
        )
    ranks = _errors(networks, inputs, proof, widen=False)
    if not all(error.within(proof.bound) for error in ranks):
        raise ProofFailed(
            f"the networks go astray: {deviation(ranks, proof.bound)}.", hint=ROUNDING
        )
    return NetworkProof(algebra, ranks, time.perf_counter() - start)


def _errors(
    networks: Sequence[Network], inputs: Mapping[str, Tensor], proof: Proof, *, widen: bool
) -> tuple[Error, ...]:
    outputs = replay(networks, inputs, widen=widen)
    return tuple(worst(of_rank, proof.reference) for of_rank in outputs)
