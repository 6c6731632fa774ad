"""Ring Attention: keys and values stream past, one rank's chunk at a time.

Algebra, for the chunks ``s = 0 .. W-1`` (m: row maximum, l: row sum, A: unnormalised output)::

    X   = Q_r K_s^T * scale
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
Limits: none on heads; queries may be sharded or whole.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import ops
from ..mesh import Axis
from .site import Refusal, Site


def why_not(site: Site, axis: Axis) -> Refusal | None:
    """Every unmasked attention can be split this way."""
    return None


def attend(
    q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, *, scale: float | None, axis: Axis
) -> Tensor:
    """This rank's queries over every rank's keys in turn, ``[B, H, S, D]``."""
    q = q_BHSD.float() * (1 / math.sqrt(q_BHSD.shape[-1]) if scale is None else scale)
    own_2BHSD = torch.stack((k_BHSD, v_BHSD))
    top = total = out = None
    for root in range(axis.size):
        k, v = ops.broadcast(own_2BHSD, root, axis).float().unbind(0)
        scores = q @ k.transpose(-1, -2)
        new_top = scores.amax(-1, keepdim=True)
        if top is None or total is None or out is None:
            weights = torch.exp(scores - new_top)
            total = weights.sum(-1, keepdim=True)
            out = weights @ v
        else:
            new_top = torch.maximum(top, new_top)
            weights = torch.exp(scores - new_top)
            decay = torch.exp(top - new_top)
            total = total * decay + weights.sum(-1, keepdim=True)
            out = out * decay + weights @ v
        top = new_top
    assert out is not None and total is not None
    return (out / total).to(q_BHSD.dtype)
