"""Which linear layers multiply codes of 8 bits, and why the others do not.

In: a dense program, and the codes of a checkpoint if there are any. Out: nodes, and reasons.
:mod:`.products8` makes of them what is computed then.

Which layers are left as they are follows NVIDIA's and SGLang's published recipes for diffusion
transformers: embedders, modulation and the output. Here that is said by structure: layers outside
of the repeated blocks, and layers that compute one vector and not tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Final

import torch
from torch import fx

from ..errors import CannotConvert, UsageError
from ..ir.linear8 import Kept
from ..ir.nvfp4 import BLOCK, PAIRS
from ..ir.ops import ATTENTION
from ..ir.program import Lowered, module_path, shape
from ..ir.quantize import FP8
from ..ir.source import Codes
from ..words import near

LINEAR: Final = torch.ops.aten.linear.default
ALONE: Final = "only its weight is codes"
"""How the reason begins for a layer that reads codes and multiplies in the precision."""
KEEP: Final = "--keep"
"""The reason where the user says so."""
_STEP: Final = 16
"""Rows and columns of a weight come in multiples of it where FP8 is multiplied."""
_FEWEST: Final = 2 * BLOCK
"""Columns that NVFP4 is multiplied with; TensorRT computes with one block in half precision."""
_TOKENS: Final = 16
"""Rows of a matrix that are tokens without a batch, and not a vector for each of the batch."""


def choose(
    program: Lowered, keep: Sequence[str] = (), dtype: torch.dtype = FP8
) -> tuple[list[fx.Node], tuple[Kept, ...]]:
    """The linear layers that are to multiply codes, and why the others are not.

    Args:
        program: decomposed and whole.
        keep: patterns of module paths that are left as they are, as a shell's.
        dtype: of the codes.

    Raises:
        UsageError: a pattern that names no linear layer.
        CannotConvert: no layer is left, or ranks have weights of their own.
    """
    if program.own:
        raise CannotConvert("--quantize: every rank has weights of its own here.")
    nodes = list(program.graph_module.graph.find_nodes(op="call_function", target=LINEAR))
    reasons = _reasons(program, nodes, keep, dtype)
    kept = tuple(Kept(module_path(n), why) for n, why in reasons.items() if why is not None)
    chosen = [node for node, why in reasons.items() if why is None]
    if not chosen:
        found = sorted({one.reason for one in kept}) or ["there is none"]
        raise CannotConvert(
            f"--quantize: no linear layer can be quantized: {'; '.join(found)}.",
            hint="leave --quantize out" + (", or keep fewer layers." if keep else "."),
        )
    return chosen, kept


def _reasons(
    program: Lowered, nodes: Sequence[fx.Node], keep: Sequence[str], dtype: torch.dtype
) -> dict[fx.Node, str | None]:
    """Of every linear layer, why it is left as it is; ``None``: it need not be."""
    attentions = program.graph_module.graph.find_nodes(op="call_function", target=ATTENTION)
    for pattern in keep:
        if not any(fnmatchcase(module_path(node), pattern) for node in (*nodes, *attentions)):
            raise UsageError(
                f"--keep {pattern}: there is no linear layer, and no attention, of such a path.",
                hint=near(pattern, [module_path(node) for node in nodes]),
            )
    has_blocks = any(is_in_a_block(node) for node in nodes)
    reasons = {node: _why_kept(node, program, keep, has_blocks) for node in nodes}
    if dtype != PAIRS:
        return reasons
    return {node: _why_not_4_bits(node) if why is None else why for node, why in reasons.items()}


def is_in_a_block(node: fx.Node) -> bool:
    """Whether the module that called it is in one of the repeated blocks."""
    return any(part.isdigit() for part in module_path(node).split("."))


def _why_not_4_bits(node: fx.Node) -> str | None:
    few = shape(node.args[0])[-1] < _FEWEST
    return f"its input has fewer than {_FEWEST} columns" if few else None


def _why_kept(node: fx.Node, program: Lowered, keep: Sequence[str], has_blocks: bool) -> str | None:
    path, weight = module_path(node), node.args[1]
    assert isinstance(weight, fx.Node)
    if any(fnmatchcase(path, pattern) for pattern in keep):
        return KEEP
    if has_blocks and (not is_in_a_block(node) or "embed" in path):
        return "an embedder or the output"
    if len(sizes := shape(node.args[0])) < 3 and sizes[0] < _TOKENS:
        return "modulation: it computes a vector, not tokens"
    if weight.name not in program.state or any(u.target is not LINEAR for u in weight.users):
        return "its weight is computed, or read elsewhere too"
    if any(size % _STEP for size in shape(weight)):
        return f"its weight's sizes are no multiples of {_STEP}"
    return None


def stored_layers(
    program: Lowered,
    codes: Mapping[str, Codes],
    *,
    measured: bool = False,
    keep: Sequence[str] = (),
) -> tuple[list[fx.Node], tuple[Kept, ...]]:
    """The linear layers of a quantized checkpoint that multiply codes, and those that do not.

    Args:
        program: decomposed and whole.
        codes: by placeholder of the weight.
        measured: whether inputs without a scale in the checkpoint are to be given one, but for
            layers that :func:`choose` would not take.
        keep: see :func:`choose`.

    Raises:
        CannotConvert: codes with both scales that are no linear layer's weight, and nothing else.
        UsageError: a pattern that names no linear layer.
    """
    nodes = list(program.graph_module.graph.find_nodes(op="call_function", target=LINEAR))
    _check_readers(program, nodes, codes)
    reasons, kept = _reasons(program, nodes, keep, FP8), dict[fx.Node, str]()
    for node in nodes:
        own = codes.get(str(node.args[1]))
        if own is None:
            kept[node] = "as in the checkpoint"
        elif (why := _why_alone(node, own, reasons[node], measured=measured)) is not None:
            kept[node] = f"{ALONE}: {why}"
    told = tuple(Kept(module_path(node), why) for node, why in kept.items())
    return [node for node in nodes if node not in kept], told


def _why_alone(node: fx.Node, own: Codes, why: str | None, *, measured: bool) -> str | None:
    """Why a layer that reads codes does not multiply them; ``why`` one of numbers would not."""
    if not own.is_multiplied and not measured:
        return "the checkpoint has no scale for its input"
    if why is not None and (why == KEEP or not own.is_multiplied):
        return why
    return None if own.blocks is None else _why_not_4_bits(node)


def _check_readers(program: Lowered, nodes: Sequence[fx.Node], codes: Mapping[str, Codes]) -> None:
    """What is stored with the scales of both operands is multiplied, and nothing else."""
    of_layers = [node for node in nodes if str(node.args[1]) in codes]
    found = {str(node.args[1]) for node in of_layers}
    for weight in program.graph_module.graph.find_nodes(op="placeholder"):
        own = codes.get(weight.name)
        if own is None or not own.is_multiplied or not weight.users:
            continue
        others = [user for user in weight.users if user not in of_layers]
        if weight.name not in found or others:
            raise CannotConvert(
                f"{weight.name} is stored in 8 bits, and read by {others[0].target}: only the "
                "weights of linear layers can be multiplied so.",
                where=module_path(others[0]),
                hint="name the checkpoint that is not quantized.",
            )


def weights_of(chosen: Sequence[fx.Node], names: Mapping[str, str]) -> dict[str, str]:
    """By placeholder, what the codes of a weight are called where they are stored apart.

    Args:
        chosen: see :func:`choose`.
        names: of parameters, by placeholder.
    """
    return {name: f"constants.{names[name]}" for name in _weights(chosen)}


def _weights(chosen: Sequence[fx.Node]) -> Iterator[str]:
    for node in chosen:
        weight = node.args[1]
        assert isinstance(weight, fx.Node)
        yield weight.name
