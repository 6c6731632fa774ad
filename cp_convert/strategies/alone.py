"""No strategy at all: every rank attends to its own keys. The proof's control, never converted.

Algebra (r: this rank)::

    O_r = softmax(Q_r K_r^T * scale) V_r

Where this gives the same output as the dense model, attention does not matter in it, and nothing
would be proven by agreement.
"""

from __future__ import annotations

from torch import Tensor

from ..ir import ops
from ..ir.attention import Cost, Refusal, Site
from ..mesh import Axis
from .tokens import repeated


def why_not(site: Site, axis: Axis) -> Refusal | None:
    """It always can be done; it is just wrong."""
    return None


def cost(site: Site, axis: Axis) -> Cost:
    """Nothing is communicated."""
    own = site.own_key_values
    return Cost(0, 0, own, site.heads, site.operations(site.heads, site.queries) // axis.size)


def travels(site: Site, axis: Axis) -> str:
    """Nothing is sent."""
    return ""


def attend(
    q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, mask: Tensor | None, *, site: Site, axis: Axis
) -> Tensor:
    """This rank's queries over its own keys, unmasked, ``[B, H, S, D]``."""
    ratio = site.heads // site.kv_heads
    k, v = (repeated(x, ratio) for x in (k_BHSD, v_BHSD))
    return ops.attention(q_BHSD, k, v, scale=site.scale)
