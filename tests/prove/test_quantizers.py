"""The proof of programs with quantizers: what passes, and what is caught by which of its parts."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from cp_convert.backends import BACKENDS
from cp_convert.engine.build import prepare
from cp_convert.engine.lower import lower
from cp_convert.errors import ProofFailed
from cp_convert.ir import ops
from cp_convert.ir.network import Layer, Network
from cp_convert.ir.program import copied, module_of
from cp_convert.ir.quantize import DEQUANTIZE, FP8, QUANTIZE, dequantize, quantize
from cp_convert.prove import Proof, Stages, flat_inputs, measure, prove, prove_networks
from tests.conftest import networks_of, rewritten, tiny, tiny_inputs

prepare(BACKENDS["tensorrt-rtx"])
cp = torch.ops.cp


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


def stages_of(name: str, world: int, dtype: torch.dtype = torch.float32) -> Stages:
    inputs = {key: x.to(dtype) for key, x in tiny_inputs().items()}
    return rewritten(tiny().to(dtype), inputs, name, world, eight="qkvo")


def proven(stages: Stages, dtype: torch.dtype = torch.float32, **options: Any) -> Proof:
    inputs = {key: x.to(dtype) for key, x in tiny_inputs().items()}
    return prove(measure(tiny().to(dtype), inputs), inputs, stages, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
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


def of(graph: fx.Graph, target: Any, **wanted: Any) -> list[fx.Node]:
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
    stages = stages_of("ring", 3)
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
