"""Proof that all ranks together compute what the model computes."""

from .program import Error, Proof, Stages, prove

__all__ = ["Error", "Proof", "Stages", "prove"]
