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

*Scales apart.* Constants of two blocks differ, and so would their engines. Where blocks are to
share one, scales are parameters, and constants ``c`` powers of two that are the same everywhere::

    linear(x, w, b)    ->    linear(dq(q(x / (s_x / c), c)), dequantize(codes, c)) * s + b

with ``s = (s_x / c) (s_w / c)``, of a whole tensor or of rows.

The codes are the same: ``c`` changes no digit. Both operands lie between -1 and 1 then, so that no
half-precision sum is too large, whatever the scales are. NVFP4 has the scales of tensors so, and a
weight alone is ``dequantize(codes, c) * (s_w / c)``, the same numbers as before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, Final

import torch
from torch import Tensor, fx

from ..errors import CannotConvert
from ..ir.nvfp4 import DEQUANTIZE_BLOCKS, PAIRS, QUANTIZE_DEQUANTIZE_BLOCKS, STEP_OF_ALL
from ..ir.program import Lowered, copied, module_of, module_path, tensor_of
from ..ir.quantize import DEQUANTIZE, LARGEST, QUANTIZE_DEQUANTIZE, STEP, TOKEN_FLOOR
from ..ir.source import Codes
from ..ir.writer import Writer
from .given8 import Given as Given
from .given8 import Measured as Measured
from .given8 import Stored as Stored
from .linear8 import LINEAR
from .scales import check_products
from .tables8 import Tables

aten: Final = torch.ops.aten
_CONSTANT: Final = {**STEP, PAIRS: STEP_OF_ALL}
"""What a code of 1 stands for where scales are apart, by the type of codes."""


@dataclass(frozen=True)
class Products:
    """A program whose linear layers are in 8 bits.

    Attributes:
        program: itself.
        codes: by the layer's name, what its operands are.
        apart: by placeholder of a scale that is a parameter, the weight's placeholder, and what it
            is of that layer.
    """

    program: Lowered
    codes: dict[str, Codes]
    apart: dict[str, tuple[str, str]]


def quantized(
    program: Lowered,
    chosen: Sequence[fx.Node],
    given: Given,
    alone: Mapping[str, Codes] | None = None,
    *,
    apart: bool = False,
) -> Products:
    """``program`` with its linear layers in 8 bits; it stays as it is.

    Args:
        program: decomposed and whole.
        chosen: of its linear layers, see :func:`.linear8.choose` and
            :func:`.linear8.stored_layers`.
        given: their codes and scales.
        alone: by placeholder, weights that are codes whether they are multiplied so or not.
        apart: whether scales are parameters, so that equal blocks have equal constants.

    Raises:
        CannotConvert: an input or a weight that is all zeros, or not finite, or whose scale makes
            it so; or rows of codes that something else than a linear layer reads.
    """
    names, alone = {node.name for node in chosen}, alone or {}
    products = _Products(program, apart)
    nodes = list(products.graph.find_nodes(op="call_function", target=LINEAR))
    # All before any is replaced: a layer's input may be another's output.
    found = {
        node.name: given.codes(node, program.state[str(node.args[1])].detach())
        for node in nodes
        if node.name in names
    }
    for node in nodes:
        weight = str(node.args[1])
        stored = _alone(alone[weight]) if weight in alone else None
        if (own := found.get(node.name, stored)) is not None:
            like = program.state[weight].dtype
            check_products(own, like, module_path(node), apart=apart)
            products.put(node, own)
    for name, own in alone.items():
        products.read_as_codes(name, _alone(own))
    return Products(products.program(), found, products.tables.apart)


def _alone(own: Codes) -> Codes:
    """A weight that is codes, and is not multiplied as such."""
    return replace(own, input_scale=None, by_token=False)


def scales_of_blocks(program: Lowered) -> dict[str, str]:
    """By placeholder of the scales of a weight's blocks, the weight's placeholder."""
    found = program.graph_module.graph.find_nodes(op="call_function", target=DEQUANTIZE_BLOCKS)
    return {str(node.args[1]): str(node.args[0]) for node in found}


