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
from typing import Any

from ..errors import CannotShard
from ..ir.signature import Cut


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
    return tuple(
        cut
        for pattern, value in plan.items()
        for module in _resolve(pattern, module_names)
        for cut in _cuts(module, value)
    )


def _resolve(pattern: str, module_names: Sequence[str]) -> list[str]:
    wanted = pattern.split(".")
    found = [n for n in module_names if _matches(n.split("."), wanted)]
    if not found and not _is_deeper(wanted, module_names):
        raise CannotShard(
            f"the plan names a module {pattern!r} that the model does not have.",
            hint="module names are those of model.named_modules(); '*' stands for one index.",
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


def _cuts(module: str, value: Any) -> Iterator[Cut]:
    if not isinstance(value, Mapping):
        outputs = value if isinstance(value, list | tuple) else [value]
        for index, output in enumerate(outputs):
            if output is not None:
                dim = _attribute(output, "gather_dim", module)
                yield Cut("gather", module, True, index, None, dim, output.expected_dims)
        return
    for key, split in value.items():
        elements = list(enumerate(split)) if isinstance(split, list | tuple) else [(None, split)]
        for element, one in elements:
            dim = _attribute(one, "split_dim", module)
            if isinstance(key, int) and not one.split_output:
                raise CannotShard(
                    f"the plan's key {key} of module {module!r} is an output's index, "
                    "so it needs split_output=True."
                )
            yield Cut("split", module, one.split_output, key, element, dim, one.expected_dims)


def _attribute(value: Any, name: str, module: str) -> int:
    found = getattr(value, name, None)
    if not isinstance(found, int):
        raise CannotShard(
            f"the plan's entry for module {module!r} is {value!r}, which has no integer {name}.",
            hint="use ContextParallelInput and ContextParallelOutput of cp_convert or diffusers.",
        )
    return found
