"""Several shapes in one bundle: manifests of one variant each, and all of them as one. No torch.

A manifest's own fields are those of the first variant, so that a bundle of one reads as if there
were no variants; ``variants`` lists the others, by the fields in which they may differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from msgspec.structs import replace

from ..errors import UsageError
from ..words import near
from .manifest import Manifest, Variant, Weight
from .sizes import at_size, size_called

_OWN: Final = tuple(
    field for field in Variant.__struct_fields__ if field not in ("weights", "unused")
)
"""Fields that a variant has instead of the manifest's."""


def joined(manifests: Sequence[Manifest]) -> Manifest:
    """One manifest of bundles that differ in their shapes alone; the first stays where it is."""
    first, *others = manifests
    if not others:
        return first
    workarounds = dict.fromkeys(w for one in manifests for w in one.backend.workarounds)
    return replace(
        first,
        backend=replace(first.backend, workarounds=list(workarounds)),
        timings=manifests[-1].timings,
        variants=[_variant(one, first) for one in others],
    )


def _variant(one: Manifest, first: Manifest) -> Variant:
    shared = {weight.name: weight for weight in first.weights}
    here = {weight.name for weight in one.weights}
    own: dict[str, Any] = {name: getattr(one, name) for name in _OWN}
    return Variant(
        weights=[weight for weight in one.weights if shared.get(weight.name) != weight],
        unused=[name for name in shared if name not in here],
        **own,
    )


def all_variants(manifest: Manifest) -> list[Manifest]:
    """The manifest of every variant, as if it were a bundle's only one."""
    return [replace(manifest, variants=[]), *(_alone(manifest, v) for v in manifest.variants)]


def _alone(manifest: Manifest, variant: Variant) -> Manifest:
    weights: dict[str, Weight] = {weight.name: weight for weight in manifest.weights}
    for name in variant.unused:
        del weights[name]
    weights |= {weight.name: weight for weight in variant.weights}
    own: dict[str, Any] = {name: getattr(variant, name) for name in _OWN}
    return replace(manifest, variants=[], weights=list(weights.values()), **own)


def names_of(manifest: Manifest) -> list[str | None]:
    """Of all variants; ``None`` is the only one of a bundle that has no variants."""
    return [manifest.request.variant, *(one.request.variant for one in manifest.variants)]


def variant_of(manifest: Manifest, name: str | None) -> Manifest:
    """The manifest with this variant alone.

    Args:
        manifest: of the bundle.
        name: the variant's; ``None``: that of a bundle that has but one.

    Raises:
        UsageError: there is no such variant, or several and none is named.
    """
    if manifest.dynamic is not None and name is not None:
        return at_size(manifest, size_called(manifest, name))
    names = names_of(manifest)
    known = [one for one in names if one is not None]
    if name is None and len(names) == 1:
        return manifest
    if name is None:
        raise UsageError(
            f"the bundle has {len(names)} variants: {', '.join(known)}.",
            hint="name one of them: --variant NAME.",
        )
    if name not in known:
        raise UsageError(
            f"the bundle has no variant {name!r}.",
            hint=near(name, known) if known else "it was converted for one shape: leave it out.",
        )
    return all_variants(manifest)[names.index(name)]
