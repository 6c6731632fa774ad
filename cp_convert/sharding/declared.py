"""A plan of modules beside what is found: what it names is shared, all else stays whole.

What a program lets be split comes in, with a model's ``tp_plan``; the part of it that the plan
names goes out. The plan decides which matrices, never how: that is in the program, and a plan that
says otherwise is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import NoReturn

from torch import fx

from ..errors import CannotShard
from ..ir.ops import ATTENTION
from ..ir.program import module_path, shape, source_line
from ..ir.shares import Declared, Kept
from .propagation import Rules
from .regions import Found, Region, reason_for
from .tensor_rules import weight_of

_WAYS = ("columns", "rows")


def restricted(
    found: Found, plan: Mapping[str, Declared], graph: fx.Graph, rules: Rules, size: int
) -> Found:
    """What of ``found`` the plan names.

    Args:
        found: what the program lets be split.
        plan: by placeholder, what is said of a matrix. Those that nothing reads do not matter.
        graph: whose matrices these are.
        rules: by which ``found`` was found.
        size: how many ranks share.

    Raises:
        CannotShard: a matrix that cannot be split, or not so, or not without another one.
    """
    regions = tuple(region for region in found.regions if _is_named(region, plan, size))
    gathered = tuple(node for node in found.gathered if _weight(node).name in plan)
    for node in gathered:
        line = plan[_weight(node).name]
        _check(line, 0, (shape(node)[-1],), size)
    held = {node for region in regions for node in region.dims} | set(map(_weight, gathered))
    for node in graph.find_nodes(op="placeholder"):
        if node.name in plan and node.users and node not in held:
            line = plan[node.name]
            _refuse(line, size, f"cannot be split: {reason_for(node, line.dim, rules, size)}")
    return Found(regions, gathered, (*found.kept, *_left(found, regions, graph)))


def _weight(node: fx.Node) -> fx.Node:
    weight = weight_of(node)
    assert weight is not None
    return weight


def _is_named(region: Region, plan: Mapping[str, Declared], size: int) -> bool:
    """Whether the plan names all matrices of the region, or none."""
    matrices = [n for n in region.dims if n.op == "placeholder" and len(shape(n)) == 2]
    named = sorted((n for n in matrices if n.name in plan), key=lambda n: list(plan).index(n.name))
    others = [node for node in matrices if node.name not in plan]
    if named and others:
        other = module_path(next(iter(others[0].users)))
        _refuse(plan[named[0].name], size, f"is split together with {other}, which it leaves out")
    for node in named:
        ends = sorted({0, shape(node)[region.dims[node]], *region.cuts[node]})
        lengths = tuple(stop - start for start, stop in pairwise(ends))
        _check(plan[node.name], region.dims[node], lengths, size)
    return bool(named)


def _check(line: Declared, dim: int, lengths: tuple[int, ...], size: int) -> None:
    if line.dim != dim:
        _refuse(line, size, f"is split by its {_WAYS[dim]}, not by its {_WAYS[line.dim]}")
    if line.blocks != lengths:
        _refuse(
            line, size, f"has parts of {list(lengths)} to be shared, not of {list(line.blocks)}"
        )


def _refuse(line: Declared, size: int, why: str) -> NoReturn:
    raise CannotShard(
        f"--tp {size}: the plan names {line.module}, which {why}.",
        where=line.line,
        hint="mend the plan, or --tp-plan auto, which shares all that can be.",
    )


def _left(found: Found, regions: tuple[Region, ...], graph: fx.Graph) -> Iterator[Kept]:
    """Attentions that could be shared and are not."""
    for node in graph.find_nodes(op="call_function", target=ATTENTION):
        could = any(node in region.dims for region in found.regions)
        if could and not any(node in region.dims for region in regions):
            yield Kept(module_path(node), source_line(node), "the plan leaves its matrices out")
