"""Changed weights: of one set, or of several at strengths of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..bundle.manifest import Manifest, Weight
from ..errors import WeightsError
from ..ir.tensors import is_finite
from .base import Numbers
from .change import Change, changed
from .targets import parameters

Changes = Mapping[str, Sequence[tuple[Change, float]]]
"""By weight, every change of it with its strength."""


class Changed(Mapping[str, Tensor]):
    """The weights that are changed, by name, computed when they are asked for.

    They are in the types in which the bundle stores them: computed in float32, rounded once.
    Weights that are one tensor are changed together.

    Args:
        manifest: of the bundle.
        base: the weights before.
        changes: of each.

    Raises:
        WeightsError: on access; the type of the weight does not hold the result.
        DamagedBundle: on access; see :meth:`.base.Base.tensor`.
    """

    def __init__(self, manifest: Manifest, base: Numbers, changes: Changes) -> None:
        self._base, self._weights = base, parameters(manifest)
        groups = tied(manifest)
        self._changes = {one.name: c for name, c in changes.items() for one in groups[name]}

    def __iter__(self) -> Iterator[str]:
        return iter(self._changes)

    def __len__(self) -> int:
        return len(self._changes)

    def told(self, name: str) -> Weight:
        """What the manifest says of the weight before."""
        return self._weights[name]

    def __getitem__(self, name: str) -> Tensor:
        told = self._weights[name]
        value = changed(self._base.tensor(told), self._changes[name]).to(getattr(torch, told.dtype))
        if not is_finite(value):
            raise WeightsError(
                f"{name} with the LoRA holds numbers that {told.dtype} cannot hold.",
                hint="take a smaller strength.",
            )
        return value


def tied(manifest: Manifest) -> dict[str, list[Weight]]:
    """By name, all weights that are the same numbers in the same place, itself included."""
    places: dict[tuple[str, int, int], list[Weight]] = {}
    for one in parameters(manifest).values():
        places.setdefault((one.file, one.offset, one.bytes), []).append(one)
    return {one.name: group for group in places.values() for one in group}
