"""Operators added to a graph, with the values that tell their shapes; equal calls are known."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode

from .program import PROVENANCE, fake_mode_of


class Writer:
    """Adds operators to a graph, each with its fake value.

    Attributes:
        graph: what is added to, at its insertion point.
        origin: the node whose provenance (module and source line) the new ones carry.
    """

    def __init__(self, graph: fx.Graph, mode: FakeTensorMode | None = None) -> None:
        self.graph = graph
        self.mode = fake_mode_of(graph) if mode is None else mode
        self.origin: fx.Node | None = None
        self._known: dict[str, Any] = {}

    def op(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call of ``target``."""
        node: fx.Node = self.graph.call_function(target, args, kwargs)
        if self.origin is not None:
            node.meta = {k: self.origin.meta[k] for k in PROVENANCE if k in self.origin.meta}
        node.meta["val"] = self.value(node)
        return node

    def value(self, node: fx.Node) -> Any:
        """What ``node`` gives on the fake values of its operands; equal calls share it."""
        call = described(node)
        if call not in self._known:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            target: Any = node.target
            with self.mode, torch.no_grad():
                self._known[call] = target(*args, **kwargs)
        return self._known[call]


def described(node: fx.Node) -> str:
    """A call by what decides its result's shape: operator, arguments, and tensors as they lie."""
    like: Any = _like_of
    given = fx.map_arg((node.args, node.kwargs), like)
    return f"{node.target}{given}"


def _like_of(node: fx.Node) -> _Like:
    return _Like(node.meta.get("val"))


class _Like:
    """A value as text: of tensors how they lie, of anything else what it is."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __repr__(self) -> str:
        told = self._value
        if isinstance(told, list | tuple):
            return repr([_Like(one) for one in told])
        if not isinstance(told, Tensor):
            return repr(told)
        return f"{told.dtype}{tuple(told.shape)}{told.stride()}{told.device}"
