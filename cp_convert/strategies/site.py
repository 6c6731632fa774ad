"""What a strategy is told about one attention. Pure data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Refusal:
    """Why something cannot be done, in words that name the values, and what to try."""

    reason: str
    hint: str | None = None


@dataclass(frozen=True)
class Site:
    """One ``scaled_dot_product_attention`` of the traced program.

    Attributes:
        index: its position among the model's attentions, in order of execution.
        module: path of the module that called it.
        source: ``file:line`` in the model's code, when known.
        batch, heads, kv_heads, head_dim: as on every rank before the rewrite.
        queries, keys: sequence lengths on one rank.
        queries_sharded, keys_sharded: whether every rank holds a part only.
        world: by how much the sharded lengths are to be multiplied for the global ones.
        mask, causal: whether there is a mask, and whether it is causal.
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
    queries_sharded: bool
    keys_sharded: bool
    world: int
    mask: bool
    causal: bool

    @property
    def where(self) -> str:
        """Module path and source line, for messages."""
        return f"{self.module} ({self.source})" if self.source else self.module

    @property
    def global_queries(self) -> int:
        """Queries of all ranks together."""
        return self.queries * (self.world if self.queries_sharded else 1)

    @property
    def global_keys(self) -> int:
        """Keys of all ranks together."""
        return self.keys * (self.world if self.keys_sharded else 1)
