"""Names in files that are not the model's, but mean the same."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Final

from .ties import Ties

WRAPPERS: Final = ("model.diffusion_model.", "diffusion_model.", "transformer.")
"""Prefixes in files that hold other models as well: text encoders, a VAE."""


@dataclass(frozen=True)
class Matched:
    """Which stored tensor is which of the model's.

    Attributes:
        names: the stored name, by the model's.
        missing: the model's names that no stored one stands for.
        unexpected: stored names that stand for nothing.
        told: what was done to the names, in words; nothing where they are equal.
    """

    names: Mapping[str, str]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    told: tuple[str, ...] = field(default=())

    @property
    def fits(self) -> bool:
        """Whether nothing is left over."""
        return not self.missing and not self.unexpected


def by_name(wanted: Collection[str], stored: Collection[str], ties: Ties) -> Matched:
    """Names as they are; one that is missing is fine when it is tied to a present one."""
    return Matched(
        {name: name for name in wanted if name in stored},
        tuple(name for name in wanted if ties.present(name, stored) is None),
        tuple(name for name in stored if name not in wanted),
    )


def match(wanted: Collection[str], stored: Collection[str], ties: Ties) -> Matched:
    """Names as they are, else without the one prefix in which they differ."""
    wanted, stored = dict.fromkeys(wanted), dict.fromkeys(stored)
    plain = by_name(wanted, stored, ties)
    if plain.fits:
        return plain
    found = [*_with_prefix(wanted, stored, ties), *_without_prefix(wanted, stored, ties)]
    return found[0] if len(found) == 1 else plain


def _with_prefix(wanted: Collection[str], stored: Collection[str], ties: Ties) -> list[Matched]:
    """The files' names have a prefix that the model's lack."""
    found = []
    for prefix in _prefixes(wanted, stored):
        inner = {name.removeprefix(prefix) for name in stored if name.startswith(prefix)}
        others = [name for name in stored if not name.startswith(prefix)]
        if by_name(wanted, inner, ties).fits and (not others or prefix in WRAPPERS):
            told = [f"names in the file begin with {prefix!r}, the model's do not"]
            if others:
                told.append(unused(len(others), others[0]))
            names = {name: prefix + name for name in wanted if name in inner}
            found.append(Matched(names, told=tuple(told)))
    return found


def unused(count: int, example: str = "") -> str:
    """That a file holds more than the model."""
    such = f", such as {example}" if example else ""
    return f"{count} tensors of other models in the file are not used{such}"


def _without_prefix(wanted: Collection[str], stored: Collection[str], ties: Ties) -> list[Matched]:
    """The model's names have a prefix that the files' lack: ``torch.compile``, a wrapper."""
    found = []
    for prefix in _prefixes(stored, wanted):
        whole = [prefix + name for name in stored]
        if by_name(wanted, whole, ties).fits:
            told = f"names of the model begin with {prefix!r}, the file's do not"
            names = {prefix + name: name for name in stored}
            found.append(Matched(names, told=(told,)))
    return found


def _prefixes(short: Collection[str], long: Collection[str]) -> list[str]:
    """What stands before any short name in a long one, up to a dot."""
    if not short:
        return []
    # A tied name may be missing on either side, hence more than one is looked for.
    looked = sorted(short, key=lambda name: (-name.count("."), name))[:4]
    found = {name.removesuffix(own) for own in looked for name in long if name.endswith(f".{own}")}
    return sorted(found)


def inside(stored: Collection[str]) -> tuple[str, list[str]]:
    """The diffusion model's own prefix in a file that holds others too, and the names under it."""
    for prefix in WRAPPERS:
        names = [name for name in stored if name.startswith(prefix)]
        if names:
            return prefix, names
    return "", list(stored)
