"""What a strategy is told about one attention. Pure data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from .attention8 import Steps
from .layout import Layout

Way = Literal["one", "fused", "explicit"]
"""Over which attentions a softmax is computed: one fused attention over all keys; several, whose
results are merged; or scores that are written out in float32."""


@dataclass(frozen=True)
class Refusal:
    """Why something cannot be done, in words that name the values, and what to try."""

    reason: str
    hint: str | None = None


@dataclass(frozen=True)
class Cost:
    """What one attention costs one rank, by arithmetic alone.

    Attributes:
        collectives: how many; what goes with codes of 8 bits is not counted.
        sent: numbers (or codes of them) put on the wire, averaged over the ranks.
        key_values: numbers of K and V that are held at once.
        heads: query heads that all ranks compute together, padding included.
        operations: floating-point operations of the two products, padding included.
        scores: scores that are held at once in float32; none where the attention is fused.
        way: over which attentions the softmax is computed.
    """

    collectives: int
    sent: int
    key_values: int
    heads: int
    operations: int
    scores: int = 0
    way: Way = "one"


@dataclass(frozen=True)
class Site:
    """One attention of the model.

    Attributes:
        index: its position among the model's attentions, in order of execution.
        module: path of the module that called it.
        source: ``file:line`` in the model's code, when known.
        batch, heads, kv_heads, head_dim: as on every rank before the rewrite.
        queries, keys: sequence lengths (slots, padding included) on one rank.
        dtype: of queries, keys and values.
        query_layout, key_layout: how they are spread over the ranks when keys are sharded;
            ``None`` when every rank attends by itself.
        mask: the shape of the mask, whole and in the model's order.
        causal: whether query ``i`` sees keys up to ``i`` only.
        scale: what scores are multiplied with; ``None`` means ``1 / sqrt(head_dim)``.
        mask_dtype: of the mask; a boolean one says what is seen, numbers are added to scores.
        eight: which of q, k, v and o travel in 8 bits, where the strategy sends them.
        steps: of q, k and v, where it is computed over their FP8 codes (:mod:`.attention8`).
    """

    index: int
    module: str
    source: str | None
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    queries: int
    keys: int
    dtype: torch.dtype
    query_layout: Layout | None = None
    key_layout: Layout | None = None
    mask: tuple[int, ...] | None = None
    causal: bool = False
    scale: float | None = None
    mask_dtype: torch.dtype | None = None
    eight: str = ""
    steps: Steps | None = None

    @property
    def where(self) -> str:
        """Module path and source line, for messages."""
        return f"{self.module} ({self.source})" if self.source else self.module

    @property
    def keys_sharded(self) -> bool:
        """Whether a rank holds a part of the keys only."""
        return self.key_layout is not None

    @property
    def global_queries(self) -> int:
        """Queries of all ranks together, without padding."""
        return self.queries if self.query_layout is None else self.query_layout.length

    @property
    def global_keys(self) -> int:
        """Keys of all ranks together, without padding."""
        return self.keys if self.key_layout is None else self.key_layout.length

    def operations(self, heads: int, queries: int) -> int:
        """Floating-point operations of ``Q K^T`` and ``P V`` over all real keys."""
        return 4 * self.batch * heads * queries * self.global_keys * self.head_dim

    @property
    def own_key_values(self) -> int:
        """Numbers of K and V that one rank holds before anything is exchanged."""
        return 2 * self.batch * self.kv_heads * self.keys * self.head_dim


@dataclass(frozen=True)
class Outcome:
    """What was done with one attention.

    Attributes:
        site: the attention as every rank sees it.
        node: name of the node that holds its result in the rewritten program.
        kept: why it was left alone; ``None`` when it was rewritten.
        heads: query heads that all ranks compute together, padding included.
        way: over which attentions the softmax is computed.
    """

    site: Site
    node: str
    kept: str | None
    heads: int
    way: Way = "one"
