"""Stream KV: keys and values of a few heads at a time, while the heads before them are attended to.

Algebra (r: this rank; the heads are cut into groups g = 0 .. G-1)::

    O_r[g] = softmax(Q_r[g] [K_0[g] .. K_{W-1}[g]]^T * scale + M_r[g]) [V_0[g] .. V_{W-1}[g]]
    O_r    = [O_r[0] .. O_r[G-1]]

Heads know nothing of one another, so this is exact, and every group is a plain fused attention.

Collectives: G an attention, each an all-gather of one group's K and V packed as
``[2, B, h, S, D]``. The gather of group ``g + 1`` is issued before the attention of group ``g``,
on which it does not depend, so the two overlap. The gather of group ``g + 2`` waits for the
attention of group ``g``: without a reason to wait a compiler would gather everything first, and
hold it.
Copies: as AllGather KV, a group at a time, and one join of the heads' outputs.
Bytes sent by a rank: ``2 (W-1)/W`` of one full Q, as AllGather KV; with grouped queries, less by
the ratio of key heads to query heads, whose groups stay together.
Memory: its own K and V and two groups of all ranks' K and V, ``2/G`` of what AllGather KV holds.
Masks: a rank's own rows, the columns in the order in which the keys arrive, a group's heads.
Limits: none. A model with one key head has one group, which is AllGather KV.
Source: AllGather KV (:mod:`.allgather_kv`), with the prefetch of PyTorch's FSDP (Zhao et al.,
arXiv:2304.11277, section 3.3) put to heads.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from ..ir import ops
from ..ir.attention import Cost, Refusal, Site
from ..mesh import Axis
from .order import after
from .tokens import mask_columns, mask_of, mask_part, mask_rows, real_keys, repeated
from .wire import sent

GROUPS: Final = 4
"""Into how many groups the key heads are cut, where there are as many. Measured on one H100 with 24
heads of 128: the attentions of four groups take 1.2 (16,896 tokens, 2 ranks) to 1.5 (4,608 tokens)
times as long as one over all heads. More groups hold less and leave less of the first gather
uncovered, but a group of fewer heads fills a GPU less."""


def groups_of(heads: int) -> list[int]:
    """How many key heads every group has; they differ by one at most."""
    count = min(GROUPS, heads)
    return [heads // count + (i < heads % count) for i in range(count)]


def why_not(site: Site, axis: Axis) -> Refusal | None:
    """Every attention can be split this way."""
    return None


def cost(site: Site, axis: Axis) -> Cost:
    """An all-gather for every group; every rank computes its own queries over all keys."""
    groups = groups_of(site.kv_heads)
    held = max(sum(groups[i : i + 2]) for i in range(len(groups)))
    return Cost(
        collectives=len(groups),
        sent=(axis.size - 1) * site.own_key_values,
        key_values=axis.size * held * site.own_key_values // site.kv_heads,
        heads=site.heads,
        operations=site.operations(site.heads, site.queries),
    )


def travels(site: Site, axis: Axis) -> str:
    """Queries stay where they are."""
    return "kv"


def attend(
    q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, mask: Tensor | None, *, site: Site, axis: Axis
) -> Tensor:
    """This rank's queries over all ranks' keys, a group of heads at a time, ``[B, H, S, D]``."""
    assert site.query_layout is not None and site.key_layout is not None
    mask = mask_of(site, mask, q_BHSD)
    if mask is not None:
        mask = mask_rows(mask_columns(mask, site.key_layout.order), site.query_layout, axis)
    groups, ratio = groups_of(site.kv_heads), site.heads // site.kv_heads
    packed = torch.stack((k_BHSD, v_BHSD)).split(groups, dim=2)
    q_groups = q_BHSD.split([ratio * heads for heads in groups], dim=1)
    arriving = _gathered(packed[0], site, axis)
    outs: list[Tensor] = []
    for g, q in enumerate(q_groups):
        arrived = arriving
        if g + 1 < len(groups):
            following = after(outs[g - 1] if g else None, packed[g + 1])
            arriving = _gathered(following, site, axis)
        k, v = _heads_tokens(arrived, site, axis)
        rows = None if mask is None else mask_part(mask, -3, ratio * sum(groups[:g]), q.shape[1])
        k, v = (repeated(x, ratio) for x in (k, v))
        outs.append(ops.attention(q, k, v, rows, scale=site.scale, steps=site.steps))
    return torch.cat(outs, 1)


def _gathered(packed: Tensor, site: Site, axis: Axis) -> Tensor:
    return sent(lambda x: ops.all_gather(x, axis), packed, eight="k" in site.eight)


def _heads_tokens(gathered: Tensor, site: Site, axis: Axis) -> list[Tensor]:
    """K and V of one group, all ranks' real tokens of a head together: ``[B, h, T, D]`` each."""
    assert site.key_layout is not None
    kv_W2BhSD: Tensor = gathered.unflatten(0, (axis.size, 2))
    joined = kv_W2BhSD.permute(1, 2, 3, 0, 4, 5).flatten(3, 4)
    return [real_keys(x, site.key_layout) for x in joined.unbind(0)]
