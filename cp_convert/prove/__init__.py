"""Proof that all ranks together compute what the model computes."""

from .device import check_device
from .network import NetworkProof, prove_networks
from .program import Error, Proof, Stages, Truth, flat_inputs, measure, measure_ranks, prove

__all__ = [
    "Error",
    "NetworkProof",
    "Proof",
    "Stages",
    "Truth",
    "check_device",
    "flat_inputs",
    "measure",
    "measure_ranks",
    "prove",
    "prove_networks",
]
