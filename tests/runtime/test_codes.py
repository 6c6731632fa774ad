"""Quantizers as the torch executor computes them: the same codes, and products of them."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from cp_convert.capture.decompose import decompose
from cp_convert.capture.linear8 import choose
from cp_convert.capture.products8 import Measured, quantized
from cp_convert.capture.trace import trace
from cp_convert.ir.nvfp4 import BLOCK_QUANTIZERS, PAIRS
from cp_convert.ir.program import Lowered
from cp_convert.ir.quantize import FP8, QUANTIZERS
from cp_convert.prove import flat_inputs
from cp_convert.prove.calibrate import largest_inputs
from cp_convert.prove.lockstep import run
from cp_convert.runtime.codes import by_torch, multiplies_codes
from tests.capture.test_linear8 import Model, inputs
from tests.conftest import table

PRODUCT = torch.ops.aten._scaled_mm.default


def given(dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: x.to(dtype) for name, x in inputs().items()}


@cache
def in_fp8(dtype: torch.dtype, *keep: str, codes: torch.dtype = FP8) -> Lowered:
    torch.manual_seed(0)
    model = Model().eval().requires_grad_(False).to(dtype)
    for block in model.blocks:  # so that what the codes say weighs as much as what passes by
        block.q.weight *= 6
        block.k.weight *= 6
    traced, _ = trace(model, given(dtype), {}, ())
    dense = decompose(traced, table())
    chosen, _ = choose(dense, keep)
    largest = largest_inputs(dense, chosen, [flat_inputs(dense, given(dtype))])
    return quantized(dense, chosen, Measured(largest, codes)).program


def computed(program: Lowered, dtype: torch.dtype) -> Tensor:
    ((out,),) = run(program, flat_inputs(program, given(dtype)), 1)
    return out


def off(program: Lowered, truth: Lowered, dtype: torch.dtype) -> float:
    """Relative, root mean square."""
    right = computed(truth, dtype).float()
    return float((computed(program, dtype).float() - right).norm() / right.norm())


def count(program: Lowered, *targets: object) -> int:
    return sum(node.target in targets for node in program.graph_module.graph.nodes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_written_out_they_give_the_same_codes(dtype: torch.dtype) -> None:
    before = in_fp8(dtype)
    after = by_torch(before, products=False)
    assert count(before, *QUANTIZERS) == 6  # q and k of a block read the same input
    assert count(after, *QUANTIZERS, PRODUCT) == 0
    assert torch.equal(computed(after, dtype), computed(before, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nvfp4_is_written_out_to_the_same_codes(dtype: torch.dtype) -> None:
    before = in_fp8(dtype, codes=PAIRS)
    after = by_torch(before, products=True)
    assert count(before, *BLOCK_QUANTIZERS) == 6
    assert count(after, *BLOCK_QUANTIZERS, PRODUCT) == 0
    assert torch.equal(computed(after, dtype), computed(before, dtype))
    assert off(in_fp8(dtype), before, dtype) > 0.01  # other codes would be seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_layers_of_codes_are_products_of_codes(dtype: torch.dtype) -> None:
    before = in_fp8(dtype, "blocks.0.*")  # codes that others decide may be next to a tie
    after = by_torch(before, products=True)
    assert count(after, PRODUCT) == 2
    assert count(after, torch.ops.aten.clamp.default) == 1
    assert (
        count(after, torch.ops.aten.linear.default)
        == count(before, torch.ops.aten.linear.default) - 2
    )
    assert off(after, before, dtype) < torch.finfo(dtype).eps


def test_a_wrong_scale_would_be_seen() -> None:
    before = in_fp8(torch.bfloat16, "blocks.0.*")
    after = by_torch(before, products=True)
    scales = {n: t for n, t in after.state.items() if n.startswith("scale_of_codes")}
    name = next(iter(scales))
    spoilt = Lowered(
        after.graph_module, {**after.state, name: 1.5 * scales[name]}, after.inputs, after.outputs
    )
    assert off(spoilt, before, torch.bfloat16) > 0.05


def test_what_torch_does_not_multiply_is_computed_as_before() -> None:
    wide = by_torch(in_fp8(torch.float32), products=True)
    assert count(wide, PRODUCT) == 0
    assert torch.equal(
        computed(wide, torch.float32), computed(in_fp8(torch.float32), torch.float32)
    )
    assert not multiplies_codes(torch.device("cpu"))


def test_a_program_without_codes_stays_itself() -> None:
    traced, _ = trace(Model().eval().requires_grad_(False), inputs(), {}, ())
    dense = decompose(traced, table())
    assert by_torch(dense, products=True) is dense


@pytest.mark.slow
def test_it_can_be_compiled() -> None:
    after = by_torch(in_fp8(torch.bfloat16), products=False)
    values = after.state | flat_inputs(after, given(torch.bfloat16))
    names = [node.name for node in after.graph_module.graph.find_nodes(op="placeholder")]
    module = torch.fx.GraphModule(after.graph_module, after.graph_module.graph)
    fast = torch.compile(module, dynamic=False, fullgraph=True)
    with torch.no_grad():
        (out, *_) = fast(*[values[name] for name in names])
    truth = computed(in_fp8(torch.bfloat16), torch.bfloat16).float()
    # Other roundings, which differ by processor, and other codes: 0.042 was seen. A product that is
    # spoilt is more than 0.05 off, see above.
    assert (out.float() - truth).norm() / truth.norm() < 0.05
