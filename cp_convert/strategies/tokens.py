"""What the strategies share: token order, padding, masks and grouped heads, in plain torch.

Between ranks tokens stand in shard order with padding (:mod:`cp_convert.ir.layout`); masks come
whole, in the model's order. Padded keys are cut away rather than masked, so they take no softmax
mass; padded queries are computed and later dropped.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ir import ops
from ..ir.attention import Site
from ..ir.layout import Layout
from ..mesh import Axis


def picked(x: Tensor, dim: int, ranges: Sequence[tuple[int, int]]) -> Tensor:
    """The ranges of ``x`` along ``dim``, one after another; ``x`` itself when that is all of it."""
    if list(ranges) == [(0, x.shape[dim])]:
        return x
    parts = [x.narrow(dim, start, stop - start) for start, stop in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def real_keys(x_BHTD: Tensor, layout: Layout) -> Tensor:
    """Joined keys or values of all ranks without their padding, in shard order."""
    return picked(x_BHTD, 2, layout.slots)


def repeated(x_BHSD: Tensor, times: int) -> Tensor:
    """Every head ``times`` times in a row: ``[B, H, S, D] -> [B, times H, S, D]``."""
    if times == 1:
        return x_BHSD
    b, h, s, d = x_BHSD.shape
    return x_BHSD.unsqueeze(2).expand(b, h, times, s, d).reshape(b, h * times, s, d)


def mask_of(site: Site, mask: Tensor | None, like: Tensor) -> Tensor | None:
    """The attention's mask, whole and in the model's order; a causal one is written out."""
    if not site.causal:
        return mask
    rows = torch.arange(site.global_queries, device=like.device)
    columns = torch.arange(site.global_keys, device=like.device)
    return (rows.unsqueeze(1) >= columns.unsqueeze(0)).unsqueeze(0).unsqueeze(0)


def mask_columns(mask: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
    """The mask's columns for keys that stand in another order, or for a part of them."""
    return mask if mask.shape[-1] == 1 else picked(mask, mask.dim() - 1, ranges)


def mask_part(mask: Tensor, dim: int, start: int, length: int) -> Tensor:
    """A range of the mask along ``dim``, counted from the end; all of it where one is for all."""
    if mask.dim() < -dim or mask.shape[dim] == 1:
        return mask
    return mask.narrow(dim, start, length)


def mask_rows(mask: Tensor, layout: Layout, axis: Axis) -> Tensor:
    """The mask's rows for this rank's own queries; rows of padding hide nothing."""
    if mask.dim() < 2 or mask.shape[-2] == 1:
        return mask
    parts = [ops.shard(part, mask.dim() - 2, axis) for part in _segments(mask, layout)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -2)


def mask_all_rows(mask: Tensor, layout: Layout) -> Tensor:
    """The mask's rows for all ranks' queries in shard order, padding included."""
    if mask.dim() < 2 or mask.shape[-2] == 1 or layout.is_plain:
        return mask
    size = layout.size
    parts = [p.unflatten(-2, (size, -1)) for p in _segments(mask, layout)]
    return torch.cat(parts, -2).flatten(-3, -2)


def _segments(mask: Tensor, layout: Layout) -> list[Tensor]:
    """The rows of every segment, padded so that they divide among the ranks."""
    found = []
    for start, segment in zip(layout.cuts, layout.segments, strict=False):
        part = mask.narrow(-2, start, segment.length)
        missing = layout.size * segment.local - segment.length
        if missing:
            part = torch.cat([part, _open(mask, -2, missing)], -2)
        found.append(part)
    return found


def _open(mask: Tensor, dim: int, count: int) -> Tensor:
    """A piece of mask along ``dim`` that hides nothing."""
    sizes = list(mask.shape)
    sizes[dim] = count
    return mask.new_full(sizes, mask.dtype == torch.bool)


def mask_heads(mask: Tensor, heads: int, axis: Axis) -> Tensor:
    """A per-head mask's share for this rank's group of heads, ``heads`` in all."""
    if mask.dim() < 3 or mask.shape[-3] == 1:
        return mask
    if mask.shape[-3] < heads:
        mask = torch.cat([mask, _open(mask, -3, heads - mask.shape[-3])], -3)
    return ops.shard(mask, mask.dim() - 3, axis)


def padded_heads(x_BHSD: Tensor, heads: int) -> Tensor:
    """Heads of zeros appended up to ``heads``."""
    b, own, s, d = x_BHSD.shape
    if own == heads:
        return x_BHSD
    return torch.cat([x_BHSD, x_BHSD.new_zeros(b, heads - own, s, d)], 1)
