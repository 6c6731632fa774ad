"""The part of the manifest that tells which weights ranks share. No torch, no tensorrt."""

from __future__ import annotations

from typing import Literal

from .call import Count, Positive, Struct


class SharedWeight(Struct, frozen=True):
    """A parameter of which every rank of the axis ``tp`` has a part.

    ``dim`` is cut; each of the ``segments``, which follow one another along it, is cut equally, so
    that a rank's part is its share of every one.
    """

    name: str
    dim: Count
    segments: list[Positive]


class WholeAttention(Struct, frozen=True):
    """An attention that every rank of the axis ``tp`` computes whole, and why."""

    module: str
    source: str | None
    reason: str


class Tensor(Struct, frozen=True):
    """How the ranks of the axis ``tp`` share the model.

    ``bytes`` are those of the ``weights``, whole, in the bundle's precision; of all parameters
    together there are ``of_bytes``. ``plan`` says who chose them: the program alone
    (``inferred``), or a plan of the model's (``model``).
    """

    bytes: Count
    of_bytes: Count
    weights: list[SharedWeight]
    whole: list[WholeAttention]
    plan: Literal["inferred", "model"] = "inferred"
