"""Where a model's sequence is split and gathered: the vocabulary of a ``cp_plan``.

The words are those of diffusers' ``_cp_plan`` (documentation: *Distributed inference, context
parallelism*), so a plan written for diffusers is understood here and the other way round; a
model file without diffusers imports them from ``cp_convert``::

    cp_plan = {
        "blocks.0": {"x": ContextParallelInput(split_dim=1, expected_dims=3)},
        "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }

A key names a module (``""`` the model itself, ``*`` every member of a ``ModuleList``). A dict
value splits: a string key names an argument of that module's ``forward``, an integer key (with
``split_output=True``) the index of one of its outputs. Any other value gathers outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ..errors import CannotShard
from ..ir.signature import Cut
from ..words import near

_SHOWN: Final = 400
"""Module names that a misspelt one is compared with."""


@dataclass(frozen=True)
class ContextParallelInput:
    """Split a tensor along ``split_dim``, every rank keeping its own equal part.

    Attributes:
        split_dim: the tensor dimension that holds the sequence.
        expected_dims: split only tensors of this many dimensions; others are left whole.
        split_output: split what the module returns instead of what it is given.
    """

    split_dim: int
    expected_dims: int | None = None
    split_output: bool = False


@dataclass(frozen=True)
class ContextParallelOutput:
    """Gather a module's output along ``gather_dim``, in rank order.

    Attributes:
        gather_dim: the tensor dimension that holds the sequence.
        expected_dims: the number of dimensions the output must have.
    """

    gather_dim: int
    expected_dims: int | None = None


def normalise(plan: Mapping[str, Any], module_names: Sequence[str]) -> tuple[Cut, ...]:
    """Flatten ``plan`` to cuts, wildcards resolved against ``module_names``.

    A class's plan may number the blocks of its largest model; lines for blocks that a shallower
    one lacks are left out.

    Raises:
        CannotShard: a module that does not exist, or a value that is no plan.
    """
    cuts = [
        cut
        for pattern, value in plan.items()
        for module in modules_of(pattern, module_names)
        for cut in _cuts(module, value, f"cp_plan[{pattern!r}]")
    ]
    _check_once(cuts)
    return tuple(cuts)


def _check_once(cuts: Sequence[Cut]) -> None:
    """No tensor is cut by two lines."""
    seen: dict[tuple[object, ...], Cut] = {}
    for cut in cuts:
        first = seen.setdefault(
            (cut.module, cut.on_output, cut.argument, cut.element, cut.kind), cut
        )
        if first is not cut:
            raise CannotShard(
                f"the plan {cut.kind}s {cut.tensor} of {cut.module or 'the model'} twice: by "
                f"{first.line} and by {cut.line}.",
                where=cut.line,
                hint="leave one of them out.",
            )


def modules_of(pattern: Any, module_names: Sequence[str], plan: str = "cp_plan") -> list[str]:
    """The modules that a key of ``plan`` names.

    Raises:
        CannotShard: there is none, and none in a deeper model of the class.
    """
    if not isinstance(pattern, str):
        raise CannotShard(f"the plan has the key {pattern!r}, which is no module name.", where=plan)
    wanted = pattern.split(".")
    found = [n for n in module_names if _matches(n.split("."), wanted)]
    if not found and not _is_deeper(wanted, module_names):
        raise CannotShard(
            f"the plan names a module {pattern!r} that the model does not have.",
            where=f"{plan}[{pattern!r}]",
            hint=f"{near(pattern, [n for n in module_names if n][:_SHOWN])} '*' stands for one "
            "index.",
        )
    return found


def _is_deeper(wanted: Sequence[str], module_names: Sequence[str]) -> bool:
    """Whether the line is for a block that this model, a shallower one of its class, lacks."""
    for i, part in enumerate(wanted):
        container = ".".join(wanted[:i])
        if part.isdigit() and f"{container}.0" in module_names:
            return ".".join(wanted[: i + 1]) not in module_names
    return False


def _matches(name: list[str], wanted: list[str]) -> bool:
    return len(name) == len(wanted) and all(
        w == n or (w == "*" and n.isdigit()) for n, w in zip(name, wanted, strict=True)
    )


def _cuts(module: str, value: Any, line: str) -> Iterator[Cut]:
    if not isinstance(value, Mapping):
        several = isinstance(value, list | tuple)
        for index, output in enumerate(value if several else [value]):
            if output is not None:
                at = f"{line}[{index}]" if several else line
                dim, dims = _dims(output, "gather_dim", at)
                yield Cut("gather", module, True, index, None, dim, dims, at)
        return
    for key, split in value.items():
        several = isinstance(split, list | tuple)
        for index, one in enumerate(split if several else [split]):
            at = f"{line}[{key!r}]" + (f"[{index}]" if several else "")
            dim, dims = _dims(one, "split_dim", at)
            _check_key(key, one, at)
            element = index if several else None
            yield Cut("split", module, bool(one.split_output), key, element, dim, dims, at)


def _check_key(key: Any, split: Any, line: str) -> None:
    if isinstance(key, int) and not split.split_output:
        raise CannotShard(
            f"the plan's key {key} is an output's index, so it needs split_output=True.",
            where=line,
            hint="a word is the name of an argument of the module's forward.",
        )
    if isinstance(key, str) and split.split_output:
        raise CannotShard(
            f"the plan splits an output, and calls it {key!r}.",
            where=line,
            hint="with split_output=True the key is the output's index, such as 0.",
        )
    if not isinstance(key, int | str):
        raise CannotShard(f"the plan's key {key!r} is neither argument nor index.", where=line)


def _dims(value: Any, name: str, line: str) -> tuple[int, int | None]:
    """The dimension that a line of the plan cuts along, and how many it expects.

    Raises:
        CannotShard: it is none, or the dimension does not exist.
    """
    found = getattr(value, name, None)
    if not isinstance(found, int) or isinstance(found, bool):
        raise CannotShard(
            f"the plan says {value!r}, which has no integer {name}.",
            where=line,
            hint="use ContextParallelInput to split and ContextParallelOutput to gather, of "
            "cp_convert or diffusers.",
        )
    dims = value.expected_dims
    if dims is not None and not -dims <= found < dims:
        raise CannotShard(
            f"the plan's {name} {found} does not exist in a tensor of {dims} dimensions.",
            where=line,
            hint=f"dimensions count from 0 to {dims - 1}, or from -1 down.",
        )
    return found, dims
