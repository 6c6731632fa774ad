"""Fused attentions merged by a key of common weight: numbers at the edges."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cp_convert.ir.attention import Way
from cp_convert.strategies.parts import Fused, way_of
from tests.strategies.test_strategies import site_of

CHUNKS, KEYS, HEADS, ROWS, DIM = 4, 32, 2, 48, 16
SCALE = DIM**-0.5


def given(spread: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Q, K and V whose logits reach from about ``-spread`` to ``spread``."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, n, DIM) for n in (ROWS, CHUNKS * KEYS, CHUNKS * KEYS))
    logits = q @ k.transpose(-1, -2) * SCALE
    q = q * (spread / logits.abs().max())
    return q.to(dtype), k.to(dtype), v.to(dtype)


def whole(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """In float64; a row that sees nothing gives zeros."""
    logits = (q.double() @ k.double().transpose(-1, -2)) * SCALE
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf)
    return torch.nan_to_num(logits.softmax(-1)) @ v.double()


def merged(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, own: int = 1) -> Tensor:
    """By chunks, as rank ``own`` of four does it."""
    parts = Fused(q, k.chunk(CHUNKS, 2)[own], SCALE, mask)
    for i, (keys, values) in enumerate(zip(k.chunk(CHUNKS, 2), v.chunk(CHUNKS, 2), strict=True)):
        parts.add(keys, values, [(i * KEYS, (i + 1) * KEYS)])
    return parts.result()


def loss(got: Tensor, truth: Tensor) -> float:
    return float((got.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("spread", [0.0, 1.0, 10.0, 50.0])
@pytest.mark.parametrize("own", [0, 3])
def test_float32(spread: float, own: int) -> None:
    q, k, v = given(spread)
    assert loss(merged(q, k, v, own=own), whole(q, k, v)) < 3e-6


def test_one_key_takes_all_and_is_in_another_ranks_chunk() -> None:
    q, k, v = given(1.0)
    k[:, :, 5] = 0
    k[..., 0], q[..., 0] = 0, 20.0
    k[:, :, 5, 0] = 80 / 20 / SCALE
    truth = whole(q, k, v)
    assert torch.allclose(truth, v[:, :, 5:6].double().expand_as(truth), atol=1e-6)
    assert loss(merged(q, k, v), truth) < 3e-6


@pytest.mark.parametrize("spread", [0.5, 3.0, 20.0])
def test_bfloat16_loses_little_more_than_one_attention(spread: float) -> None:
    q, k, v = given(spread, torch.bfloat16)
    truth = whole(q, k, v)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=SCALE)
    got = merged(q, k, v)
    assert got.dtype == torch.bfloat16
    assert loss(got, truth) < 2 * loss(plain, truth)


def test_masks_that_hide_a_chunk_or_all_of_it() -> None:
    q, k, v = given(5.0)
    mask = torch.rand(1, 1, ROWS, CHUNKS * KEYS) > 0.5
    mask[..., KEYS : 2 * KEYS] = False  # the rank's own
    mask[:, :, 0] = False  # a row that sees nothing
    got = merged(q, k, v, mask)
    assert loss(got, whole(q, k, v, mask)) < 3e-6
    assert not got[:, :, 0].any()


@pytest.mark.parametrize(
    ("chunks", "changed", "way"),
    [
        (2, {"dtype": torch.float16}, "one"),
        (3, {"dtype": torch.bfloat16}, "fused"),
        (3, {"dtype": torch.float32}, "fused"),
        (3, {"dtype": torch.float16}, "explicit"),
        (3, {"dtype": torch.bfloat16, "head_dim": 248}, "fused"),
        (3, {"dtype": torch.bfloat16, "head_dim": 249}, "explicit"),
    ],
)
def test_which_way(chunks: int, changed: dict[str, object], way: Way) -> None:
    assert way_of(site_of(4, **changed), chunks) == way
