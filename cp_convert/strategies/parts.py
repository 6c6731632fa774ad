"""Attention over keys that arrive in chunks: one class for each way in which chunks are merged.

In: a rank's queries, then chunks of keys and values. Out: their attention, ``[B, H, S, D]``.

- ``one``: two ranks or less have one chunk, and one fused attention sees all keys. Own and one
  other rank's keys are alive in any case, so with two ranks nothing is won by merging.
- ``fused``: a fused attention a chunk, merged by a key of common weight (:class:`Fused`).
- ``explicit``: scores are written out in float32 (:mod:`.online`), 20 times slower on a GPU.

:func:`way_of` decides by numbers that are known before anything runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Final, Protocol

import torch
from torch import Tensor

from ..ir import ops
from ..ir.attention import Site, Way
from ..ir.layout import merged
from ..mesh import Axis
from .online import OnlineAttention
from .order import after
from .tokens import mask_columns, picked, repeated
from .wire import sent

Ranges = list[tuple[int, int]]

EXTRA: Final = 8
"""How many dimensions a head gains: kernels take head sizes in steps of 8."""
LARGEST_HEAD: Final = 256
"""The widest head that TensorRT-RTX and cuDNN attend to in one kernel."""
OFFSET: Final = 20.0
"""By how much the common key's logit is above the mean of a rank's own logits. Any value is right;
this one keeps flat rows (the mean is their maximum) and peaked ones (80 above it) far from where
two roundings meet, at half. Measured from 0 to 75 over logits up to 80: tests/strategies."""
_SMALLEST: Final = 2.0**-126
_LIFT: Final = 2.0**-32


def way_of(site: Site, chunks: int) -> Way:
    """How ``chunks`` chunks of keys are merged for one attention.

    Float16 ends at 2 ** -24, which is where weights of ``exp(-20)`` and less would be; numbers
    added by a mask may be of any size. Bfloat16 and float32 reach down to ``exp(-87)``.
    """
    if chunks <= 2:
        return "one"
    narrow = site.dtype not in (torch.bfloat16, torch.float32)
    wide = site.head_dim + EXTRA > LARGEST_HEAD
    added = site.mask is not None and site.mask_dtype != torch.bool
    return "explicit" if narrow or wide or added else "fused"


def widened(operations: int, site: Site, way: Way) -> int:
    """The operations of an attention whose heads are wider by :data:`EXTRA` where it is merged."""
    return operations * (site.head_dim + EXTRA) // site.head_dim if way == "fused" else operations


class Parts(Protocol):
    """The attention of fixed queries over chunks."""

    def add(self, k_BHSD: Tensor, v_BHSD: Tensor, columns: Ranges) -> None:
        """One more chunk; ``columns`` are its keys' ranges in the mask."""

    def done(self) -> Tensor | None:
        """Something that is there when the last chunk was attended to."""

    def result(self) -> Tensor:
        """``[B, H, S, D]``, in the queries' dtype."""


