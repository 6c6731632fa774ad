"""Linear layers as products of codes of 8 bits: a pure pass over a dense program.

In: a dense program, chosen layers, and their codes and scales. Out: the program, its weights codes.
Before and after, for one scale of each tensor (``s_x`` and ``s_w`` are numbers)::

    linear(x, w, b)    ->    linear(dq(q(x / s_x)), dequantize(codes, s_w), b)

which TensorRT computes as a product of codes (measured: only with constant scales, and with both
operands quantized; anything else is built as well, and computed in half precision). Scales of rows
of the weight, and of tokens, are therefore taken out of the product, where they are exact::

    linear(x, w, b)    ->    linear(dq(q(x / t / 2^-9)), dequantize(codes, s_w)) * r * t + b

``s_w`` is the largest of the rows' scales and ``r[N]`` what each is of it, so that no row of the
product is larger than that of a whole scale; ``t[.., 1]`` makes the token's largest number the
largest code. A factor on the columns of a weight (SmoothQuant) is one on ``x`` before.

NVFP4 is a product of codes as well, with a scale of each block and one of each tensor::

    linear(x, w, b)    ->    linear(dq(q(x, s_x)), dequantize(codes, blocks, s_w), b)

A low rank beside (SVDQuant) is ``+ linear(linear(x, a), b)``.

A weight that is codes in the checkpoint, and whose input has no scale, is ``dequantize(codes)``:
half the bytes as well, and a product in half precision. Codes take the place of the weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any, Final, Protocol

import torch
from torch import Tensor, fx

from ..errors import CannotConvert
from ..ir.nvfp4 import (
    DEQUANTIZE_BLOCKS,
    PAIRS,
    QUANTIZE_DEQUANTIZE_BLOCKS,
    pairs,
    quantize_blocks,
)
from ..ir.program import Lowered, copied, module_of, module_path, tensor_of
from ..ir.quantize import DEQUANTIZE, FP8, LARGEST, QUANTIZE_DEQUANTIZE, STEP, TOKEN_FLOOR, quantize
from ..ir.source import Codes
from ..ir.writer import Writer
from .linear8 import LINEAR
from .scales import scale_of

aten: Final = torch.ops.aten


class Given(Protocol):
    """Where codes and scales come from."""

    def codes(self, node: fx.Node, numbers: Tensor) -> Codes:
        """Of a linear layer, whose weight has these ``numbers`` in the model."""


@dataclass(frozen=True)
class Measured:
    """Scales that the largest magnitudes give.

    Attributes:
        largest: of the layers' inputs, by their names.
        dtype: of the codes. FP8 has one scale for a weight, INT8 one for each of its rows, NVFP4
            one, and one for each block besides.
    """

    largest: Mapping[str, float]
    dtype: torch.dtype = FP8

    def codes(self, node: fx.Node, numbers: Tensor) -> Codes:
        """See :class:`Given`."""
        step = _scale(float(numbers.abs().max()), node, "weight", self.dtype)
        of_input = _scale(self.largest[str(node.args[0])], node, "input", self.dtype)
        if self.dtype == FP8:
            return Codes(quantize(numbers, step, FP8), step, of_input)
        if self.dtype == PAIRS:
            codes, blocks = quantize_blocks(numbers, step)
            return Codes(pairs(codes), step, of_input, blocks=blocks)
        rows = numbers.abs().amax(1).float() / LARGEST[self.dtype]
        rows = torch.where(rows > 0, rows, step)
        return Codes(quantize(numbers.float() / rows[:, None], 1.0, self.dtype), rows, of_input)


@dataclass(frozen=True)
class Stored:
    """Those of a quantized checkpoint.

    Attributes:
        stored: by placeholder of the weight.
        largest: of inputs for which it has no scale, by their names.
    """

    stored: Mapping[str, Codes]
    largest: Mapping[str, float] = field(default_factory=dict)

    def codes(self, node: fx.Node, numbers: Tensor) -> Codes:
        """See :class:`Given`."""
        own = self.stored[str(node.args[1])]
        if own.is_multiplied:
            return own
        largest = self.largest[str(node.args[0])]
        return replace(own, input_scale=_scale(largest, node, "input", own.codes.dtype))


def _scale(largest: float, node: fx.Node, what: str, dtype: torch.dtype) -> float:
    path = module_path(node)
    return scale_of(largest, path, dtype, f"--quantize: the {what} of {path}", "the layer")


def quantized(
    program: Lowered,
    chosen: Sequence[fx.Node],
    given: Given,
    alone: Mapping[str, Codes] | None = None,
) -> tuple[Lowered, dict[str, Codes]]:
    """``program`` with its linear layers in 8 bits; it stays as it is.

    Args:
        program: decomposed and whole.
        chosen: of its linear layers, see :func:`.linear8.choose` and
            :func:`.linear8.stored_layers`.
        given: their codes and scales.
        alone: by placeholder, weights that are codes whether they are multiplied so or not.

    Returns:
        the program, and by the layer's name what its operands are.

    Raises:
        CannotConvert: an input or a weight that is all zeros, or not finite; or rows of codes that
            something else than a linear layer reads.
    """
    names, alone = {node.name for node in chosen}, alone or {}
    products = _Products(program)
    nodes = list(products.graph.find_nodes(op="call_function", target=LINEAR))
    # All before any is replaced: a layer's input may be another's output.
    found = {
        node.name: given.codes(node, program.state[str(node.args[1])].detach())
        for node in nodes
        if node.name in names
    }
    for node in nodes:
        weight = str(node.args[1])
        if node.name in found:
            products.put(node, found[node.name])
        elif weight in alone:
            products.put(node, replace(alone[weight], input_scale=None, by_token=False))
    for name, own in alone.items():
        products.read_as_codes(name, own)
    return products.program(), found


def scales_of_blocks(program: Lowered) -> dict[str, str]:
    """By placeholder of the scales of a weight's blocks, the weight's placeholder."""
    found = program.graph_module.graph.find_nodes(op="call_function", target=DEQUANTIZE_BLOCKS)
    return {str(node.args[1]): str(node.args[0]) for node in found}


class _Products:
    """A graph in which linear layers are replaced, one after the other."""

    def __init__(self, program: Lowered) -> None:
        self.before, self.graph = program, copied(program.graph_module.graph)
        self.write, self.state = Writer(self.graph), dict(program.state)
        self._types = {
            n.name: tensor_of(n).dtype
            for n in self.graph.find_nodes(op="placeholder")
            if n.name in program.state
        }
        self._inputs: dict[tuple[fx.Node, object], tuple[fx.Node, fx.Node | None]] = {}
        self._smooth: dict[tuple[fx.Node, bytes], fx.Node] = {}
        self._weights: dict[str, fx.Node] = {}
        self._blocks: dict[str, fx.Node] = {}
        self._held: dict[str, Tensor] = {}
        self._names: dict[str, str] = {}

    def program(self) -> Lowered:
        """The result."""
        self.graph.lint()
        used = [str(node.target) for node in self.graph.find_nodes(op="get_attr")]
        old = [name for name in used if name not in self._held]
        root = {name: attrgetter(name)(self.before.graph_module) for name in old} | self._held
        outputs = tuple(
            replace(one, node=self._names.get(one.node, one.node)) for one in self.before.outputs
        )
        module = module_of(root, self.graph)
        return replace(self.before, graph_module=module, state=self.state, outputs=outputs)

    def put(self, node: fx.Node, own: Codes) -> None:
        """The product of codes in the place of a linear layer."""
        x, weight, *bias = node.args
        assert isinstance(x, fx.Node) and isinstance(weight, fx.Node)
        like, self.write.origin = self._types[weight.name], node
        with self.graph.inserting_before(node):
            operand, factor = self._input(x, own, like)
            numbers = self._numbers(weight, own, like)
            if factor is None and own.rows is None:
                node.args = (operand, numbers, *bias)
                self._add_low_rank(node, x, own)
                return
            product = self._wide(self.write.op(LINEAR, operand, numbers))
            for one in (self._constant(f"rows_{weight.name}", own.rows), factor):
                product = product if one is None else self.write.op(aten.mul.Tensor, product, one)
            if bias and isinstance(bias[0], fx.Node):
                product = self.write.op(aten.add.Tensor, product, self._wide(bias[0]))
            result = self._as(product, tensor_of(node).dtype)
        node.replace_all_uses_with(result)
        self._names[node.name] = result.name
        self.graph.erase_node(node)

    def _add_low_rank(self, node: fx.Node, x: fx.Node, own: Codes) -> None:
        """What a product of numbers adds to that of codes."""
        if own.low_rank is None:
            return
        dtype, name = tensor_of(node).dtype, node.name
        factors = [self._constant(f"low_rank_{name}", one, dtype) for one in own.low_rank]
        added = self._smoothed(x, own)
        for factor in factors:
            added = self.write.op(LINEAR, added, factor)
        with self.graph.inserting_after(node):
            result = self.write.op(aten.add.Tensor, node, added)
        node.replace_all_uses_with(result, delete_user_cb=lambda user: user is not result)
        self._names[name] = result.name

    def _smoothed(self, x: fx.Node, own: Codes) -> fx.Node:
        """The input, its columns multiplied by the checkpoint's factors."""
        if own.smooth is None:
            return x
        key = x, own.smooth.numpy().tobytes()
        if key not in self._smooth:
            by = self._constant(f"smooth_{x.name}", own.smooth, tensor_of(x).dtype)
            self._smooth[key] = self.write.op(aten.mul.Tensor, x, by)
        return self._smooth[key]

    def _input(self, x: fx.Node, own: Codes, like: torch.dtype) -> tuple[fx.Node, fx.Node | None]:
        """The left operand of the product, and what the product is multiplied with."""
        smooth = None if own.smooth is None else own.smooth.numpy().tobytes()
        key = x, (own.input_scale, own.by_token, smooth, own.codes.dtype, like)
        if key not in self._inputs:
            self._inputs[key] = self._rounded(self._smoothed(x, own), own, like)
        return self._inputs[key]

    def _rounded(self, x: fx.Node, own: Codes, like: torch.dtype) -> tuple[fx.Node, fx.Node | None]:
        op, dtype = self.write.op, own.codes.dtype
        if own.by_token:
            largest = self._wide(op(aten.amax.default, op(aten.abs.default, x), [-1], True))
            largest = op(aten.clamp.default, largest, TOKEN_FLOOR)
            step = op(aten.mul.Tensor, largest, 1 / (LARGEST[dtype] * STEP[dtype]))
            ratio = op(aten.div.Tensor, self._wide(x), step)
            return op(QUANTIZE_DEQUANTIZE, ratio, STEP[dtype], dtype, like), step
        if own.input_scale is not None and own.blocks is not None:
            return op(QUANTIZE_DEQUANTIZE_BLOCKS, x, own.input_scale, like), None
        if own.input_scale is not None:
            return op(QUANTIZE_DEQUANTIZE, x, own.input_scale, dtype, like), None
        return x, None

    def read_as_codes(self, name: str, own: Codes) -> None:
        """What still reads a weight that is codes reads what they stand for."""
        (weight,) = (n for n in self.graph.find_nodes(op="placeholder") if n.name == name)
        users = [u for u in weight.users if u.target not in (DEQUANTIZE, DEQUANTIZE_BLOCKS)]
        if not users:
            return
        first = next(node for node in self.graph.nodes if node in users)
        if own.rows is not None or own.smooth is not None or own.low_rank is not None:
            raise CannotConvert(
                f"{name} is stored in 8 bits by rows, and read by {first.target}: only the weights "
                "of linear layers can be.",
                where=module_path(first),
                hint="name the checkpoint that is not quantized.",
            )
        self.write.origin = first
        with self.graph.inserting_before(first):
            self._weights.pop(name, None)
            numbers = self._numbers(weight, own, self._types[name])
        for user in users:
            user.replace_input_with(weight, numbers)

    def _numbers(self, weight: fx.Node, own: Codes, like: torch.dtype) -> fx.Node:
        """What the codes of a weight stand for; they take its place among the parameters."""
        if weight.name not in self._weights:
            self.state[weight.name] = own.codes
            with self.write.mode:
                value = torch.empty(own.codes.shape, dtype=own.codes.dtype)
            weight.meta = {**weight.meta, "val": value}
            self._weights[weight.name] = (
                self.write.op(DEQUANTIZE, weight, own.step, like)
                if own.blocks is None
                else self.write.op(
                    DEQUANTIZE_BLOCKS, weight, self._beside(weight, own.blocks), own.step, like
                )
            )
        return self._weights[weight.name]

    def _beside(self, weight: fx.Node, blocks: Tensor) -> fx.Node:
        """The scales of a weight's blocks, a parameter of their own: too large for a constant."""
        if weight.name not in self._blocks:
            with self.graph.inserting_after(weight):
                made = self.graph.placeholder(f"{weight.name}_scale")
            with self.write.mode:
                value = torch.empty(blocks.shape, dtype=blocks.dtype)
            made.meta = {**weight.meta, "val": value}
            self._blocks[weight.name], self.state[made.name] = made, blocks
        return self._blocks[weight.name]

    def _constant(
        self, name: str, value: Tensor | None, dtype: torch.dtype = torch.float32
    ) -> fx.Node | None:
        """A table of the program, as an attribute."""
        if value is None:
            return None
        name = f"_{name}"
        if name in self._held:
            name = f"{name}_{len(self._held)}"
        self._held[name] = value.to(dtype)
        node = self.graph.get_attr(name)
        with self.write.mode:
            node.meta["val"] = torch.empty(value.shape, dtype=dtype)
        return node

    def _wide(self, node: fx.Node) -> fx.Node:
        return self._as(node, torch.float32)

    def _as(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        if tensor_of(node).dtype == dtype:
            return node
        cast: Any = aten._to_copy.default
        return self.write.op(cast, node, dtype=dtype)
