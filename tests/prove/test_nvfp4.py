"""The proof of programs that multiply NVFP4: what passes, and what is caught by which part."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import fx

from cp_convert.capture import linear8, products8
from cp_convert.engine.lower import lower
from cp_convert.errors import ProofFailed
from cp_convert.ir.network import FP4, Layer, Network
from cp_convert.ir.nvfp4 import DEQUANTIZE_BLOCKS, PAIRS, QUANTIZE_DEQUANTIZE_BLOCKS
from cp_convert.ir.program import Lowered
from cp_convert.prove import Stages, flat_inputs, prove_networks
from cp_convert.prove.calibrate import largest_inputs
from tests.conftest import networks_of, tiny_inputs
from tests.prove.test_quantizers import (
    Sabotage,
    of,
    programs,
    proven,
    rounding_of,
    sabotaged,
    scaled_by,
    staged,
)

BOTH = QUANTIZE_DEQUANTIZE_BLOCKS
SLOW = pytest.mark.slow


@cache
def in_nvfp4() -> Lowered:
    """The small model with two of its layers in NVFP4."""
    plain, _ = programs()
    chosen, _ = linear8.choose(plain, dtype=PAIRS)
    assert len(chosen) == 2
    largest = largest_inputs(plain, chosen, [flat_inputs(plain, tiny_inputs())])
    return products8.quantized(plain, chosen, products8.Measured(largest, PAIRS)).program


@cache
def stages_of(name: str, world: int, eight: str = "") -> Stages:
    return staged(programs()[0], in_nvfp4(), name, world, eight)


@pytest.mark.parametrize(
    ("name", "world", "eight"),
    [
        ("allgather-kv", 2, ""),
        pytest.param("ulysses", 4, "qkvo", marks=SLOW),
        pytest.param("ring", 4, "", marks=SLOW),
    ],
)
def test_what_is_right_passes_in_three_statements(name: str, world: int, eight: str) -> None:
    stages = stages_of(name, world, eight)
    rounded = of(stages.rewritten.graph_module.graph, BOTH)
    assert [n.meta["val"].shape[1] for n in rounded] == [24 // world] * 2
    stages = replace(stages, lowered=lower(stages.lowered))
    proof = proven(stages)
    codes = rounding_of(proof)
    assert codes.loss.max > 1e-2
    assert all(e.within(codes.bound) for e in codes.ranks)
    networks = networks_of(stages.lowered, world)
    kinds = [layer.kind for layer in networks[0].layers]
    assert kinds.count("DYNAMIC_QUANTIZE") == 2
    found = prove_networks(
        networks, flat_inputs(stages.lowered, tiny_inputs()), proof, stages.lowered
    )
    assert max(e.max for e in found.algebra) < 1e-5
    assert len(found.codes) == world


def nibbles_are_swapped(graph: fx.Graph) -> None:
    node = of(graph, DEQUANTIZE_BLOCKS)[0]
    with graph.inserting_before(node):
        high = torch.ops.aten.__rshift__.Scalar
        up = graph.call_function(torch.ops.aten.mul.Tensor, (node.args[0], 16))
        down = graph.call_function(high, (node.args[0], 4))
        swapped = graph.call_function(torch.ops.aten.add.Tensor, (up, down))
    node.args = (swapped, *node.args[1:])


def blocks_of_another_layer(graph: fx.Graph) -> None:
    """Of as many columns; the first rows of the other's, where it has more."""
    larger, smaller = sorted(of(graph, DEQUANTIZE_BLOCKS), key=lambda n: -n.meta["val"].shape[0])
    rows = smaller.meta["val"].shape[0]
    with graph.inserting_before(smaller):
        own = graph.call_function(torch.ops.aten.slice.Tensor, (larger.args[1], 0, 0, rows))
    smaller.args = (smaller.args[0], own, *smaller.args[2:])


