"""The context-parallel strategies, by name.

A strategy is a module of its own (or, where it has parameters, an object of one) with

- ``why_not(site, axis)``: the reason why the attention cannot be split this way, and a hint, or
  ``None``; it never changes anything;
- ``cost(site, axis)``: what it costs one rank, by arithmetic;
- ``travels(site, axis)``: which of ``q``, ``k``, ``v`` and ``o`` it sends;
- ``attend(q, k, v, mask, site=..., axis=...)``: the attention of this rank's queries over all
  ranks' keys, in plain torch and ``cp::*`` operators. It is traced once for each shape of
  attention and put in the place of the model's own.

Shape suffixes: B batch, H heads, h = H / W heads of one rank, S this rank's sequence, D head
dimension, W world (the axis' size).
"""

from typing import Final, Protocol

from torch import Tensor

from ..ir.attention import Cost, Refusal, Site
from ..mesh import Axis
from . import allgather_kv, alone, fused, ring, stream_kv, ulysses
from .usp import Usp


class Strategy(Protocol):
    """What a strategy module provides; see the package's docstring."""

    def why_not(self, site: Site, axis: Axis) -> Refusal | None:
        """Why the attention cannot be split this way, or ``None``."""

    def cost(self, site: Site, axis: Axis) -> Cost:
        """What the attention costs one rank."""

    def travels(self, site: Site, axis: Axis) -> str:
        """Which of q, k, v and o are sent, as letters."""

    def attend(
        self,
        q_BHSD: Tensor,
        k_BHSD: Tensor,
        v_BHSD: Tensor,
        mask: Tensor | None,
        *,
        site: Site,
        axis: Axis,
    ) -> Tensor:
        """This rank's queries over all ranks' keys, ``[B, H, S, D]``."""


STRATEGIES: Final[dict[str, Strategy]] = {
    "allgather-kv": allgather_kv,
    "ring": ring,
    "stream-kv": stream_kv,
    "ulysses": ulysses,
}

CONTROL: Final[Strategy] = alone
"""What the proof's control runs instead; never part of an engine."""


def choose(name: str, ulysses: int | None = None) -> Strategy:
    """The strategy called ``name``.

    Args:
        name: a key of :data:`STRATEGIES`, ``usp`` or ``fused``.
        ulysses: for ``usp``, how many neighbouring ranks exchange heads for tokens.
    """
    if name == "usp":
        assert ulysses is not None
        return Usp(ulysses)
    return fused if name == "fused" else STRATEGIES[name]


__all__ = ["CONTROL", "STRATEGIES", "Cost", "Refusal", "Site", "Strategy", "Usp", "choose"]
