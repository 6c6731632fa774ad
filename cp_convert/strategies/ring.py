"""Ring Attention: keys and values stream past, one rank's worth at a time.

Algebra, for the chunks ``s = 0 .. W-1`` (c: any number, the same in all chunks of a row)::

    l_s = sum exp(Q_r K_s^T * scale + M_rs - c)
    A_s =     exp(Q_r K_s^T * scale + M_rs - c) V_s
    O_r = (A_0 + .. + A_{W-1}) / (l_0 + .. + l_{W-1})

which is the softmax over all keys (Milakov and Gimelshein, arXiv:1805.02867), streamed between
devices as in Ring Attention (Liu et al., arXiv:2310.01889). How ``A`` and ``l`` of a chunk are
found is :mod:`.parts`' affair: by a fused attention in bfloat16 and float32, by scores that are
written out in float32 in float16, with a mask of numbers, and for heads wider than 248; the
manifest says which (``way``). With two ranks there is one chunk, and it is AllGather KV.

Chunk s is the s-th part of every rank's tokens, as many as one rank has. TensorRT's collectives
have no send and receive, which would bring one rank's tokens after another's; softmax does not
care which tokens come together (ADR 1).

Collectives: W an attention, all-gathers of K and V packed as ``[2, B, H, S/W, D]``; with two ranks
one. That of chunk ``s + 1`` is issued before chunk ``s`` is attended to, and that of ``s + 2``
waits for it.
Bytes sent by a rank: ``2 (W-1)/W`` of one full Q, the same in every step.
Memory: its own K and V, those of the present chunk and of the next, ``6 S`` tokens, however large
the world; written-out scores, ``[B, H, S, S]``, come in blocks (:mod:`.online`).
With grouped queries only the key heads travel. Masks: a rank's own rows, the columns of the chunk.
Limits: none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ir.attention import Cost, Refusal, Site
from ..mesh import Axis
from .online import blocks_for
from .parts import longest, ring_over, slices_of, way_of, widened
from .tokens import mask_of, mask_rows


def why_not(site: Site, axis: Axis) -> Refusal | None:
    """Every attention can be split this way."""
    return None


def cost(site: Site, axis: Axis) -> Cost:
    """Every rank sends its keys to all others, and holds its own and those of two others."""
    way, heads = way_of(site, axis.size), site.batch * site.heads
    keys = longest(site.keys, axis.size)
    blocks = blocks_for(heads, site.queries, keys)
    return Cost(
        collectives=len(slices_of(site.keys, axis.size)),
        sent=(axis.size - 1) * site.own_key_values,
        key_values=min(3, axis.size) * site.own_key_values,
        heads=site.heads,
        operations=widened(site.operations(site.heads, site.queries), site, way),
        scores=heads * -(-site.queries // blocks) * keys if way == "explicit" else 0,
        way=way,
    )


def travels(site: Site, axis: Axis) -> str:
    """Queries stay where they are."""
    return "kv"


def attend(
    q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, mask: Tensor | None, *, site: Site, axis: Axis
) -> Tensor:
    """This rank's queries over every rank's keys in turn, ``[B, H, S, D]``."""
    queries, keys = site.query_layout, site.key_layout
    assert queries is not None and keys is not None
    mask = mask_of(site, mask, q_BHSD)
    rows = None if mask is None else mask_rows(mask, queries, axis)
    return ring_over(
        torch.stack((k_BHSD, v_BHSD)),
        q_BHSD,
        rows,
        site=site,
        axis=axis,
        held=lambda rank: (keys.slots_of(rank), keys.tokens_of(rank)),
    )
