"""Where the file lies that built a bundle's model, and its weights, for who runs it elsewhere.

In: a manifest, which has both as they were typed. Out: paths. What was typed relative to some
folder is looked for from here, and from the bundle's folder and those above it: a bundle is mostly
written below the folder in which the command was given. The file is known by its SHA-256.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..bundle.manifest import Manifest
from ..errors import UsageError
from ..files import sha256
from ..model.preset import path_of


@dataclass(frozen=True)
class Original:
    """What the dense model is built from.

    Attributes:
        model: the file, or a preset's.
        weights: ``None``: it is built with its own.
    """

    model: Path | None = None
    weights: Path | None = None


def check_named(named: Original, manifest: Manifest) -> None:
    """Refuse files that are not those of the bundle.

    Args:
        named: by the user.
        manifest: of the bundle.

    Raises:
        UsageError: there is no such file, or it is another one.
    """
    if named.model is not None:
        if not named.model.is_file():
            raise UsageError(f"--model: there is no file {named.model}.")
        if sha256(named.model) != manifest.model.source_sha256:
            raise UsageError(
                f"--model {named.model}: the bundle was made from another file, "
                f"{manifest.model.source}, or that file has changed since.",
                hint="name the file as it was; its SHA-256 is model.source_sha256 in the manifest.",
            )
    if named.weights is not None:
        if manifest.model.weights is None:
            raise UsageError(
                f"--weights {named.weights}: the bundle was made with the model file's own numbers."
            )
        if not named.weights.exists():
            raise UsageError(f"--weights: there is no {named.weights}.")


def original_of(manifest: Manifest, bundle: Path, named: Original) -> Original | str:
    """The files, or the reason why the dense model cannot be built.

    Args:
        manifest: of the bundle.
        bundle: its folder.
        named: by the user, see :func:`check_named`.
    """
    told = manifest.model
    here = [path for path in _places(Path(told.source), bundle) if path.is_file()]
    fits = [path for path in here if sha256(path) == told.source_sha256]
    model = named.model or next(iter(fits), None)
    if model is None:
        why = f"{told.source} has changed" if here else _not_here(told.source)
        return f"{why}; --model names the file as it was"
    if told.weights is None:
        return Original(model)
    places = [path for path in _places(Path(told.weights), bundle) if path.exists()]
    weights = named.weights or next(iter(places), None)
    if weights is None:
        return f"the weights: {_not_here(told.weights)}; --weights names them"
    return Original(model, weights)


def _places(told: Path, bundle: Path) -> Iterator[Path]:
    whole = bundle.resolve()
    for folder in (Path(), whole, *whole.parents):
        yield folder / told
        if told.is_absolute():
            break
    if told.suffix == ".toml" and (shipped := path_of(told.stem)) is not None:
        yield shipped  # of another installation


def _not_here(told: str) -> str:
    where = "not here" if Path(told).is_absolute() else "neither here nor above the bundle"
    return f"{told} is {where}"
