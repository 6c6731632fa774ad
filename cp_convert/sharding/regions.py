"""What is split along weights and heads, found in a dense program: regions from columns to rows.

A program and its rules come in; the regions that are held split go out. A region begins where
matrices are split by their output columns (queries, keys and values; the first matrix of an MLP),
goes through whatever carries the split dimension (norms over a head, rotary embeddings, attention,
activations, concatenations), and ends where matrices are split by their input rows, whose partial
sums one all-reduce combines. Nothing in a region is read whole: what no rule understands keeps the
whole region replicated, which is right and only dearer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

from torch import fx

from ..ir.ops import ATTENTION
from ..ir.program import module_path, shape, source_line
from ..ir.shares import Kept
from .cuts import all_cuts
from .propagation import Rules
from .rules import GETITEM, Rule, elements, operands
from .tensor_rules import LINEAR, weight_of

FEW: Final = 64
"""A matrix this many times as large as its result, such as a modulation's, is split by columns and
its result gathered: that is little beside what the matrix takes."""


@dataclass(frozen=True)
class Region:
    """Values that are held split together.

    Attributes:
        dims: by value, the dimension that is split.
        rules: by operator, how it is computed; those without a result in ``dims`` are reductions.
        cuts: by value, where besides the ends parts begin that are split one by one.
        ends: values that are gathered as soon as they are made.
    """

    dims: dict[fx.Node, int] = field(default_factory=dict)
    rules: dict[fx.Node, Rule] = field(default_factory=dict)
    cuts: dict[fx.Node, frozenset[int]] = field(default_factory=dict)
    ends: set[fx.Node] = field(default_factory=set)

    @property
    def worth(self) -> float:
        """Numbers of weights that are split, for every number that is reduced."""
        split = sum(elements(n) for n in self.dims if n.op == "placeholder")
        return split / (1 + sum(elements(n) for n, r in self.rules.items() if r.output is None))


@dataclass(frozen=True)
class Found:
    """What a program lets be split.

    Attributes:
        regions: from columns to rows; disjoint.
        gathered: matrices that are split by columns and whose results are gathered.
        kept: attentions that stay whole.
    """

    regions: tuple[Region, ...]
    gathered: tuple[fx.Node, ...]
    kept: tuple[Kept, ...]

    @property
    def ends(self) -> frozenset[fx.Node]:
        """What is gathered as soon as it is made."""
        return frozenset(self.gathered).union(*(region.ends for region in self.regions))


def regions(graph: fx.Graph, rules: Rules, size: int) -> Found:
    """Everything that ``size`` ranks can share.

    Attentions come first, by their heads; then matrices, by what they are worth: a residual stream
    could be split as well, but every matrix that reads it would have to be reduced.
    """
    found: list[Region] = []
    kept: list[Kept] = []
    for node in graph.find_nodes(op="call_function", target=ATTENTION):
        if not any(node in region.dims for region in found):
            region = _of_heads(node, rules, size)
            if isinstance(region, str):
                kept.append(Kept(module_path(node), source_line(node), region))
            else:
                found.append(region)
    candidates: list[Region] = []
    for node in _matrices(graph):
        taken = any(node in region.rules for region in found)
        known = any(node in region.dims for region in candidates)  # it would grow to the same
        if not is_few(node) and not taken and not known:
            region = _checked(grown(node, len(shape(node)) - 1, rules), size)
            candidates += [] if isinstance(region, str) else [region]
    for region in sorted(candidates, key=lambda r: -r.worth):
        if _weights(region) and not _meets(region, found):
            found.append(region)
    held = {node for region in found for node in region.dims}
    gathered = [n for n in _matrices(graph) if _is_gathered(n, held, size)]
    return Found(tuple(found), tuple(gathered), tuple(kept))


def _matrices(graph: fx.Graph) -> Iterator[fx.Node]:
    return (n for n in graph.nodes if n.op == "call_function" and weight_of(n) is not None)


def is_few(node: fx.Node) -> bool:
    """Whether a product with a matrix gives few numbers beside those of the matrix."""
    weight = weight_of(node)
    return weight is not None and elements(node) * FEW <= elements(weight)


def _is_gathered(node: fx.Node, held: Collection[fx.Node], size: int) -> bool:
    """Plain linear layers only, whose parameters nothing else reads."""
    if node.target is not LINEAR or not is_few(node) or shape(node)[-1] % size:
        return False
    _, *own = operands(node)
    return all(p.op == "placeholder" and len(p.users) == 1 and p not in held for p in own)


def _of_heads(node: fx.Node, rules: Rules, size: int) -> Region | str:
    heads = shape(node)[1]
    if heads % size:
        return f"its {heads} heads cannot be shared equally by {size} ranks"
    region = _checked(grown(node, 1, rules), size)
    if isinstance(region, str):  # who reads it, reads it whole; its own weights are shared still
        end = _checked(grown(node, 1, rules, end=node), size)
        region = region if isinstance(end, str) else end
    return region if isinstance(region, str) or _weights(region) else "no weights make its heads"


def reason_for(weight: fx.Node, dim: int, rules: Rules, size: int) -> str:
    """Why a matrix that is in no region cannot be split along ``dim``."""
    region = _checked(grown(weight, dim, rules), size)
    return region if isinstance(region, str) else "what it is split with is split otherwise"


def _weights(region: Region) -> bool:
    return any(n.op == "placeholder" for n in region.dims)


def _meets(region: Region, others: Collection[Region]) -> bool:
    return any(
        not region.dims.keys().isdisjoint(other.dims)
        or not region.rules.keys().isdisjoint(other.rules)
        for other in others
    )


def _checked(region: Region | str, size: int) -> Region | str:
    """With its cuts, if all its parts are as many as divide."""
    if isinstance(region, str):
        return region
    region.cuts.update(all_cuts(region.dims, region.rules))
    for node, dim in region.dims.items():
        ends = sorted({0, shape(node)[dim], *region.cuts[node]})
        for start, stop in pairwise(ends):
            if (stop - start) % size:
                return f"{stop - start} of {node.name} cannot be shared equally by {size} ranks"
    return region


def grown(seed: fx.Node, dim: int, rules: Rules, end: fx.Node | None = None) -> Region | str:
    """All that has to be split where ``seed`` is split along ``dim``; or why it cannot be.

    ``end`` is gathered at once, so that nobody has to read parts of it.
    """
    growth = _Growth(rules)
    growth.region.ends.update([] if end is None else [end])
    growth.hold(seed, dim)
    while growth.waiting and growth.why is None:
        node = growth.waiting.pop()
        growth.made(node)
        if node is not end:
            growth.read(node)
    return growth.region if growth.why is None else growth.why


class _Growth:
    """A region in the making.

    Attributes:
        region: so far.
        waiting: values whose makers and readers have not been looked at.
        why: what stands in its way.
    """

    def __init__(self, rules: Rules) -> None:
        self.rules, self.region = rules, Region()
        self.waiting: list[fx.Node] = []
        self.why: str | None = None

    def hold(self, node: fx.Node, dim: int) -> None:
        """``node`` is split along ``dim``."""
        own = self.region.dims.setdefault(node, dim)
        if own != dim:
            self.why = f"{node.name} would be split along two dimensions"
        elif node not in self.waiting:
            self.waiting.append(node)

    def made(self, node: fx.Node) -> None:
        """What its operator must be given; a value that no rule makes is cut, which is free."""
        dim = self.region.dims[node]
        if node.target is GETITEM:
            self._add(node.all_input_nodes[0], dim)
        elif node.op == "call_function":
            chosen = self.region.rules.get(node)
            if chosen is None:
                chosen = next((r for r in self.rules[node] if r.output == dim), None)
            if chosen is not None:
                self._take(node, chosen)

    def read(self, node: fx.Node) -> None:
        """Everybody who reads it must be able to work on parts."""
        dim = self.region.dims[node]
        for user in node.users:
            if user.op == "output":
                self.why = f"{node.name} is returned"
            elif user.target is GETITEM:
                self._add(user, dim)
            else:
                self._reads(user, node, dim)

    def _reads(self, user: fx.Node, node: fx.Node, dim: int) -> None:
        places = [i for i, x in enumerate(operands(user)) if x is node]
        known, own = self.region.rules.get(user), self.region.dims.get(user)
        for rule in self.rules[user] if known is None else [known]:
            if all(rule.inputs.get(i) == dim for i in places) and own in (None, rule.output):
                self._take(user, rule)
                return
        self.why = f"{user.target} in {module_path(user)} reads {node.name} whole"

    def _take(self, node: fx.Node, rule: Rule) -> None:
        self.region.rules[node] = rule
        if rule.output is not None:
            self._add(node, rule.output)
        elif node in self.region.dims:
            self.why = f"{node.name} would be reduced and split"
        given = operands(node)
        for position, dim in rule.inputs.items():
            self._add(given[position], dim)

    def _add(self, node: fx.Node, dim: int) -> None:
        if self.region.dims.get(node) != dim:
            self.hold(node, dim)
