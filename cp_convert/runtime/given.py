"""What a run's ranks are given: tensors of a file, or random ones, alike on all ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from ..bundle.manifest import Manifest
from ..bundle.sizes import at_size
from ..bundle.variants import variant_of
from ..errors import UsageError
from ..model.header import given_tensors
from .arguments import check_tensor, inputs_of
from .choice import fitting, views_of

INPUTS: Final = "--inputs"
"""The option by which files are named."""


def asked_variant(manifest: Manifest, name: str | None, file: str | None) -> Manifest:
    """The variant that is run: the one that is named, that of the file's shapes, or the first.

    Args:
        manifest: of the bundle.
        name: of the variant, or of a size in a range.
        file: a safetensors file of inputs.

    Raises:
        UsageError: there is no such variant, none has such inputs, or the file is no safetensors
            file.
    """
    if name is not None:
        return variant_of(manifest, name)
    if manifest.dynamic is not None and file is None:
        return at_size(manifest, manifest.dynamic.last)
    views = views_of(manifest)
    if len(views) == 1 or file is None:
        return next(iter(views.values()))
    return views[fitting(views, given_tensors(Path(file), INPUTS))]


def given_inputs(manifest: Manifest, file: str | None, seed: int) -> dict[str, Tensor]:
    """The inputs by binding name, on the CPU.

    Args:
        manifest: of the bundle.
        file: a safetensors file with these names; ``None``: random numbers.
        seed: of random numbers.

    Raises:
        UsageError: the file lacks an input, has one too many, or of another shape or type, or is
            no safetensors file.
    """
    if file is None:
        return random_inputs(manifest, seed)
    wanted, found = inputs_of(manifest), given_tensors(Path(file), INPUTS)
    lacking = [name for name in wanted if name not in found]
    other = [name for name in found if name not in wanted]
    if lacking or other:
        what = [f"lacks {', '.join(lacking)}"] if lacking else []
        what += [f"has {', '.join(other)}, which the bundle does not take"] if other else []
        raise UsageError(
            f"{file} {' and '.join(what)}.", hint=f"the bundle takes {', '.join(wanted)}."
        )
    for name, tensor in found.items():
        check_tensor(name, tensor, wanted[name])
    return found


def random_inputs(manifest: Manifest, seed: int) -> dict[str, Tensor]:
    """Standard normal numbers, and zeros and ones where the engines take integers."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    for name, io in inputs_of(manifest).items():
        dtype = getattr(torch, io.dtype)
        if dtype.is_floating_point:
            found[name] = torch.randn(io.shape, generator=generator).to(dtype)
        else:
            found[name] = torch.randint(0, 2, io.shape, generator=generator).to(dtype)
    return found
