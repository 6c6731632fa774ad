"""Decomposition operator by operator, each once: equal calls share what was found for the first.

``ExportedProgram.run_decompositions`` traces the whole program anew, 10,000 operators for 57 equal
blocks. Here every distinct call (operator, arguments, shapes, strides) is traced alone, with the
same table and the same tracer (``make_fx``), and what it becomes is written in the place of all its
equals. That is right where operators neither write in place (:mod:`.functionalize` turns most such
writes into values first) nor contain others; programs of which that cannot be said are left to
torch.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, fx
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from ..ir.program import PROVENANCE, fake_mode_of, fresh
from .functionalize import Unclear, functionalized

_DROPPED: Final = (
    torch.ops.aten.detach.default,
    torch.ops.aten.detach_.default,
    torch.ops.aten.alias.default,
)
"""What aot_export leaves out as well: the values are the argument's."""


class _Beyond(Exception):
    """A program that is left to torch."""


def decompose_once(module: fx.GraphModule, table: Mapping[Any, Any]) -> fx.Graph | None:
    """The graph of ``module`` with every operator decomposed by ``table``.

    Args:
        module: placeholders, operators and one output; it stays as it is.
        table: decompositions by operator.

    Returns:
        A graph with the same placeholders, or ``None`` when the program is beyond this.
    """
    try:
        return _Once(functionalized(module.graph), table).graph
    except (_Beyond, Unclear):
        return None


class _Once:
    def __init__(self, graph: fx.Graph, table: Mapping[Any, Any]) -> None:
        self.graph = fx.Graph()
        self._table = dict(table)
        self._mode = fake_mode_of(graph)
        self._known: dict[Any, fx.Graph] = {}
        self._new: dict[fx.Node, Any] = {}
        for node in graph.nodes:
            self._new[node] = self._added(node)

    def _added(self, node: fx.Node) -> Any:
        if node.op in ("placeholder", "output"):
            copy = self.graph.create_node(
                node.op, node.target, self._mapped(node.args), {}, name=node.name
            )
            if copy.name != node.name:
                raise _Beyond  # named like a builtin: torch renames it in the signature as well
            copy.meta = dict(node.meta)
            return copy
        if node.op != "call_function":
            raise _Beyond
        if node.target is operator.getitem:
            whole, index = node.args
            return self._new[whole][index]  # type: ignore[index]
        if node.target in _DROPPED:
            return self._new[node.args[0]]  # type: ignore[index]
        if not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.is_mutable:
            raise _Beyond
        if node.target not in self._table and _is_kept(node.target):
            copy = self.graph.node_copy(node, self._new.__getitem__)
            copy.meta = dict(node.meta)
            return copy
        return self._inlined(self._traced(node), node)

    def _mapped(self, arguments: Any) -> Any:
        return fx.map_arg(arguments, self._new.__getitem__)

    def _traced(self, node: fx.Node) -> fx.Graph:
        """What one call becomes: a graph of its tensor arguments."""
        leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, fx.Node)]
        values = [self._value(one) for one in tensors]
        rest = tuple(_Hole if isinstance(leaf, fx.Node) else _typed(leaf) for leaf in leaves)
        key = (node.target, spec, rest, tuple(_told(value) for value in values))
        if any(isinstance(leaf, torch.SymInt) for leaf in pytree.tree_leaves((rest, key[3]))):
            raise _Beyond
        if key not in self._known:
            self._known[key] = self._decomposed(node.target, leaves, spec, values)
        return self._known[key]

    def _value(self, node: fx.Node) -> Tensor:
        new = self._new[node]
        value = new.meta.get("val") if isinstance(new, fx.Node) else None
        if not isinstance(value, Tensor):
            raise _Beyond
        return value

    def _decomposed(
        self, target: Any, leaves: Sequence[Any], spec: pytree.TreeSpec, values: Sequence[Tensor]
    ) -> fx.Graph:
        # A composite that the table names is taken apart before mutations become values.
        meaning = self._table.get(target, target) if _is_composite(target) else target

        def call(*tensors: Tensor) -> Any:
            given = iter(tensors)
            filled = [next(given) if isinstance(leaf, fx.Node) else leaf for leaf in leaves]
            args, kwargs = pytree.tree_unflatten(filled, spec)
            return meaning(*args, **kwargs)

        traced: Any = meaning
        # What a decomposition writes in place becomes a value; a second time where the table's
        # own functions write, which the tracer calls below that.
        for _ in range(2):
            made = functionalize(call if traced is meaning else traced, remove="mutations")
            with self._mode, torch.no_grad():
                traced = make_fx(made, decomposition_table=self._table)(*map(fresh, values))
            schemas = [getattr(node.target, "_schema", None) for node in traced.graph.nodes]
            if not any(schema is not None and schema.is_mutable for schema in schemas):
                break
        else:
            raise _Beyond
        if traced.graph.find_nodes(op="get_attr"):
            raise _Beyond  # a constant that the tracer made
        traced.graph.eliminate_dead_code()
        graph: fx.Graph = traced.graph
        return graph

    def _inlined(self, traced: fx.Graph, origin: fx.Node) -> Any:
        provenance: dict[str, Any] = {
            key: origin.meta[key] for key in PROVENANCE if key in origin.meta
        }
        here: dict[fx.Node, Any] = {}
        given = iter(_tensors(origin))
        for node in traced.nodes:
            if node.op == "placeholder":
                here[node] = self._new[next(given)]
            elif node.op == "output":
                return fx.map_arg(node.args[0], here.__getitem__)
            elif node.target in _DROPPED:
                here[node] = here[node.args[0]]
            else:
                copy = self.graph.node_copy(node, here.__getitem__)
                copy.meta = {**provenance, "val": node.meta.get("val")}  # an assertion has none
                here[node] = copy
        raise _Beyond


def _is_kept(target: torch._ops.OpOverload) -> bool:
    """What ``run_decompositions`` keeps unless the table names it: composites that are no views."""
    is_random = torch.Tag.nondeterministic_seeded in target.tags
    is_view = any(one.alias_info is not None for one in target._schema.returns)
    return _is_composite(target) and not is_view and not is_random


def _is_composite(target: torch._ops.OpOverload) -> bool:
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return bool(has_kernel(target.name(), "CompositeImplicitAutograd"))


class _Hole:
    """Where a tensor stands in a call's arguments."""


def _tensors(node: fx.Node) -> list[fx.Node]:
    return [
        leaf for leaf in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(leaf, fx.Node)
    ]


def _typed(leaf: Any) -> Any:
    """``1``, ``1.0`` and ``True`` are equal, and different arguments."""
    return type(leaf), leaf


def _told(value: Tensor) -> tuple[Any, ...]:
    """Where it begins in memory decides nothing: it is traced as a tensor in memory of its own.

    Weights of a file all begin elsewhere.
    """
    return value.dtype, tuple(value.shape), value.stride(), value.device
