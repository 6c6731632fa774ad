"""Numbers beside half tensors: the network computes what torch does, operator by operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from cp_convert.backends import BACKENDS
from cp_convert.capture.decompose import decompose
from cp_convert.capture.trace import trace
from cp_convert.engine.build import prepare
from cp_convert.engine.lower import lower
from cp_convert.ir.network import Network
from cp_convert.ir.numbers import holds, rounded
from cp_convert.ir.program import Lowered
from cp_convert.prove.replay import replay
from tests.conftest import networks_of, table

pytestmark = pytest.mark.engine
prepare(BACKENDS["tensorrt-rtx"])

aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)
NUMBERS = (0.7, 1.3, 1 / 3, 1e-3, 1e-6)
Operator = Callable[[Tensor, Tensor, float], Tensor]


class Computes(nn.Module):
    """An operator with every number, in both half types: ``x``, and ``y`` that is positive."""

    def __init__(self, operator: Operator, numbers: tuple[float, ...] = NUMBERS) -> None:
        super().__init__()
        self.operator, self.numbers = operator, numbers

    def forward(self, x: Tensor, y: Tensor, x_b: Tensor, y_b: Tensor) -> tuple[Tensor, ...]:
        pairs = ((x, y), (x_b, y_b))
        return tuple(self.operator(a, b, c) for a, b in pairs for c in self.numbers)


def values() -> dict[str, Tensor]:
    """32 x 32 numbers, the scalars' own neighbours among them."""
    torch.manual_seed(0)
    x, y = torch.randn(32, 32), torch.rand(32, 32) * 3 + 0.1
    x[0, : len(NUMBERS)] = y[0, : len(NUMBERS)] = torch.tensor(NUMBERS)
    pairs = {"": torch.float16, "_b": torch.bfloat16}
    return {f"{n}{end}": v.to(t) for end, t in pairs.items() for n, v in (("x", x), ("y", y))}


def lowered(module: nn.Module, inputs: dict[str, Tensor]) -> Lowered:
    return lower(decompose(trace(module, inputs, {})[0], table()))


def network(module: nn.Module, inputs: dict[str, Tensor]) -> Network:
    (only,) = networks_of(lowered(module, inputs), 1)
    return only


def roundings(ours: Tensor, theirs: Tensor) -> float:
    """By how many units in the last place of the larger numbers' type they differ at most."""
    ours, theirs = ours.nan_to_num(), theirs.nan_to_num()
    if not ours.dtype.is_floating_point:
        return float((ours != theirs).sum()) * 1e9
    unit = torch.finfo(ours.dtype).eps * theirs.double().abs().clamp_min(1e-4)
    return float(((ours.double() - theirs.double()).abs() / unit).max())


def check(
    operator: Operator,
    truth: Operator | None = None,
    *,
    allowed: float = 0,
    numbers: tuple[float, ...] = NUMBERS,
) -> None:
    inputs = values()
    (ours,) = replay([network(Computes(operator, numbers), inputs)], inputs)
    theirs = Computes(truth or operator, numbers)(**inputs)
    for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        number = numbers[index % len(numbers)]
        assert one.dtype == other.dtype
        if allowed:
            assert roundings(one, other) <= allowed, (number, one.dtype)
        else:
            assert torch.equal(one.nan_to_num(), other.nan_to_num()), (number, one.dtype)


def with_numbers() -> Iterator[Any]:
    """Every core pointwise operator that takes a number, as torch's registry tells."""
    for name in sorted(dir(aten)):
        packet = getattr(aten, name)
        for overload in packet.overloads() if hasattr(packet, "overloads") else ():
            operator = getattr(packet, overload)
            kinds = [str(a.type) for a in operator._schema.arguments]
            core = {torch.Tag.core, torch.Tag.pointwise} <= set(operator.tags)
            if core and not operator._schema.is_mutable and any("number" in k for k in kinds):
                yield operator


OF_INTEGERS = {"aten::bitwise_and", "aten::bitwise_or", "aten::bitwise_xor"}
TABLE = [op for op in with_numbers() if op._schema.name not in OF_INTEGERS]


