"""Ulysses' exchange, shared by the strategies that trade tokens for heads."""

from __future__ import annotations

from math import lcm

import torch
from torch import Tensor

from ..ir import ops
from ..ir.attention import Site
from ..mesh import Axis
from .tokens import padded_heads, repeated
from .wire import sent


def padded(heads: int, size: int) -> int:
    """``heads`` rounded up to a multiple of ``size``."""
    return -(-heads // size) * size


def key_heads(site: Site, size: int) -> int:
    """How many key heads travel, so that every rank has those that its query heads read."""
    if site.heads % size:
        return padded(site.heads, size)
    return lcm(site.kv_heads, size) if site.kv_heads < site.heads else site.heads


def _grouped(k_BHSD: Tensor, site: Site, size: int) -> Tensor:
    """Key heads repeated just as often as makes them divide among ``size`` ranks.

    With query heads that divide, group ``g`` of the result serves group ``g`` of them, and no rank
    is sent a head that it does not use; otherwise every query head is given its own.
    """
    wanted = site.heads if site.heads % size else key_heads(site, size)
    return repeated(k_BHSD, wanted // site.kv_heads)


def to_heads(
    q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, site: Site, axis: Axis
) -> list[Tensor]:
    """All tokens of this rank's share of the heads: ``[B, h, W S, D]`` each.

    In one collective, or two where queries travel in another type than keys and values. Heads that
    do not divide are padded with zeros, grouped key heads repeated as far as needed.
    """
    heads = padded(site.heads, axis.size)
    k_BHSD, v_BHSD = (_grouped(x, site, axis.size) for x in (k_BHSD, v_BHSD))
    if heads > site.heads:
        q_BHSD, k_BHSD, v_BHSD = (padded_heads(x, heads) for x in (q_BHSD, k_BHSD, v_BHSD))
    blocks = [_by_head_group(x, axis.size) for x in (q_BHSD, k_BHSD, v_BHSD)]
    if ("q" in site.eight) == ("k" in site.eight):
        return _exchanged(blocks, axis, eight="k" in site.eight)
    apart = (_exchanged(blocks[:1], axis, eight="q" in site.eight),
             _exchanged(blocks[1:], axis, eight="k" in site.eight))  # fmt: skip
    return [*apart[0], *apart[1]]


def _exchanged(blocks: list[Tensor], axis: Axis, *, eight: bool) -> list[Tensor]:
    """Blocks ``[W, B, h, S, D]`` in one collective; ``[B, h, W S, D]`` each."""
    if len({x.shape[3] for x in blocks}) == 1:
        packed = torch.cat(blocks, dim=2)
        arrived = _to_all(packed, axis, eight).split([x.shape[2] for x in blocks], dim=2)
        return [_all_tokens(x) for x in arrived]
    # Other numbers of tokens, so that only rows of a head can be packed.
    rows = torch.cat([x.flatten(1, 3) for x in blocks], dim=1)
    arrived = _to_all(rows, axis, eight).split([x[0, ..., 0].numel() for x in blocks], dim=1)
    return [_all_tokens(x.view(b.shape)) for x, b in zip(arrived, blocks, strict=True)]


def _to_all(x: Tensor, axis: Axis, eight: bool) -> Tensor:
    return sent(lambda part: ops.all_to_all(part, axis), x, eight=eight and axis.size > 1)


def to_tokens(out_BhTD: Tensor, site: Site, axis: Axis) -> Tensor:
    """The way back: all heads of this rank's own tokens, padding dropped, ``[B, H, S, D]``."""
    out_BhWSD: Tensor = out_BhTD.unflatten(2, (axis.size, -1))
    back_WBhSD = _to_all(out_BhWSD.permute(2, 0, 1, 3, 4), axis, "o" in site.eight)
    out_BHSD = back_WBhSD.permute(1, 0, 2, 3, 4).flatten(1, 2)
    return out_BHSD if out_BHSD.shape[1] == site.heads else out_BHSD[:, : site.heads]


def _by_head_group(x_BHSD: Tensor, size: int) -> Tensor:
    """``[B, H, S, D] -> [W, B, h, S, D]``; with a batch of 1 no number moves."""
    x_BWhSD: Tensor = x_BHSD.unflatten(1, (size, -1))
    return x_BWhSD.permute(1, 0, 2, 3, 4)


def _all_tokens(x_WBhSD: Tensor) -> Tensor:
    """``[W, B, h, S, D] -> [B, h, W S, D]``."""
    return x_WBhSD.permute(1, 2, 0, 3, 4).flatten(2, 3)
