"""Proof that all ranks together compute what the model computes."""

from ..ir.proof import Error, NetworkProof, Proof
from .chain import check_pieces
from .device import check_device
from .measure import Truth, flat_inputs, measure, measure_program, measure_ranks
from .network import prove_networks
from .program import prove
from .stages import Stages

__all__ = [
    "Error",
    "NetworkProof",
    "Proof",
    "Stages",
    "Truth",
    "check_device",
    "check_pieces",
    "flat_inputs",
    "measure",
    "measure_program",
    "measure_ranks",
    "prove",
    "prove_networks",
]
