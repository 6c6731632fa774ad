"""The proof of programs with quantizers: what passes, and what is caught by which of its parts."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from cp_convert.backends import BACKENDS
from cp_convert.capture import linear8, products8
from cp_convert.capture.decompose import decompose
from cp_convert.capture.trace import trace
from cp_convert.engine.build import prepare
from cp_convert.engine.lower import lower
from cp_convert.errors import ProofFailed
from cp_convert.ir import ops
from cp_convert.ir.attention import Outcome
from cp_convert.ir.network import Layer, Network
from cp_convert.ir.program import Lowered, copied, module_of
from cp_convert.ir.proof import Codes as Rounding
from cp_convert.ir.quantize import DEQUANTIZE, FP8, LARGEST, QUANTIZE, dequantize, quantize
from cp_convert.ir.source import Codes
from cp_convert.prove import Proof, Stages, flat_inputs, measure, prove, prove_networks
from cp_convert.prove.calibrate import largest_inputs
from cp_convert.sharding.shard import shard
from cp_convert.strategies import CONTROL
from cp_convert.strategies.rewrite import rewrite
from cp_convert.strategies.rounded import rounded
from tests.conftest import (
    TINY_PLAN,
    axis_of,
    networks_of,
    rewritten,
    strategy,
    table,
    tiny,
    tiny_inputs,
)

prepare(BACKENDS["tensorrt-rtx"])
cp, aten = torch.ops.cp, torch.ops.aten
BOTH = cp.quantize_dequantize.default
SLOW = pytest.mark.slow


def test_codes_are_the_nearest_ties_to_even_and_saturate() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, 126.6, 500.0, -500.0])
    told = torch.tensor([0, 2, 2, 0, 127, 127, -128], dtype=torch.int8)
    assert torch.equal(quantize(x, 1.0, torch.int8), told)
    assert torch.equal(dequantize(told, 0.5, torch.float32), told.float() / 2)


def test_fp8_is_e4m3_that_saturates() -> None:
    x = torch.tensor([448.0, 1e6, -1e6, 1.0625, 1.1875, 2.0**-10])
    codes = quantize(x * 0.25, 0.25, FP8)
    assert codes.dtype == FP8
    assert codes.float().tolist() == [448.0, 448.0, -448.0, 1.0, 1.25, 0.0]


@cache
def stages_of(name: str, world: int, dtype: torch.dtype = torch.float32) -> Stages:
    inputs = {key: x.to(dtype) for key, x in tiny_inputs().items()}
    return rewritten(tiny().to(dtype), inputs, name, world, eight="qkvo")


def proven(stages: Stages, dtype: torch.dtype = torch.float32, **options: Any) -> Proof:
    inputs = {key: x.to(dtype) for key, x in tiny_inputs().items()}
    return prove(measure(tiny().to(dtype), inputs), inputs, stages, **options)


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=SLOW), torch.bfloat16])
def test_what_is_right_passes_in_three_statements(dtype: torch.dtype) -> None:
    stages = stages_of("ulysses", 2, dtype)
    stages = replace(stages, lowered=lower(stages.lowered))
    proof = proven(stages, dtype)
    assert proof.codes is not None
    assert proof.control is not None
    worst = max(e.max for e in proof.algebra)
    assert worst < 1e-5  # as if there were no quantizers
    assert proof.control.max > 1000 * worst
    assert proof.codes.loss.max > 1e-3  # what rounding costs
    assert all(e.within(proof.codes.bound) for e in proof.codes.ranks)
    assert 0 < proof.codes.flipped < proof.codes.codes / 100
    networks = networks_of(stages.lowered, 2)
    inputs = {key: x.to(dtype) for key, x in tiny_inputs().items()}
    flat = flat_inputs(stages.lowered, inputs)
    found = prove_networks(networks, flat, proof, stages.lowered)
    assert len(found.codes) == 2
    assert max(e.max for e in found.algebra) < 1e-5


Sabotage = Callable[[fx.Graph], None]


def sabotaged(stages: Stages, sabotage: Sabotage) -> Stages:
    graph = copied(stages.rewritten.graph_module.graph)
    sabotage(graph)
    broken = replace(stages.rewritten, graph_module=module_of(stages.rewritten.graph_module, graph))  # type: ignore[type-var]
    return replace(stages, rewritten=broken, lowered=broken)


def of(graph: fx.Graph, target: Any) -> list[fx.Node]:
    return list(graph.find_nodes(op="call_function", target=target))


def largest_stays_at_home(graph: fx.Graph) -> None:
    """Every rank measures what arrives by what it had itself."""
    node = next(n for n in of(graph, cp.all_to_all.default) if n.meta["val"].shape[-1] == 1)
    assert isinstance(node.args[0], fx.Node)
    node.replace_all_uses_with(node.args[0])


def largest_of_another_head(graph: fx.Graph) -> None:
    node = next(n for n in of(graph, cp.all_to_all.default) if n.meta["val"].shape[-1] == 1)
    with graph.inserting_after(node):
        rolled = graph.call_function(torch.ops.aten.roll.default, (node, [1], [2]))
    node.replace_all_uses_with(rolled, delete_user_cb=lambda user: user is not rolled)


def half_of_the_codes(graph: fx.Graph) -> None:
    node = of(graph, DEQUANTIZE)[0]
    node.args = (node.args[0], 0.5, node.args[2])


def coarser_on_both_sides(graph: fx.Graph) -> None:
    """Right but for the rounding: without it nothing is to be seen."""
    for node in (of(graph, QUANTIZE)[0], of(graph, DEQUANTIZE)[0]):
        node.args = (node.args[0], 2.0, node.args[2])


@pytest.mark.parametrize(
    ("sabotage", "told"),
    [
        (largest_stays_at_home, "all ranks together went astray"),
        (largest_of_another_head, "all ranks together went astray"),
        (half_of_the_codes, "all ranks together went astray"),
        (coarser_on_both_sides, "round to other codes"),
    ],
)
def test_planted_faults_are_caught(sabotage: Sabotage, told: str) -> None:
    with pytest.raises(ProofFailed, match=told):
        proven(sabotaged(stages_of("ulysses", 2), sabotage))


def scale_of(network: Network, factor: float) -> Network:
    """The constant that a quantizer of the network divides by, changed."""
    scale = next(layer.inputs[1] for layer in network.layers if layer.kind == "QUANTIZE")

    def changed(layer: Layer) -> Layer:
        if layer.outputs[0].name != scale:
            return layer
        return replace(layer, parameters={"value": layer.parameters["value"] * factor})

    return replace(network, layers=tuple(map(changed, network.layers)))


def test_a_networks_wrong_scale_is_caught() -> None:
    stages = stages_of("ulysses", 2)
    stages = replace(stages, lowered=lower(stages.lowered))
    proof = proven(stages)
    networks = [scale_of(network, 1.01) for network in networks_of(stages.lowered, 2)]
    flat = flat_inputs(stages.lowered, tiny_inputs())
    with pytest.raises(ProofFailed, match="networks go astray"):
        prove_networks(networks, flat, proof, stages.lowered)


def test_what_it_costs_can_be_limited() -> None:
    stages = stages_of("allgather-kv", 2)
    assert proven(stages, max_loss=0.5).codes is not None
    with pytest.raises(ProofFailed, match="--max-loss allows"):
        proven(stages, max_loss=1e-4)


def test_ranks_that_do_not_communicate_are_told_apart() -> None:
    """Quantizers snap small differences away; the control has none."""
    stages = stages_of("ulysses", 2)
    assert not any(n.target is QUANTIZE for n in stages.control.graph_module.graph.nodes)
    with pytest.raises(ProofFailed, match="went astray"):
        proven(replace(stages, rewritten=stages.control))


def test_a_tensor_moves_as_codes() -> None:
    """Splitting, joining and moving commute with quantizers: their rules are those of numbers."""
    x = torch.randn(4, 6)
    codes = quantize(x, 0.03, torch.int8)
    assert torch.equal(codes.chunk(2)[1], quantize(x.chunk(2)[1], 0.03, torch.int8))
    (moved, _) = ops.on_all_ranks(cp.all_to_all.default, [codes, codes], [[0, 1], 2])
    both = ops.on_all_ranks(cp.all_to_all.default, [x, x], [[0, 1], 2])
    assert torch.equal(moved, quantize(both[0], 0.03, torch.int8))


def test_zeros_are_exact() -> None:
    zeros: Tensor = torch.zeros(3, dtype=torch.bfloat16)
    assert torch.equal(cp.quantize_dequantize(zeros, 0.1, FP8), zeros)


# --- linear layers in FP8 -------------------------------------------------------------------------


@cache
def programs() -> tuple[Lowered, Lowered]:
    """The model, and the same with two of its layers in FP8."""
    program, _ = trace(tiny(), tiny_inputs(), TINY_PLAN)
    plain = decompose(program, table())
    chosen, _ = linear8.choose(plain)
    assert len(chosen) == 2
    largest = largest_inputs(plain, chosen, [flat_inputs(plain, tiny_inputs())])
    return plain, products8.quantized(plain, chosen, products8.Measured(largest)).program


@cache
def in_fp8(name: str, world: int, eight: str = "") -> Stages:
    """Sharded after that, as a conversion does."""
    return staged(*programs(), name, world, eight)


def staged(
    plain: Lowered, dense: Lowered, name: str = "ulysses", world: int = 2, eight: str = ""
) -> Stages:
    """``dense``, which is ``plain`` in codes, as a conversion shards it."""
    return with_outcomes(plain, dense, name, world, eight)[0]


def with_outcomes(
    plain: Lowered, dense: Lowered, name: str, world: int, eight: str
) -> tuple[Stages, Sequence[Outcome]]:
    """The same, and what became of every attention."""
    axis = axis_of(world)
    split, by = shard(dense, axis), strategy(name, world)
    control, _ = rewrite(split, CONTROL, "control", axis, table())
    done, outcomes = rewrite(split, by, name, axis, table(), eight=eight)
    quantized = rounded(dense, split, eight, axis, table()) if eight else dense
    sites = [(o.site, o.node) for o in outcomes]
    return Stages(dense, control, done, done, sites, axis, quantized, plain), outcomes


def rounding_of(proof: Proof) -> Rounding:
    """Of a proof in which all ranks are right without it, and the control is wrong."""
    assert proof.codes is not None
    assert proof.control is not None
    assert max(e.max for e in proof.algebra) < 1e-5
    assert proof.control.max > 1e-2
    return proof.codes


@pytest.mark.parametrize(
    ("name", "world", "eight"),
    [
        ("ulysses", 2, "qkvo"),
        pytest.param("ring", 3, "", marks=SLOW),
        pytest.param("usp", 4, "qkv", marks=SLOW),
    ],
)
def test_fp8_layers_are_proven(name: str, world: int, eight: str) -> None:
    stages = in_fp8(name, world, eight)
    sharded_too = [n for n in stages.rewritten.graph_module.graph.nodes if n.target is BOTH]
    assert [n.meta["val"].shape[1] for n in sharded_too] == [24 // world] * len(sharded_too)
    codes = rounding_of(proven(replace(stages, lowered=lower(stages.lowered))))
    assert codes.bound.max < codes.loss.max
    assert max(e.max for e in codes.ranks) <= codes.bound.max


def scaled_by(target: Any, factor: float) -> Sabotage:
    def sabotage(graph: fx.Graph) -> None:
        node = of(graph, target)[0]
        node.args = (node.args[0], node.args[1] * factor, *node.args[2:])

    return sabotage


def scale_of_another_layer(graph: fx.Graph) -> None:
    first, second = of(graph, BOTH)[:2]
    first.args = (first.args[0], second.args[1], first.args[2])


def activations_left_alone(graph: fx.Graph) -> None:
    for node in of(graph, BOTH):
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sabotage", "told"),
    [
        (scaled_by(DEQUANTIZE, 1.01), "all ranks together went astray"),
        (scaled_by(BOTH, 1.01), "round to other codes"),
        (scale_of_another_layer, "round to other codes"),
        (activations_left_alone, "round to other codes"),
    ],
)
def test_faults_in_fp8_layers_are_caught(sabotage: Sabotage, told: str) -> None:
    with pytest.raises(ProofFailed, match=told):
        proven(sabotaged(in_fp8("ulysses", 2), sabotage))


def with_weights_alone() -> Stages:
    """The same layers with weights that are codes, and nothing else that is."""
    plain, _ = programs()
    chosen, _ = linear8.choose(plain)
    alone = {}
    for number, node in enumerate(chosen):
        weight = plain.state[str(node.args[1])].detach()
        scale = (1 + 0.1 * number) * float(weight.abs().max()) / 448
        alone[str(node.args[1])] = Codes(quantize(weight, scale, FP8), scale, None)
    found, kept = linear8.stored_layers(plain, alone)
    assert found == []
    assert sum(one.reason.startswith(linear8.ALONE) for one in kept) == 2
    made = products8.quantized(plain, [], products8.Stored(alone), alone)
    dense, scales = made.program, made.codes
    assert scales == {}
    return staged(plain, dense)


def test_weights_that_are_codes_round_nothing_more() -> None:
    stages = with_weights_alone()
    proof = proven(replace(stages, lowered=lower(stages.lowered)))
    assert proof.codes is not None
    assert proof.codes.codes == 0
    assert max(e.max for e in (*proof.algebra, *proof.codes.ranks)) < 1e-5
    assert proof.codes.loss.max > 1e-3  # what the checkpoint's weights have lost


def dequantized_by_the_other(graph: fx.Graph) -> None:
    first, second = of(graph, DEQUANTIZE)[:2]
    first.args = (first.args[0], second.args[1], first.args[2])


def not_dequantized(graph: fx.Graph) -> None:
    node = of(graph, DEQUANTIZE)[0]
    node.args = (node.args[0], 1.0, node.args[2])


@pytest.mark.parametrize(
    "sabotage", [scaled_by(DEQUANTIZE, 1.01), dequantized_by_the_other, not_dequantized]
)
def test_faults_in_weights_that_are_codes_are_caught(sabotage: Sabotage) -> None:
    with pytest.raises(ProofFailed, match="all ranks together went astray"):
        proven(sabotaged(with_weights_alone(), sabotage))


# --- scales of rows and of tokens, outside of the product -----------------------------------------

KINDS = {
    "fp8 by tokens": (FP8, {"by_token": True}),
    "int8": (torch.int8, {"input_scale": 0.08}),
    "int8, smoothed": (torch.int8, {"input_scale": 0.12, "smooth": True}),
}


def stages_by_rows(kind: str) -> Stages:
    """Two layers with a scale for each row of their weights."""
    plain, _ = programs()
    chosen, _ = linear8.choose(plain)
    dtype, told = KINDS[kind]
    stored = {}
    for node in chosen:
        name = str(node.args[1])
        weight = plain.state[name].detach()
        rows = weight.abs().amax(1) / LARGEST[dtype]
        options = {"input_scale": None, **told}
        if "smooth" in options:
            options["smooth"] = torch.linspace(0.5, 2, weight.shape[1])
            rows = rows * 2
            weight = weight / options["smooth"]
        stored[name] = Codes(quantize(weight / rows[:, None], 1.0, dtype), rows, **options)
    found, _ = linear8.stored_layers(plain, stored)
    assert found == chosen
    made = products8.quantized(plain, chosen, products8.Stored(stored), stored)
    dense, by_name = made.program, made.codes
    assert {name: one.step for name, one in by_name.items()} == {
        node.name: stored[str(node.args[1])].step for node in chosen
    }
    return staged(plain, dense)


@cache
def by_rows(kind: str) -> Stages:
    """The same, once."""
    return stages_by_rows(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_scales_of_rows_and_tokens_are_proven(kind: str) -> None:
    stages = by_rows(kind)
    both = of(stages.rewritten.graph_module.graph, BOTH)
    assert [n.meta["val"].shape[1] for n in both] == [12, 12]  # sharded as the tokens are
    proof = proven(replace(stages, lowered=lower(stages.lowered)))
    assert proof.codes is not None
    assert proof.control is not None
    assert max(e.max for e in proof.algebra) < 1e-5
    assert proof.control.max > 1e-2
    assert max(e.max for e in proof.codes.ranks) <= proof.codes.bound.max
    assert 1e-3 < proof.codes.loss.max < 0.3
    networks = networks_of(lower(stages.lowered), 2)
    found = prove_networks(
        networks, flat_inputs(stages.lowered, tiny_inputs()), proof, stages.lowered
    )
    assert max(e.max for e in found.algebra) < 1e-5


def factors(graph: fx.Graph) -> list[fx.Node]:
    """What products are multiplied with: by rows first, then by tokens."""
    return [
        node
        for node in of(graph, aten.mul.Tensor)
        if isinstance(node.args[0], fx.Node) and "linear" in node.args[0].name
    ]


def rows_are_dropped(graph: fx.Graph) -> None:
    node = factors(graph)[0]
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]


def rows_of_another_order(graph: fx.Graph) -> None:
    node = factors(graph)[0]
    with graph.inserting_before(node):
        rolled = graph.call_function(torch.ops.aten.roll.default, (node.args[1], [1], [0]))
    node.args = (node.args[0], rolled)


def tokens_of_another(graph: fx.Graph) -> None:
    """Every product is measured by the largest number of the token before."""
    node = next(n for n in of(graph, aten.mul.Tensor) if "mul" in str(n.args[0]))
    with graph.inserting_before(node):
        rolled = graph.call_function(torch.ops.aten.roll.default, (node.args[1], [1], [1]))
    node.args = (node.args[0], rolled)


def smoothing_is_dropped(graph: fx.Graph) -> None:
    both = of(graph, BOTH)[0]
    (x,) = both.all_input_nodes
    both.args = (x.args[0], *both.args[1:])


@pytest.mark.parametrize(
    ("kind", "sabotage", "told"),
    [
        ("fp8 by tokens", rows_are_dropped, "all ranks together went astray"),
        ("fp8 by tokens", rows_of_another_order, "all ranks together went astray"),
        ("fp8 by tokens", tokens_of_another, "all ranks together went astray"),
        ("fp8 by tokens", scaled_by(BOTH, 1.01), "round to other codes"),
        ("fp8 by tokens", activations_left_alone, "round to other codes"),
        ("int8", rows_are_dropped, "all ranks together went astray"),
        ("int8", rows_of_another_order, "all ranks together went astray"),
        ("int8", scaled_by(DEQUANTIZE, 1.01), "all ranks together went astray"),
        ("int8", scaled_by(BOTH, 1.05), "round to other codes"),
        ("int8, smoothed", smoothing_is_dropped, "all ranks together went astray"),
    ],
)
def test_faults_in_scales_of_rows_and_tokens_are_caught(
    kind: str, sabotage: Sabotage, told: str
) -> None:
    with pytest.raises(ProofFailed, match=told):
        proven(sabotaged(by_rows(kind), sabotage))


def test_codes_of_another_model_are_caught() -> None:
    """The program before quantization must be the model."""
    stages = in_fp8("ulysses", 2)
    assert stages.plain is not None
    other = {name: 1.001 * t for name, t in stages.plain.state.items()}
    with pytest.raises(ProofFailed, match="the traced program is not the model"):
        proven(replace(stages, plain=replace(stages.plain, state=other)))  # type: ignore[type-var]
