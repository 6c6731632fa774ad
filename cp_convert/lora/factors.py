"""The factors of a set, as they are kept in the bundle: ``lora/factors/NAME.safetensors``.

A tensor's name is that of the weight and that of the part, such as ``proj_out.weight|up``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..ir.tensors import FLOAT8, mapped, save
from .change import Change

_BETWEEN = "|"


def write_factors(changes: Mapping[str, Change], file: Path) -> None:
    """Write what a LoRA file tells, by weight."""
    save({_key(name, part): t for name, c in changes.items() for part, t in _parts(c)}, file)


def read_factors(file: Path) -> dict[str, Change]:
    """The changes by weight; their numbers are read when they are used.

    Raises:
        WeightsError: the file is missing or damaged.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in mapped(file).items():
        name, _, part = key.rpartition(_BETWEEN)
        parts.setdefault(name, {})[part] = tensor
    return {name: _change(own) for name, own in parts.items()}


def _key(name: str, part: str) -> str:
    return f"{name}{_BETWEEN}{part}"


def _parts(change: Change) -> list[tuple[str, Tensor]]:
    found = {**change.tensors, "scale": torch.tensor(change.scale, dtype=torch.float64)}
    found |= {} if change.rows is None else {"rows": change.rows}
    found |= {} if change.magnitude is None else {"magnitude": change.magnitude}
    # The format of our own files has no types of 8 bits; float32 holds them exactly.
    return [(part, t.float() if t.dtype in FLOAT8.values() else t) for part, t in found.items()]


def _change(parts: Mapping[str, Tensor]) -> Change:
    rest = dict(parts)
    scale = float(rest.pop("scale"))
    rows, magnitude = rest.pop("rows", None), rest.pop("magnitude", None)
    kind = "lora" if "up" in rest else "full" if "full" in rest else "lokr"
    return Change(kind, rest, scale, rows, magnitude)
