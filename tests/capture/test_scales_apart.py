"""Scales of quantized layers as parameters: the same codes, and constants that blocks share."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from cp_convert.capture import attention8, linear8
from cp_convert.capture.products8 import Measured, Products, Stored, quantized
from cp_convert.engine.lower import lower
from cp_convert.errors import ProofFailed
from cp_convert.ir.nvfp4 import (
    DEQUANTIZE_BLOCKS,
    PAIRS,
    QUANTIZE_DEQUANTIZE_BLOCKS,
    STEP_OF_ALL,
    quantize_blocks,
)
from cp_convert.ir.ops import ATTENTION
from cp_convert.ir.quantize import (
    DEQUANTIZE,
    FP8,
    INT8,
    QUANTIZE_DEQUANTIZE,
    STEP,
    scaled,
    to_codes,
)
from cp_convert.ir.source import Codes
from cp_convert.prove import Stages, flat_inputs
from cp_convert.prove.calibrate import largest_inputs
from cp_convert.prove.lockstep import run
from tests.capture.test_linear8 import inputs, program
from tests.prove.test_quantizers import of, programs, proven, rounding_of, sabotaged, staged

QUANTIZERS = {QUANTIZE_DEQUANTIZE: 1, DEQUANTIZE: 1, QUANTIZE_DEQUANTIZE_BLOCKS: 1}
Change = Callable[[Codes], Codes]


@pytest.mark.parametrize("dtype", [FP8, INT8])
def test_codes_are_the_same_to_the_bit(dtype: torch.dtype) -> None:
    """Of numbers of all sizes, and beyond the outermost code; ties among them."""
    torch.manual_seed(0)
    x = torch.randn(1 << 18) * torch.logspace(-9, 4, 1 << 18)
    scale, step = torch.tensor(0.0371).item(), STEP[dtype]
    ties = scale * torch.arange(0, 448, 0.125)
    for numbers in (x, x.bfloat16().float(), x.half().float(), ties):
        apart = scaled(numbers / torch.tensor(scale / step), step)
        assert torch.equal(apart, scaled(numbers, scale))
        assert len(to_codes(apart, dtype).float().unique()) > 70


def test_codes_of_blocks_are_the_same_but_for_ties() -> None:
    torch.manual_seed(0)
    x, scale = torch.randn(512, 512) * torch.logspace(-3, 1, 512)[:, None], 0.00371
    codes, blocks = quantize_blocks(x, scale)
    apart, of_apart = quantize_blocks(x / torch.tensor(scale / STEP_OF_ALL), STEP_OF_ALL)
    assert (blocks.float() != of_apart.float()).sum() <= 2
    assert (codes != apart).sum() <= 32


def made(dtype: torch.dtype, change: Change = lambda own: own, **options: bool) -> Products:
    """Two blocks whose layers are as ``change`` says, the scales apart or not."""
    chosen, _ = linear8.choose(program(), dtype=dtype)
    flat = flat_inputs(program(), inputs())
    measured = Measured(largest_inputs(program(), chosen, [flat]), dtype)
    plain = quantized(program(), chosen, measured)
    stored = {str(n.args[1]): change(plain.codes[n.name]) for n in chosen}
    multiplied = [n for n in chosen if stored[str(n.args[1])].is_multiplied]
    return quantized(program(), multiplied, Stored(stored), stored, **options)


def by_rows(own: Codes) -> Codes:
    rows = torch.linspace(0.5, 1, len(own.codes)) * own.step
    return replace(own, weight_scale=rows, input_scale=None, by_token=True)


def smoothed(own: Codes) -> Codes:
    return replace(own, smooth=torch.linspace(0.5, 1.5, own.codes.shape[1]))


def with_low_rank(own: Codes) -> Codes:
    rows, columns = own.codes.shape[0], 2 * own.codes.shape[1]
    return replace(own, low_rank=(torch.ones(4, columns) / 64, torch.ones(rows, 4) / 8))


def alone(own: Codes) -> Codes:
    return replace(own, input_scale=None)


@pytest.mark.parametrize(
    ("dtype", "change", "each"),
    [
        (FP8, lambda own: own, {"input_scale", "scale"}),
        (INT8, smoothed, {"input_scale", "scale", "smooth"}),
        (PAIRS, lambda own: own, {"input_scale", "scale"}),
        (PAIRS, with_low_rank, {"input_scale", "scale", "low_rank_a", "low_rank_b"}),
        (FP8, by_rows, {"scale"}),
        (FP8, alone, {"scale"}),
        (PAIRS, alone, {"scale"}),
    ],
)
def test_the_program_computes_the_same(dtype: torch.dtype, change: Any, each: set[str]) -> None:
    both = [made(dtype, change, apart=apart) for apart in (False, True)]
    ((want,),), ((got,),) = (
        run(one.program, flat_inputs(one.program, inputs()), 1) for one in both
    )
    same_numbers = dtype is FP8 and change is alone
    assert (got - want).norm() <= (0 if same_numbers else 2e-4) * want.norm()
    plain, apart = both
    assert plain.apart == {}
    assert {what for _, what in apart.apart.values()} == each
    assert apart.program.state.keys() >= apart.apart.keys()
    scales = [set[float](), set[float]()]
    for known, one in zip(scales, both, strict=True):
        for node in one.program.graph_module.graph.nodes:
            if node.target in QUANTIZERS:
                known.add(node.args[1])
            if node.target is DEQUANTIZE_BLOCKS:
                known.add(node.args[2])
    tables = [
        [n for n in one.program.graph_module.graph.find_nodes(op="get_attr") if n.name[0] == "_"]
        for one in both
    ]
    assert bool(tables[0]) == (change in (by_rows, smoothed, with_low_rank) or dtype is INT8)
    assert not tables[1]
    assert len(scales[0]) > len(scales[1]) == 1


def test_layers_that_read_the_same_divide_it_by_the_same() -> None:
    found = made(FP8, apart=True)
    weights = [weight for weight, what in found.apart.values() if what == "scale"]
    assert len(weights) == len(set(weights)) == 4
    assert sum(what == "input_scale" for _, what in found.apart.values()) == 2


# --- what the proof says --------------------------------------------------------------------------


@cache
def apart() -> Stages:
    plain, _ = programs()
    chosen, _ = linear8.choose(plain)
    largest = largest_inputs(plain, chosen, [flat_inputs(plain, _inputs())])
    return staged(plain, quantized(plain, chosen, Measured(largest), apart=True).program)


def _inputs() -> dict[str, Tensor]:
    from tests.conftest import tiny_inputs

    return tiny_inputs()


def test_they_are_proven() -> None:
    codes = rounding_of(proven(replace(apart(), lowered=lower(apart().lowered))))
    assert codes.bound.max < codes.loss.max
    assert max(e.max for e in codes.ranks) <= codes.bound.max


def changed(name: str, factor: float) -> Callable[[fx.Graph], None]:
    """What reads the first scale of that name reads it times a factor."""

    def sabotage(graph: fx.Graph) -> None:
        node = next(n for n in graph.find_nodes(op="placeholder") if f"_{name}_apart" in n.name)
        (user, *_) = node.users
        with graph.inserting_before(user):
            wrong = graph.call_function(torch.ops.aten.mul.Tensor, (node, factor))
        wrong.meta = dict(node.meta)
        user.replace_input_with(node, wrong)

    return sabotage


def exchanged(graph: fx.Graph) -> None:
    """Two layers are multiplied by one another's scales."""
    first, second = (
        n for n in graph.find_nodes(op="placeholder") if n.name.endswith("_scale_apart")
        and "input_scale" not in n.name
    )  # fmt: skip
    users = list(first.users), list(second.users)
    for user in users[0]:
        user.replace_input_with(first, second)
    for user in users[1]:
        user.replace_input_with(second, first)


