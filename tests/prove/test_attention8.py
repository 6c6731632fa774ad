"""Attention over FP8 codes: what it means, that all ranks come to it, and what is caught."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional

from cp_convert.backends import BACKENDS
from cp_convert.capture import attention8
from cp_convert.capture.decompose import decompose
from cp_convert.capture.trace import trace
from cp_convert.engine.build import prepare
from cp_convert.engine.lower import lower
from cp_convert.errors import CannotShard, ProofFailed
from cp_convert.ir import ops
from cp_convert.ir.network import Layer, Network
from cp_convert.ir.program import arguments, copied, module_of
from cp_convert.prove import Proof, Stages, flat_inputs, prove_networks
from cp_convert.prove.calibrate import attention_losses, largest_of
from tests.conftest import TINY_PLAN, networks_of, table, tiny, tiny_inputs
from tests.prove.test_quantizers import proven, rounding_of, with_outcomes

prepare(BACKENDS["tensorrt-rtx"])
SLOW = pytest.mark.slow
STEPS = (0.011, 0.009, 0.013)


# --- the operator ---------------------------------------------------------------------------------


def codes(x: Tensor, step: float) -> Tensor:
    """What FP8 codes of ``x`` stand for, by torch's own conversion."""
    return (x / step).clamp(-448, 448).to(torch.float8_e4m3fn).float() * step


def written_out(q: Tensor, k: Tensor, v: Tensor, added: Tensor | None, scale: float) -> Tensor:
    q, k, v = (codes(x, step) for x, step in zip((q, k, v), STEPS, strict=True))
    scores = scale * (q @ k.transpose(-1, -2))
    shares = torch.softmax(scores if added is None else scores + added, -1)
    return codes(shares, 1 / 448) @ v


