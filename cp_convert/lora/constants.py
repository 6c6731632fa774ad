"""What a conversion computed once from weights (``constants.*``), anew after some have changed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ..bundle.manifest import Manifest, Weight
from ..bundle.program import read_program
from ..engine.fold_weights import fold_weights
from ..errors import DamagedBundle, UsageError
from ..ir.tensors import numbers
from .base import Numbers
from .targets import parameters


def constants_of(manifest: Manifest) -> list[Weight]:
    """Engine inputs that follow from parameters."""
    return [one for one in manifest.weights if one.name.startswith("constants.")]


def check_constants(manifest: Manifest) -> None:
    """Refuse a bundle whose constants could not be computed again.

    Raises:
        UsageError: it has some, and no program that tells how.
    """
    constants = constants_of(manifest)
    for one in manifest.variants:
        if own := [weight.name for weight in one.weights]:
            raise UsageError(
                f"the variant {one.request.variant} has {own[0]} of its own, computed from weights "
                "when the bundle was made; a LoRA's set follows the constants of all variants only "
                "where they are the same.",
                hint="fuse the LoRA and convert the result, or convert one variant a bundle.",
            )
    if constants and manifest.program is None:
        raise UsageError(
            f"{constants[0].name} was computed from weights when the bundle was made, and would "
            "not follow a LoRA: the bundle does not hold the program that tells how.",
            hint="convert again with --program yes, or fuse the LoRA and convert the result.",
        )


def changed_constants(
    manifest: Manifest, folder: Path, changed: Mapping[str, Tensor], base: Numbers
) -> dict[str, Tensor]:
    """The constants that are others after these weights have changed.

    All are computed as the conversion does, by the stored program, and compared by their digests.

    Args:
        manifest: of the bundle.
        folder: where it is.
        changed: weights in their own types.
        base: the others.

    Raises:
        DamagedBundle: the program is missing, or computes constants of other shapes.
    """
    constants = constants_of(manifest)
    if not constants or not changed:
        return {}
    stored, weights = read_program(manifest, folder), parameters(manifest)
    state = dict(stored.program.state)
    for node, name in stored.names.items():
        state[node] = changed[name] if name in changed else base.tensor(weights[name])
    found = fold_weights(replace(stored.program, state=state), stored.names).constants
    for one in constants:
        if one.name not in found or list(found[one.name].shape) != one.shape:
            raise DamagedBundle(
                f"{one.name} does not follow from the bundle's program as it did when it was made.",
                hint="was it made by another version of cp-convert? Convert again.",
            )
    return {one.name: found[one.name] for one in constants if _differs(found[one.name], one)}


def _differs(value: Tensor, told: Weight) -> bool:
    return bool(hashlib.sha256(numbers(value)).hexdigest() != told.sha256)
