"""Values that became part of a program: their leaves, and a digest of tensors among them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from .tensors import numbers


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """What containers hold, in order, under paths joined with dots as in the manifest."""
    pairs: Iterator[tuple[str, Any]]
    if isinstance(value, Mapping):
        pairs = ((str(key), one) for key, one in value.items())
    elif is_dataclass(value) and not isinstance(value, type):
        pairs = ((field.name, getattr(value, field.name)) for field in fields(value))
    elif isinstance(value, list | tuple):
        names = getattr(value, "_fields", None) or map(str, range(len(value)))
        pairs = zip(names, value, strict=True)
    else:
        yield path, value
        return
    for key, one in pairs:
        yield from leaves(one, f"{path}.{key}" if path else key)


def digest_of(value: Any) -> str | None:
    """SHA-256 of the tensors within, ``None`` where there are none.

    Their type does not count, only shapes and numbers: booleans and integers as int64, others as
    float64, row-major and little-endian; what is no tensor counts as its ``repr``.
    """
    found = [leaf for _, leaf in leaves(value)]
    if not any(isinstance(leaf, Tensor) for leaf in found):
        return None
    digest = hashlib.sha256()
    for leaf in found:
        if isinstance(leaf, Tensor):
            digest.update(repr(list(leaf.shape)).encode())
            digest.update(numbers(_wide(leaf)))
        else:
            digest.update(repr(leaf).encode())
    return digest.hexdigest()


def _wide(tensor: Tensor) -> Tensor:
    whole = not (tensor.is_floating_point() or tensor.is_complex())
    return tensor.detach().cpu().to(torch.int64 if whole else torch.float64).contiguous()
