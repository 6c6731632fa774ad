"""Which variant of a bundle a call's arguments are for, on all ranks the same."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..bundle.manifest import Frozen, Manifest, Weight, of_rank
from ..bundle.sizes import AllSizes
from ..bundle.variants import all_variants, variant_of
from ..errors import ConvertError, RunFailed, UsageError
from ..ir.frozen_value import leaves
from .arguments import flattened, inputs_of
from .frozen import check_frozen
from .groups import everyone

Name = str | None


class Choice:
    """The variants that a rank has open.

    Args:
        manifest: of the bundle.
        only: the name of the one that is open; ``None``: all are.
        communicator: of all ranks, see :func:`.executors.open_rank`.

    Attributes:
        manifests: of each variant alone, by name.

    Raises:
        UsageError: there is no variant ``only``.
    """

    def __init__(self, manifest: Manifest, only: Name = None, communicator: Any = None) -> None:
        self.manifests = views_of(manifest, only)
        self._communicator = communicator

    def picked(self, arguments: Mapping[str, Any]) -> tuple[Name, dict[str, Tensor]]:
        """The variant that these arguments are for, and its inputs by name.

        Collective where several are open: ranks say what they are given, so that none begins what
        others do not.

        Raises:
            UsageError: no variant has these inputs; the nearest is named.
            RunFailed: other ranks are given another variant's inputs, or wrong ones.
        """
        if len(self.manifests) == 1:
            ((name, manifest),) = self.manifests.items()
            return name, flattened(manifest, arguments)
        refusal: ConvertError | None = None
        name, given = None, dict[str, Tensor]()
        try:
            name = fitting(self.manifests, arguments)
            given = flattened(self.manifests[name], arguments)
        except ConvertError as error:
            refusal = error
        check_same(everyone((name, refusal and refusal.message), self._communicator), refusal)
        return name, given


def views_of(manifest: Manifest, only: Name = None) -> Mapping[Name, Manifest]:
    """The manifest of every variant, or of every size of a range, by name.

    Args:
        manifest: of the bundle.
        only: the name of the one that is wanted; ``None``: all are.

    Raises:
        UsageError: there is no variant ``only``.
    """
    if only is not None:
        return {only: variant_of(manifest, only)}
    if manifest.dynamic is not None:
        return AllSizes(manifest)
    return {one.request.variant: one for one in all_variants(manifest)}


def weights_of(
    manifests: Mapping[Name, Manifest], rank: int, *, programs: bool
) -> tuple[dict[str, Weight], dict[Name, list[Weight]]]:
    """What a rank reads in all variants, by name, and what one has otherwise, variant by variant.

    Parameters are the same in all; what was computed from them (``constants.*``) may not be.

    Args:
        manifests: of each variant alone.
        rank: which reads it.
        programs: whether weights that only the stored programs read are among them.
    """
    if isinstance(manifests, AllSizes):
        manifests = {None: manifests.manifest}
    shared: dict[str, Weight] = {}
    own: dict[Name, list[Weight]] = {}
    for name, one in manifests.items():
        beside = one.program.weights if programs and one.program is not None else []
        for weight in of_rank((*one.weights, *beside), rank):
            if shared.setdefault(weight.name, weight) != weight:
                own.setdefault(name, []).append(weight)
    return shared, own


def check_same(
    ranks: Sequence[tuple[Name, str | None]],
    refusal: ConvertError | None,
    words: str = "was given inputs of the variant {}, and rank 0 of {}",
) -> None:
    """All ranks run one variant, or none runs any.

    Args:
        ranks: what each picked, or why it could not.
        refusal: this rank's own.
        words: what another rank than 0 does, and rank 0.

    Raises:
        ConvertError: the refusal.
        RunFailed: a rank picked another variant than rank 0, or none.
    """
    if refusal is not None:
        raise refusal
    for rank, (name, problem) in enumerate(ranks):
        if problem is not None:
            raise RunFailed(f"rank {rank} cannot run what it is asked for: {problem}")
        if name != ranks[0][0]:
            raise RunFailed(
                f"rank {rank} {words.format(name, ranks[0][0])}.",
                hint="all ranks are called alike, with the same inputs.",
            )


def fitting(
    manifests: Mapping[Name, Manifest], arguments: Mapping[str, Any], *, has_defaults: bool = False
) -> Name:
    """The variant with the inputs that these arguments are, by their shapes.

    Where several have these shapes it is the one with these values among those that are part of
    the engines. What the model takes and in which types, and other values, is the same in all
    variants: that is looked at when one is found.

    Args:
        manifests: of each variant alone, by name.
        arguments: of the call.
        has_defaults: what is left out is a default, which is looked at later; else nobody knows
            what it would be.

    Raises:
        UsageError: there is none, and the nearest is named, with the dimensions that differ; or
            what tells several apart was left out.
    """
    values = {name: dict(leaves(whole, name)) for name, whole in arguments.items()}
    if isinstance(manifests, AllSizes):
        return manifests.fitting(_shapes(values))
    misfits = {name: _misfits(one, values) for name, one in manifests.items()}
    fit = [name for name, found in misfits.items() if not found]
    if len(fit) > 1:
        fit = [name for name in fit if _has_values(manifests[name], values)] or fit[:1]
    if len(fit) > 1 and not has_defaults:
        _check_told_apart({name: manifests[name] for name in fit}, values)
    if fit:
        return fit[0]
    nearest = min(misfits, key=lambda name: sum(one.distance for one in misfits[name]))
    raise UsageError(
        f"no variant of the bundle has these inputs; the nearest is {nearest}, and "
        f"{'; '.join(one.text for one in misfits[nearest])}.",
        hint=f"the bundle has {', '.join(map(str, manifests))}. An engine's shapes are fixed: run "
        "at one of these sizes, or convert again with one variant more.",
    )


def _check_told_apart(manifests: Mapping[Name, Manifest], values: Values) -> None:
    """Refuse a choice among variants that differ in what was not given."""
    inside = [{(f.name, f.value, f.sha256) for f in one.frozen} for one in manifests.values()]
    every = [one for held in inside for one in held]
    odd = {one for one in every if not all(one in held for held in inside)}
    lacking = sorted({name.partition(".")[0] for name, *_ in odd} - values.keys())
    if lacking:
        raise UsageError(
            f"the variants {' and '.join(map(str, manifests))} have these inputs; they differ in "
            f"{', '.join(lacking)}, which was left out.",
            hint="give it; or name the variant, by --variant or variant=.",
        )


Values = Mapping[str, Mapping[str, Any]]
"""Of every argument what it holds, by path."""


class Misfit(NamedTuple):
    """A dimension that is not a variant's: how far away that is, and in words."""

    distance: float
    text: str


