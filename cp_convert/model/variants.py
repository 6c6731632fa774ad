"""Several shapes of one model: what a model file names, and a source for each."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import CannotTrace, ModelFileError, UsageError
from ..ir.frozen_value import digest_of
from ..ir.source import Example, Source
from ..job import VARIANT_NAME, Job, Variant
from ..words import near

_HINT: Final = (
    'variants = {"square": {}, "wide": {"width": 1360}}: what example_inputs() is called with for '
    "each; up to 100 letters, digits and _.- make a name."
)


Told = list[tuple[Variant, Mapping[str, Any]]]
"""Variants, each with what ``example_inputs()`` is called with."""


def told_variants(python: ModuleType, path: Path, wanted: Collection[str]) -> Told:
    """The variants of a model file, each with what ``example_inputs()`` is called with.

    Args:
        python: the file, imported.
        path: where it is.
        wanted: names of those that were asked for; none: all.

    Raises:
        ModelFileError: ``variants`` is no dict of such.
        UsageError: one that was asked for is not there.
    """
    told = getattr(python, "variants", None)
    if told is None:
        if wanted:
            raise UsageError(f"--variant {next(iter(wanted))}: {path} has no variants.", hint=_HINT)
        return [(Variant(), {})]
    known = _checked(told, path)
    for name in wanted:
        if name not in known:
            raise UsageError(f"--variant {name}: {path} has none.", hint=near(name, list(known)))
    return [(Variant(name), known[name]) for name in wanted or known]


def sized(python: ModuleType, path: Path, sizes: Sequence[Variant], name: str) -> Told:
    """A range's sizes, each with what ``example_inputs()`` is called with.

    Args:
        python: the file, imported.
        path: where it is.
        sizes: of the range.
        name: of the argument that is the size.

    Raises:
        UsageError: ``example_inputs()`` has no such argument.
    """
    function = getattr(python, "example_inputs", None)
    known = inspect.signature(function).parameters if callable(function) else {}
    kinds = [one.kind for one in known.values()]
    if known and name not in known and inspect.Parameter.VAR_KEYWORD not in kinds:
        raise UsageError(
            f"--dynamic {name}: example_inputs() of {path} has no such argument.",
            hint=near(name, list(known)),
        )
    return [(one, {name: one.size}) for one in sizes]


def _checked(told: Any, path: Path) -> dict[str, Mapping[str, Any]]:
    is_dict = isinstance(told, Mapping) and told
    if not is_dict or not all(isinstance(one, Mapping) for one in told.values()):
        raise ModelFileError(
            f"variants is {told!r}, not a dict of dicts by name.", where=str(path), hint=_HINT
        )
    for name in told:
        if not isinstance(name, str) or not VARIANT_NAME.fullmatch(name):
            raise ModelFileError(f"variants: {name!r} is no name.", where=str(path), hint=_HINT)
        if odd := [key for key in told[name] if not isinstance(key, str)]:
            raise ModelFileError(
                f"variants: {name!r} has {odd[0]!r} where an argument of example_inputs() should "
                "be named.",
                where=str(path),
                hint=_HINT,
            )
    lower = [name.lower() for name in told]
    for name in told:
        if lower.count(name.lower()) > 1:
            raise ModelFileError(
                f"variants: {name!r} is there twice, but for capitals, which not every file "
                "system tells apart.",
                where=str(path),
            )
    return dict(told)


def check_apart(examples: Sequence[Example], freeze: Collection[str], where: Path) -> None:
    """Refuse variants that no caller's arguments could tell apart, or that take other arguments.

    Raises:
        UsageError: two are of equal shapes and frozen values, or name different arguments.
    """
    seen: dict[Any, Example] = {}
    first = examples[0]
    for one in examples:
        if set(one.inputs) != set(first.inputs):
            odd = sorted(set(one.inputs) ^ set(first.inputs))
            raise UsageError(
                f"{where}: the variants {first.variant.name} and {one.variant.name} do not take "
                f"the same arguments: only one has {', '.join(odd)}.",
                hint="variants differ in sizes; give every argument in all of them.",
            )
        twin = seen.setdefault(_told(one.inputs, freeze), one)
        if twin is not one:
            raise UsageError(
                f"{where}: the variants {twin.variant.name} and {one.variant.name} have inputs of "
                "equal shapes, so one engine serves both.",
                hint=f"leave one of the two out: inputs of {one.variant.name} are then run by "
                f"{twin.variant.name}.",
            )


def _told(inputs: Mapping[str, Any], freeze: Collection[str]) -> tuple[Any, ...]:
    """All of the inputs that decides a program."""
    found: list[Any] = []
    for name in sorted(inputs):
        if name in freeze:
            found.append((name, digest_of(inputs[name]) or repr(inputs[name])))
            continue
        for path, leaf in pytree.tree_flatten_with_path(inputs[name])[0]:
            is_tensor = isinstance(leaf, Tensor)
            what = (leaf.dtype, tuple(leaf.shape)) if is_tensor else (type(leaf), repr(leaf))
            found.append((name, str(path), what))
    return tuple(found)


def with_variants(source: Source, examples: Sequence[Example]) -> Source:
    """The source, which has the first example's inputs, with those of the others.

    Models keep tables from call to call, and those of a trace belong to that trace: every further
    variant has a copy of the module, with the same parameters and buffers.

    Raises:
        CannotTrace: the module cannot be copied.
    """
    first, *rest = examples
    others = tuple(
        replace(
            source,
            inputs=one.inputs,
            variant=one.variant,
            module=_copied(source.module),
            peers=tuple(map(_copied, source.peers)),
        )
        for one in rest
    )
    return replace(source, variant=first.variant, others=others)


def _copied(module: nn.Module) -> nn.Module:
    held = {id(one): one for one in (*module.parameters(), *module.buffers())}
    try:
        return copy.deepcopy(module, held)
    # The user's own classes may refuse to be copied with anything.
    except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError) as error:
        raise CannotTrace(
            f"{type(module).__name__} cannot be copied ({type(error).__name__}: {error}), and "
            "every variant is traced from a copy of its own.",
            hint="convert one variant a bundle (--variant NAME), or let the class have a "
            "__deepcopy__.",
        ) from error


def check_alone(examples: Sequence[Example], job: Job, *, coded: bool) -> None:
    """Refuse several variants beside what was never proven with them.

    Args:
        examples: of the job's model.
        job: what was asked for.
        coded: whether the checkpoint is quantized.

    Raises:
        UsageError: there are several, and other axes than the sequence's, or layers in 8 bits.
    """
    if len(examples) == 1:
        return
    many = f"{len(examples)} variants" if job.dynamic is None else f"--dynamic {job.dynamic.words}"
    beside = f"--mesh {job.mesh.words}" if job.mesh.others else ""
    beside = beside or ("layers in 8 bits" if coded or job.quantize is not None else "")
    if beside:
        raise UsageError(
            f"{many} and {beside}: a bundle has one of the two.",
            hint="a bundle for each shape, or several shapes without.",
        )
