"""The dense program with the rounding of an exchange in 8 bits: what the ranks are proven against.

Algebra (no communication at all; ``r`` rounds each head of each token to 8 bits)::

    O = r(softmax(r(Q) r(K)^T * scale + M) r(V))

with ``r`` where the strategy's exchange rounds, and nowhere else. Rounding by head and token knows
nothing of ranks, so every strategy must come to this, at any world.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..ir import ops
from ..ir.attention import Cost, Refusal, Site
from ..ir.program import Lowered
from ..ir.quantize import decoded, encoded
from ..ir.sharded import Sharded
from ..mesh import Axis
from . import alone
from .rewrite import rewrite
from .tokens import repeated


@dataclass(frozen=True)
class Rounded:
    """Attention over whole queries and keys, with what ``site.eight`` names rounded."""

    def why_not(self, site: Site, axis: Axis) -> Refusal | None:
        """It always can be done."""
        return None

    def travels(self, site: Site, axis: Axis) -> str:
        """Whatever the site says."""
        return site.eight

    def cost(self, site: Site, axis: Axis) -> Cost:
        """Nothing is communicated."""
        return alone.cost(site, axis)

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
        """All queries over all keys, ``[B, H, S, D]``."""
        q, k, v = (
            _rounded(x) if name in site.eight else x
            for name, x in (("q", q_BHSD), ("k", k_BHSD), ("v", v_BHSD))
        )
        k, v = (repeated(x, site.heads // site.kv_heads) for x in (k, v))
        out = ops.attention(q, k, v, mask, scale=site.scale, causal=site.causal, steps=site.steps)
        return _rounded(out) if "o" in site.eight else out


def _rounded(x: Tensor) -> Tensor:
    return decoded(*encoded(x), x.dtype)


def rounded(
    dense: Lowered, sharded: Sharded, eight: str, axis: Axis, decompositions: Mapping[Any, Any]
) -> Lowered:
    """``dense`` with the rounding of an exchange in the places where ``sharded`` has one.

    Args:
        dense: whole; it stays as it is.
        sharded: the same, spread over the ranks.
        eight: which of q, k, v and o the strategy sends in 8 bits.
        axis: the ranks.
        decompositions: see :func:`.rewrite.rewrite`.
    """
    of = (p.graph_module.graph.find_nodes(op="call_function", target=ops.ATTENTION)
          for p in (sharded.program, dense))  # fmt: skip
    places = {
        whole.name: sharded.places[part.name]
        for part, whole in zip(*of, strict=True)
        if part.name in sharded.places
    }
    own = replace(sharded, program=dense, places=places)
    program, _ = rewrite(own, Rounded(), "rounded", axis, decompositions, eight=eight)
    return program
