"""Which sets are in effect, and how strongly; what of that a bundle holds ready."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import isfinite
from pathlib import Path

from ..bundle.folder import file_problem
from ..bundle.manifest import LoraSet, Manifest
from ..errors import DamagedBundle, UsageError
from .add import set_of
from .change import Change
from .compute import Changes
from .factors import read_factors

Asked = None | str | Iterable[str] | Mapping[str, float | None]
"""A set's name; or several, each with its strength, ``None`` being the one that it was added with.

Without names, the weights are those that the bundle was made with.
"""


def chosen(manifest: Manifest, asked: Asked) -> dict[str, float]:
    """The strength of every set that is asked for, by name, in the order of names.

    Raises:
        UsageError: there is no such set, a strength is no number, or sets cannot be added.
    """
    found: dict[str, float] = {}
    for name, strength in sorted(_plain(asked).items(), key=lambda one: str(one[0])):
        own = set_of(manifest, name)
        strength = own.scale if strength is None else strength
        # A caller's value may be anything; who fails alone has the other ranks wait.
        is_number = isinstance(strength, int | float) and not isinstance(strength, bool)
        if not is_number or not isfinite(strength):
            raise UsageError(f"the strength of {name} is {strength!r}, which is no finite number.")
        found[name] = float(strength)
    alone = [name for name in found if "dora" in set_of(manifest, name).kinds]
    if alone and len(found) > 1:
        raise UsageError(
            f"{alone[0]} is a DoRA, which does not add to {_other(found, alone[0])}: it scales the "
            "weights to norms of its own, whatever else was added to them.",
            hint="use it alone; or fuse one of them into the model, and convert that.",
        )
    return found


def _plain(asked: Asked) -> dict[str, float | None]:
    if asked is None:
        return {}
    if isinstance(asked, Mapping):
        return dict(asked)
    if isinstance(asked, str):
        return {asked: None}
    if not isinstance(asked, Iterable):
        raise UsageError(
            f"{asked!r} is no LoRA set.", hint='"style", ["style", "other"] or {"style": 0.5}.'
        )
    return dict.fromkeys(asked)


def _other(names: Iterable[str], one: str) -> str:
    return next(name for name in names if name != one)


def ready(manifest: Manifest, strengths: Mapping[str, float]) -> LoraSet | None:
    """The set whose stored weights are those that are asked for; ``None``: they are computed."""
    if len(strengths) != 1:
        return None
    ((name, strength),) = strengths.items()
    own = set_of(manifest, name)
    return own if own.scale == strength else None


def changes_at(
    manifest: Manifest, folder: Path, strengths: Mapping[str, float], *, verify: bool = True
) -> Changes:
    """By weight, what the sets change, from the factors that the bundle keeps.

    Args:
        manifest: of the bundle.
        folder: where it is.
        strengths: of the sets, by name.
        verify: whether the files are compared with the manifest's SHA-256.

    Raises:
        DamagedBundle: a file is missing or altered.
    """
    found: dict[str, list[tuple[Change, float]]] = {}
    for name, strength in strengths.items():
        told = set_of(manifest, name).factors
        problem = file_problem(folder / told.file, told, digest=verify)
        if problem is not None:
            raise DamagedBundle(
                f"the LoRA set {name}: {folder / told.file}: {problem}.",
                hint="copy the bundle again; or remove the set with `cp-convert lora BUNDLE "
                "--remove`, and add it again.",
            )
        for weight, change in read_factors(folder / told.file).items():
            found.setdefault(weight, []).append((change, strength))
    return found
