"""The walk: a dense graph, rules and wants come in; the sharded graph, and what it cost, come out.

:mod:`.shard` spreads a sequence with it, :mod:`.tensor_parallel` weights and heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Final

import torch
from torch import Tensor, fx

from ..errors import CannotShard
from ..ir.layout import Layout
from ..ir.ops import MARK
from ..ir.program import (
    Lowered,
    erase_dead,
    fake_mode_of,
    module_of,
    module_path,
    shape,
    source_line,
)
from ..ir.sharded import Move
from ..mesh import Axis
from .parts import PartWriter
from .propagation import Rules, Want, is_tensor
from .rules import GETITEM, Rule, elements, operands

aten: Final = torch.ops.aten
Place = tuple[int, Layout]


@dataclass
class Value:
    """A value of the dense program as nodes of the sharded one."""

    whole: fx.Node | None = None
    parts: dict[Place, fx.Node] = field(default_factory=dict)
    wanted: Place | None = None
    tuple_parts: tuple[fx.Node, int, list[Layout]] | None = None

    @property
    def must(self) -> Place | None:
        """Where it is sharded, if it is not held whole as well or was split on purpose."""
        if self.wanted is not None:
            return self.wanted
        return next(iter(self.parts)) if self.whole is None and self.parts else None


class Walk(PartWriter):
    """One walk over the dense graph, building the sharded one.

    Attributes:
        places: by the node of an attention over sharded keys, the layouts of queries and keys.
        moves: what was split, gathered and reduced.
        outputs: the program's, by the names of the new graph.
    """

    def __init__(
        self, program: Lowered, axis: Axis, rules: Rules, wants: Mapping[fx.Node, Want]
    ) -> None:
        self.program = program
        self.dense = program.graph_module.graph
        super().__init__(axis, fake_mode_of(self.dense))
        self.env: dict[fx.Node, Value] = {}
        self.places: dict[str, tuple[Layout, Layout]] = {}
        self.moves: list[Move] = []
        self.rules, self.wants = rules, wants
        self.outputs = program.outputs

    def run(self) -> None:
        """Build the sharded graph."""
        for node in self.dense.nodes:
            self.origin = node
            if node.op == "output":
                self._finish(node)
            elif node.op != "call_function":
                self._given(node)
            elif node.target is MARK:
                self._mark(node)
            elif node.target is GETITEM:
                self._getitem(node)
            else:
                self._call(node)
        erase_dead(self.graph)
        self.graph.lint()

    def _given(self, node: fx.Node) -> None:
        """An input, a parameter or a constant: whole, and split where that is wanted."""
        copy = self.graph.node_copy(node)
        copy.name = node.name  # bindings and weights are known by it
        self.env[node] = Value(whole=copy)
        if node in self.wants:
            self._split_wanted(node)

    def module(self) -> fx.GraphModule:
        """The graph as a module, over the dense program's attributes."""
        return module_of(self.program.graph_module, self.graph)

    def _finish(self, node: fx.Node) -> None:
        returned = fx.map_arg(node.args, lambda n: self._whole(n))
        new = self.graph.output(returned[0])
        new.meta = dict(node.meta)
        names = {n.name: self._whole(n).name for n in node.all_input_nodes}
        self.outputs = tuple(replace(b, node=names[b.node]) for b in self.program.outputs)

    # ------------------------------------------------------------ operators

    def _call(self, node: fx.Node) -> None:
        given = operands(node)
        must = {i: p for i, n in enumerate(given) if (p := self.env[n].must) is not None}
        rule, layouts = self._choose(node, given, must)
        if rule is None:
            copy = self._emit(node, node.args, node.kwargs, [self._whole(n) for n in given])
            self.env[node] = Value(whole=copy)
            if node in self.wants and is_tensor(node):
                self._split_wanted(node)
            return
        nodes = [
            self._part(n, rule.inputs[i], layouts[i]) if i in rule.inputs else self._whole(n)
            for i, n in enumerate(given)
        ]
        if rule.reduce is not None:
            self._reduce(node, rule, layouts, nodes)
            return
        args, kwargs = node.args, node.kwargs
        if rule.localise is not None:
            args, kwargs = rule.localise(args, kwargs, layouts)
        results = rule.layouts(layouts)
        assert results is not None and rule.output is not None
        part = self._emit(node, args, kwargs, nodes)
        _check(node, part, rule.output, results)
        if rule.context:
            self.places[part.name] = (layouts[0], layouts[1])
        if isinstance(node.meta["val"], Tensor):
            self.env[node] = Value(parts={(rule.output, results[0]): part})
        else:
            self.env[node] = Value(tuple_parts=(part, rule.output, results))

    def _choose(
        self, node: fx.Node, given: list[fx.Node], must: Mapping[int, Place]
    ) -> tuple[Rule | None, dict[int, Layout]]:
        """The way that gathers least, and the layouts of what it shards.

        ``None``, for whole tensors, when nothing is sharded and nothing asks for it.
        """
        want = self.wants.get(node)
        if not must:
            for rule in self.rules[node] if want is not None else ():
                if rule.output == want.dim and self._have_a_part(rule, given):  # type: ignore[union-attr]
                    layouts = self._layouts(node, rule, given, must)
                    return (None, {}) if layouts is None else (rule, layouts)
            return None, {}
        best: tuple[Rule | None, dict[int, Layout]] = None, {}
        cost = sum(elements(given[i]) for i in must)
        for rule in self.rules[node]:
            kept = {i: p for i, p in must.items() if rule.inputs.get(i) == p[0]}
            price = sum(elements(given[i]) for i in must if i not in kept)
            layouts = self._layouts(node, rule, given, kept) if price < cost else None
            if layouts is not None:
                best, cost = (rule, layouts), price
        return best

    def _have_a_part(self, rule: Rule, given: list[fx.Node]) -> bool:
        return any(
            place[0] == dim for i, dim in rule.inputs.items() for place in self.env[given[i]].parts
        )

    def _layouts(
        self, node: fx.Node, rule: Rule, given: list[fx.Node], must: Mapping[int, Place]
    ) -> dict[int, Layout] | None:
        """A layout for every operand that the rule shards, or ``None`` where they disagree."""
        found = {i: place[1] for i, place in must.items() if i in rule.inputs}
        held = {
            i: [layout for d, layout in self.env[given[i]].parts if d == dim]
            for i, dim in rule.inputs.items()
        }
        for i in sorted(rule.inputs, key=lambda i: not held[i]):
            if i in found:
                continue
            length = shape(given[i])[rule.inputs[i]]
            peers = () if rule.free else tuple(found.values())
            options = [x for x in (*peers, *held[i]) if x.length == length]
            found[i] = options[0] if options else self._even(length, self._cuts(node, rule, i))
        if rule.reduce is not None:
            return found if len(set(found.values())) == 1 else None
        return found if rule.layouts(found) is not None else None

    def _reduce(
        self, node: fx.Node, rule: Rule, layouts: Mapping[int, Layout], nodes: list[fx.Node]
    ) -> None:
        layout = layouts[min(layouts)]
        if layout.padding:
            neutral = {"max": float("-inf"), "min": float("inf")}.get(str(rule.reduce), 0.0)
            nodes[0] = self.blanked(nodes[0], rule.inputs[0], layout, neutral)
        part = self._partial(node, nodes)
        if rule.reduce == "mean":
            part = self.op(aten.mul.Tensor, part, layout.local / layout.length)
        kind = "sum" if rule.reduce == "mean" else str(rule.reduce)
        whole = self.op(torch.ops.cp.all_reduce.default, part, kind, self.axis.flat, self.axis.size)
        self._note("all_reduce", node, 0, layout, elements(node))
        self.env[node] = Value(whole=self._completed(node, whole, nodes))

    def _partial(self, node: fx.Node, nodes: list[fx.Node]) -> fx.Node:
        """This rank's share of a reduction."""
        return self._emit(node, node.args, node.kwargs, nodes)

    def _completed(self, node: fx.Node, reduced: fx.Node, nodes: list[fx.Node]) -> fx.Node:
        """What follows when all shares are combined: nothing here."""
        return reduced

    def _getitem(self, node: fx.Node) -> None:
        base, index = node.args
        assert isinstance(base, fx.Node) and isinstance(index, int)
        value = self.env[base]
        if value.tuple_parts is None:
            self.env[node] = Value(whole=self._emit(node, node.args, {}, [self._whole(base)]))
            if node in self.wants:
                self._split_wanted(node)
            return
        part, dim, layouts = value.tuple_parts
        own = self._emit(node, node.args, {}, [part])
        self.env[node] = Value(parts={(dim, layouts[index]): own})

    def _mark(self, node: fx.Node) -> None:
        x, kind, dim = node.args
        assert isinstance(x, fx.Node) and isinstance(dim, int)
        if kind == "gather":
            self.env[node] = Value(whole=self._whole(x))
            return
        layout = Layout.even([shape(x)[dim]], self.axis.size, self.axis.unit)
        held = [place for place in self.env[x].parts if place[0] == dim]
        place = held[0] if held else (dim, layout)
        if layout.length < self.axis.size:
            raise CannotShard(
                f"{layout.length} tokens along dimension {dim} are fewer than the "
                f"{self.axis.size} ranks.",
                where=f"{module_path(node)} ({source_line(node)})",
            )
        self.env[node] = Value(parts={place: self._part(x, *place)})

    # ------------------------------------------------------------ whole and part

    def _split_wanted(self, node: fx.Node) -> None:
        want = self.wants[node]
        length = shape(node)[want.dim]
        place = want.dim, self._even(length, want.cuts)
        self._part(node, *place)
        self.env[node].wanted = place

    def _even(self, length: int, cuts: frozenset[int]) -> Layout:
        ends = sorted({0, length, *cuts})
        lengths = [b - a for a, b in pairwise(ends)]
        return Layout.even(lengths, self.axis.size, self.axis.unit)

    def _cuts(self, node: fx.Node, rule: Rule, position: int) -> frozenset[int]:
        """Where an operand that nothing else decides on is best cut."""
        want = self.wants.get(node)
        if want is None or want.dim != rule.output:
            return frozenset()
        return want.cuts if rule.back is None else rule.back(want.cuts, position)

    def _whole(self, node: fx.Node) -> fx.Node:
        value = self.env[node]
        if value.whole is None and value.parts:
            (dim, layout), part = next(iter(value.parts.items()))
            value.whole = self.gathered(part, dim, layout)
            assert self.origin is not None
            self._note("gather", self.origin, dim, layout, elements(node))
        elif value.whole is None:
            raise CannotShard(
                f"{node.target} returns several tensors that are needed whole at once.",
                where=f"{module_path(node)} ({source_line(node)})",
            )
        return value.whole

    def _part(self, node: fx.Node, dim: int, layout: Layout) -> fx.Node:
        value = self.env[node]
        if (dim, layout) not in value.parts:
            self._note("split", node, dim, layout, elements(node))
            value.parts[dim, layout] = self.sharded(self._whole(node), dim, layout)
        return value.parts[dim, layout]

    def _note(self, kind: str, node: fx.Node, dim: int, layout: Layout, size: int) -> None:
        name = node.name if node.op in ("placeholder", "get_attr") else str(node.target)
        name = "the output" if node.op == "output" else name
        where = (module_path(node), source_line(node))
        self.moves.append(Move(kind, name, *where, dim, layout, size, self.axis.name))

    # ------------------------------------------------------------ nodes

    def _emit(self, node: fx.Node, args: Any, kwargs: Any, given: list[fx.Node]) -> fx.Node:
        """``node`` again, on other operands."""
        replacements = iter(given)
        args, kwargs = fx.map_arg((args, kwargs), lambda _: next(replacements))
        new = self.graph.create_node("call_function", node.target, tuple(args), kwargs, node.name)
        new.meta = dict(node.meta)
        new.meta["val"] = self.value(new)
        return new


def _check(node: fx.Node, part: fx.Node, dim: int, layouts: list[Layout]) -> None:
    """A rule that is wrong about shapes must not go unnoticed."""
    dense, local = node.meta["val"], part.meta["val"]
    pairs = [(dense, local)] if isinstance(dense, Tensor) else zip(dense, local, strict=True)
    for (whole, own), layout in zip(pairs, layouts, strict=True):
        wanted = list(whole.shape)
        assert wanted[dim] == layout.length, (node.format_node(), dim, layout)
        wanted[dim] = layout.local
        assert list(own.shape) == wanted, (node.format_node(), list(own.shape), wanted)