def called(operator: Any) -> Operator:
    """The operator with its tensors and, for every number that it wants, ``c``.

    Left at their defaults are those that Torch-TensorRT ignores, whatever the precision: elu's
    scales, and alpha where it is no keyword.
    """

    def call(x: Tensor, y: Tensor, c: float) -> Tensor:
        tensors = iter((y if operator._schema.name == "aten::pow" else x, y))
        args: list[Any] = []
        named: dict[str, Any] = {}
        for argument in operator._schema.arguments:
            value: Any = "floor"
            if str(argument.type) == "Tensor":
                value = next(tensors)
            elif "number" in str(argument.type):
                # An upper limit must not be below the lower one.
                value = c + 1 if argument.name in ("max", "max_val") else c
            is_alpha = argument.name == "alpha" and operator._overloadname == "Scalar"
            if is_alpha or argument.name in ("scale", "input_scale"):
                continue
            if argument.kwarg_only:
                named[argument.name] = value
            else:
                args.append(value)
        result: Tensor = operator(*args, **named)
        return result

    return call


ON_CUDA = ("aten::add", "aten::sub")
"""CUDA's kernels do not round the number, the CPU's do."""
BY_QUOTIENT = ("aten::fmod", "aten::remainder")
"""``x - trunc(x / c) * c``: exact while the quotient is small enough for float32."""


def in_float32(operator: Operator) -> Operator:
    return lambda x, y, c: operator(x.float(), y.float(), c).to(x.dtype)


@pytest.mark.parametrize("operator", TABLE, ids=lambda op: f"{op._schema.name}.{op._overloadname}")
def test_every_operator_of_the_table(operator: Any) -> None:
    call, name = called(operator), operator._schema.name
    if name in ON_CUDA:
        # alpha: torch fuses the product and the sum.
        check(call, truth=in_float32(call), allowed=operator._overloadname == "Tensor")
    elif name in BY_QUOTIENT:
        check(call, numbers=NUMBERS[:4], allowed=1)
    else:
        check(call)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("operator", [torch.add, torch.sub])
def test_sums_differ_from_the_cpus_by_the_numbers_own_rounding(
    operator: Any, dtype: torch.dtype
) -> None:
    x = next(v for v in values().values() if v.dtype == dtype)
    for c in NUMBERS:
        sums = operator(x.float(), c)
        unit = torch.finfo(dtype).eps * (sums.abs() + torch.finfo(dtype).smallest_normal)
        apart = (operator(x, c).float() - sums.to(dtype).float()).abs()
        assert bool((apart <= abs(rounded(c, dtype) - c) + unit).all())


def test_the_table_is_what_torch_knows() -> None:
    """A new core operator with a number has to be looked at."""
    assert {op._schema.name.split("::")[1] for op in TABLE} == {
        "add", "clamp", "div", "elu", "eq", "fmod", "ge", "gt", "hardtanh", "le", "leaky_relu",
        "lt", "mul", "ne", "pow", "remainder", "sub",
    }  # fmt: skip


EXACT: dict[str, Operator] = {
    "div by a number": lambda x, y, c: x / c,
    "number by a tensor": lambda x, y, c: c / y,
    "floor_divide": lambda x, y, c: torch.floor_divide(x, c),
    "div, floor": lambda x, y, c: torch.div(x, c, rounding_mode="floor"),
    "clamp_max": lambda x, y, c: x.clamp_max(c),
    "where": lambda x, y, c: torch.where(x > y, x, c),
    "masked_fill": lambda x, y, c: x.masked_fill(x > y, c),
    "addcdiv": lambda x, y, c: torch.addcdiv(x, x, y, value=c),
    "threshold": lambda x, y, c: functional.threshold(x, c, 0.3),
    "softshrink": lambda x, y, c: functional.softshrink(x, c),
    "celu": lambda x, y, c: functional.celu(x, max(c, 0.01)),
    "pad": lambda x, y, c: functional.pad(x, (1, 1), value=c),
    "in a tensor without dimensions": lambda x, y, c: x * torch.tensor(c),
    "by a tensor without dimensions": lambda x, y, c: x / torch.tensor(c),
    "a half tensor made of a number": lambda x, y, c: x * torch.full((1,), c, dtype=x.dtype),
    "integer": lambda x, y, c: x * 2049,
    "too large": lambda x, y, c: (x * 1e5) * 1e-5,
    "log2": lambda x, y, c: y.log2(),
    "log10": lambda x, y, c: y.log10(),
    "atan2": lambda x, y, c: torch.atan2(x, y),
    "trunc": lambda x, y, c: (x * 3).trunc(),
    "var": lambda x, y, c: x.var(-1),
    "rms_norm": lambda x, y, c: functional.rms_norm(x, (32,), eps=c),
    "softmax": lambda x, y, c: (x * c).softmax(-1),
}


