"""The lines of a plan as hooks of forward: every tensor that one names becomes ``cp::mark``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import CannotShard
from ..ir import ops
from ..ir.signature import Applied, Cut
from ..words import near


@contextmanager
def planned(module: nn.Module, cuts: Iterable[Cut], applied: list[Applied]) -> Iterator[None]:
    """Put every cut in place as a forward hook, and take them away again.

    Args:
        module: the model.
        cuts: lines of its plan.
        applied: what became of each is added here, while forward runs.

    Raises:
        CannotShard: the forward of a module has no such argument; within, a line does not fit the
            tensor that it meets.
    """
    by_module: dict[str, list[Cut]] = {}
    for cut in cuts:
        by_module.setdefault(cut.module, []).append(cut)
    handles = []
    for name, own in by_module.items():
        target = module.get_submodule(name)
        before = [cut for cut in own if not cut.on_output]
        after = [cut for cut in own if cut.on_output]
        if before:
            _check_arguments(target, before)
            hook = _input_hook(before, applied)
            handles.append(target.register_forward_pre_hook(hook, with_kwargs=True))
        if after:
            handles.append(target.register_forward_hook(_output_hook(after, applied)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_arguments(module: nn.Module, cuts: Iterable[Cut]) -> None:
    """Whether the forward of a module has the arguments that the plan splits."""
    parameters = inspect.signature(module.forward).parameters
    if any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        return
    for cut in cuts:
        if cut.argument not in parameters:
            raise CannotShard(
                f"the plan splits {cut.tensor} of {cut.module or 'the model'}, and "
                f"{type(module).__name__}.forward has no such argument.",
                where=cut.line,
                hint=near(str(cut.argument), parameters),
            )


def _input_hook(cuts: list[Cut], applied: list[Applied]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        for cut in cuts:
            name = str(cut.argument)
            holder = bound.arguments if name in bound.arguments else _caught(bound)
            value = holder.get(name)
            is_member = cut.element is not None and value is not None
            value = (_with_member if is_member else _cut)(value, cut, applied)
            if name in holder:
                holder[name] = value
        return bound.args, bound.kwargs

    return hook


def _caught(bound: inspect.BoundArguments) -> dict[str, Any]:
    """What ``**kwargs`` caught."""
    for name, one in bound.signature.parameters.items():
        if one.kind is one.VAR_KEYWORD:
            return bound.arguments.get(name, {})  # type: ignore[no-any-return]
    return {}


def _output_hook(cuts: list[Cut], applied: list[Applied]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        for cut in cuts:
            if isinstance(output, Tensor) and cut.argument == 0:
                output = _cut(output, cut, applied)
            else:
                output = _with_member(output, cut, applied)
        return output

    return hook


def _with_member(value: Any, cut: Cut, applied: list[Applied]) -> Any:
    """A container, of whatever class, with one of its members cut."""
    index = cut.element if cut.element is not None else int(cut.argument)
    members, spec = pytree.tree_flatten(value, is_leaf=lambda one: one is not value)
    if isinstance(value, Tensor) or index >= len(members):
        count = 1 if isinstance(value, Tensor) else len(members)
        raise CannotShard(
            f"the plan {cut.kind}s {cut.tensor} of {cut.module or 'the model'}, which has "
            f"{count} tensor{'' if count == 1 else 's'}.",
            where=cut.line,
            hint="indices count from 0.",
        )
    members[index] = _cut(members[index], cut, applied)
    return pytree.tree_unflatten(members, spec)


def _cut(value: Any, cut: Cut, applied: list[Applied]) -> Any:
    reason = None
    if not isinstance(value, Tensor):
        reason = "not passed" if value is None else f"a {type(value).__name__}, no tensor"
    elif cut.expected_dims is not None and value.dim() != cut.expected_dims:
        reason = f"has {value.dim()} dimensions, the plan expects {cut.expected_dims}"
    if reason is not None:
        applied.append(Applied(cut, None, reason))
        return value
    if not -value.dim() <= cut.dim < value.dim():
        raise CannotShard(
            f"the plan {cut.kind}s {cut.tensor} of {cut.module or 'the model'} along dimension "
            f"{cut.dim}, and it has the shape {list(value.shape)}.",
            where=cut.line,
        )
    applied.append(Applied(cut, value.shape[cut.dim], None))
    return ops.mark(value, cut.kind, cut.dim)
