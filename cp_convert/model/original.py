"""Checkpoints in the names of the model's authors, by diffusers' own mapping of single files.

diffusers knows, class by class, how the published single files are named, split and joined. Its
mapping is given tensors that are mapped from the files, so that what it only renames, and pieces
that it cuts out whole, are still the files' own bytes and are found there by their address.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import WeightsError
from ..ir.tensors import Location

Renaming = Callable[..., dict[str, Tensor]]


def mapping_of(module: nn.Module) -> Renaming | None:
    """Diffusers' mapping for the model's class; ``None`` where it has none."""
    if not any(cls.__module__.startswith("diffusers.") for cls in type(module).__mro__):
        return None
    # Late: diffusers takes seconds to import, and is only needed where the model is one of its own.
    import diffusers
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES as KNOWN

    for name, told in KNOWN.items():
        if isinstance(module, getattr(diffusers, name, ())):
            found: Renaming = told["checkpoint_mapping_fn"]
            return found
    return None


def renamed(
    module: nn.Module, mapping: Renaming, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors under the names of the diffusers class.

    Raises:
        WeightsError: the mapping does not know these names.
    """
    given = dict(tensors)
    try:
        with _AloneIsNotJoined():
            found = mapping(checkpoint=given, config=dict(getattr(module, "config", {})))
    # Written for the published files, it fails in any way with others.
    except (LookupError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"diffusers cannot map these names to {type(module).__name__} "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})."
        ) from error
    left = {} if found is given else given
    return {**{name: t for name, t in left.items() if name in tensors}, **found}


class _AloneIsNotJoined(TorchFunctionMode):
    """``torch.cat([piece])``, as the mappings write it, copies what could stay where it is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.cat and len(args[0]) == 1:
            return args[0][0]
        return func(*args, **(kwargs or {}))


def place_of(value: Tensor, mapped: Mapping[int, tuple[Tensor, Location]]) -> Location | None:
    """Where a file holds exactly these numbers, in this order; ``None``: they were computed.

    Args:
        value: what the mapping returned.
        mapped: by the address of the storage, a file's bytes and any location in it.
    """
    known = mapped.get(value.untyped_storage().data_ptr())
    if known is None or not value.is_contiguous():
        return None
    file, at = known
    offset = value.data_ptr() - file.data_ptr()
    same_type: Any = value.dtype == at.dtype
    return replace(
        at,
        offset=offset,
        size=value.nbytes,
        dtype=value.dtype,
        kind=at.kind if same_type else str(value.dtype),
        shape=tuple(value.shape),
    )