@pytest.mark.parametrize("name", EXACT)
def test_what_becomes_of_other_operators(name: str) -> None:
    check(EXACT[name])


NEARLY: dict[str, tuple[Operator, float]] = {
    # The CPU fuses a product and a sum.
    "addcmul": (lambda x, y, c: torch.addcmul(x, y, x, value=c), 1),
    "lerp": (lambda x, y, c: torch.lerp(x, y, c), 1),
    # x ** 3 is two rounded products in bfloat16.
    "gelu by hand": (
        lambda x, y, c: 0.5 * y * (1 + torch.tanh(0.79788456 * (y + 0.044715 * y**3))), 2,
    ),
    # log(1 + exp(c x)) / c, replayed as three functions.
    "softplus": (lambda x, y, c: functional.softplus(y, beta=c + 0.5), 3),
}  # fmt: skip


@pytest.mark.parametrize("name", NEARLY)
def test_what_differs_by_a_rounding(name: str) -> None:
    operator, allowed = NEARLY[name]
    check(operator, allowed=allowed)


WIDE: dict[str, Operator] = {
    "addmm": lambda x, y, c: torch.addmm(x, y, y, beta=c, alpha=c + 1),
    "attention": lambda x, y, c: functional.scaled_dot_product_attention(
        x.view(1, 2, 16, 32), y.view(1, 2, 16, 32), x.view(1, 2, 16, 32), scale=c
    ),
    "attention's own scale": lambda x, y, c: functional.scaled_dot_product_attention(
        x.view(1, 2, 16, 32), y.view(1, 2, 16, 32), x.view(1, 2, 16, 32)
    ),
    "batch_norm": lambda x, y, c: functional.batch_norm(x, y[0], y[1], eps=c),
    "clamp": lambda x, y, c: x.clamp(-c, c),
    "add": lambda x, y, c: x + c,
    "mul": lambda x, y, c: x * c,
}


@pytest.mark.parametrize("name", WIDE)
def test_no_number_is_rounded_in_the_network(name: str) -> None:
    """In float32 arithmetic the network is the float32 model: a rounded number would show."""
    inputs = values()
    (ours,) = replay([network(Computes(WIDE[name]), inputs)], inputs, widen=True)
    theirs = Computes(WIDE[name])(**{n: v.float() for n, v in inputs.items()})
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * other.abs().max().item())


UNCHANGED: dict[str, Operator] = {
    "exact": lambda x, y, c: (x * 0.75 + 0.5) / 3 - 1000,
    "bool": lambda x, y, c: x * True,
    "no numbers": lambda x, y, c: x * y + x / y,
    "pow": lambda x, y, c: y**0.7 + y**2,
    "attributes": lambda x, y, c: functional.leaky_relu(functional.elu(x, 0.7), 0.1),
    "comparisons": lambda x, y, c: (x > 0.7) | (x <= 0.1),
    "norm": lambda x, y, c: functional.layer_norm(x, (32,), eps=1e-6),
    "gelu": lambda x, y, c: functional.gelu(x, approximate="tanh"),
}


@pytest.mark.parametrize("name", UNCHANGED)
def test_what_is_right_already_is_left_alone(name: str) -> None:
    program = lowered(Computes(UNCHANGED[name], (0.0,)), values())
    casts = program.graph_module.graph.find_nodes(op="call_function", target=aten._to_copy.default)
    assert not casts


def test_what_a_type_holds() -> None:
    assert all(holds(n, torch.float16) for n in (0.75, -2048, True, float("inf"), float("nan")))
    assert not any(holds(n, torch.float16) for n in (0.7, 2049, 1e5, 1e-8))
    assert holds(1000, torch.bfloat16)
    assert not holds(1001, torch.bfloat16)
    assert rounded(1e5, torch.float16) == float("inf")
    assert rounded(0.7, torch.bfloat16) == 0.69921875
