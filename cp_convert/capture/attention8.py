"""Which attentions are computed over FP8 codes, and the program that says so.

In: a dense program, chosen attentions and what a code of 1 stands for. Out: the program, where
these ``cp::attention`` have ``steps`` (:mod:`..ir.attention8`); nothing else changes, so whatever
knows attentions (the sharder, the strategies) goes on as before.

Left as they are: attentions outside of the repeated blocks, as linear layers are, and those for
which TensorRT has no fused kernel of FP8 codes (measured, TensorRT-RTX 1.7.1; it computes them with
products of codes and scores in memory).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Final

from torch import fx

from ..errors import CannotConvert
from ..ir.attention8 import Steps
from ..ir.linear8 import Kept
from ..ir.ops import ATTENTION
from ..ir.program import (
    HALF,
    Lowered,
    arguments,
    copied,
    module_of,
    module_path,
    shape,
    tensor_of,
)
from ..ir.quantize import FP8
from .linear8 import KEEP, is_in_a_block
from .scales import scale_of

_HEADS: Final = range(16, 257, 8)
"""Sizes of heads for which there is a kernel."""
_FEWEST: Final = 32
"""Keys that a kernel needs."""


def attentions_of(program: Lowered) -> list[fx.Node]:
    """All of them, in order of execution."""
    return list(program.graph_module.graph.find_nodes(op="call_function", target=ATTENTION))


def choose(program: Lowered, keep: Sequence[str] = ()) -> tuple[list[fx.Node], tuple[Kept, ...]]:
    """The attentions to be computed over FP8 codes, and why the others are not.

    Args:
        program: decomposed and whole.
        keep: patterns of module paths that are left as they are, as a shell's.

    Raises:
        CannotConvert: none is left.
    """
    nodes = attentions_of(program)
    has_blocks = any(is_in_a_block(node) for node in nodes)
    reasons = {node: _why_kept(node, keep, has_blocks=has_blocks) for node in nodes}
    return _told(reasons)


def stored(
    program: Lowered, steps: Mapping[str, Steps], keep: Sequence[str] = ()
) -> tuple[list[fx.Node], tuple[Kept, ...]]:
    """Those of a checkpoint that has scales for them.

    Args:
        program: decomposed and whole.
        steps: by the path of the module that attends.
        keep: see :func:`choose`.

    Raises:
        CannotConvert: scales of what does not attend; or none is left.
    """
    nodes = attentions_of(program)
    if lost := sorted(steps.keys() - {module_path(node) for node in nodes}):
        raise CannotConvert(
            f"the checkpoint has scales of the attention of {lost[0]}, where the model has none.",
            where=lost[0],
            hint="--attention precision leaves them out.",
        )
    reasons = {
        node: "as in the checkpoint"
        if module_path(node) not in steps
        else _why_kept(node, keep, has_blocks=False)
        for node in nodes
    }
    return _told(reasons)


def _told(reasons: Mapping[fx.Node, str | None]) -> tuple[list[fx.Node], tuple[Kept, ...]]:
    chosen = [node for node, why in reasons.items() if why is None]
    kept = tuple(Kept(module_path(n), why) for n, why in reasons.items() if why is not None)
    if not chosen:
        found = sorted({one.reason for one in kept}) or ["there is none"]
        raise CannotConvert(
            f"--attention fp8: no attention can be computed over codes: {'; '.join(found)}.",
            hint="--attention precision computes them as they are.",
        )
    return chosen, kept


def _why_kept(node: fx.Node, keep: Sequence[str], *, has_blocks: bool) -> str | None:
    given = arguments(node)
    q, k = tensor_of(given["query"]), shape(given["key"])
    if any(fnmatchcase(module_path(node), pattern) for pattern in keep):
        return KEEP
    if has_blocks and not is_in_a_block(node):
        return "outside of the repeated blocks"
    if q.dtype not in HALF:
        return f"it is computed in {str(q.dtype).removeprefix('torch.')}, without a kernel for FP8"
    if q.shape[-1] not in _HEADS:
        return f"there is no FP8 kernel for heads of {q.shape[-1]} numbers"
    if k[2] < _FEWEST:
        return f"there is no FP8 kernel for fewer than {_FEWEST} keys"
    return None


def operands(node: fx.Node) -> tuple[str, str, str]:
    """The names of what an attention reads as codes."""
    given = arguments(node)
    q, k, v = (str(given[name]) for name in ("query", "key", "value"))
    return q, k, v


def measured(chosen: Sequence[fx.Node], largest: Mapping[str, float]) -> dict[str, Steps]:
    """What a code of 1 stands for, by the attention's name.

    Args:
        chosen: see :func:`choose`.
        largest: magnitudes of what they read, by name.

    Raises:
        CannotConvert: one is zero, or not finite.
    """
    found = {}
    for node in chosen:
        q, k, v = (_step(largest[name], node) for name in operands(node))
        found[node.name] = q, k, v
    return found


def alike(chosen: Sequence[fx.Node], steps: Mapping[str, Steps]) -> dict[str, Steps]:
    """The largest of every block's, so that blocks which share an engine have equal constants.

    An engine's scores have one factor, ``s_q s_k``, which cannot be taken out of the softmax. A
    larger step clips nothing and costs FP8 no digit but of its smallest numbers, 2^-15 of the
    largest and less.

    Args:
        chosen: see :func:`choose`.
        steps: by the attention's name.
    """
    groups: dict[str, list[Steps]] = {}
    places = {node.name: _in_any_block(node) for node in chosen}
    for name, place in places.items():
        groups.setdefault(place, []).append(steps[name])
    found = {}
    for name, place in places.items():
        q, k, v = (max(every) for every in zip(*groups[place], strict=True))
        found[name] = q, k, v
    return found


def _in_any_block(node: fx.Node) -> str:
    """The path of the module that attends, without the number of its block."""
    return ".".join("*" if part.isdigit() else part for part in module_path(node).split("."))


def _step(largest: float, node: fx.Node) -> float:
    path = module_path(node)
    return scale_of(largest, path, FP8, f"--attention fp8: what {path} attends to", "it")


def over_codes(program: Lowered, steps: Mapping[str, Steps]) -> Lowered:
    """``program`` with attentions over codes; it stays as it is.

    Args:
        program: decomposed and whole.
        steps: by the attention's name.
    """
    graph = copied(program.graph_module.graph)
    for node in graph.find_nodes(op="call_function", target=ATTENTION):
        if node.name in steps:
            node.kwargs = {**node.kwargs, "steps": list(steps[node.name])}
    graph.lint()
    return replace(program, graph_module=module_of(program.graph_module, graph))
