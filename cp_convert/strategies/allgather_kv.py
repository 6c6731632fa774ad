"""AllGather KV: every rank fetches all keys and values and attends with its own queries.

Algebra (r: this rank)::

    O_r = softmax(Q_r [K_0 .. K_{W-1}]^T * scale + M_r) [V_0 .. V_{W-1}]

Collectives: 1 an attention, an all-gather of K and V packed as ``[2, B, H, S, D]``.
Copies: one packing of K and V, and one transposition of what arrives, ``[W, 2, B, H, S, D] ->
[2, B, H, W, S, D]``: the join is on dimension 0, and attention wants a head's tokens together.
Bytes sent by a rank: ``2 (W-1)/W`` of one full Q, that is ``(W-1)`` times its own K and V; with
grouped queries, less by the ratio of key heads to query heads.
Memory: all K and V on every rank, ``2 W S`` tokens, whatever the world.
Masks: a rank's own rows, the columns in the order in which the keys arrive.
Limits: none.
Source: Llama 3 (arXiv:2407.21783, section 3.3.2) gathers K and V in the same way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ir import ops
from ..ir.attention import Cost, Refusal, Site
from ..mesh import Axis
from .tokens import mask_columns, mask_of, mask_rows, real_keys, repeated
from .wire import sent


def why_not(site: Site, axis: Axis) -> Refusal | None:
    """Every attention can be split this way."""
    return None


def cost(site: Site, axis: Axis) -> Cost:
    """One all-gather; every rank computes its own queries over all keys."""
    return Cost(
        collectives=1,
        sent=(axis.size - 1) * site.own_key_values,
        key_values=axis.size * site.own_key_values,
        heads=site.heads,
        operations=site.operations(site.heads, site.queries),
    )


def travels(site: Site, axis: Axis) -> str:
    """Queries stay where they are."""
    return "kv"


def attend(
    q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, mask: Tensor | None, *, site: Site, axis: Axis
) -> Tensor:
    """This rank's queries over the gathered keys, ``[B, H, S, D]``."""
    assert site.query_layout is not None and site.key_layout is not None
    packed = torch.stack((k_BHSD, v_BHSD))
    gathered = sent(lambda x: ops.all_gather(x, axis), packed, eight="k" in site.eight)
    kv_W2BHSD: Tensor = gathered.unflatten(0, (axis.size, 2))
    ratio = site.heads // site.kv_heads
    k_BHTD, v_BHTD = (
        repeated(real_keys(x, site.key_layout), ratio)
        for x in kv_W2BHSD.permute(1, 2, 3, 0, 4, 5).flatten(3, 4).unbind(0)
    )
    mask = mask_of(site, mask, q_BHSD)
    if mask is not None:
        mask = mask_rows(mask_columns(mask, site.key_layout.order), site.query_layout, axis)
    return ops.attention(q_BHSD, k_BHTD, v_BHTD, mask, scale=site.scale, steps=site.steps)
