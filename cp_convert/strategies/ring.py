"""Ring Attention: keys and values stream past, one rank's chunk at a time.

Algebra, for the chunks ``s = 0 .. W-1`` (m: row maximum, l: row sum, A: unnormalised output)::

    X   = Q_r K_s^T * scale + M_rs
    m'  = max(m, rowmax X)          P = exp(X - m')          c = exp(m - m')
    l'  = c l + rowsum P            A' = c A + P V_s
    O_r = A / l  after the last chunk

which is the online softmax of Milakov and Gimelshein (arXiv:1805.02867), streamed between
devices as in Ring Attention (Liu et al., arXiv:2310.01889). Everything between the chunk's
arrival and the final division is float32: half-precision operands are exact in float32 (and in
TF32), so only the accumulation order differs from a fused attention.

Collectives: W an attention, broadcasts of K and V packed as ``[2, B, H, S, D]``, the root of step
s being rank s. TensorRT's collectives have no send and receive, which a true ring would use; a
broadcast is the one-to-all it does have (ADR 1).
Bytes sent by a rank: ``2 (W-1)/W`` of one full Q, all of it in the one step it is root of.
Memory: its own K and V and one other rank's, ``4 S`` tokens, however large the world; plus the
scores of one chunk, ``[B, H, S, S]``, or of as many of its queries as fit (:mod:`.online`).
With grouped queries only the key heads travel. Masks: a rank's own rows, the columns of the chunk.
Limits: none.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ir import ops
from ..ir.attention import Cost, Refusal, Site
from ..mesh import Axis
from .online import OnlineAttention, blocks_for
from .tokens import mask_of, mask_rows, picked, repeated


def why_not(site: Site, axis: Axis) -> Refusal | None:
    """Every attention can be split this way."""
    return None


def cost(site: Site, axis: Axis) -> Cost:
    """Every rank sends its keys to all others, and holds those of one other."""
    heads = site.batch * site.heads
    blocks = blocks_for(heads, site.queries, site.keys)
    return Cost(
        collectives=axis.size,
        sent=(axis.size - 1) * site.own_key_values,
        key_values=2 * site.own_key_values,
        heads=site.heads,
        operations=site.operations(site.heads, site.queries),
        scores=heads * -(-site.queries // blocks) * site.keys,
    )


def attend(
    q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, mask: Tensor | None, *, site: Site, axis: Axis
) -> Tensor:
    """This rank's queries over every rank's keys in turn, ``[B, H, S, D]``."""
    assert site.query_layout is not None and site.key_layout is not None
    scale = 1 / math.sqrt(site.head_dim) if site.scale is None else site.scale
    ratio = site.heads // site.kv_heads
    mask = mask_of(site, mask, q_BHSD)
    rows = None if mask is None else mask_rows(mask, site.query_layout, axis)
    attention = OnlineAttention(q_BHSD, scale, rows, site.keys)
    own_2BHSD = torch.stack((k_BHSD, v_BHSD))
    for root in range(axis.size):
        slots = site.key_layout.slots_of(root)
        if not slots:
            continue  # nothing but padding there
        arrived = ops.broadcast(own_2BHSD, root, axis).float().unbind(0)
        k, v = (repeated(picked(x, 2, slots), ratio) for x in arrived)
        attention.add(k, v, site.key_layout.tokens_of(root))
    return attention.result()
