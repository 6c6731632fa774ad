"""Objects that hold tensors, among forward's arguments and in what it returns.

``torch.export`` takes containers apart that pytree knows: lists, tuples, dicts. Dataclasses and
other plain objects become known as they are met; what they hold besides tensors stays as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import CannotTrace

PLAIN: Final = (
    *(type(None), bool, int, float, complex, str),
    *(torch.dtype, torch.device, torch.memory_format, torch.layout),
)
"""What becomes part of a program as it stands."""
_HOOK: Final = -1


def make_known(value: Any) -> Iterator[tuple[str, Any]]:
    """Let pytree know every object in ``value`` that holds tensors.

    Args:
        value: anything; tensors, numbers and words are left alone.

    Returns:
        what it can take apart neither before nor after: where it stands, and the object.
    """
    yield from _walk(value, "", set())


def _walk(value: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (Tensor, *PLAIN)) or id(value) in seen:
        return
    seen.add(id(value))
    kind = pytree._get_node_type(value)
    if kind not in pytree.SUPPORTED_NODES:
        if not _holds_tensor(value, set()):
            yield path, value
            return
        _register(kind)
    for name, child in _members(value).items():
        yield from _walk(child, f"{path}.{name}" if path else str(name), seen)


def _members(value: Any) -> Mapping[Any, Any]:
    """What an object, or a container, holds, by name."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    if isinstance(value, (type, nn.Module)) or callable(value):
        return {}
    if is_dataclass(value):
        return {f.name: getattr(value, f.name) for f in fields(value) if hasattr(value, f.name)}
    return dict(getattr(value, "__dict__", ()))


def _holds_tensor(value: Any, seen: set[int]) -> bool:
    if isinstance(value, Tensor):
        return True
    if isinstance(value, PLAIN) or id(value) in seen:
        return False
    seen.add(id(value))
    return any(_holds_tensor(child, seen) for child in _members(value).values())


class _Rest(dict[Any, Any]):
    """What an object holds besides tensors: equal to all others, since no program depends on it."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Rest)


def _register(kind: type) -> None:
    pytree.register_pytree_node(
        kind,
        _apart,
        partial(_together, kind),
        flatten_with_keys_fn=_apart_with_keys,
    )


def _apart(value: Any) -> tuple[list[Any], Any]:
    members = _members(value)
    held = {name: child for name, child in members.items() if _holds_tensor(child, set())}
    rest = _Rest((name, child) for name, child in members.items() if name not in held)
    return list(held.values()), (tuple(held), rest)


def _apart_with_keys(value: Any) -> tuple[list[tuple[Any, Any]], Any]:
    children, context = _apart(value)
    keys: Collection[Any] = [pytree.GetAttrKey(str(name)) for name in context[0]]
    return list(zip(keys, children, strict=True)), context


def _together(kind: type, children: Any, context: Any) -> Any:
    """An object with these members; ``__init__`` is not run again, nor is it frozen yet."""
    names, rest = context
    members = {**rest, **dict(zip(names, children, strict=True))}
    made: Any = object.__new__(kind) if not issubclass(kind, dict) else kind()
    if isinstance(made, dict):
        made.update(members)
    else:
        for name, child in members.items():
            object.__setattr__(made, name, child)
    return made


def watch_outputs(module: nn.Module) -> None:
    """Let all that ``module`` returns be known, each time it is called."""
    handle = module.register_forward_hook(_known_output)
    # Under a key that does not count how many hooks this process has seen: the cache's key of a
    # model holds it.
    module._forward_hooks[_HOOK] = module._forward_hooks.pop(handle.id)


def _known_output(module: nn.Module, args: Any, output: Any) -> None:
    """A hook of forward.

    Raises:
        CannotTrace: it returns something that tensors cannot be taken out of, or no tensor.
    """
    for path, value in make_known(output):
        raise CannotTrace(
            f"{type(module).__name__}.forward returns {_named(value)}"
            + (f" as {path}" if path else "")
            + ", which tensors cannot be taken out of.",
            hint="return tensors, in tuples, lists, dicts or dataclasses; build_model() may wrap "
            "the model in a torch.nn.Module whose forward does.",
        )
    if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(output)):
        raise CannotTrace(
            f"{type(module).__name__}.forward returns {_named(output)}, and no tensor.",
            hint="an engine's outputs are tensors; does forward lack a return?",
        )


def _named(value: Any) -> str:
    kind = type(value).__qualname__
    return "None" if value is None else f"{'an' if kind[0] in 'AEIOUaeiou' else 'a'} {kind}"
