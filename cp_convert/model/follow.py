"""Scales that follow their codes through a mapping of names that splits, joins and reorders.

In: the stored tensors, which of them are codes, and diffusers' mapping. Out: the scales by the
model's own names. The mapping is run once more, on numbers that say of every row of a weight which
stored row it is; what comes out says which scales belong to it, whatever was done on the way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..errors import WeightsError
from .coded import Coded
from .original import Renaming, renamed
from .quantized import UNQUANTIZED


def followed(
    module: nn.Module,
    mapping: Renaming,
    tensors: Mapping[str, Tensor],
    coded: Mapping[str, Coded],
    codes: Collection[str],
) -> dict[str, Coded]:
    """The scales of what the mapping makes of codes.

    Args:
        module: the model, whose configuration the mapping reads.
        mapping: see :func:`.original.mapping_of`.
        tensors: what it is given; only their shapes count.
        coded: those of them that are codes.
        codes: what is codes of what it returned for them.

    Raises:
        WeightsError: one tensor of the model is made of pieces whose scales differ.
    """
    owners, numbered, begin = list[str](), dict[str, Tensor](), 0
    for name, tensor in tensors.items():
        rows = torch.full((1,), -1, dtype=torch.int32)
        if name in coded:
            rows = torch.arange(begin, begin + len(tensor), dtype=torch.int32)
            owners += [name] * len(tensor)
            begin += len(tensor)
        shape = (-1, *(1 for _ in tensor.shape[1:]))
        numbered[name] = (rows.reshape(shape) if tensor.dim() else rows[0]).expand(tensor.shape)
    found, every = renamed(module, mapping, numbered), _by_rows(owners, coded)
    all_rows = {name: _rows(name, found[name]) for name in codes}
    return {
        name: _of(name, rows, owners, coded, every)
        for name, rows in all_rows.items()
        if bool((rows >= 0).any())  # plain numbers of 8 bits have no scale
    }


def _by_rows(owners: list[str], coded: Mapping[str, Coded]) -> Tensor:
    """The scales of all rows, one after the other."""
    counts = Counter(owners)
    found = [torch.as_tensor(coded[n].weight_scale).expand(count) for n, count in counts.items()]
    return torch.cat(found) if found else torch.empty(0)


def _rows(name: str, numbered: Tensor) -> Tensor:
    """The stored row of each row."""
    flat = numbered.reshape(len(numbered), -1) if numbered.dim() else numbered.reshape(1, 1)
    if flat.stride(1) != 0 and not bool((flat == flat[:, :1]).all()):
        raise _refused(name, "pieces of rows")
    return flat[:, 0]


def _of(
    name: str, rows: Tensor, owners: list[str], coded: Mapping[str, Coded], every: Tensor
) -> Coded:
    """The scales of one tensor."""
    if bool((rows < 0).any()):
        raise _refused(name, "quantized and other pieces")
    pieces = [coded[owner] for owner in dict.fromkeys(owners[row] for row in rows.tolist())]
    if any(not _alike(one, pieces[0]) for one in pieces):
        raise _refused(name, "pieces whose scales differ")
    if pieces[0].blocks is not None:
        return _of_blocks(name, rows, owners, coded)
    if not isinstance(pieces[0].weight_scale, Tensor):
        return pieces[0]
    return replace(pieces[0], weight_scale=every[rows.long()])


def _of_blocks(name: str, rows: Tensor, owners: list[str], coded: Mapping[str, Coded]) -> Coded:
    """The scales of blocks go with their rows, too; ``rows`` number the stored ones of all."""
    told = dict.fromkeys(owners[row] for row in rows.tolist())
    first = {owner: owners.index(owner) for owner in told}
    place = dict(zip(told, _begins(told, coded), strict=True))
    every = torch.cat([_blocks(coded[owner]) for owner in told])
    own = [row - first[owners[row]] + place[owners[row]] for row in rows.tolist()]
    pieces = [coded[owner] for owner in told]
    if any(one.low_rank is not None for one in pieces):
        raise _refused(name, "pieces of what has a low rank beside")
    if own == list(range(len(every))) and len(pieces) == 1:
        return pieces[0]  # whole, hence where it is
    return replace(pieces[0], blocks=every[own], blocks_at=None)


def _begins(owners: Collection[str], coded: Mapping[str, Coded]) -> list[int]:
    counts = [len(_blocks(coded[owner])) for owner in owners]
    return [sum(counts[:i]) for i in range(len(counts))]


def _blocks(one: Coded) -> Tensor:
    assert one.blocks is not None
    return one.blocks


def _alike(one: Coded, other: Coded) -> bool:
    """But for the scales of rows, which go with them."""
    told = [(c.input_scale, c.by_token, c.dtype, _one(c.weight_scale)) for c in (one, other)]
    if told[0] != told[1] or (one.smooth is None) != (other.smooth is None):
        return False
    return one.smooth is None or other.smooth is None or torch.equal(one.smooth, other.smooth)


def _one(scale: float | Tensor) -> float | None:
    return None if isinstance(scale, Tensor) else scale


def _refused(name: str, what: str) -> WeightsError:
    return WeightsError(
        f"{name} would be made of {what}: its codes have no scale of their own.",
        hint="export it in the names of the diffusers class; " + UNQUANTIZED,
    )
