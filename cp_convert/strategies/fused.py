"""TensorRT's own multi-device attention: one layer that communicates inside its kernel.

Algebra, as TensorRT's documentation tells it (*Multi-Device Attention*): the key-value sequence is
split among the ranks, and every rank's queries attend to all of it::

    O_r = softmax(Q_r [K_0 .. K_W-1]^T * scale) [V_0 .. V_W-1]

Collectives: none in the network; ``IAttention.num_ranks`` makes the layer exchange K and V itself.
Bytes sent by a rank: ``2 (W-1)/W`` of one full K at most, as for AllGather KV; how TensorRT sends
them is its own affair.
Memory: not told; counted as AllGather KV's.
Limits: FP16 and BF16; compute capability 10.0 and later with the tensorrt backend
(:func:`cp_convert.engine.build.prepare` refuses others); one group of all ranks, since the layer
takes no groups; no mask, no causal order and no padded keys, for the documentation does not say
how a mask is split.
Executed nowhere yet: the proof covers the program and the network, the kernel is TensorRT's.
"""

from __future__ import annotations

from torch import Tensor

from ..ir import ops
from ..ir.attention import Cost, Refusal, Site
from ..mesh import Axis


def why_not(site: Site, axis: Axis) -> Refusal | None:
    """The layer takes neither masks nor groups."""
    other = "try --strategy ulysses, ring or allgather-kv."
    if site.steps is not None:
        return Refusal("TensorRT's multi-device attention reads no FP8 codes.", other)
    if site.eight:
        return Refusal("TensorRT's multi-device attention exchanges by itself, in 16 bits.", other)
    if len(axis.groups) > 1:
        return Refusal("TensorRT's multi-device attention knows no groups of ranks.", other)
    if site.mask is not None or site.causal:
        return Refusal("how TensorRT's multi-device attention splits a mask is not told.", other)
    if site.key_layout is not None and site.key_layout.padding:
        return Refusal(
            f"{site.global_keys} keys do not divide by {axis.size} ranks; padding needs a mask.",
            other,
        )
    return None


def cost(site: Site, axis: Axis) -> Cost:
    """Counted as if the layer gathered keys and values."""
    return Cost(
        collectives=0,
        sent=(axis.size - 1) * site.own_key_values,
        key_values=axis.size * site.own_key_values,
        heads=site.heads,
        operations=site.operations(site.heads, site.queries),
    )


def travels(site: Site, axis: Axis) -> str:
    """Nothing that could be looked at: the layer exchanges by itself."""
    return ""


def attend(
    q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, mask: Tensor | None, *, site: Site, axis: Axis
) -> Tensor:
    """This rank's queries over all ranks' keys, ``[B, H, S, D]``."""
    assert mask is None
    return ops.fused_attention(q_BHSD, k_BHSD, v_BHSD, axis, scale=site.scale)