class _Products:
    """A graph in which linear layers are replaced, one after the other."""

    def __init__(self, program: Lowered, apart: bool) -> None:
        self.before, self.graph = program, copied(program.graph_module.graph)
        self.write, self.state = Writer(self.graph), dict(program.state)
        self.apart, self.tables = apart, Tables(self.write, self.state)
        self._types = {
            n.name: tensor_of(n).dtype
            for n in self.graph.find_nodes(op="placeholder")
            if n.name in program.state
        }
        self._inputs: dict[tuple[fx.Node, object], tuple[fx.Node, fx.Node | None]] = {}
        self._smooth: dict[tuple[fx.Node, bytes], fx.Node] = {}
        self._weights: dict[tuple[str, bool], fx.Node] = {}
        self._names: dict[str, str] = {}

    def program(self) -> Lowered:
        """The result."""
        self.graph.lint()
        used = [str(node.target) for node in self.graph.find_nodes(op="get_attr")]
        held = self.tables.held
        old = [name for name in used if name not in held]
        root = {name: attrgetter(name)(self.before.graph_module) for name in old} | held
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
            operand, factor = self._input(x, own, like, weight, self._block(node))
            numbers = self._numbers(weight, own, like)
            outside = self._outside(weight, own)
            added = self._low_rank(x, own, weight, node)
            if factor is None and outside is None:
                node.args = (operand, numbers, *bias)
                self._plus(node, added)
                return
            product = self._wide(self.write.op(LINEAR, operand, numbers))
            for one in (outside, factor):
                product = product if one is None else self.write.op(aten.mul.Tensor, product, one)
            if bias and isinstance(bias[0], fx.Node):
                product = self.write.op(aten.add.Tensor, product, self._wide(bias[0]))
            result = self._as(product, tensor_of(node).dtype)
            if added is not None:
                result = self.write.op(aten.add.Tensor, result, added)
        node.replace_all_uses_with(result)
        self._names[node.name] = result.name
        self.graph.erase_node(node)

    def _block(self, node: fx.Node) -> str:
        """Where scales are apart, the numbered module that it is in: codes do not leave it.

        A piece that is handed what codes stand for (of a text, which all blocks read) would
        multiply that, in half precision.
        """
        path = module_path(node).split(".") if self.apart else []
        count = next((n for n, part in enumerate(path) if part.isdigit()), -1) + 1
        return ".".join(path[:count])

    def _outside(self, weight: fx.Node, own: Codes) -> fx.Node | None:
        """What the product of codes is multiplied with: scales of rows, or all that are apart."""
        if not self.apart:
            rows = own.rows
            return None if rows is None else self.tables.constant(f"rows_{weight.name}", rows)
        if not own.is_multiplied:
            return None
        constant = _CONSTANT[own.codes.dtype]
        of_input = 1.0 if own.input_scale is None else own.input_scale / constant
        scale = _vector(own.weight_scale, of_input / constant)
        return self.tables.parameter(weight, scale, "scale")

    def _low_rank(self, x: fx.Node, own: Codes, weight: fx.Node, node: fx.Node) -> fx.Node | None:
        """What a product of numbers adds to that of codes."""
        if own.low_rank is None:
            return None
        added, dtype = self._smoothed(x, own, weight), tensor_of(node).dtype
        for what, factor in zip(("low_rank_a", "low_rank_b"), own.low_rank, strict=True):
            table = self._table(weight, what, f"low_rank_{node.name}", factor.to(dtype))
            added = self.write.op(LINEAR, added, table)
        return added

    def _plus(self, node: fx.Node, added: fx.Node | None) -> None:
        """``node + added`` in the place of ``node``."""
        if added is None:
            return
        with self.graph.inserting_after(node):
            result = self.write.op(aten.add.Tensor, node, added)
        node.replace_all_uses_with(result, delete_user_cb=lambda user: user is not result)
        self._names[node.name] = result.name

    def _smoothed(self, x: fx.Node, own: Codes, weight: fx.Node) -> fx.Node:
        """The input, its columns multiplied by the checkpoint's factors."""
        if own.smooth is None:
            return x
        key = x, own.smooth.numpy().tobytes()
        if key not in self._smooth:
            numbers = own.smooth.to(tensor_of(x).dtype)
            by = self._table(weight, "smooth", f"smooth_{x.name}", numbers)
            self._smooth[key] = self.write.op(aten.mul.Tensor, x, by)
        return self._smooth[key]

    def _input(
        self, x: fx.Node, own: Codes, like: torch.dtype, weight: fx.Node, block: str
    ) -> tuple[fx.Node, fx.Node | None]:
        """The left operand of the product, and what the product is multiplied with."""
        smooth = None if own.smooth is None else own.smooth.numpy().tobytes()
        key = x, (own.input_scale, own.by_token, smooth, own.codes.dtype, like, block)
        if key not in self._inputs:
            smoothed = self._smoothed(x, own, weight)
            self._inputs[key] = self._rounded(smoothed, own, like, weight)
        return self._inputs[key]

    def _rounded(
        self, x: fx.Node, own: Codes, like: torch.dtype, weight: fx.Node
    ) -> tuple[fx.Node, fx.Node | None]:
        op, dtype = self.write.op, own.codes.dtype
        if own.by_token:
            largest = self._wide(op(aten.amax.default, op(aten.abs.default, x), [-1], True))
            largest = op(aten.clamp.default, largest, TOKEN_FLOOR)
            step = op(aten.mul.Tensor, largest, 1 / (LARGEST[dtype] * STEP[dtype]))
            ratio = op(aten.div.Tensor, self._wide(x), step)
            return op(QUANTIZE_DEQUANTIZE, ratio, STEP[dtype], dtype, like), step
        if own.input_scale is None:
            return x, None
        scale = own.input_scale
        if self.apart:
            constant = _CONSTANT[dtype]
            step = self.tables.parameter(weight, _vector(scale, 1 / constant), "input_scale")
            # In float32, the wider of the two. A cast before would be one of what all blocks read.
            x, scale = op(aten.div.Tensor, x, step), constant
        if own.blocks is not None:
            return op(QUANTIZE_DEQUANTIZE_BLOCKS, x, scale, like), None
        return op(QUANTIZE_DEQUANTIZE, x, scale, dtype, like), None

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
            self._weights.pop((name, False), None)
            numbers = self._numbers(weight, own, self._types[name])
        for user in users:
            user.replace_input_with(weight, numbers)

    def _numbers(self, weight: fx.Node, own: Codes, like: torch.dtype) -> fx.Node:
        """What the codes of a weight stand for; they take its place among the parameters.

        Where scales are apart, and the product is of codes, it is multiplied by them afterwards.
        """
        key = weight.name, own.is_multiplied
        if key in self._weights:
            return self._weights[key]
        self.state[weight.name] = own.codes
        weight.meta = {**weight.meta, "val": self.tables.value(own.codes)}
        step, alone = own.step, self.apart and not own.is_multiplied
        step = _CONSTANT[own.codes.dtype] if self.apart else step
        given = () if own.blocks is None else (self.tables.blocks(weight, own.blocks),)
        target: Any = DEQUANTIZE if own.blocks is None else DEQUANTIZE_BLOCKS
        found = self.write.op(target, weight, *given, step, torch.float32 if alone else like)
        if alone:
            scale = _vector(own.weight_scale, 1 / step)
            scale = scale if scale.numel() == 1 else scale[:, None]
            scale_node = self.tables.parameter(weight, scale, "scale")
            found = self._as(self.write.op(aten.mul.Tensor, found, scale_node), like)
        self._weights[key] = found
        return found

    def _table(self, weight: fx.Node, what: str, name: str, value: Tensor) -> fx.Node:
        """Numbers beside a weight that are few, but not the same in every block."""
        if self.apart:
            return self.tables.parameter(weight, value, what)
        return self.tables.constant(name, value)

    def _wide(self, node: fx.Node) -> fx.Node:
        return self._as(node, torch.float32)

    def _as(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        if tensor_of(node).dtype == dtype:
            return node
        cast: Any = aten._to_copy.default
        return self.write.op(cast, node, dtype=dtype)


def _vector(scale: float | Tensor, by: float) -> Tensor:
    """``scale * by``, of all rows or of each, float32."""
    return torch.as_tensor(scale, dtype=torch.float32).reshape(-1).double().mul(by).float()
