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
With grouped queries, key heads are repeated only as far as every rank needs one.
Masks: rows and columns in shard order, and this rank's heads of a per-head mask.
Limits: as many heads as ranks; heads that do not divide are padded with zeros and dropped again.
Source: DeepSpeed Ulysses (Jacobs et al., arXiv:2309.14509).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..mesh import Axis
from .site import Refusal, Site
from .tokens import (
    grouped,
    mask_all_rows,
    mask_columns,
    mask_heads,
    mask_of,
    padded_heads,
    real_keys,
    repeated,
)


def why_not(site: Site, axis: Axis) -> Refusal | None:
    """Padding may cost up to half of the work, but more ranks than heads would idle."""
    if site.heads < axis.size:
        return Refusal(
            f"{site.heads} heads are fewer than the {axis.size} ranks.",
            "try --strategy ring or --strategy allgather-kv, which do not split heads, "
            f"or a world of at most {site.heads}.",
        )
    return None


def attend(
    q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, mask: Tensor | None, *, site: Site, axis: Axis
) -> Tensor:
    """This rank's queries over all keys, a share of the heads at a time, ``[B, H, S, D]``."""
    assert site.query_layout is not None and site.key_layout is not None
    heads = -(-site.heads // axis.size) * axis.size
    if heads > site.heads or site.kv_heads < site.heads:
        k_BHSD, v_BHSD = (grouped(x, site.heads, axis.size) for x in (k_BHSD, v_BHSD))
    if heads > site.heads:
        q_BHSD, k_BHSD, v_BHSD = (padded_heads(x, heads) for x in (q_BHSD, k_BHSD, v_BHSD))
    q, k, v = _exchanged((q_BHSD, k_BHSD, v_BHSD), axis)
    ratio = q.shape[1] // k.shape[1]
    k, v = (repeated(real_keys(x, site.key_layout), ratio) for x in (k, v))
    in_order = site.query_layout.is_plain and site.query_layout == site.key_layout
    causal = site.causal and in_order
    mask = None if causal else mask_of(site, mask, q_BHSD)
    if mask is not None:
        mask = mask_all_rows(mask_columns(mask, site.key_layout.order), site.query_layout)
        mask = mask_heads(mask, heads, axis)
    out_BhTD = ops.attention(q, k, v, mask, scale=site.scale, causal=causal)
    out_WSBhD = out_BhTD.permute(2, 0, 1, 3).unflatten(0, (axis.size, -1))
    back_WSBhD = ops.all_to_all(out_WSBhD, axis)
    out_BHSD = back_WSBhD.permute(2, 0, 3, 1, 4).flatten(1, 2)
    return out_BHSD if heads == site.heads else out_BHSD[:, : site.heads]


def _exchanged(qkv: tuple[Tensor, ...], axis: Axis) -> list[Tensor]:
    """All tokens of this rank's heads, in one collective: ``[B, H, S, D] -> [B, h, W S, D]``."""
    blocks = [_by_head_group(x, axis.size) for x in qkv]
    if len({x.shape[3] for x in blocks}) == 1:
        packed = torch.cat(blocks, dim=1)
        arrived = ops.all_to_all(packed, axis).split([x.shape[1] for x in blocks], dim=1)
        return [_all_tokens(x) for x in arrived]
    # Grouped queries: other numbers of heads, so that only flat blocks can be packed.
    flat = torch.cat([x.flatten(1) for x in blocks], dim=1)
    arrived = ops.all_to_all(flat, axis).split([x[0].numel() for x in blocks], dim=1)
    return [_all_tokens(x.view(b.shape)) for x, b in zip(arrived, blocks, strict=True)]


def _by_head_group(x_BHSD: Tensor, size: int) -> Tensor:
    """``[B, H, S, D] -> [W, S, B, h, D]``."""
    x_BWhSD: Tensor = x_BHSD.unflatten(1, (size, -1))
    return x_BWhSD.permute(1, 3, 0, 2, 4)


def _all_tokens(x_WSBhD: Tensor) -> Tensor:
    """``[W, S, B, h, D] -> [B, h, W S, D]``."""
    return x_WSBhD.permute(2, 3, 0, 1, 4).flatten(2, 3)
