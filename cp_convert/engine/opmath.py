"""Numbers beside half-precision tensors, as torch computes with them: in float32, rounded once.

torch calls it *opmath*: ``x * 0.7`` with a half ``x`` is ``half(float(x) * 0.7)``. Torch-TensorRT's
converters make the number a constant of the tensor's type, which is another number (0.7 becomes
0.7002 in float16, 0.6992 in bfloat16), so the program says what is meant::

    mul(x, 0.7)  ->  half(mul(float(x), 0.7))

The program is changed and not the converters, so that there is one place for all operators, and
what is proven is what is built. torch rounds after every operator, and so does this: a chain of
operators is not computed in float32 as a whole.

What stays as it is, because the result is the same to the bit:

- ``+ - * /`` with a number that the half type holds. TensorRT rounds the exact result once; torch
  rounds to float32 and then to half, which comes to the same: with at least 2p + 2 bits in the
  wider type (float32 has 24; p is 11 in float16, 8 in bfloat16) rounding twice is harmless
  (Figueroa, "When is double rounding innocuous?", 1995).
- Activations whose numbers are attributes of the layer, which are float32: leaky_relu, elu,
  hardtanh, hardsigmoid, softplus, gelu; and the epsilon of a normalization layer.
- Tensors that are made of a number in half precision (``full``, ``masked_fill``'s value): torch
  rounds these as well.

Operators differ in what torch does with the number (CPU: measured; CUDA: read in its kernels):

- :data:`_IN_FLOAT32`: the number is not rounded. Two of these need a word. In ``add`` and ``sub``
  the CPU rounds it, and CUDA does not (its functors hold the number as ``opmath_t``); the GPU is
  what counts, and is nearer to what was written. ``clamp`` rounds it on both, which is the same:
  rounding keeps the order, so that ``half(clamp(float(x), c))`` is ``clamp(x, half(c))``.
- :data:`_ROUNDED`: torch rounds the number to the tensor's type (``exp_scalar.to<scalar_t>()``),
  on both. The program then says which number that is, so that it and the network agree in float32
  arithmetic, too. Comparisons would else differ where a value is the number's nearest neighbour.
- :data:`_SEVERAL_LAYERS`: converted to several layers, some with a constant of their own (log2's
  logarithm of 2, atan2's pi): torch rounds once at the end, each of the layers would. These are
  computed in float32 whatever their numbers.
- ``addmm`` with factors: a matrix product in half precision, and the rest in float32.

A tensor without dimensions that is not half is a number, too: torch does not let it decide the
result's type.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor, fx

from ..ir.numbers import Number, holds, rounded
from ..ir.program import HALF, arguments, erase_dead
from ..ir.writer import Writer

aten: Final = torch.ops.aten
_CAST: Final = aten._to_copy.default

_IN_FLOAT32: Final = (
    aten.add.Tensor,
    aten.add.Scalar,
    aten.sub.Tensor,
    aten.sub.Scalar,
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.div.Tensor,
    aten.div.Scalar,
    aten.floor_divide.default,
    aten.floor_divide.Scalar,
    aten.clamp.default,
    torch.ops.prims.div.default,
)
_COMPARISONS: Final = tuple(
    getattr(packet, overload)
    for packet in (aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge)
    for overload in ("Scalar", "Tensor")
)
_ROUNDED: Final = (
    *_COMPARISONS,
    aten.pow.Tensor_Scalar,
    aten.pow.Scalar,
    aten.remainder.Scalar,
    aten.remainder.Tensor,
    aten.fmod.Scalar,
    aten.fmod.Tensor,
    aten.constant_pad_nd.default,
)
_SEVERAL_LAYERS: Final = (
    aten.remainder.Scalar,
    aten.remainder.Tensor,
    aten.fmod.Scalar,
    aten.fmod.Tensor,
    aten.div.Tensor_mode,
    aten.div.Scalar_mode,
    aten.trunc.default,
    aten.log2.default,
    aten.log10.default,
    aten.log1p.default,
    aten.expm1.default,
    aten.atan2.default,
    aten.batch_norm.default,
)


def in_opmath(module: fx.GraphModule) -> None:
    """Rewrite ``module``'s graph, in place, so that numbers beside half tensors mean as in torch.

    Args:
        module: lowered, in the operators that have converters.
    """
    graph = module.graph
    writer = Writer(graph)
    for node in list(graph.nodes):
        if node.op == "get_attr" and "val" not in node.meta:
            node.meta["val"] = writer.mode.from_tensor(_held(module, node))
        half = _half(node)
        if half is None:
            continue
        writer.origin = node
        if node.target in _ROUNDED:
            _round_numbers(node, half)
        if node.target is aten.addmm.default and _has_factors(node):
            _addmm_apart(node, writer)
        elif _needs_float32(node, half, module):
            _widen(node, writer)
    erase_dead(graph)


def _held(module: fx.GraphModule, node: fx.Node) -> Tensor:
    *parents, name = str(node.target).split(".")
    value: Tensor = getattr(module.get_submodule(".".join(parents)), name)
    return value


def _half(node: fx.Node) -> torch.dtype | None:
    """The half-precision type among the operands of an operator."""
    if node.op != "call_function":
        return None
    return next((v.dtype for v in map(_value, node.all_input_nodes) if _is_half(v)), None)


def _value(node: fx.Node) -> Any:
    return node.meta.get("val")


def _is_half(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in HALF


def _numbers(node: fx.Node) -> Iterator[tuple[str, Number]]:
    """The arguments, by name, that could as well be tensors, and are Python numbers."""
    target: Any = node.target
    kinds = {argument.name: str(argument.type) for argument in target._schema.arguments}
    for name, value in arguments(node).items():
        if isinstance(value, int | float) and ("number" in kinds[name] or kinds[name] == "Tensor"):
            yield name, value


def _round_numbers(node: fx.Node, dtype: torch.dtype) -> None:
    numbers = {name: rounded(number, dtype) for name, number in _numbers(node)}
    target: Any = node.target
    names = [argument.name for argument in target._schema.arguments]
    node.args = tuple(numbers.get(n, a) for n, a in zip(names, node.args, strict=False))
    node.kwargs = {n: numbers.get(n, a) for n, a in node.kwargs.items()}


def _needs_float32(node: fx.Node, dtype: torch.dtype, module: fx.GraphModule) -> bool:
    if not isinstance(_value(node), Tensor):
        return False
    if node.target in _SEVERAL_LAYERS:
        return True
    if node.target not in _IN_FLOAT32:
        return False
    numbers = dict(_numbers(node))
    if numbers.pop("alpha", 1) not in (1, -1):  # a product, rounded, before the sum
        return True
    return not all(holds(number, dtype) for number in numbers.values()) or any(
        not _holds_all(n, dtype, module) for n in node.all_input_nodes if _is_number(n)
    )


def _is_number(node: fx.Node) -> bool:
    """Whether it is a tensor without dimensions that is wider than half precision."""
    value = _value(node)
    return isinstance(value, Tensor) and value.dim() == 0 and value.dtype == torch.float32


def _holds_all(node: fx.Node, dtype: torch.dtype, module: fx.GraphModule) -> bool:
    return node.op == "get_attr" and holds(_held(module, node).item(), dtype)


def _widen(node: fx.Node, writer: Writer) -> None:
    """Compute ``node`` in float32, and round its result to the type that it had."""
    value = _value(node)
    with writer.graph.inserting_before(node):
        wide = {
            operand: writer.op(_CAST, operand, dtype=torch.float32)
            for operand in node.all_input_nodes
            if _is_half(_value(operand))
        }
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: wide.get(n, n))
    with writer.graph.inserting_before(node):
        computed = writer.op(node.target, *args, **kwargs)
        is_half = value.dtype in HALF
        result = writer.op(_CAST, computed, dtype=value.dtype) if is_half else computed
    node.replace_all_uses_with(result)


def _has_factors(node: fx.Node) -> bool:
    named = arguments(node)
    return (named["alpha"], named["beta"]) != (1, 1)


def _addmm_apart(node: fx.Node, writer: Writer) -> None:
    """``beta * bias + alpha * (a @ b)``: the product in half precision, the rest in float32."""
    named, dtype = arguments(node), _value(node).dtype
    with writer.graph.inserting_before(node):
        product = writer.op(aten.mm.default, named["mat1"], named["mat2"])
        wide, bias = (writer.op(_CAST, x, dtype=torch.float32) for x in (product, named["self"]))
        scaled = writer.op(aten.mul.Tensor, bias, named["beta"])
        total = writer.op(aten.add.Tensor, scaled, wide, alpha=named["alpha"])
        result = writer.op(_CAST, total, dtype=dtype)
    node.replace_all_uses_with(result)
