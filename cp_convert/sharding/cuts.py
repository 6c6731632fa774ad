"""Where the split dimensions of a region are cut: a packed matrix is several, each shared equally.

Dimensions and rules of a region come in, by value the places where parts begin go out::

    q, k, v, mlp = split(x @ packed^T)       packed: cut where k, v and mlp begin
    cat([attention, mlp]) @ packed^T          packed: cut where mlp begins
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, fx

from ..ir.program import shape
from .rules import GETITEM, Rule, operands

Cuts = dict[fx.Node, frozenset[int]]


def all_cuts(dims: Mapping[fx.Node, int], rules: Mapping[fx.Node, Rule]) -> Cuts:
    """Every value's cuts, so that operands and results of every rule are cut alike."""
    cuts: Cuts = dict.fromkeys(dims, frozenset())
    before: Cuts | None = None
    while before != cuts:
        before = dict(cuts)
        for node in reversed(list(dims)):
            if node.target is GETITEM:
                _piece(node, dims, rules, cuts)
        for node, rule in (*rules.items(), *reversed(list(rules.items()))):
            _alike(node, rule, cuts)
    return cuts


def _alike(node: fx.Node, rule: Rule, cuts: Cuts) -> None:
    given = [(i, operands(node)[i]) for i in rule.inputs]
    if rule.output is None:
        joined = frozenset[int]().union(*(cuts[x] for _, x in given))
        cuts.update((x, joined) for _, x in given)
        return
    if rule.results > 1 or not isinstance(node.meta["val"], Tensor):
        if rule.carry is None:  # several results, cut as the operand is
            joined = cuts[node].union(*(cuts[x] for _, x in given))
            cuts.update({x: joined for _, x in given} | {node: joined})
        return
    for position, operand in given:
        own = cuts[node] if rule.back is None else rule.back(cuts[node], position)
        cuts[operand] |= own
    for position, operand in given:
        own = cuts[operand]
        cuts[node] |= own if rule.forth is None else rule.forth(own, position)


def _piece(
    node: fx.Node, dims: Mapping[fx.Node, int], rules: Mapping[fx.Node, Rule], cuts: Cuts
) -> None:
    """One of several results: a piece of the dimension itself, or as long as the operand."""
    base, index = node.all_input_nodes[0], node.args[1]
    rule, dim = rules.get(base), dims[node]
    if rule is None or not isinstance(index, int):
        return
    if rule.carry is None:
        cuts[node] = cuts[base] = cuts[node] | cuts[base]
        return
    whole = operands(base)[0]
    sizes = [piece.shape[dim] for piece in base.meta["val"]]
    begin, length = sum(sizes[:index]), sizes[index]
    ends = frozenset({begin, begin + length}) - {0, shape(whole)[dim]}
    cuts[whole] |= ends | {begin + cut for cut in cuts[node]}
    cuts[node] |= {cut - begin for cut in cuts[whole] if begin < cut < begin + length}
