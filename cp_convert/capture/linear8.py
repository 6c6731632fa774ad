"""Linear layers in FP8: a pure pass over a dense program, given the scales of their inputs.

Before and after (``s_x`` and ``s_w`` are numbers, one for all of a tensor)::

    linear(x, w, b)    ->    linear(dq(q(x / s_x)), dequantize(codes, s_w), b)

which TensorRT computes as a product of codes (measured: only with constant scales, and with both
operands quantized; anything else is built as well, and computed in half precision). ``codes`` take
the weight's place among the parameters: half the bytes, and no work at run time.

A weight that is codes in the checkpoint, and whose input has no scale, becomes
``linear(x, dequantize(codes, s_w), b)``: half the bytes as well, and a product in half precision.

Which layers are left as they are follows NVIDIA's and SGLang's published recipes for diffusion
transformers: embedders, modulation and the output. Here that is said by structure: layers outside
of the repeated blocks, and layers that compute one vector and not tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Final, Protocol

import torch
from torch import fx

from ..errors import CannotConvert, UsageError
from ..ir.linear8 import Kept
from ..ir.program import Lowered, copied, module_of, module_path, shape, tensor_of
from ..ir.quantize import DEQUANTIZE, FP8, LARGEST, QUANTIZE_DEQUANTIZE, quantize
from ..ir.source import Codes
from ..ir.writer import Writer

LINEAR: Final = torch.ops.aten.linear.default
ALONE: Final = "only its weight is FP8"
"""How the reason begins for a layer that reads codes and multiplies in the precision."""
_STEP: Final = 16
"""Rows and columns of a weight come in multiples of it where FP8 is multiplied."""


def choose(program: Lowered, keep: Sequence[str] = ()) -> tuple[list[fx.Node], tuple[Kept, ...]]:
    """The linear layers that are to multiply codes, and why the others are not.

    Args:
        program: decomposed and whole.
        keep: patterns of module paths that are left as they are, as a shell's.

    Raises:
        UsageError: a pattern that names no linear layer.
        CannotConvert: no layer is left, or ranks have weights of their own.
    """
    if program.own:
        raise CannotConvert("--quantize: every rank has weights of its own here.")
    nodes = list(program.graph_module.graph.find_nodes(op="call_function", target=LINEAR))
    reasons = _reasons(program, nodes, keep)
    kept = tuple(Kept(module_path(n), why) for n, why in reasons.items() if why is not None)
    chosen = [node for node, why in reasons.items() if why is None]
    if not chosen:
        found = sorted({one.reason for one in kept}) or ["there is none"]
        raise CannotConvert(f"--quantize: no linear layer can be quantized: {'; '.join(found)}.")
    return chosen, kept


def _reasons(
    program: Lowered, nodes: Sequence[fx.Node], keep: Sequence[str]
) -> dict[fx.Node, str | None]:
    """Of every linear layer, why it is left as it is; ``None``: it need not be."""
    for pattern in keep:
        if not any(fnmatchcase(module_path(node), pattern) for node in nodes):
            raise UsageError(
                f"--keep {pattern}: there is no linear layer of such a path.",
                hint=f"such as {module_path(nodes[0])}." if nodes else None,
            )
    has_blocks = any(_is_in_a_block(node) for node in nodes)
    return {node: _why_kept(node, program, keep, has_blocks) for node in nodes}


def _is_in_a_block(node: fx.Node) -> bool:
    return any(part.isdigit() for part in module_path(node).split("."))


def _why_kept(node: fx.Node, program: Lowered, keep: Sequence[str], has_blocks: bool) -> str | None:
    path, weight = module_path(node), node.args[1]
    assert isinstance(weight, fx.Node)
    if any(fnmatchcase(path, pattern) for pattern in keep):
        return "--keep"
    if has_blocks and (not _is_in_a_block(node) or "embed" in path):
        return "an embedder or the output"
    if len(shape(node.args[0])) < 3:
        return "modulation: it computes a vector, not tokens"
    if weight.name not in program.state or any(u.target is not LINEAR for u in weight.users):
        return "its weight is computed, or read elsewhere too"
    if any(size % _STEP for size in shape(weight)):
        return f"its weight's sizes are no multiples of {_STEP}"
    return None


def quantized(
    program: Lowered,
    chosen: Sequence[fx.Node],
    given: Given,
    alone: Mapping[str, Codes] | None = None,
) -> tuple[Lowered, dict[str, tuple[float, float]]]:
    """``program`` with its linear layers in FP8; it stays as it is.

    Args:
        program: decomposed and whole.
        chosen: of its linear layers, see :func:`choose` and :func:`stored_layers`.
        given: their scales.
        alone: by placeholder, weights that become codes while their readers go on as they did.

    Returns:
        the program, and by the layer's name the scales of its input and its weight.

    Raises:
        CannotConvert: an input or a weight that is all zeros, or not finite.
    """
    names = {node.name for node in chosen}
    graph, state = copied(program.graph_module.graph), dict(program.state)
    write, done, scales = Writer(graph), _Done(), dict[str, tuple[float, float]]()
    for node in graph.find_nodes(op="call_function", target=LINEAR):
        if node.name in names:
            write.origin = node
            scales[node.name] = _into_codes(write, node, state, given, done)
    for weight in graph.find_nodes(op="placeholder"):
        if alone is not None and weight.name in alone:
            _read_as_codes(write, weight, alone[weight.name], state)
    graph.lint()
    module = module_of(program.graph_module, graph)
    return replace(program, graph_module=module, state=state), scales


class Given(Protocol):
    """Where codes and scales come from."""

    def input_scale(self, node: fx.Node) -> float:
        """Of a linear layer's input."""

    def weight(self, node: fx.Node, numbers: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Codes and scale of its weight, whose ``numbers`` the model has."""


@dataclass(frozen=True)
class Measured:
    """Scales that the largest magnitudes give.

    Attributes:
        largest: of the layers' inputs, by their names.
    """

    largest: Mapping[str, float]

    def input_scale(self, node: fx.Node) -> float:
        """See :class:`Given`."""
        return _scale(self.largest[str(node.args[0])], node, "input")

    def weight(self, node: fx.Node, numbers: torch.Tensor) -> tuple[torch.Tensor, float]:
        """See :class:`Given`."""
        scale = _scale(float(numbers.abs().max()), node, "weight")
        return quantize(numbers, scale, FP8), scale


@dataclass(frozen=True)
class Stored:
    """Those of a quantized checkpoint.

    Attributes:
        codes: by placeholder of the weight.
        largest: of inputs for which it has no scale, by their names.
    """

    codes: Mapping[str, Codes]
    largest: Mapping[str, float] = field(default_factory=dict)

    def input_scale(self, node: fx.Node) -> float:
        """See :class:`Given`."""
        own = self.codes[str(node.args[1])].input_scale
        return _scale(self.largest[str(node.args[0])], node, "input") if own is None else own

    def weight(self, node: fx.Node, numbers: torch.Tensor) -> tuple[torch.Tensor, float]:
        """See :class:`Given`."""
        own = self.codes[str(node.args[1])]
        return own.codes, own.weight_scale


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
    reasons, kept = _reasons(program, nodes, keep), dict[fx.Node, str]()
    for node in nodes:
        own = codes.get(str(node.args[1]))
        if own is None:
            kept[node] = "as in the checkpoint"
        elif own.input_scale is None and not measured:
            kept[node] = f"{ALONE}: the checkpoint has no scale for its input"
        elif own.input_scale is None and (why := reasons[node]) is not None:
            kept[node] = f"{ALONE}: {why}"
    told = tuple(Kept(module_path(node), why) for node, why in kept.items())
    return [node for node in nodes if node not in kept], told


def _check_readers(program: Lowered, nodes: Sequence[fx.Node], codes: Mapping[str, Codes]) -> None:
    """What is stored with the scales of both operands is multiplied, and nothing else."""
    of_layers = [node for node in nodes if str(node.args[1]) in codes]
    found = {str(node.args[1]) for node in of_layers}
    for weight in program.graph_module.graph.find_nodes(op="placeholder"):
        own = codes.get(weight.name)
        if own is None or own.input_scale is None or not weight.users:
            continue
        others = [user for user in weight.users if user not in of_layers]
        if weight.name not in found or others:
            raise CannotConvert(
                f"{weight.name} is stored in FP8, and read by {others[0].target}: only the weights "
                "of linear layers can be multiplied so.",
                where=module_path(others[0]),
                hint="name the checkpoint that is not quantized.",
            )


class _Done:
    """Inputs and weights that several layers share."""

    def __init__(self) -> None:
        self.inputs: dict[tuple[fx.Node, float], fx.Node] = {}
        self.weights: dict[fx.Node, tuple[fx.Node, float]] = {}


def _into_codes(
    write: Writer,
    node: fx.Node,
    state: dict[str, torch.Tensor],
    given: Given,
    done: _Done,
) -> tuple[float, float]:
    x, weight, *bias = node.args
    assert isinstance(x, fx.Node) and isinstance(weight, fx.Node)
    with write.graph.inserting_before(node):
        scale = given.input_scale(node)
        if (x, scale) not in done.inputs:
            done.inputs[x, scale] = write.op(QUANTIZE_DEQUANTIZE, x, scale, FP8)
        if weight not in done.weights:
            codes, own = given.weight(node, state[weight.name].detach())
            done.weights[weight] = _numbers(write, weight, codes, own, state), own
    numbers, own = done.weights[weight]
    node.args = (done.inputs[x, scale], numbers, *bias)
    return scale, own


def _read_as_codes(
    write: Writer, weight: fx.Node, own: Codes, state: dict[str, torch.Tensor]
) -> None:
    """What still reads the weight itself reads what its codes stand for."""
    users = [user for user in weight.users if user.target is not DEQUANTIZE]
    if not users:
        return
    write.origin = next(node for node in write.graph.nodes if node in users)
    with write.graph.inserting_before(write.origin):
        numbers = _numbers(write, weight, own.codes, own.weight_scale, state)
    for user in users:
        user.replace_input_with(weight, numbers)


def _numbers(
    write: Writer,
    weight: fx.Node,
    codes: torch.Tensor,
    scale: float,
    state: dict[str, torch.Tensor],
) -> fx.Node:
    """What the codes of a weight stand for; they take its place among the parameters."""
    like = tensor_of(weight).dtype
    state[weight.name] = codes
    with write.mode:
        weight.meta = {**weight.meta, "val": torch.empty(codes.shape, dtype=codes.dtype)}
    return write.op(DEQUANTIZE, weight, scale, like)


def _scale(largest: float, node: fx.Node, what: str) -> float:
    if not 0 < largest < float("inf"):
        raise CannotConvert(
            f"--quantize: the {what} of {module_path(node)} has no scale: its largest magnitude "
            f"is {largest}.",
            where=module_path(node),
            hint="--keep leaves the layer as it is; --calibration names other inputs.",
        )
    return largest / LARGEST[FP8]


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
