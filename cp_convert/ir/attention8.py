"""Attention over FP8 codes: what ``cp::attention`` means where it is given ``steps``.

Algebra (s: what a code of 1 stands for; c: codes; M: a mask, if any)::

    O = s_p c(softmax((s_q scale c(q / s_q)) (s_k c(k / s_k))^T + M) / s_p) (s_v c(v / s_v))

which is TensorRT's ``IAttention`` behind quantizers (documentation, *IAttention*): what the
normalization returns is quantized as well, with a scale of its own. Probabilities are at most one,
so that scale is a constant, one over the largest code, in the type of the queries. The factor of
the scores is part of the queries' second scale: exact, and nothing stands between the codes and
the attention. Rows that see nothing give zeros.

Splitting tokens or heads, moving them and padding them commutes with all of that, so the codes are
taken where the attention is computed, after every exchange.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from .numbers import rounded
from .quantize import FP8, LARGEST, from_codes, scaled, to_codes

Steps = tuple[float, float, float]
"""What a code of 1 stands for, of queries, keys and values."""
OF_PROBABILITIES: Final = 1 / LARGEST[FP8]
_SCORES: Final = 1 << 24
"""How many scores are held at once, at least those of one head."""


class Coding:
    """How numbers become codes; :mod:`..prove.quantizers` has others."""

    def codes(self, x: Tensor, step: float) -> Tensor:
        """FP8 codes of ``x``."""
        return to_codes(scaled(x, step), FP8)

    def shares(self, scores: Tensor, softmax: Callable[[Tensor], Tensor], step: float) -> Tensor:
        """FP8 codes of the probabilities that ``softmax`` makes of scores."""
        return self.codes(softmax(scores), step)


_EXACT: Final = Coding()


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    steps: list[float] | None = None,
    coding: Coding = _EXACT,
) -> Tensor:
    """``cp::attention``, with the arguments of its schema.

    Args:
        query: ``[B, H, S, D]``.
        key: of as many heads, or of fewer, each for several query heads.
        value: like ``key``.
        attn_mask: of booleans (what is seen) or numbers (added to scores).
        dropout_p: 0.
        is_causal: whether query ``i`` sees keys up to ``i`` only.
        scale: of scores; ``None``: ``1 / sqrt(D)``.
        enable_gqa: whether a key head serves several query heads.
        steps: see :data:`Steps`; ``None``: nothing is quantized.
        coding: how numbers become codes.
    """
    if not steps:
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    (of_q, of_k, of_v), dtype = steps, query.dtype
    q = from_codes(coding.codes(query, of_q), of_q * scale, dtype)
    k = from_codes(coding.codes(key, of_k), of_k, dtype)
    v = from_codes(coding.codes(value, of_v), of_v, dtype)
    of_p = float(rounded(OF_PROBABILITIES, dtype))
    return with_coded_shares(q, k, v, attn_mask, of_p, causal=is_causal, coding=coding).to(dtype)


def with_coded_shares(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    step: float,
    *,
    causal: bool = False,
    coding: Coding = _EXACT,
) -> Tensor:
    """``step * codes(softmax(q k^T + mask) / step) v`` in float32, some heads at a time.

    Args:
        q: the numbers that codes stand for, ``[B, H, S, D]``.
        k: the same; a key head may serve several query heads.
        v: the same.
        mask: as in :func:`attention`.
        step: what a code of 1 stands for, of probabilities.
        causal: as in :func:`attention`.
        coding: how numbers become codes.
    """
    heads, ratio = q.shape[1], q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(ratio, 1) for x in (k, v))
    mask = _whole(_causal(q, k) if causal else mask)
    count = max(1, _SCORES // (q.shape[0] * q.shape[2] * k.shape[2]))
    found = []
    for start in range(0, heads, count):
        some = slice(start, start + count)
        scores = q[:, some].float() @ k[:, some].transpose(-1, -2)
        own = mask if mask is None or mask.shape[1] == 1 else mask[:, some]
        codes = coding.shares(scores, partial(_softmax, mask=own), step)
        found.append(from_codes(codes, step, torch.float32) @ v[:, some])
    return torch.cat(found, 1)


def _causal(q: Tensor, k: Tensor) -> Tensor:
    return torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()


def _whole(mask: Tensor | None) -> Tensor | None:
    """A mask with four dimensions."""
    return None if mask is None else mask[(None,) * (4 - mask.dim())]


def _softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask.float()
    shares: Tensor = torch.ops.aten._safe_softmax(scores, -1)
    return shares


def steps_of(given: Any) -> Steps | None:
    """The argument of an operator, as a strategy is told it."""
    if not given:
        return None
    q, k, v = given
    return float(q), float(k), float(v)
