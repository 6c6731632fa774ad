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
scores ``[B, H, S, S]`` of one chunk.
With grouped queries only the key heads travel. Masks: a rank's own rows, the columns of the chunk.
Limits: none.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from .. import ops
from ..mesh import Axis
from .site import Refusal, Site
from .tokens import mask_columns, mask_of, mask_rows, picked, repeated


def why_not(site: Site, axis: Axis) -> Refusal | None:
    """Every attention can be split this way."""
    return None


def attend(
    q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, mask: Tensor | None, *, site: Site, axis: Axis
) -> Tensor:
    """This rank's queries over every rank's keys in turn, ``[B, H, S, D]``."""
    assert site.query_layout is not None and site.key_layout is not None
    scale = 1 / math.sqrt(site.head_dim) if site.scale is None else site.scale
    ratio = site.heads // site.kv_heads
    mask = mask_of(site, mask, q_BHSD)
    rows = None if mask is None else mask_rows(mask, site.query_layout, axis)
    q = q_BHSD.float() * scale
    own_2BHSD = torch.stack((k_BHSD, v_BHSD))
    top = total = out = None
    for root in range(axis.size):
        slots = site.key_layout.slots_of(root)
        if not slots:
            continue  # nothing but padding there
        arrived = ops.broadcast(own_2BHSD, root, axis).float().unbind(0)
        k, v = (repeated(picked(x, 2, slots), ratio) for x in arrived)
        scores = q @ k.transpose(-1, -2)
        seen = None
        if rows is not None:
            columns = mask_columns(rows, site.key_layout.tokens_of(root))
            scores, seen = _masked(scores, columns)
        new_top = scores.amax(-1, keepdim=True)
        if top is not None:
            new_top = torch.maximum(top, new_top)
        weights = torch.exp(scores - new_top)
        if seen is not None:
            weights = weights * seen
        if top is None or total is None or out is None:
            total = weights.sum(-1, keepdim=True)
            out = weights @ v
        else:
            decay = torch.exp(top - new_top)
            total = total * decay + weights.sum(-1, keepdim=True)
            out = out * decay + weights @ v
        top = new_top
    assert out is not None and total is not None
    if rows is not None:
        total = total + (total == 0).float()  # a query that sees nothing gives zeros, as in torch
    return (out / total).to(q_BHSD.dtype)


def _masked(scores: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Masked scores, finite even where nothing is seen, and where something is (1 or 0)."""
    if mask.dtype == torch.bool:
        seen, added = mask, scores
    else:
        wide = mask.float()
        seen = wide != -math.inf
        added = scores + torch.where(seen, wide, 0.0)
    return torch.where(seen, added, _HIDDEN), seen.float()


_HIDDEN: Final = -1e30
"""Below every score, and far enough from float32's limit to be subtracted from."""
