"""Tensors from safetensors files into a module. Never pickle, never ``torch.load``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import WeightsError
from ..ir.attention8 import Steps
from ..ir.quantize import FP8
from ..ir.source import Cast, Codes, of_blocks
from ..ir.tensors import Location, bytes_of, is_finite, tensor_at
from .coded import KINDS, Coded, shape_of
from .follow import followed
from .formats import FLOAT8
from .meta import replace
from .mismatch import mismatched
from .names import Matched, by_name, inside, match, unused
from .original import Renaming, mapping_of, place_of, renamed
from .quantized import check_floating, check_types, check_unmatched
from .ties import Ties
from .unread import read_numbers, without_numbers


@dataclass(frozen=True)
class Found:
    """One tensor for the model.

    Attributes:
        tensor: as stored, mapped and not read yet; or computed from such; without memory where
            nobody reads what ``codes`` stand for.
        at: where a file holds these numbers; ``None`` where they were computed.
        told: where it comes from, in words.
        codes: that ``tensor`` was computed from, and are to stay codes.
        upcast: of codes that are not, their type.
        blocks_at: where a file holds the scales of blocks.
    """

    tensor: Tensor
    at: Location | None
    told: str
    codes: Codes | None = None
    upcast: torch.dtype | None = None
    blocks_at: Location | None = None


@dataclass(frozen=True)
class Filled:
    """What was done.

    Attributes:
        located: where the files hold the parameters, or their codes and scales of blocks; tied
            ones under all their names.
        casts: types that were changed.
        told: what a person should know.
        codes: parameters that stay codes, which they were computed from.
        attentions: by the path of a module that attends, the scales of its codes.
    """

    located: Mapping[str, Location]
    casts: tuple[Cast, ...]
    told: tuple[str, ...]
    codes: Mapping[str, Codes] = field(default_factory=dict)
    attentions: Mapping[str, Steps] = field(default_factory=dict)


class _Files:
    """The files, each mapped once; they are those whose headers were read."""

    def __init__(self, stored: Mapping[str, Location], *, upcast: bool, unread: bool) -> None:
        self._stored, self._upcast, self._unread = stored, upcast, unread
        self._mapped: dict[Path, Tensor] = {}

    def tensor(self, name: str) -> Tensor:
        """The numbers of a stored name."""
        at = self._stored[name]
        if at.dtype is None:
            raise WeightsError(
                f"{name} of {at.file.name} is stored as {at.kind}, which torch does not have.",
                where=str(at.file),
            )
        if at.file not in self._mapped:
            self._mapped[at.file] = bytes_of(at.file)
            at.check_unchanged()
        return tensor_at(at, self._mapped[at.file])

    def found(self, name: str, coded: Coded | None, like: Tensor) -> Found:
        """The tensor of a stored name, or as ``like`` is the numbers that its codes stand for."""
        at = self._stored[name]
        return self.read(self.tensor(name), at, f"{name} of {at.file.name}", coded, like)

    def read(
        self, tensor: Tensor, at: Location | None, told: str, coded: Coded | None, like: Tensor
    ) -> Found:
        """The same of a tensor that was mapped, or made of such."""
        if coded is None:
            return Found(tensor, at, told)
        if coded.is_swapped:  # no engine reads codes in this order: they are written anew
            tensor, at = (tensor << 4) | (tensor >> 4), None
        numbers = without_numbers(coded, tensor, like) if self._unread else None
        numbers = coded.numbers(tensor, like.dtype) if numbers is None else numbers
        if self._upcast and coded.dtype == FP8:
            return Found(numbers, None, told, upcast=tensor.dtype)
        return Found(numbers, at, told, coded.of(tensor), blocks_at=coded.blocks_at)

    @cached_property
    def by_address(self) -> dict[int, tuple[Tensor, Location]]:
        """Every mapped file and a location in it, by the address where it begins."""
        some = {at.file: at for at in self._stored.values()}
        return {t.untyped_storage().data_ptr(): (t, some[f]) for f, t in self._mapped.items()}


def load_weights(
    module: nn.Module,
    stored: Mapping[str, Location],
    path: Path,
    ties: Ties | None = None,
    *,
    coded: Mapping[str, Coded] | None = None,
    allowed: Collection[str] = (),
    lazily: bool = False,
    unread: bool = False,
) -> Filled:
    """Put the tensors of ``stored`` into ``module``, in the module's own dtypes.

    Parameters without memory (:mod:`.meta`) are given it, one at a time, in the mapped file where
    their type is the stored one; others are copied into.

    Args:
        module: the model; its ``state_dict`` names what is expected.
        stored: what :func:`.checkpoint.locate` found.
        path: where, for messages.
        ties: what shared memory before the model was cast.
        coded: of ``stored``, those that are codes, see :mod:`.formats`.
        allowed: casts that the user asked for; ``float8`` is one.
        lazily: whether numbers that stay where they are remain unread; who reads them first
            has to see whether they are finite.
        unread: whether parameters that are codes get no numbers, see :mod:`.unread`.

    Raises:
        WeightsError: names, shapes or types that are not the model's, tied names that disagree,
            numbers that are not finite. Nothing is copied in all these cases but the last.
    """
    wanted = module.state_dict(keep_vars=True)
    ties = Ties.of(module) if ties is None else ties
    files = _Files(stored, upcast=FLOAT8 in allowed, unread=unread)
    found, told = _found(module, wanted, stored, files, ties, allowed, path, coded or {})
    ties.check_agreement(
        found,
        lambda n: read_numbers(found[n].tensor, found[n].codes, wanted[n].dtype),
        lambda n: found[n].told,
    )
    casted = _put(module, wanted, found, lazily=lazily)
    named = _named(module, found, ties)
    located = {name: one.at for name, one in named.items() if one.at is not None}
    scales = {of_blocks(name): one.blocks_at for name, one in named.items()}
    located |= {name: at for name, at in scales.items() if at is not None}
    codes = {name: one.codes for name, one in named.items() if one.codes is not None}
    return Filled(located, casted, told, codes)


def _put(
    module: nn.Module, wanted: Mapping[str, Any], found: Mapping[str, Found], *, lazily: bool
) -> tuple[Cast, ...]:
    """Every tensor into its place; returns the types that were changed."""
    casts: Counter[tuple[str, str]] = Counter()
    replaced: dict[nn.Parameter, Tensor] = {}
    with torch.no_grad():
        for name, one in found.items():
            own = wanted[name]
            if (kind := one.upcast or one.tensor.dtype) != own.dtype:
                casts[_name(kind), _name(own.dtype)] += 1
            value = one.tensor.to(own.dtype)
            is_there = one.at is not None and (one.codes is None or value.is_meta)
            stays = is_there and value is one.tensor and isinstance(own, nn.Parameter)
            if not (lazily and stays):
                _check_finite(name, one, value)
            if own.is_meta or value.is_meta:
                replaced.setdefault(own, value)
            else:
                own.copy_(value)
    replace(module, replaced)
    return tuple(Cast(a, b, n) for (a, b), n in sorted(casts.items()))


def _named(module: nn.Module, found: Mapping[str, Found], ties: Ties) -> dict[str, Found]:
    """What every parameter was given; of tied names, the first that is there tells it."""
    named = {}
    for name, _ in module.named_parameters(remove_duplicate=False):
        own = next((n for n in ties.same.get(name, (name,)) if n in found), None)
        if own is not None:
            named[name] = found[own]
    return named


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _found(
    module: nn.Module,
    wanted: Mapping[str, Tensor],
    stored: Mapping[str, Location],
    files: _Files,
    ties: Ties,
    allowed: Collection[str],
    path: Path,
    coded: Mapping[str, Coded],
) -> tuple[dict[str, Found], tuple[str, ...]]:
    """The model's tensors, under its names, under others, or in its authors' own."""
    matched = match(wanted, stored, ties)
    shapes = {n: shape_of(stored[o].shape, coded.get(o)) for n, o in matched.names.items()}
    if matched.fits:
        types = {name: own for name, own in matched.names.items() if own not in coded}
        check_types(types, stored, wanted, allowed)
        _check_shapes(matched, shapes, wanted, path)
        found = {
            name: files.found(own, coded.get(own), wanted[name])
            for name, own in matched.names.items()
        }
        return found, matched.told
    mapping = mapping_of(module)
    if mapping is None or 2 * len(matched.names) >= len(wanted):
        check_unmatched({n: at for n, at in stored.items() if n not in coded}, allowed)
        raise mismatched(matched, shapes, wanted, path)
    mismatch = partial(mismatched, matched, shapes, wanted, path)
    tensors, scales = _mapped(module, mapping, stored, files, allowed, mismatch, coded)
    after = by_name(wanted, tensors, ties)
    _check_shapes(
        after,
        {n: shape_of(tuple(tensors[n].shape), scales.get(n)) for n in after.names},
        wanted,
        path,
    )
    found = {
        name: _original(name, tensor, files, scales.get(name), wanted[name])
        for name, tensor in tensors.items()
    }
    return found, _told(found, len(stored) - len(inside(stored)[1]))


def _mapped(
    module: nn.Module,
    mapping: Renaming,
    stored: Mapping[str, Location],
    files: _Files,
    allowed: Collection[str],
    mismatch: Callable[[str], WeightsError],
    coded: Mapping[str, Coded],
) -> tuple[dict[str, Tensor], dict[str, Coded]]:
    """The file's tensors under the names of the diffusers class, and scales; or ``mismatch``."""
    prefix, names = inside(stored)
    here = {name: stored[name] for name in names} | _markers(stored)
    for name in names:
        if name not in coded:
            check_floating(name, here, allowed)
    tensors = {name.removeprefix(prefix): files.tensor(name) for name in names}
    try:
        found = renamed(module, mapping, tensors)
    except WeightsError as error:
        raise mismatch(error.message) from error
    scales = {name.removeprefix(prefix): one for name, one in coded.items()}
    if not scales:
        return found, {}
    codes = [name for name, tensor in found.items() if tensor.dtype in KINDS]
    return found, followed(module, mapping, tensors, scales, codes)


