"""Proof that all ranks together compute what the model computes."""

from .network import NetworkProof, prove_networks
from .program import Error, Proof, Stages, flat_inputs, prove

__all__ = [
    "Error",
    "NetworkProof",
    "Proof",
    "Stages",
    "flat_inputs",
    "prove",
    "prove_networks",
]
