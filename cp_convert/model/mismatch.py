"""What differs between the tensors of a checkpoint and those of a model, told all at once."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Final

from torch import Tensor

from ..errors import WeightsError
from .names import Matched

_SHOWN: Final = 8


def mismatched(
    matched: Matched,
    shapes: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, Tensor],
    path: Path,
    more: str = "",
) -> WeightsError:
    """The complaint; ``shapes`` are those of the names that are there."""
    other = [
        f"{name}: {list(shape)} in the file, {list(wanted[name].shape)} in the model"
        for name, shape in shapes.items()
        if shape != tuple(wanted[name].shape)
    ]
    complaints = [
        f"{len(names)} {what}: {_some(names)}."
        for what, names in (
            ("missing", matched.missing),
            ("unexpected", matched.unexpected),
            ("of another shape", other),
        )
        if names
    ]
    return WeightsError(
        f"the tensors of {path.name} are not those of the model. {' '.join([*complaints, more])}",
        where=str(path),
        hint="check that the file belongs to this model and build_model() to this file.",
    )


def _some(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
