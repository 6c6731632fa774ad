"""DeepSpeed Ulysses: sequence shards become head shards for the attention, and back.

Algebra (group g of heads belongs to rank g)::

    [Q K V]_r : all heads, S tokens      --all-to-all-->   heads of group r, W S tokens
    O_r = softmax(Q K^T * scale) V       on the heads of group r, all tokens
    O_r : heads of group r, W S tokens   --all-to-all-->   all heads, S tokens

Collectives: 2 an attention. Q, K and V travel together as ``[W, B, 3 h, S, D]``, O as
``[W, B, h, S, D]``: block j of dimension 0 goes to rank j, and what arrives is in rank order,
which is token order on the way there and head order on the way back.
Copies: with a batch of 1 the shards are such blocks as they stand. What moves numbers is one
packing of Q, K and V, one transposition ``[W, h] -> [h, W]`` of each that arrives, because
attention wants a head's tokens together, and its inverse for O; coming home, O moves no more.
Bytes sent by a rank: ``4 (W-1)/W^2`` of one full Q, a quarter (Q, K, V, O) each.
Memory: Q, K, V and O of ``W S`` tokens but ``H / W`` heads: as much as the shards themselves.
With grouped queries, key heads are repeated only as far as every rank needs one.
Masks: rows and columns in shard order, and this rank's heads of a per-head mask.
Limits: as many heads as ranks; heads that do not divide are padded with zeros and dropped again.
Source: DeepSpeed Ulysses (Jacobs et al., arXiv:2309.14509).
"""

from __future__ import annotations

from torch import Tensor

from ..ir import ops
from ..ir.attention import Cost, Refusal, Site
from ..mesh import Axis
from .exchange import key_heads, padded, to_heads, to_tokens
from .tokens import mask_all_rows, mask_columns, mask_heads, mask_of, real_keys, repeated


def why_not(site: Site, axis: Axis) -> Refusal | None:
    """Padding may cost up to half of the work, but more ranks than heads would idle."""
    if site.heads < axis.size:
        return Refusal(
            f"{site.heads} heads are fewer than the {axis.size} ranks that share the sequence.",
            "try --strategy ring or --strategy allgather-kv, which do not split heads, "
            f"or at most {site.heads} such ranks; --cfg gives guidance branches their own.",
        )
    return None


def cost(site: Site, axis: Axis) -> Cost:
    """Two exchanges; every rank computes its share of the heads over all tokens."""
    size, heads, keys = axis.size, padded(site.heads, axis.size), key_heads(site, axis.size)
    numbers = site.batch * site.head_dim
    travelling = 2 * heads * site.queries + 2 * keys * site.keys
    return Cost(
        collectives=2,
        sent=numbers * travelling * (size - 1) // size,
        key_values=2 * numbers * keys * site.keys,
        heads=heads,
        operations=site.operations(heads, site.queries),
    )


def travels(site: Site, axis: Axis) -> str:
    """Everything is exchanged."""
    return "qkvo"


def attend(
    q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, mask: Tensor | None, *, site: Site, axis: Axis
) -> Tensor:
    """This rank's queries over all keys, a share of the heads at a time, ``[B, H, S, D]``."""
    assert site.query_layout is not None and site.key_layout is not None
    q, k, v = to_heads(q_BHSD, k_BHSD, v_BHSD, site, axis)
    ratio = q.shape[1] // k.shape[1]
    k, v = (repeated(real_keys(x, site.key_layout), ratio) for x in (k, v))
    in_order = site.query_layout.is_plain and site.query_layout == site.key_layout
    causal = site.causal and in_order
    mask = None if causal else mask_of(site, mask, q_BHSD)
    if mask is not None:
        mask = mask_all_rows(mask_columns(mask, site.key_layout.order), site.query_layout)
        mask = mask_heads(mask, padded(site.heads, axis.size), axis)
    out_BhTD = ops.attention(q, k, v, mask, scale=site.scale, causal=causal, steps=site.steps)
    return to_tokens(out_BhTD, site, axis)