def _shapes(values: Values) -> dict[str, list[int]]:
    return {
        path: list(value.shape)
        for argument in values.values()
        for path, value in argument.items()
        if isinstance(value, Tensor)
    }


def _misfits(manifest: Manifest, values: Values) -> list[Misfit]:
    wanted = inputs_of(manifest)
    return [
        misfit
        for argument in values.values()
        for path, value in argument.items()
        if isinstance(value, Tensor) and path in wanted
        for misfit in _other_dimensions(path, list(value.shape), wanted[path].shape)
    ]


def _has_values(manifest: Manifest, values: Values) -> bool:
    """Whether the arguments that are part of the engines are those of this variant."""
    wanted = inputs_of(manifest)
    frozen: dict[str, list[Frozen]] = {}
    for one in manifest.frozen:
        frozen.setdefault(one.name.partition(".")[0], []).append(one)
    try:
        for name in frozen.keys() & values.keys():
            rest = [value for path, value in values[name].items() if path not in wanted]
            check_frozen(name, rest[0] if len(rest) == 1 else rest, frozen[name])
    except UsageError:
        return False
    return True


def _other_dimensions(name: str, shape: Sequence[int], wanted: Sequence[int]) -> Iterator[Misfit]:
    if len(shape) != len(wanted):
        yield Misfit(math.inf, f"{name} has the shape {list(wanted)} there, here {list(shape)}")
        return
    for number, (own, right) in enumerate(zip(shape, wanted, strict=True)):
        if own != right:
            away = abs(math.log((own + 1) / (right + 1)))
            yield Misfit(away, f"dimension {number} of {name} is {right} there, {own} here")
