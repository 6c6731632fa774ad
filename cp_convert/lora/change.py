"""What a LoRA file changes in one weight, and the weight afterwards; all arithmetic in float32.

::

    LoRA   W + s * alpha/r * up @ down
    LoKr   W + s * alpha/r * kron(w1, w2)          w1, w2 whole or products of two
    DoRA   m * (W + s * alpha/r * up @ down) / |W + s * alpha/r * up @ down|

``s`` is the strength that the user chooses. DoRA's norm is over a row (or, in LyCORIS, over a
column) of the sum, as in PEFT. Sources: PEFT (its ``dora`` and ``lokr`` tuners), LyCORIS (its
``lokr`` module).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Change:
    """What one file changes in one weight.

    Attributes:
        kind: ``lora``, ``lokr`` or ``full``.
        tensors: ``up [out, r]`` and ``down [r, in]``; ``w1``, ``w2`` or, of either, ``_a`` and
            ``_b``; ``full``. Convolutions have their kernel's dimensions behind.
        scale: alpha over rank.
        rows: which rows of the product are this weight's, where the file changes several that are
            one in the names of the model's authors; ``None``: all.
        magnitude: DoRA's, ``[out]`` or ``[1, in]``.
    """

    kind: str
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    scale: float = 1.0
    rows: Tensor | None = None
    magnitude: Tensor | None = None

    @property
    def additive(self) -> bool:
        """Whether it may be added to other changes of the same weight."""
        return self.magnitude is None

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of what it adds; a convolution's kernel counts as columns."""
        if self.kind == "lokr":
            first, second = (_shape(self.tensors, name) for name in ("w1", "w2"))
            rows, columns = first[0] * second[0], first[1] * second[1]
        elif self.kind == "lora":
            rows = self.tensors["up"].shape[0]
            columns = self.tensors["down"][0].numel()
        else:
            full = self.tensors["full"]
            rows = full.shape[0] if full.dim() else 1
            columns = full.numel() // max(rows, 1)
        return rows if self.rows is None else len(self.rows), columns


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    if name in tensors:
        whole = tensors[name]
        return whole.shape[0], whole[0].numel()
    return tensors[f"{name}_a"].shape[0], tensors[f"{name}_b"][0].numel()


def delta(change: Change, shape: Sequence[int]) -> Tensor:
    """What is added to the weight of this ``shape`` at strength 1, in float32."""
    if change.kind == "lora":
        up, down = (change.tensors[name].float().flatten(1) for name in ("up", "down"))
        found = up @ down
    elif change.kind == "lokr":
        found = _kronecker(change.tensors)
    else:
        found = change.tensors["full"].float()
    if change.rows is not None:
        found = found[change.rows]
    return found.reshape(tuple(shape)) * change.scale


def _kronecker(tensors: Mapping[str, Tensor]) -> Tensor:
    """``kron(w1, w2)``, ``[out, in]`` or ``[out, in, *kernel]``."""
    first, second = (_factor(tensors, name) for name in ("w1", "w2"))
    first = first.reshape(*first.shape, *(1 for _ in range(second.dim() - first.dim())))
    return torch.kron(first, second)


def _factor(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name in tensors:
        return tensors[name].float()
    left, right = tensors[f"{name}_a"].float(), tensors[f"{name}_b"].float()
    return (left @ right.flatten(1)).reshape(left.shape[0], *right.shape[1:])


def changed(weight: Tensor, changes: Sequence[tuple[Change, float]]) -> Tensor:
    """The weight with all changes at their strengths, in float32.

    Args:
        weight: in any floating type.
        changes: each with its strength; one that is not additive stands alone.
    """
    found = weight.to(torch.float32, copy=True)
    changes = [(_on(change, weight.device), strength) for change, strength in changes]
    for change, strength in changes:
        found += strength * delta(change, weight.shape)
    magnitude = changes[0][0].magnitude if changes else None
    if magnitude is None:
        return found
    assert len(changes) == 1
    return found * _direction(found, magnitude.float())


def _on(change: Change, device: torch.device) -> Change:
    return replace(
        change,
        tensors={name: one.to(device) for name, one in change.tensors.items()},
        rows=None if change.rows is None else change.rows.to(device),
        magnitude=None if change.magnitude is None else change.magnitude.to(device),
    )


def _direction(summed: Tensor, magnitude: Tensor) -> Tensor:
    """What DoRA multiplies the sum by: the magnitude over the norm, broadcast over ``summed``."""
    if by_column(magnitude, summed.shape):
        over = [0, *range(2, summed.dim())]
        magnitude = magnitude.reshape(1, -1, *(1 for _ in summed.shape[2:]))
    else:
        over = list(range(1, summed.dim()))
        magnitude = magnitude.reshape(-1, *(1 for _ in summed.shape[1:]))
    norm: Tensor = torch.linalg.vector_norm(summed, dim=over, keepdim=True)
    return magnitude / norm


def by_column(magnitude: Tensor, shape: Sequence[int]) -> bool:
    """Whether a magnitude is one a column; a square weight's tells it by its own shape."""
    if magnitude.dim() < 2:
        return False
    return magnitude.shape[0] == 1 and shape[0] != 1
