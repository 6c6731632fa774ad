"""Guidance branches in example inputs, and the classic way to combine what the model returns.

Inputs of one branch come in where the model's ``forward`` is called once a branch; the same with
all branches on dimension 0 go out, branch by branch, as a pipeline that concatenates them does.
Guidance: Ho and Salimans, *Classifier-Free Diffusion Guidance*, arXiv:2207.12598.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import CannotTrace, UsageError
from ..ir.source import Branches
from ..words import near

SCALE: Final = 4.0
"""Example value of the scale: as pipelines have it, and exact in every type."""


def branched(
    inputs: Mapping[str, Any],
    module: nn.Module,
    count: int,
    combine: str | None = None,
    kept: Collection[str] = (),
    frozen: Collection[str] = (),
) -> tuple[dict[str, Any], Branches]:
    """Example inputs with ``count`` branches, and what was found and done.

    A batch of one is taken for one branch. The other branches get the same numbers in another
    order: as large, and not the same, so that a rank that computes another's branch is noticed.
    Integers and booleans are positions and masks, whose values decide shapes; they are repeated.

    Args:
        inputs: keyword arguments of forward.
        module: whose forward it is.
        count: how many branches.
        combine: name of the input that has the scale, where the engines combine them.
        kept: arguments without a batch, which stay as they are.
        frozen: arguments that become part of the engines, the same ones for every branch.

    Raises:
        UsageError: the batch has not as many rows, or a multiple; or the name is taken.
    """
    if count == 1:
        return dict(inputs), Branches()
    unknown = sorted(set(kept) - set(inputs))
    if unknown:
        raise UsageError(
            f"the example inputs have no argument {unknown[0]}, which --unbatched names.",
            hint=near(unknown[0], inputs),
        )
    rows = _rows(inputs, module, {*kept, *frozen})
    if rows > 1 and rows % count:
        raise UsageError(
            f"--cfg {count}: the example inputs have a batch of {rows}, which {count} branches do "
            "not share evenly.",
            hint=f"a batch of 1, which is repeated for every branch, or of {count} or a multiple.",
        )
    if combine is not None and combine in inspect.signature(module.forward).parameters:
        raise UsageError(
            f"--combine {combine}: forward has an argument of that name.",
            hint="give the scale another, such as guidance_scale.",
        )
    added = {} if combine is None else {combine: torch.tensor([SCALE])}
    known = Branches(max(rows, count), rows == 1, added)
    return (_widened(inputs, count, kept, frozen) if rows == 1 else dict(inputs)), known


def _rows(inputs: Mapping[str, Any], module: nn.Module, others: Collection[str]) -> int:
    rows = rows_of(inputs, module, others)
    if not rows:
        raise UsageError(
            "--cfg: no argument is a tensor of two dimensions or more, so there is no batch; a "
            "list of tensors is none.",
            hint="leave --cfg out.",
        )
    return rows


def rows_of(inputs: Mapping[str, Any], module: nn.Module, others: Collection[str]) -> int:
    """The batch: how many rows forward's first tensor of two dimensions or more has; 0: no such.

    ``others`` are arguments without a batch.
    """
    parameters = inspect.signature(module.forward).parameters
    # A list of tensors is a batch by itself (Z-Image): its tensors have none.
    given = [inputs[name] for name in parameters if name in inputs and name not in others]
    found = [value.shape[0] for value in given if isinstance(value, Tensor) and value.dim() > 1]
    return int(found[0]) if found else 0


def _widened(
    inputs: Mapping[str, Any], count: int, kept: Collection[str], frozen: Collection[str]
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def widened(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] != 1:
            return leaf
        return torch.cat([leaf, *(_shuffled(leaf, generator) for _ in range(count - 1))])

    def own(name: str, value: Any) -> Any:
        if name in kept:
            return value
        return repeated(value, count) if name in frozen else pytree.tree_map(widened, value)

    return {name: own(name, value) for name, value in inputs.items()}


def repeated(value: Any, count: int) -> Any:
    """Tensors of one row in ``value`` with ``count`` equal ones."""

    def copies(leaf: Any) -> Any:
        is_row = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == 1
        return torch.cat([leaf] * count) if is_row else leaf

    return pytree.tree_map(copies, value)


def _shuffled(row: Tensor, generator: torch.Generator) -> Tensor:
    if not row.is_floating_point():
        return row
    order = torch.randperm(row.numel(), generator=generator)
    return row.flatten()[order.to(row.device)].view(row.shape)


@contextmanager
def blamed_on_rows(branches: Branches) -> Iterator[None]:
    """Where forward fails with a row that was repeated, say so: with one row it may not."""
    try:
        yield
    except CannotTrace as error:
        if not branches.widened:
            raise
        raise CannotTrace(
            f"forward was given the example's one row {branches.rows} times, once a branch, and "
            f"failed: {error.message}",
            where=error.where,
            hint="--unbatched ARGUMENT for what has one row whatever the batch is; an example with "
            "all branches, where lists go with the batch; or no --cfg.",
        ) from error


def combined(outputs: Iterable[Tensor], branches: Branches) -> list[Tensor]:
    """``uncond + s * (cond - uncond)`` of every output that has the batch, in float32.

    The first half of the batch is ``uncond``. Outputs keep their types: ``[B, ...]`` becomes
    ``[B / 2, ...]``.
    """
    if not branches.added:
        return list(outputs)
    (scale,) = branches.added.values()
    return [_guided(x, scale) if branches.are_in(x.shape) else x for x in outputs]


def _guided(x: Tensor, scale: Tensor) -> Tensor:
    uncond, cond = x.float().chunk(2)
    return (uncond + scale.to(x.device) * (cond - uncond)).to(x.dtype)