def operands(keys: int = 33, kv_heads: int = 4, size: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    q = 2 * torch.randn(2, 4, 24, size)
    k, v = (2 * torch.randn(2, kv_heads, keys, size) for _ in "kv")
    return q, k, v


def off(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_what_it_means() -> None:
    q, k, v = operands()
    mine = ops.attention(q, k, v, scale=0.3, steps=STEPS)
    assert off(mine, written_out(q, k, v, None, 0.3)) < 1e-6
    assert 1e-2 < off(mine, ops.attention(q, k, v, scale=0.3)) < 0.5
    usual = ops.attention(q, k, v, scale=None, steps=STEPS)
    assert off(usual, written_out(q, k, v, None, 16**-0.5)) < 1e-6


def test_masks_heads_and_order(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = operands(24, kv_heads=2)
    both = (x.repeat_interleave(2, 1) for x in (k, v))
    lower = torch.ones(24, 24).tril().bool()
    hidden = torch.zeros(24, 24).masked_fill(~lower, -torch.inf)
    truth = written_out(q, *both, hidden, 0.3)
    call, given = torch.ops.cp.attention, {"scale": 0.3, "steps": list(STEPS)}
    monkeypatch.setattr("cp_convert.ir.attention8._SCORES", 2 * 24 * 24)  # a head at a time
    for mask, causal in ((lower, False), (hidden, False), (None, True)):
        mine = call(q, k, v, mask, 0.0, causal, enable_gqa=True, **given)
        assert off(mine, truth) < 1e-6
    heads = torch.randn(1, 4, 24, 24)
    masked = call(q, *(x.repeat_interleave(2, 1) for x in (k, v)), heads, **given)
    one = call(q[:, 3:], k[:, 1:], v[:, 1:], heads[:, 3:], **given)
    assert off(masked[:, 3:], one) < 1e-6
    none = call(q, k, v, torch.zeros(24, 24, dtype=torch.bool), enable_gqa=True, **given)
    assert torch.equal(none, torch.zeros_like(none))


def test_parts_of_tokens_and_heads_are_what_they_are_in_the_whole() -> None:
    q, k, v = operands()
    whole = ops.attention(q, k, v, scale=None, steps=STEPS)
    rows = ops.attention(q[:, 2:, 8:16], k[:, 2:], v[:, 2:], scale=None, steps=STEPS)
    assert off(rows, whole[:, 2:, 8:16]) < 1e-6


def test_without_steps_it_is_torchs() -> None:
    q, k, v = operands()
    assert torch.equal(
        ops.attention(q, k, v, scale=None), functional.scaled_dot_product_attention(q, k, v)
    )


# --- all ranks ------------------------------------------------------------------------------------


@cache
def in_fp8(name: str, world: int, eight: str = "") -> Stages:
    """Both attentions over codes, by scales that the inputs give."""
    program, _ = trace(tiny(), tiny_inputs(), TINY_PLAN)
    plain = decompose(program, table())
    nodes = attention8.attentions_of(plain)
    names = {name for node in nodes for name in attention8.operands(node)}
    largest = largest_of(plain, names, [flat_inputs(plain, tiny_inputs())])
    steps = attention8.measured(nodes, largest)
    dense = attention8.over_codes(plain, steps)
    assert [arguments(n)["steps"] for n in attention8.attentions_of(plain)] == [None, None]
    lost = attention_losses(plain, steps, flat_inputs(plain, tiny_inputs()))
    assert all(1e-3 < one < 0.2 for one in lost.values())
    assert len(lost) == 2
    stages, outcomes = with_outcomes(plain, dense, name, world, eight)
    assert [o.kept is None for o in outcomes] == [world > 1, False]
    return stages


def of(graph: fx.Graph) -> list[fx.Node]:
    return list(graph.find_nodes(op="call_function", target=ops.ATTENTION))


@pytest.mark.parametrize(
    ("name", "world", "eight", "count"),
    [
        ("ulysses", 4, "", 2),
        ("allgather-kv", 2, "", 2),
        ("stream-kv", 2, "kv", 5),
        ("ring", 2, "", 2),
        pytest.param("ulysses", 2, "qkv", 2, marks=SLOW),
        pytest.param("allgather-kv", 4, "", 2, marks=SLOW),
        pytest.param("usp", 4, "", 2, marks=SLOW),
    ],
)
def test_what_is_right_passes(name: str, world: int, eight: str, count: int) -> None:
    """In three statements, and the networks too; every attention of a rank reads codes."""
    stages = in_fp8(name, world, eight)
    steps = [arguments(n)["steps"] for n in of(stages.rewritten.graph_module.graph)]
    assert len(steps) == count
    assert len({tuple(one) for one in steps}) == 2  # of two sites
    stages = replace(stages, lowered=lower(stages.lowered))
    proof = proven(stages)
    codes = rounding_of(proof)
    assert codes.codes > 2 * 12 * 24 * 24  # probabilities among them
    assert 0 < codes.flipped < codes.codes / 100
    assert codes.bound.max < codes.loss.max
    assert all(e.within(codes.bound) for e in codes.ranks)
    flat = flat_inputs(stages.lowered, tiny_inputs())
    found = prove_networks(networks_of(stages.lowered, world), flat, proof, stages.lowered)
    assert max(e.max for e in found.algebra) < 1e-5
    assert all(e.within(codes.bound) for e in found.codes)


@pytest.mark.parametrize(("name", "world"), [("ring", 3), ("usp", 3)])
def test_parts_that_are_merged_are_refused(name: str, world: int) -> None:
    with pytest.raises(CannotShard, match="over FP8 codes, and what parts") as caught:
        in_fp8(name, world)
    assert "--attention precision" in str(caught.value.hint)


Sabotage = Callable[[fx.Graph], None]


def steps_of(change: Callable[[list[float]], list[float]]) -> Sabotage:
    def sabotage(graph: fx.Graph) -> None:
        node = of(graph)[0]
        node.kwargs = {**node.kwargs, "steps": change(list(node.kwargs["steps"]))}  # type: ignore[arg-type]

    return sabotage


def dropped(graph: fx.Graph) -> None:
    for node in of(graph):
        node.kwargs = {n: v for n, v in node.kwargs.items() if n != "steps"}


@pytest.mark.parametrize(
    "sabotage",
    [
        steps_of(lambda s: [s[0], 1.03 * s[1], s[2]]),
        steps_of(lambda s: [s[1], s[0], s[2]]),
        steps_of(lambda s: [s[0], s[1], s[2] / 4]),  # what is beyond becomes the outermost code
        dropped,
    ],
)
def test_planted_faults_are_caught(sabotage: Sabotage) -> None:
    stages = in_fp8("ulysses", 4)
    graph = copied(stages.rewritten.graph_module.graph)
    sabotage(graph)
    broken = replace(
        in_fp8("ulysses", 4).rewritten,
        graph_module=module_of(stages.rewritten.graph_module, graph),  # type: ignore[type-var]
    )
    with pytest.raises(ProofFailed, match="round to other codes"):
        proven(replace(stages, rewritten=broken, lowered=broken))


def constant(network: Network, name: str, factor: float) -> Network:
    """A scale of the network, changed."""

    def changed(layer: Layer) -> Layer:
        if layer.outputs[0].name != name:
            return layer
        return replace(layer, parameters={"value": layer.parameters["value"] * factor})

    assert any(layer.outputs[0].name == name for layer in network.layers)
    return replace(network, layers=tuple(map(changed, network.layers)))


def scale_of(kind: str, which: int) -> Callable[[Network], str]:
    def find(network: Network) -> str:
        return str([layer.inputs[1] for layer in network.layers if layer.kind == kind][which])

    return find


def of_probabilities(network: Network) -> str:
    attention = next(one for one in network.layers if one.kind == "ATTENTION_INPUT")
    return str(attention.inputs[4])


def is_changed(network: Network) -> Network:
    """Probabilities that stay numbers."""
    layers = [
        replace(one, parameters={**one.parameters, "shares": None})
        if one.kind == "ATTENTION_INPUT"
        else one
        for one in network.layers
    ]
    return replace(network, layers=tuple(layers))


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (lambda n: constant(n, scale_of("DEQUANTIZE", 1)(n), 1.001), "networks go astray"),
        (lambda n: constant(n, scale_of("QUANTIZE", 0)(n), 1.01), "networks go astray"),
        (lambda n: constant(n, of_probabilities(n), 1.5), "round to other codes"),
        (is_changed, "round to other codes"),
    ],
)
def test_faults_of_a_network_are_caught(fault: Callable[[Network], Network], told: str) -> None:
    stages, proof, networks = built()
    flat = flat_inputs(stages.lowered, tiny_inputs())
    with pytest.raises(ProofFailed, match=told):
        prove_networks([fault(one) for one in networks], flat, proof, stages.lowered)


@cache
def built() -> tuple[Stages, Proof, list[Network]]:
    stages = in_fp8("ulysses", 2)
    stages = replace(stages, lowered=lower(stages.lowered))
    return stages, proven(stages), networks_of(stages.lowered, 2)
