"""The arithmetic of every kind, against formulas written out in float64."""

import pytest
import torch
from torch import Tensor

from cp_convert.lora.change import Change, changed, delta


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


WEIGHT = numbers(6, 8)
LORA = Change("lora", {"up": numbers(6, 2), "down": numbers(2, 8)}, scale=0.25)


def product(change: Change) -> Tensor:
    return change.tensors["up"].double() @ change.tensors["down"].double() * change.scale


def near(found: Tensor, wanted: Tensor) -> bool:
    assert found.dtype == torch.float32
    return torch.allclose(found.double(), wanted, rtol=1e-5, atol=1e-6)


def test_lora() -> None:
    assert near(changed(WEIGHT, [(LORA, 0.5)]), WEIGHT.double() + 0.5 * product(LORA))


def test_half_precision_weights_and_factors_are_added_in_float32() -> None:
    half = Change("lora", {n: t.bfloat16() for n, t in LORA.tensors.items()}, 0.25)
    found = changed(WEIGHT.half(), [(half, 1.0)])
    assert near(found, WEIGHT.half().double() + product(half))


def test_several_are_added_each_at_its_strength() -> None:
    other = Change("full", {"full": numbers(6, 8, seed=1)})
    found = changed(WEIGHT, [(LORA, 0.5), (other, -2.0)])
    assert near(found, WEIGHT.double() + 0.5 * product(LORA) - 2 * other.tensors["full"].double())


def test_a_convolution() -> None:
    down, up = numbers(2, 4, 3, 3), numbers(6, 2, 1, 1)
    found = delta(Change("lora", {"up": up, "down": down}), (6, 4, 3, 3))
    wanted = torch.einsum("or,rikl->oikl", up[:, :, 0, 0].double(), down.double())
    assert near(found, wanted)


def test_lokr_whole_and_in_products() -> None:
    first, second = numbers(2, 4), numbers(3, 2)
    whole = Change("lokr", {"w1": first, "w2": second}, 0.5)
    assert whole.size == (6, 8)
    assert near(delta(whole, (6, 8)), torch.kron(first.double(), second.double()) * 0.5)
    left, right = numbers(3, 1), numbers(1, 2)
    halves = Change("lokr", {"w1": first, "w2_a": left, "w2_b": right})
    assert halves.size == (6, 8)
    wanted = torch.kron(first.double(), left.double() @ right.double())
    assert near(delta(halves, (6, 8)), wanted)


def test_lokr_of_a_convolution() -> None:
    first, second = numbers(2, 2), numbers(3, 2, 3, 3)
    change = Change("lokr", {"w1": first, "w2": second})
    found = delta(change, (6, 4, 3, 3))
    assert change.size == (6, 36)
    for row in range(3):
        for column in range(3):
            wanted = torch.kron(first.double(), second[:, :, row, column].double())
            assert near(found[:, :, row, column], wanted)


@pytest.mark.parametrize("by_row", [True, False])
def test_dora_gives_rows_or_columns_the_norms_of_its_magnitude(by_row: bool) -> None:
    magnitude = numbers(6).abs() if by_row else numbers(1, 8).abs()
    dora = Change("lora", LORA.tensors, LORA.scale, magnitude=magnitude)
    found = changed(WEIGHT, [(dora, 0.5)])
    summed = WEIGHT.double() + 0.5 * product(LORA)
    norm = summed.norm(dim=1 if by_row else 0, keepdim=True)
    wide = magnitude.double()[:, None] if by_row else magnitude.double()
    assert near(found, wide * summed / norm)
    assert torch.allclose(found.norm(dim=1 if by_row else 0), magnitude.flatten(), rtol=1e-5)


def test_rows_are_a_part_of_the_product_in_their_order() -> None:
    index = torch.tensor([4, 5, 0])
    piece = Change("lora", LORA.tensors, LORA.scale, rows=index)
    assert piece.size == (3, 8)
    assert near(delta(piece, (3, 8)), product(LORA)[index])