def slices_of(size: int, ranks: int) -> Ranges:
    """Into which ranges of slots every rank's keys are cut: one for each rank, and one for two."""
    count = 1 if ranks <= 2 else min(size, ranks)
    cuts = [size * i // count for i in range(count + 1)]
    return list(pairwise(cuts))


def longest(size: int, ranks: int) -> int:
    """How many keys the longest chunk has."""
    return ranks * max(stop - start for start, stop in slices_of(size, ranks))


def ring_over(
    own_2BHSD: Tensor,
    q_BHSD: Tensor,
    rows: Tensor | None,
    *,
    site: Site,
    axis: Axis,
    held: Callable[[int], tuple[Ranges, Ranges]],
) -> Tensor:
    """The attention of ``q`` over the keys of all members of ``axis``, ``[B, H, S, D]``.

    Args:
        own_2BHSD: this rank's keys and values.
        q_BHSD: its queries; a multiple of the key heads.
        rows: the mask's rows for these queries, with all its columns.
        site: the attention.
        axis: the ring.
        held: of a member, the slots that hold tokens, and which tokens they are.
    """
    scale = 1 / math.sqrt(site.head_dim) if site.scale is None else site.scale
    size, ratio = own_2BHSD.shape[3], q_BHSD.shape[1] // own_2BHSD.shape[2]
    way = way_of(site, axis.size)
    parts: Parts
    if way == "one":
        parts = One(q_BHSD, rows, site)
    elif way == "fused":
        parts = Fused(q_BHSD, repeated(own_2BHSD[0], ratio), scale, rows)
    else:
        parts = OnlineAttention(q_BHSD, scale, rows, longest(size, axis.size))
    members = [held(member) for member in range(axis.size)]
    chunks = {cut: chunk_of(cut, members) for cut in slices_of(size, axis.size)}
    cuts = [cut for cut, (slots, _) in chunks.items() if slots]  # others are padding alone
    arriving = _arriving(own_2BHSD, cuts, axis, parts.done, site)
    for cut, arrived in zip(cuts, arriving, strict=True):
        slots, tokens = chunks[cut]
        k, v = (repeated(picked(x, 2, slots), ratio) for x in arrived)
        parts.add(k, v, tokens)
    return parts.result()


def chunk_of(cut: tuple[int, int], held: Sequence[tuple[Ranges, Ranges]]) -> tuple[Ranges, Ranges]:
    """What a gathered slice holds: ranges of its slots that hold tokens, and which those are.

    Args:
        cut: which of every member's slots are gathered.
        held: of every member, ranges of slots that hold tokens, and of those tokens, in one order.
    """
    start, stop = cut
    slots, tokens = [], []
    for member, (theirs, which) in enumerate(held):
        for slot, token, count in _aligned(theirs, which):
            first, end = max(slot, start), min(slot + count, stop)
            if first < end:
                here = member * (stop - start) + first - start
                slots.append((here, here + end - first))
                tokens.append((token + first - slot, token + end - slot))
    return merged(slots), merged(tokens)


def _aligned(slots: Ranges, tokens: Ranges) -> Iterator[tuple[int, int, int]]:
    """Slot, token and length of every run that is one in both orders."""
    remaining = list(tokens)
    for start, stop in slots:
        while start < stop:
            first, end = remaining.pop(0)
            count = min(stop - start, end - first)
            yield start, first, count
            start += count
            if first + count < end:
                remaining.insert(0, (first + count, end))


def _arriving(
    own_2BHSD: Tensor, cuts: Ranges, axis: Axis, done: Callable[[], Tensor | None], site: Site
) -> Iterator[tuple[Tensor, ...]]:
    """Every slice of all members' keys and values, ``[B, H, W s, D]`` each.

    The next is sent for before the present one is attended to; the one after that waits for the
    present attention, so that two are on their way at most.
    """

    def gathered(cut: tuple[int, int], wait: Tensor | None) -> tuple[Tensor, ...]:
        part = picked(after(wait, own_2BHSD), 3, [cut])
        eight = "k" in site.eight and axis.size > 1
        whole = sent(lambda x: ops.all_gather(x, axis), part, eight=eight)
        joined: Tensor = whole.unflatten(0, (axis.size, -1)).permute(1, 2, 3, 0, 4, 5)
        return joined.flatten(3, 4).unbind(0)

    arriving = gathered(cuts[0], None)
    for following in (*cuts[1:], None):
        arrived = arriving
        if following is not None:
            arriving = gathered(following, done())
        yield arrived


class One:
    """All keys at once, and one fused attention."""

    def __init__(self, q_BHSD: Tensor, rows: Tensor | None, site: Site) -> None:
        self.q, self.rows, self.site = q_BHSD, rows, site
        self.out: Tensor | None = None

    def add(self, k_BHSD: Tensor, v_BHSD: Tensor, columns: Ranges) -> None:
        """See :class:`Parts`."""
        rows = None if self.rows is None else mask_columns(self.rows, columns)
        scale, steps = self.site.scale, self.site.steps
        self.out = ops.attention(self.q, k_BHSD, v_BHSD, rows, scale=scale, steps=steps)

    def done(self) -> Tensor | None:
        """See :class:`Parts`."""
        return None

    def result(self) -> Tensor:
        """See :class:`Parts`."""
        assert self.out is not None
        return self.out


class Fused:
    """A fused attention a chunk, which tells each row's sum through a key of common weight.

    A fused attention keeps the sum of its softmax to itself. Every chunk gets one key more, whose
    logit ``c`` is the same in all chunks of a row, and columns of ``V`` that are 1 for this key or
    for the others. With ``s`` the sum of ``exp(x)`` over a chunk's own keys, it returns::

        out = s O / (s + e^c)      p = e^c / (s + e^c)      t = s / (s + e^c)

    so that ``out / p = s O e^-c`` and ``t / p = s e^-c``: added up over the chunks, their quotient
    is the attention over all of them. ``c`` cancels, and need not be known to any accuracy. ``p``
    and ``t`` come in several columns of different size, whose roundings differ.

    ``c`` is the mean of a row's logits over this rank's own keys, and :data:`OFFSET`. Rows are
    right as long as no logit is more than 105 above that mean, which logits within +-50 cannot be;
    beyond that, chunks whose logits are that large count alike (nothing becomes infinite).
    """

    def __init__(self, q_BHSD: Tensor, k_BHSD: Tensor, scale: float, rows: Tensor | None) -> None:
        self.dtype, self.dim, self.scale, self.rows = q_BHSD.dtype, q_BHSD.shape[3], scale, rows
        mean = k_BHSD.float().mean(2, keepdim=True).to(self.dtype)
        common = q_BHSD @ mean.transpose(-1, -2) + OFFSET / scale
        zeros = q_BHSD.new_zeros(*q_BHSD.shape[:3], EXTRA - 1)
        self.q = torch.cat((q_BHSD, common, zeros), 3)
        self.told: Tensor | None = None
        self.out: Tensor | None = None
        self.sum: Tensor | None = None

    def add(self, k_BHSD: Tensor, v_BHSD: Tensor, columns: Ranges) -> None:
        """See :class:`Parts`."""
        k, v = _with_common(k_BHSD, _first(k_BHSD)), _with_common(v_BHSD, _sizes(v_BHSD))
        rows = None if self.rows is None else _seen(mask_columns(self.rows, columns), k.shape[2])
        self.told = ops.attention(self.q, k, v, rows, scale=self.scale)
        columns_of = self.told.split([self.dim, _OF_COMMON, EXTRA - _OF_COMMON], 3)
        out, p, t = (x.float() for x in columns_of)
        sizes = 1 + torch.arange(EXTRA, device=out.device) / EXTRA
        common = (p.sum(3, keepdim=True) / sizes[:_OF_COMMON].sum()).clamp_min(_SMALLEST)
        weight = _LIFT / common
        own = t.sum(3, keepdim=True) / sizes[_OF_COMMON:].sum()
        out, own = out * weight, own * weight
        self.out = out if self.out is None else self.out + out
        self.sum = own if self.sum is None else self.sum + own

    def done(self) -> Tensor | None:
        """See :class:`Parts`; the attention itself, as sums of several chunks become one kernel."""
        return self.told

    def result(self) -> Tensor:
        """See :class:`Parts`."""
        assert self.out is not None and self.sum is not None
        # A query that sees nothing gives zeros, as in torch.
        return (self.out / (self.sum + (self.sum == 0).float())).to(self.dtype)


_OF_COMMON: Final = 2
"""How many of the additional columns tell ``p``; the others tell ``t``, on which more depends."""


def _with_common(x_BHSD: Tensor, columns: tuple[Tensor, Tensor]) -> Tensor:
    """The common key behind all others, and additional columns: ``[B, H, S + 1, D + EXTRA]``."""
    b, h, s, d = x_BHSD.shape
    others, common = (c.to(x_BHSD.dtype) for c in columns)
    wide = torch.cat((x_BHSD, others.expand(b, h, s, EXTRA)), 3)
    last = torch.cat((x_BHSD.new_zeros(b, h, 1, d), common.expand(b, h, 1, EXTRA)), 3)
    return torch.cat((wide, last), 2)


def _first(like: Tensor) -> tuple[Tensor, Tensor]:
    """Of K: nothing for the others, and for the common key what the queries' column is read by."""
    number = torch.arange(EXTRA, device=like.device)
    return torch.zeros_like(number), number == 0


def _sizes(like: Tensor) -> tuple[Tensor, Tensor]:
    """Of V: columns that tell the others' weight, and those that tell the common key's."""
    number = torch.arange(EXTRA, device=like.device)
    sizes = 1 + number / EXTRA
    return sizes * (number >= _OF_COMMON), sizes * (number < _OF_COMMON)


def _seen(mask: Tensor, keys: int) -> Tensor:
    """The mask of a chunk, whose last column is the common key's: all rows see it."""
    whole = mask.expand(*mask.shape[:-1], keys - 1)
    return torch.cat((whole, torch.ones_like(whole[..., :1])), -1)
