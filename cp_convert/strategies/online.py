"""Attention over keys that arrive in chunks: the online softmax of Flash and Ring Attention.

Maximum ``m``, sum ``l`` and output ``o`` are carried from chunk to chunk, in float32::

    m' = max(m, max(s));  p = exp(s - m');  c = exp(m - m')
    l' = c l + sum(p);    o' = c o + p V

Queries are worked off in blocks, so that the scores of one block and one chunk stay below
:data:`SCORES`. Sources: Dao et al., arXiv:2205.14135; Liu et al., arXiv:2310.01889.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from .tokens import mask_columns

SCORES: Final = 1 << 28
"""Scores that are held at once, in numbers of float32: 1 GiB."""


class OnlineAttention:
    """The attention of fixed queries over chunks of keys.

    Args:
        q_BHSD: the queries; computed with in float32.
        scale: what scores are multiplied with.
        rows: the mask's rows for these queries, with all its columns; ``None`` for no mask.
        keys: the most keys that a chunk has.
    """

    def __init__(self, q_BHSD: Tensor, scale: float, rows: Tensor | None, keys: int) -> None:
        b, h, s, _ = q_BHSD.shape
        self.dtype = q_BHSD.dtype
        self.last: Tensor | None = None
        count = blocks_for(b * h, s, keys)
        size = -(-s // count)
        scaled = q_BHSD.float() * scale
        self.blocks = [
            _Block(scaled.narrow(2, start, min(size, s - start)), _rows(rows, start, size, s))
            for start in range(0, s, size)
        ]

    def add(self, k_BHSD: Tensor, v_BHSD: Tensor, columns: list[tuple[int, int]]) -> None:
        """One more chunk; ``columns`` are its keys' ranges in the mask."""
        k_BHSD, v_BHSD = k_BHSD.float(), v_BHSD.float()
        for block in self.blocks:
            block.add(k_BHSD, v_BHSD, columns, after=self.last)
            self.last = block.total

    def done(self) -> Tensor | None:
        """Something that is there when the last chunk was attended to."""
        return self.last

    def result(self) -> Tensor:
        """``[B, H, S, D]``, in the queries' dtype."""
        parts = [block.result() for block in self.blocks]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
        return out.to(self.dtype)


def blocks_for(heads: int, queries: int, keys: int) -> int:
    """How many blocks of queries keep the scores of ``heads`` heads below :data:`SCORES`."""
    return min(queries, max(1, -(-heads * queries * keys // SCORES)))


def _rows(mask: Tensor | None, start: int, size: int, whole: int) -> Tensor | None:
    if mask is None or mask.dim() < 2 or mask.shape[-2] == 1 or size >= whole:
        return mask
    return mask.narrow(-2, start, min(size, whole - start))


class _Block:
    """A block of queries on its way through the chunks."""

    def __init__(self, q: Tensor, rows: Tensor | None) -> None:
        self.q, self.rows = q, rows
        self.top: Tensor | None = None
        self.total: Tensor | None = None
        self.out: Tensor | None = None

    def add(
        self, k: Tensor, v: Tensor, columns: list[tuple[int, int]], after: Tensor | None
    ) -> None:
        q = self.q
        if after is not None:
            # A sum is never negative, which a compiler does not know: without a reason to wait it
            # would compute all scores at once, and hold them.
            q = torch.where(after.amax(2, keepdim=True) >= 0, q, 0.0)
        scores, seen = q @ k.transpose(-1, -2), None
        if self.rows is not None:
            scores, seen = _masked(scores, mask_columns(self.rows, columns))
        top = scores.amax(-1, keepdim=True)
        if self.top is not None:
            top = torch.maximum(self.top, top)
        weights = torch.exp(scores - top)
        if seen is not None:
            weights = weights * seen
        total, out = weights.sum(-1, keepdim=True), weights @ v
        if self.top is not None and self.total is not None and self.out is not None:
            decay = torch.exp(self.top - top)
            total, out = self.total * decay + total, self.out * decay + out
        self.top, self.total, self.out = top, total, out

    def result(self) -> Tensor:
        assert self.out is not None and self.total is not None
        if self.rows is None:
            return self.out / self.total
        # A query that sees nothing gives zeros, as in torch.
        return self.out / (self.total + (self.total == 0).float())


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
