"""DeepSpeed Ulysses: sequence shards become head shards for the attention, and back.

Algebra (group g of heads belongs to rank g)::

    [Q K V]_r : all heads, S tokens      --all-to-all-->   heads of group r, W S tokens
    O_r = softmax(Q K^T * scale) V       on the heads of group r, all tokens
    O_r : heads of group r, W S tokens   --all-to-all-->   all heads, S tokens

Collectives: 2 an attention. Q, K and V travel together as ``[W, 3 S, B, h, D]``, O as
``[W, S, B, h, D]``: block j of dimension 0 goes to rank j, and what arrives is in rank order,
which is token order on the way there and head order on the way back.
Bytes sent by a rank: ``4 (W-1)/W^2`` of one full Q, a quarter (Q, K, V, O) each.
Memory: Q, K, V and O of ``W S`` tokens but ``H / W`` heads: as much as the shards themselves.
Limits: the heads divide by W; queries and keys are both sharded.
Source: DeepSpeed Ulysses (Jacobs et al., arXiv:2309.14509).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..mesh import Axis
from .site import Refusal, Site


def why_not(site: Site, axis: Axis) -> Refusal | None:
    """Heads must divide by the axis' size, and queries must be sharded as keys are."""
    if site.heads % axis.size:
        return Refusal(
            f"{site.heads} heads do not divide among {axis.size} ranks.",
            "try --strategy ring or --strategy allgather-kv, which do not split heads, "
            f"or a world that divides {site.heads}.",
        )
    if not site.queries_sharded:
        return Refusal(
            "its queries are whole on every rank while its keys are sharded.",
            "try --strategy ring or --strategy allgather-kv.",
        )
    return None


def attend(
    q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, *, scale: float | None, axis: Axis
) -> Tensor:
    """This rank's queries over all keys, a share of the heads at a time, ``[B, H, S, D]``."""
    packed = torch.cat([_by_head_group(x, axis.size) for x in (q_BHSD, k_BHSD, v_BHSD)], dim=1)
    arrived = ops.all_to_all(packed, axis)
    lengths = [x.shape[2] for x in (q_BHSD, k_BHSD, v_BHSD)]
    q, k, v = (_all_tokens(x) for x in arrived.split(lengths, dim=1))
    out_BhTD = ops.attention(q, k, v, scale=scale)
    out_WSBhD = out_BhTD.permute(2, 0, 1, 3).unflatten(0, (axis.size, -1))
    back_WSBhD = ops.all_to_all(out_WSBhD, axis)
    return back_WSBhD.permute(2, 0, 3, 1, 4).flatten(1, 2)


def _by_head_group(x_BHSD: Tensor, size: int) -> Tensor:
    """``[B, H, S, D] -> [W, S, B, h, D]``."""
    x_BWhSD: Tensor = x_BHSD.unflatten(1, (size, -1))
    return x_BWhSD.permute(1, 3, 0, 2, 4)


def _all_tokens(x_WSBhD: Tensor) -> Tensor:
    """``[W, S, B, h, D] -> [B, h, W S, D]``."""
    return x_WSBhD.permute(2, 3, 0, 1, 4).flatten(2, 3)