def blocks_of_the_row_before(graph: fx.Graph) -> None:
    node = of(graph, DEQUANTIZE_BLOCKS)[0]
    with graph.inserting_before(node):
        wide = graph.call_function(
            torch.ops.aten._to_copy.default, (node.args[1],), {"dtype": torch.float32}
        )
        rolled = graph.call_function(torch.ops.aten.roll.default, (wide, [1], [0]))
    node.args = (node.args[0], rolled, *node.args[2:])


def scale_of_another_layer(graph: fx.Graph) -> None:
    first, second = of(graph, BOTH)
    first.args = (first.args[0], second.args[1], *first.args[2:])


def activations_left_alone(graph: fx.Graph) -> None:
    for node in of(graph, BOTH):
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]


def scaled_weights(factor: float) -> Sabotage:
    def sabotage(graph: fx.Graph) -> None:
        node = of(graph, DEQUANTIZE_BLOCKS)[0]
        codes, blocks, scale, dtype = node.args
        node.args = (codes, blocks, scale * factor, dtype)  # type: ignore[operator]

    return sabotage


@pytest.mark.parametrize(
    ("sabotage", "told"),
    [
        (scaled_weights(1.01), "all ranks together went astray"),
        (nibbles_are_swapped, "all ranks together went astray"),
        (blocks_of_another_layer, "all ranks together went astray"),
        (blocks_of_the_row_before, "all ranks together went astray"),
        (scaled_by(BOTH, 1.01), "round to other codes"),
        (scale_of_another_layer, "round to other codes"),
        (activations_left_alone, "round to other codes"),
    ],
)
def test_planted_faults_are_caught(sabotage: Sabotage, told: str) -> None:
    with pytest.raises(ProofFailed, match=told):
        proven(sabotaged(stages_of("allgather-kv", 2), sabotage))


def changed(network: Network, fault: str) -> Network:
    """The network with a constant of one of its weights changed."""
    codes = next(x for x in network.layers if x.outputs[0].dtype == FP4 and x.kind == "CONSTANT")
    reader = next(x for x in network.layers if codes.outputs[0].name in x.inputs)
    steps = next(x for x in network.layers if x.outputs[0].name == reader.inputs[1])
    name = {"codes": codes.outputs[0].name, "blocks": steps.inputs[0], "whole": steps.inputs[1]}

    def one(layer: Layer) -> Layer:
        if layer.outputs[0].name != name[fault]:
            return layer
        value: Any = layer.parameters["value"]
        other = {
            "codes": lambda: value * 16 + (value >> 4),
            "blocks": lambda: value.float().roll(1, 0).to(value.dtype),
            "whole": lambda: value * 1.01,
        }
        return replace(layer, parameters={"value": other[fault]()})

    return replace(network, layers=tuple(map(one, network.layers)))


def test_a_networks_wrong_constants_are_caught() -> None:
    stages = stages_of("allgather-kv", 2)
    stages = replace(stages, lowered=lower(stages.lowered))
    proof, networks = proven(stages), networks_of(stages.lowered, 2)
    flat = flat_inputs(stages.lowered, tiny_inputs())
    for fault in ("codes", "blocks", "whole"):
        with pytest.raises(ProofFailed, match="networks go astray"):
            prove_networks([changed(n, fault) for n in networks], flat, proof, stages.lowered)


def test_another_kind_of_blocks_is_not_understood() -> None:
    stages = stages_of("allgather-kv", 2)
    stages = replace(stages, lowered=lower(stages.lowered))
    proof, networks = proven(stages), networks_of(stages.lowered, 2)
    flat = flat_inputs(stages.lowered, tiny_inputs())

    def wider(layer: Layer) -> Layer:
        if layer.kind != "DYNAMIC_QUANTIZE":
            return layer
        return replace(layer, parameters={**layer.parameters, "block_size": 32})

    others = [replace(n, layers=tuple(map(wider, n.layers))) for n in networks]
    with pytest.raises(ProofFailed, match=r"DYNAMIC_QUANTIZE of .* is not understood"):
        prove_networks(others, flat, proof, stages.lowered)
