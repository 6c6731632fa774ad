"""What a user named that can be looked at before anything is measured or traced.

In: a loaded model and its job. Out: nothing, or the complaint that would else come minutes later.
What a program alone can tell (that a path is of no linear layer, that a residual is open behind a
module) is still told when there is one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import Tensor
from torch.utils import _pytree as pytree

from .capture.trace import names_of
from .errors import UsageError
from .ir.lift import Range
from .ir.padded import check_ranks, slots_of
from .ir.signature import Cut
from .ir.source import Source
from .job import Job
from .mesh import SEQUENCE
from .model.plan import normalise
from .prove.calibrate import sets_of
from .words import near


def check_named(job: Job, source: Source) -> None:
    """Refuse arguments, modules and inputs that the model has not.

    Args:
        job: what was asked for.
        source: the model.

    Raises:
        UsageError: an argument to freeze that ``example_inputs()`` does not give; a module to cut
            after, or a pattern of such to keep, that the model has not; or files of inputs that do
            not fit the example's.
        CannotShard: a plan that names a module that there is not.
        CannotLift: a size at which a rank would hold nothing of an input that the plan splits.
    """
    for name in source.freeze:
        if name not in source.inputs:
            raise UsageError(
                f"cannot freeze {name}: example_inputs() gives no such argument.",
                hint=near(name, source.inputs),
            )
    paths = list(_paths(source))
    for pattern in job.keep:
        if not any(fnmatchcase(path, pattern) for path in paths):
            raise UsageError(
                f"--keep {pattern}: {type(source.module).__name__} has no module of such a path.",
                hint=near(pattern, paths),
            )
    for module in job.split_after:
        if module not in paths:
            raise UsageError(
                f"--split-after {module}: {type(source.module).__name__} has no module of this "
                "path.",
                hint=near(module, paths),
            )
    if job.calibration:
        for _ in sets_of(_flat(source), job.calibration):
            pass  # each is read and looked through on the way
    cuts = normalise(source.plan, [name for name, _ in source.module.named_modules()])
    if job.dynamic is not None:
        _check_tokens(job, source, cuts)


def _check_tokens(job: Job, source: Source, cuts: Sequence[Cut]) -> None:
    span, ranks = job.dynamic, job.mesh.size(SEQUENCE)
    assert span is not None
    sizes = {one.variant.size or 0: one.inputs for one in (source, *source.others)}
    for cut in (one for one in cuts if not one.module and one.kind == "split"):
        found = {n: _length(inputs, cut) for n, inputs in sizes.items()}
        lengths = {n: length for n, length in found.items() if length is not None}
        if len(set(lengths.values())) < 2 or len(lengths) < len(sizes):
            continue
        slots = slots_of(lengths, job.multiple, job.unit)
        if all(slots.length(n) == length for n, length in lengths.items()):
            check_ranks(Range(span.name, span.first, span.last, span.step, (slots,)), ranks)


def _length(inputs: Mapping[str, object], cut: Cut) -> int | None:
    """Tokens of what a line of the plan splits; ``None`` where that is not to be seen here."""
    value = inputs.get(str(cut.argument))
    if not isinstance(value, Tensor) or cut.element is not None or cut.on_output:
        return None
    is_meant = cut.expected_dims in (None, value.dim()) and -value.dim() <= cut.dim < value.dim()
    return value.shape[cut.dim] if is_meant else None


def _paths(source: Source) -> Iterator[str]:
    """Of all modules, under all their names; a program calls the model itself so, too."""
    for path, _ in source.module.named_modules(remove_duplicate=False):
        yield path or "model"


def _flat(source: Source) -> dict[str, Tensor]:
    """The example's tensors by the names that a program gives them."""
    given = {name: one for name, one in source.inputs.items() if name not in source.freeze}
    leaves, spec = pytree.tree_flatten(given)
    named = zip(names_of(spec), leaves, strict=True)
    return {name: leaf for name, leaf in named if isinstance(leaf, Tensor)}