def coarser(graph: fx.Graph) -> None:
    """The same numbers without rounding, other codes."""
    node = of(graph, QUANTIZE_DEQUANTIZE)[0]
    node.args = (node.args[0], 1.01 * node.args[1], *node.args[2:])  # type: ignore[operator]


@pytest.mark.parametrize(
    ("sabotage", "told"),
    [
        (changed("input_scale", 1.01), "all ranks together went astray"),
        (changed("weight_scale", 1.01), "all ranks together went astray"),
        (exchanged, "all ranks together went astray"),
        (coarser, "round to other codes"),
    ],
)
def test_faults_are_caught(sabotage: Any, told: str) -> None:
    with pytest.raises(ProofFailed, match=told):
        proven(sabotaged(apart(), sabotage))


# --- attention ------------------------------------------------------------------------------------


def test_attentions_of_all_blocks_have_the_largest_steps() -> None:
    plain, _ = programs()
    graph = plain.graph_module.graph
    nodes = list(graph.find_nodes(op="call_function", target=ATTENTION))
    paths = ["blocks.0.attn", "blocks.1.attn", "blocks.1.text"]
    fakes = [_at(nodes[0], path, f"attention_{n}") for n, path in enumerate(paths)]
    steps = dict(zip([n.name for n in fakes], [(1.0, 5.0, 2.0), (3.0, 4.0, 1.0), (9.0,) * 3],
                     strict=True))  # fmt: skip
    found = attention8.alike(fakes, steps)
    assert list(found.values()) == [(3.0, 5.0, 2.0), (3.0, 5.0, 2.0), (9.0, 9.0, 9.0)]


def _at(node: fx.Node, path: str, name: str) -> fx.Node:
    made = fx.Graph().create_node("call_function", node.target, name=name)
    made.meta = {"nn_module_stack": {"": (path, torch.nn.Module)}}
    return made
