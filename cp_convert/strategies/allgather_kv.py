"""AllGather KV: every rank fetches all keys and values and attends with its own queries.

Algebra (r: this rank)::

    O_r = softmax(Q_r [K_0 .. K_{W-1}]^T * scale) [V_0 .. V_{W-1}]

Collectives: 1 an attention, an all-gather of K and V packed as ``[S, 2, B, H, D]``; with the
sequence in front, TensorRT's join on dimension 0 puts the tokens in rank order by itself.
Bytes sent by a rank: ``2 (W-1)/W`` of one full Q, that is ``(W-1)`` times its own K and V.
Memory: all K and V on every rank, ``2 W S`` tokens, whatever the world.
Limits: none on heads; queries may be sharded or whole.
Source: Llama 3 (arXiv:2407.21783, section 3.3.2) gathers K and V in the same way.
"""

from __future__ import annotations

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
    """This rank's queries over the gathered keys, ``[B, H, S, D]``."""
    kv_S2BHD = torch.stack((k_BHSD, v_BHSD)).permute(3, 0, 1, 2, 4)
    gathered_T2BHD = ops.all_gather(kv_S2BHD, axis)
    k_BHTD, v_BHTD = gathered_T2BHD.permute(1, 2, 3, 0, 4).unbind(0)
    return ops.attention(q_BHSD, k_BHTD, v_BHTD, scale=scale)