def _check_shapes(
    matched: Matched,
    shapes: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, Tensor],
    path: Path,
) -> None:
    if not matched.fits or any(shape != wanted[n].shape for n, shape in shapes.items()):
        raise mismatched(matched, shapes, wanted, path)


def _markers(stored: Mapping[str, Location]) -> dict[str, Location]:
    return {name: at for name, at in stored.items() if name == "scaled_fp8"}


def _original(name: str, tensor: Tensor, files: _Files, coded: Coded | None, like: Tensor) -> Found:
    at = place_of(tensor, files.by_address)
    return files.read(tensor, at, f"{name}, mapped by diffusers", coded, like)


def _told(found: Mapping[str, Found], others: int) -> tuple[str, ...]:
    made = sum(one.at is None for one in found.values())
    told = "names in the file are those of the model's authors, mapped as diffusers does; "
    told = f"{told}{len(found) - made} tensors are pieces of it, {made} were computed from it"
    return (told, unused(others)) if others else (told,)


def _check_finite(name: str, found: Found, value: Tensor) -> None:
    held = found.codes.codes if value.is_meta and found.codes is not None else value
    if is_finite(held):
        return
    if held is value and is_finite(found.tensor):
        raise WeightsError(
            f"{name} ({found.told}) holds numbers up to {found.tensor.abs().max().item():.3g}, "
            f"which {_name(value.dtype)} cannot hold.",
            hint="-p bf16 or -p fp32.",
        )
    raise not_finite(name, found.told)


def not_finite(name: str, told: str) -> WeightsError:
    """The complaint about a weight of NaN or infinity."""
    return WeightsError(
        f"{name} ({told}) holds NaN or infinity.",
        hint="the checkpoint is broken, or was saved in a type too small for it; name another one.",
    )


def check_finite(module: nn.Module) -> None:
    """The same for numbers that the model file itself has given its parameters.

    Raises:
        WeightsError: one is not finite.
    """
    for name, parameter in module.named_parameters():
        if not parameter.is_meta and not is_finite(parameter.detach()):
            raise not_finite(name, f"as build_model() returned it, in {_name(parameter.dtype)}")
