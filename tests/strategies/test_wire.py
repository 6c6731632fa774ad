"""An exchange in 8 bits: what travels, what arrives, and that nothing depends on the ranks."""

import pytest
import torch
from torch import Tensor

from cp_convert.ir import ops
from cp_convert.ir.quantize import QUANTIZE, decoded, encoded
from cp_convert.job import STRATEGY_NAMES
from cp_convert.mesh import bytes_sent
from cp_convert.prove import Stages, flat_inputs
from cp_convert.prove.lockstep import run
from tests.conftest import axis_of, rewritten, strategy, tiny, tiny_inputs
from tests.strategies.test_strategies import site_of


def error(x: Tensor, reference: Tensor) -> float:
    return ((x - reference).abs().max() / reference.abs().max()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_comes_back_within_half_a_step_of_its_largest_number(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(3, 4, 64) * torch.logspace(-6, 3, 12).reshape(3, 4, 1)).to(dtype)
    codes, largest = encoded(x)
    assert codes.dtype == torch.int8
    assert codes.abs().amax(-1).eq(127).all()
    assert torch.equal(largest, x.abs().amax(-1, keepdim=True))
    half_a_step = largest.float() / 254 * (1 + torch.finfo(dtype).eps * 254)
    assert ((decoded(codes, largest, dtype).float() - x.float()).abs() <= half_a_step).all()


def test_rows_of_zeros_stay_zeros() -> None:
    x = torch.zeros(2, 3, 8, dtype=torch.bfloat16)
    assert torch.equal(decoded(*encoded(x), torch.bfloat16), x)


def test_what_was_rounded_once_is_not_rounded_again() -> None:
    """USP sends keys and values twice."""
    x = torch.randn(64, 128)
    once = decoded(*encoded(x), torch.float32)
    torch.testing.assert_close(decoded(*encoded(once), torch.float32), once, rtol=1e-6, atol=0)


def outputs(stages: Stages, world: int) -> list[Tensor]:
    program = stages.rewritten
    return [out for (out,) in run(program, flat_inputs(program, tiny_inputs()), world)]


@pytest.mark.parametrize(
    "world",
    [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("name", STRATEGY_NAMES)
def test_all_ranks_come_to_the_dense_model_that_rounds_alike(name: str, world: int) -> None:
    stages = rewritten(tiny(), tiny_inputs(), name, world, eight="qkvo")
    assert stages.quantized is not None
    ((rounded,),) = run(stages.quantized, flat_inputs(stages.quantized, tiny_inputs()), 1)
    ((dense,),) = run(stages.dense, flat_inputs(stages.dense, tiny_inputs()), 1)
    assert error(rounded, dense) > 1e-3
    for out in outputs(stages, world):
        assert error(out, rounded) < 1e-5


@pytest.mark.parametrize(
    ("name", "eight", "in_int8", "as_they_are"),
    [
        ("ulysses", "qkv", ["all_to_all"], ["all_to_all"]),  # the outputs on their way back
        ("ulysses", "kv", ["all_to_all"], ["all_to_all", "all_to_all"]),
        ("ulysses", "qkvo", ["all_to_all", "all_to_all"], []),
        ("allgather-kv", "qkv", ["all_gather"], []),
        ("stream-kv", "kv", ["all_gather"] * 4, []),
        ("ring", "qkvo", ["all_gather"] * 4, []),
    ],
)
def test_what_travels(name: str, eight: str, in_int8: list[str], as_they_are: list[str]) -> None:
    stages = rewritten(tiny(), tiny_inputs(), name, 4, eight=eight)
    nodes = [n for n in stages.rewritten.graph_module.graph.nodes if n.target in ops.COLLECTIVES]
    attention = [n for n in nodes if n.name.startswith(name.replace("-", "_"))]
    values = [(str(n.target).split(".")[1], n.args[0].meta["val"]) for n in attention]
    assert [kind for kind, x in values if x.dtype == torch.int8] == in_int8
    rows = [x for _, x in values if x.shape[-1] == 1]
    assert len(rows) == len(in_int8)
    others = [kind for kind, x in values if x.dtype != torch.int8 and x.shape[-1] > 1]
    assert others == as_they_are
    for node in attention:  # TensorRT moves no codes but those of a quantizer right before it
        if node.args[0].meta["val"].dtype == torch.int8:
            assert node.args[0].target is QUANTIZE
            assert [u.target for u in node.users] == [torch.ops.cp.dequantize.default]


def test_queries_of_another_length_than_keys_are_packed_by_rows() -> None:
    from cp_convert.ir.layout import Layout
    from cp_convert.strategies.exchange import to_heads

    axis = axis_of(2)
    site = site_of(2, eight="qkv", query_layout=Layout.even([40], 2), queries=20)
    torch.manual_seed(0)
    parts = [torch.randn(2, 12, tokens, 16) for tokens in (20, 12, 12)]
    graph = torch.fx.experimental.proxy_tensor.make_fx(
        lambda *x: to_heads(*x, site, axis), tracing_mode="fake"
    )(*parts).graph
    sent = [n.args[0].meta["val"] for n in graph.nodes if n.target in ops.COLLECTIVES]
    assert [(x.dtype, list(x.shape)) for x in sent] == [
        (torch.int8, [2, 2 * 6 * 44, 16]),
        (torch.float32, [2, 2 * 6 * 44, 1]),
    ]


@pytest.mark.parametrize("name", ["ulysses", "ring"])
def test_bytes_are_half_of_bf16_and_a_little(name: str) -> None:
    inputs = {key: x.bfloat16() for key, x in tiny_inputs().items()}

    def sent(eight: str) -> int:
        stages = rewritten(tiny().bfloat16(), inputs, name, 4, eight=eight)
        total = 0
        for node in stages.rewritten.graph_module.graph.nodes:
            if node.target in ops.COLLECTIVES and node.name.startswith(name.replace("-", "_")):
                x = node.args[0].meta["val"]
                kind = str(node.target).split(".")[1].upper()
                total += bytes_sent(kind, x.numel() * x.element_size(), node.args[-1])
        return total

    # 8 numbers of 2 bytes become 8 codes and one number: heads are of 8 here, of 128 in models
    assert sent("qkvo") == pytest.approx(sent("") * 10 / 16)


def test_what_is_not_asked_for_changes_nothing() -> None:
    plain = rewritten(tiny(), tiny_inputs(), "ulysses", 2)
    assert plain.quantized is None
    assert not any(n.target is QUANTIZE for n in plain.rewritten.graph_module.graph.nodes)


def test_tensorrts_own_attention_cannot() -> None:
    from cp_convert.strategies import fused

    refusal = fused.why_not(site_of(2, eight="kv"), axis_of(2))
    assert refusal is not None
    assert "in 16 bits" in refusal.reason
    assert strategy("ulysses", 2).why_not(site_of(2, eight="kv"), axis_of(2)) is None
