"""What forward returns, as a tree that a bundle can keep: containers, and tensors by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch.utils import _pytree as pytree

from ..ir.signature import Returned


class _Leaf:
    """Stands for a tensor or a constant, wherever in a tree it is held."""

    def __init__(self, node: Returned) -> None:
        self.node = node


def returned(spec: pytree.TreeSpec, names: Mapping[int, str]) -> Returned:
    """The tree of ``spec``.

    Args:
        spec: of what forward returned.
        names: of its tensors, by leaf; the other leaves are constants.
    """
    leaves = [
        _Leaf(Returned("tensor", names[leaf]) if leaf in names else Returned("none"))
        for leaf in range(spec.num_leaves)
    ]
    return _tree(pytree.tree_unflatten(leaves, spec))


def _tree(value: Any) -> Returned:
    if isinstance(value, _Leaf):
        return value.node
    if value is None:
        return Returned("none")
    kind, name = "fields", type(value).__name__
    if is_dataclass(value):  # before mappings: diffusers' outputs are both
        items = {one.name: getattr(value, one.name, None) for one in fields(value)}
    elif isinstance(value, Mapping):
        kind, items = "mapping", dict(value)
    elif isinstance(value, tuple | list):
        names = getattr(value, "_fields", None)
        if names is None:
            return Returned(_kind(value), items=_trees(value))
        items = dict(zip(names, value, strict=True))
    else:
        items = dict(getattr(value, "__dict__", {}))
    keys = tuple(map(str, items))
    return Returned(kind, name if kind == "fields" else None, keys, _trees(items.values()))


def _kind(value: tuple[Any, ...] | list[Any]) -> str:
    return "tuple" if isinstance(value, tuple) else "list"


def _trees(values: Iterable[Any]) -> tuple[Returned, ...]:
    return tuple(_tree(one) for one in values)
