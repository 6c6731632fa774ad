"""NVFP4's numbers: what codes stand for, what becomes of numbers, and what may be split."""

import pytest
import torch
from torch import fx

from cp_convert.ir.nvfp4 import (
    LARGEST_OF_ALL,
    dequantize_blocks,
    from_pairs,
    nearest,
    pairs,
    quantize_blocks,
    quantize_dequantize_blocks,
)
from cp_convert.ir.quantize import FP8
from cp_convert.sharding.rules import RULES

MAGNITUDES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def test_numbers_are_the_nearest_ties_to_even_and_saturate() -> None:
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 100.0, -0.26, -2.6])
    told = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, -0.5, -3.0]
    assert nearest(x).tolist() == told
    every = torch.linspace(-7, 7, 1013)
    table = torch.tensor([*MAGNITUDES, *(-x for x in MAGNITUDES)])
    closest = (every[:, None] - table).abs().amin(1)
    assert torch.equal((nearest(every) - every).abs(), closest)


def test_the_even_column_is_in_the_lower_half() -> None:
    """ModelOpt's order, and that of the text in TensorRT's engines."""
    codes = torch.tensor([[0x21, 0xF8]], dtype=torch.uint8)
    assert from_pairs(codes).tolist() == [[0.5, 1.0, -0.0, -6.0]]
    every = torch.tensor([[*MAGNITUDES, *(-x for x in MAGNITUDES)]])
    assert torch.equal(from_pairs(pairs(every)), every)
    assert pairs(every).flatten().tolist() == [16 * (2 * i + 1) + 2 * i for i in range(8)]


def test_a_block_is_measured_by_its_largest_number_and_its_scale_is_a_code() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 48) * torch.tensor([1.0, 0.05, 4.0]).repeat_interleave(16)
    scale = x.abs().max().item() / LARGEST_OF_ALL
    numbers, blocks = quantize_blocks(x, scale)
    assert blocks.dtype == FP8
    assert blocks.shape == (3, 5, 3)
    assert blocks.float().max() == 448
    own = x.unflatten(-1, (3, 16))
    steps = (own.abs().amax(-1) / 6 / scale).to(FP8).float() * scale
    told = nearest(own / steps[..., None])
    assert torch.equal(numbers.unflatten(-1, (3, 16)), told)
    both = quantize_dequantize_blocks(x, scale)
    torch.testing.assert_close(both, (told * steps[..., None]).flatten(-2), rtol=1e-6, atol=0)
    assert torch.equal(dequantize_blocks(pairs(numbers), blocks, scale, torch.float32), both)
    assert 0.05 < (both - x).norm() / x.norm() < 0.15


def test_many_rows_are_worked_off_in_pieces() -> None:
    x = torch.randn(3, 3000, 64)
    numbers, blocks = quantize_blocks(x, 1e-3)
    for i in (0, 2):
        own = quantize_blocks(x[i, 2990:], 1e-3)
        assert torch.equal(numbers[i, 2990:], own[0])
        assert torch.equal(blocks[i, 2990:].float(), own[1].float())
    assert torch.equal(from_pairs(pairs(numbers)), numbers)


def test_blocks_of_zeros_or_of_what_is_too_small_are_zeros() -> None:
    x = torch.zeros(2, 32)
    x[1, :16] = 1e-9
    assert torch.equal(quantize_dequantize_blocks(x, 1e-3), torch.zeros(2, 32))
    beyond = quantize_dequantize_blocks(torch.full((1, 16), 1e6), 1e-3)
    torch.testing.assert_close(beyond, torch.full((1, 16), 6 * 448 * 1e-3))


def test_half_precision_is_rounded_once() -> None:
    x = torch.randn(4, 32).bfloat16()
    assert quantize_dequantize_blocks(x, 1e-3).dtype == torch.bfloat16
    wide = quantize_dequantize_blocks(x.float(), 1e-3)
    assert torch.equal(quantize_dequantize_blocks(x, 1e-3), wide.bfloat16())
    assert torch.equal(quantize_dequantize_blocks(x, 1e-3, torch.float32), wide)


@pytest.mark.parametrize("name", ["quantize_dequantize_blocks", "dequantize_blocks"])
def test_blocks_are_never_split(name: str) -> None:
    graph, mode = fx.Graph(), torch._subclasses.FakeTensorMode()
    x, blocks = graph.placeholder("x"), graph.placeholder("blocks")
    with mode:
        flows = name.startswith("quantize")
        x.meta["val"] = torch.empty(2, 24, 64) if flows else torch.empty(24, 32).byte()
        blocks.meta["val"] = torch.empty(24, 4, dtype=FP8)
        given = (x, 0.1) if flows else (x, blocks, 0.1, torch.float32)
        node = graph.call_function(getattr(torch.ops.cp, name).default, given)
        node.meta["val"] = torch.empty(2, 24, 64) if flows else torch.empty(24, 64)
    rules = RULES[node.target](node)
    places = range(1 if flows else 2)
    assert [rule.output for rule in rules] == ([0, 1] if flows else [0])
    for rule in rules:
        assert rule.inputs == dict.fromkeys(places, rule.output)
