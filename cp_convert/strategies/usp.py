"""USP: Ulysses among neighbours, Ring between their groups.

Algebra (W = U R ranks; rank ``g U + i`` is member i of group g)::

    [Q K V]_r : all heads, S tokens   --all-to-all in the group-->   H/U heads, U S tokens
    A, l over the groups' K and V, a part of all tokens at a time    (merged as in Ring)
    O_r       : H/U heads, U S tokens --all-to-all in the group-->   all heads, S tokens

Collectives: ``2 + R`` an attention: two exchanges among U ranks, R all-gathers among the R ranks
that hold the same heads of other groups; with two groups one, and no merging.
Bytes sent by a rank: ``4 (U-1)/(U W)`` of one full Q for the exchanges (a quarter each for Q, K, V
and O) and ``2 (R-1)/W`` for the ring.
Memory: K and V of its own group and of two others, ``6 U S`` tokens of ``H/U`` heads.
Masks: the group's rows, the columns of the chunk, this rank's heads of a per-head mask.
Limits: as many heads as U; heads that do not divide are padded with zeros and dropped again.
Groups of ranks are known not to work in every TensorRT release.
Source: USP (Fang and Zhao, arXiv:2405.07719).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ir import ops
from ..ir.attention import Cost, Refusal, Site
from ..ir.layout import Layout, merged
from ..mesh import Axis
from .exchange import key_heads, padded, to_heads, to_tokens
from .online import blocks_for
from .parts import longest, ring_over, slices_of, way_of, widened
from .tokens import mask_all_rows, mask_heads, mask_of


@dataclass(frozen=True)
class Usp:
    """The strategy for one factorisation of the world.

    Attributes:
        ulysses: U, how many neighbouring ranks trade heads for tokens.
    """

    ulysses: int

    def why_not(self, site: Site, axis: Axis) -> Refusal | None:
        """Only the exchange has a limit, and the ranks must form whole groups."""
        if axis.size % self.ulysses:
            return Refusal(
                f"--ulysses {self.ulysses}: {axis.size} ranks share the sequence, beside the "
                "model's own process groups.",
                f"give a divisor of {axis.size}.",
            )
        if site.heads < self.ulysses:
            return Refusal(
                f"{site.heads} heads are fewer than the {self.ulysses} ranks of --ulysses.",
                f"try --ulysses {site.heads} or fewer.",
            )
        return None

    def cost(self, site: Site, axis: Axis) -> Cost:
        """Exchanges in the group, and a ring over the groups."""
        size, rings = self.ulysses, axis.size // self.ulysses
        heads, keys = padded(site.heads, size), key_heads(site, size)
        numbers = site.batch * site.head_dim
        travelling = 2 * heads * site.queries + 2 * keys * site.keys
        chunk = 2 * numbers * keys * site.keys
        own_heads, rows = site.batch * heads // size, size * site.queries
        most = longest(size * site.keys, rings)
        blocks = blocks_for(own_heads, rows, most)
        way = way_of(site, rings)
        return Cost(
            collectives=2 + len(slices_of(size * site.keys, rings)),
            sent=numbers * travelling * (size - 1) // size + (rings - 1) * chunk,
            key_values=min(3, rings) * chunk,
            heads=heads,
            operations=widened(site.operations(heads, site.queries), site, way),
            scores=own_heads * -(-rows // blocks) * most if way == "explicit" else 0,
            way=way,
        )

    def travels(self, site: Site, axis: Axis) -> str:
        """Everything is exchanged in the group, if there is one; keys and values in the ring."""
        return "kv" if self.ulysses == 1 else "qkvo"

    def attend(
        self,
        q_BHSD: Tensor,
        k_BHSD: Tensor,
        v_BHSD: Tensor,
        mask: Tensor | None,
        *,
        site: Site,
        axis: Axis,
    ) -> Tensor:
        """This rank's queries over all keys, ``[B, H, S, D]``."""
        assert site.query_layout is not None and site.key_layout is not None
        inner, outer = axis.inner(self.ulysses), axis.outer(self.ulysses)
        q, k, v = to_heads(q_BHSD, k_BHSD, v_BHSD, site, inner)
        rows = self._rows(mask_of(site, mask, q_BHSD), site, inner, outer)
        layout = site.key_layout
        attended = ring_over(
            torch.stack((k, v)),
            q,
            rows,
            site=site,
            axis=outer,
            held=lambda group: _held(layout, group, self.ulysses),
        )
        return to_tokens(attended, site, inner)

    def _rows(self, mask: Tensor | None, site: Site, inner: Axis, outer: Axis) -> Tensor | None:
        """The mask for this group's queries and this rank's heads, with all columns."""
        if mask is None:
            return None
        assert site.query_layout is not None
        if mask.dim() >= 2 and mask.shape[-2] > 1:
            mask = ops.shard(mask_all_rows(mask, site.query_layout), mask.dim() - 2, outer)
        return mask_heads(mask, padded(site.heads, inner.size), inner)


def _held(
    layout: Layout, group: int, size: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Where the tokens of one group stand in it, and where in the model's order."""
    members = [(i, group * size + i) for i in range(size)]
    slots = [
        (i * layout.local + start, i * layout.local + stop)
        for i, rank in members
        for start, stop in layout.slots_of(rank)
    ]
    return merged(slots), merged(r for _, rank in members for r in layout.tokens_of(rank))
