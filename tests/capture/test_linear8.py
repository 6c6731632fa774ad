"""Which linear layers become products of codes, what they become, and what is refused."""

from dataclasses import replace
from functools import cache
from math import isnan
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cp_convert.capture.decompose import decompose
from cp_convert.capture.linear8 import ALONE, choose, stored_layers
from cp_convert.capture.products8 import Measured, Stored, quantized
from cp_convert.capture.scales import check_products
from cp_convert.capture.trace import trace
from cp_convert.errors import CannotConvert, UsageError
from cp_convert.ir.program import Lowered, module_path
from cp_convert.ir.quantize import FP8, LARGEST, QUANTIZE_DEQUANTIZE
from cp_convert.ir.source import Codes
from cp_convert.prove import flat_inputs
from cp_convert.prove.calibrate import largest_inputs, losses, sets_of
from cp_convert.prove.lockstep import run
from tests.conftest import table


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mod = nn.Linear(32, 64)
        self.q, self.k = nn.Linear(32, 32), nn.Linear(32, 32)
        self.odd = nn.Linear(32, 24)
        self.out = nn.Linear(24, 32)

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        shift, scale = self.mod(vector).unsqueeze(1).chunk(2, -1)
        x = x * (1 + scale) + shift
        return self.out(self.odd(self.q(x) * self.k(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(16, 32)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(32, 16)

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x, vector)
        return self.head(x)


def inputs() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"x": torch.randn(1, 24, 16), "vector": torch.randn(1, 32)}


@cache
def program() -> Lowered:
    torch.manual_seed(0)
    traced, _ = trace(Model().eval().requires_grad_(False), inputs(), {}, ())
    return decompose(traced, table())


def in_fp8(dense: Lowered, keep: Any = (), factor: float = 1.0) -> Lowered:
    chosen, _ = choose(dense, keep)
    flat = flat_inputs(dense, inputs())
    largest = {name: factor * x for name, x in largest_inputs(dense, chosen, [flat]).items()}
    return quantized(dense, chosen, Measured(largest)).program


def test_tokens_without_a_batch_are_tokens() -> None:
    """As in Cosmos3: a matrix of tokens, where modulation has a row for each of the batch."""
    torch.manual_seed(0)
    blocks = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    for rows, count in ((24, 2), (2, 0)):
        given = {"input": torch.randn(rows, 32)}
        traced, _ = trace(blocks.eval().requires_grad_(False), given, {}, ())
        dense = decompose(traced, table())
        if count:
            assert len(choose(dense)[0]) == count
        else:
            with pytest.raises(CannotConvert, match="modulation: it computes a vector"):
                choose(dense)


def test_blocks_are_quantized_and_what_surrounds_them_is_not() -> None:
    chosen, kept = choose(program())
    assert [module_path(n) for n in chosen] == [f"blocks.{i}.{n}" for i in (0, 1) for n in "qk"]
    assert {one.module: one.reason.split(":")[0] for one in kept} == {
        "embed": "an embedder or the output",
        "head": "an embedder or the output",
        "blocks.0.mod": "modulation",
        "blocks.1.mod": "modulation",
        **{
            f"blocks.{i}.{n}": "its weight's sizes are no multiples of 16"
            for i in (0, 1)
            for n in ("odd", "out")
        },
    }


def test_what_is_to_be_kept_is() -> None:
    chosen, kept = choose(program(), ("blocks.0.*", "*.k"))
    assert [module_path(n) for n in chosen] == ["blocks.1.q"]
    assert sum(one.reason == "--keep" for one in kept) == 6
    with pytest.raises(UsageError, match=r"--keep blocks.7.q: there is no linear layer"):
        choose(program(), ("blocks.7.q",))
    with pytest.raises(CannotConvert, match="no linear layer can be quantized: --keep"):
        choose(program(), ("*",))


def test_codes_take_the_weights_place_and_inputs_are_shared() -> None:
    dense = in_fp8(program())
    of_blocks = [t for name, t in dense.state.items() if t.dtype == FP8]
    assert len(of_blocks) == 4
    assert all(t.float().abs().max() == 448 for t in of_blocks)
    graph = dense.graph_module.graph
    both = list(graph.find_nodes(op="call_function", target=QUANTIZE_DEQUANTIZE))
    assert len(both) == 2  # one for q and k of a block
    assert all(len(n.users) == 2 for n in both)
    assert all(t.dtype != FP8 for t in program().state.values()), "the program before stays"


def test_it_computes_what_a_model_of_rounded_numbers_does() -> None:
    chosen, _ = choose(program())
    flat = flat_inputs(program(), inputs())
    largest = largest_inputs(program(), chosen, [flat])
    torch.manual_seed(0)
    model = Model().eval()

    def rounded(x: Tensor, top: float) -> Tensor:
        scale = torch.tensor(top, dtype=torch.float32) / 448
        return (x / scale).clamp(-448, 448).to(FP8).float() * scale

    for block in model.blocks:
        for own in (block.q, block.k):  # type: ignore[union-attr]
            own.weight.data = rounded(own.weight.data, own.weight.abs().max().item())  # type: ignore[union-attr,operator,arg-type]
    tops = iter([largest[str(n.args[0])] for n in chosen])
    for block in model.blocks:
        for own in (block.q, block.k):  # type: ignore[union-attr]
            top = next(tops)
            own.register_forward_pre_hook(  # type: ignore[union-attr,operator]
                lambda _, given, top=top: (rounded(given[0], top),)
            )
    with torch.no_grad():
        wanted = model(**inputs())
    ((got,),) = run(in_fp8(program()), flat, 1)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    ((plain,),) = run(program(), flat, 1)
    assert (plain - wanted).abs().max() > 1e-3


def test_int8_has_a_scale_for_each_row() -> None:
    chosen, _ = choose(program())
    flat = flat_inputs(program(), inputs())
    given = Measured(largest_inputs(program(), chosen, [flat]), torch.int8)
    made = quantized(program(), chosen, given)
    dense, found = made.program, made.codes
    assert set(found) == {node.name for node in chosen}
    for node in chosen:
        one, weight = found[node.name], program().state[str(node.args[1])]
        assert one.codes.dtype == torch.int8
        assert (one.codes.abs().amax(1) == 127).all()
        numbers = one.codes.float() * one.weight_scale[:, None]  # type: ignore[index]
        assert (numbers - weight).abs().max() <= 0.51 * one.step
        assert torch.equal(dense.state[str(node.args[1])], one.codes)
    ((got,),) = run(dense, flat, 1)
    ((plain,),) = run(program(), flat, 1)
    assert 1e-4 < (got - plain).norm() / plain.norm() < 0.02
    assert all(0 < one < 0.03 for one in losses(program(), found, flat).values())


def test_a_layer_that_reads_another_in_int8() -> None:
    """Where a product's scale stands outside, its reader's input is no longer what was measured."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16)).eval().requires_grad_(False)
    x = torch.randn(1, 24, 16)
    traced, _ = trace(module, {"input": x}, {}, ())
    dense = decompose(traced, table())
    flat = flat_inputs(dense, {"input": x})
    chosen, _ = choose(dense)
    largest = largest_inputs(dense, chosen, [flat])
    made = quantized(dense, chosen, Measured(largest, torch.int8))
    done, found = made.program, made.codes
    assert len(chosen) == len(found) == 2
    ((got,),), ((plain,),) = run(done, flat, 1), run(dense, flat, 1)
    assert 1e-4 < (got - plain).norm() / plain.norm() < 0.03


def test_keep_reaches_layers_of_a_checkpoint() -> None:
    chosen, _ = choose(program())
    given = Measured(largest_inputs(program(), chosen, [flat_inputs(program(), inputs())]))
    found = quantized(program(), chosen, given).codes
    stored = {str(node.args[1]): found[node.name] for node in chosen}
    first = str(chosen[0].args[1])
    stored[first] = replace(stored[first], input_scale=None)
    every, kept = stored_layers(program(), stored)
    assert [n.name for n in every] == [n.name for n in chosen[1:]]
    assert any(one.reason == f"{ALONE}: the checkpoint has no scale for its input" for one in kept)
    every, kept = stored_layers(program(), stored, measured=True, keep=("*.1.q",))
    assert [n.name for n in every] == [n.name for n in chosen if module_path(n) != "blocks.1.q"]
    assert [one.module for one in kept if one.reason == f"{ALONE}: --keep"] == ["blocks.1.q"]


def test_ranges_are_those_of_all_sets_of_inputs() -> None:
    chosen, _ = choose(program())
    flat = flat_inputs(program(), inputs())
    larger = {name: 4 * x for name, x in flat.items()}
    once, both = (largest_inputs(program(), chosen, sets) for sets in ([flat], [flat, larger]))
    assert all(both[name] > 2 * once[name] for name in once)


def test_a_range_that_is_none_stays_so_whatever_else_flows() -> None:
    chosen, _ = choose(program())
    flat = flat_inputs(program(), inputs())
    odd = {name: x * float("nan") for name, x in flat.items()}
    for sets in ([flat, odd], [odd, flat]):
        assert all(isnan(x) for x in largest_inputs(program(), chosen, sets).values())


SETS: dict[str, tuple[str, Any, str]] = {
    "NaN": ("x", lambda x: x * float("nan"), "x holds NaN or infinity"),
    "infinity": ("vector", lambda x: x / 0, "vector holds NaN or infinity"),
    "shape": ("x", lambda x: x[:, :8], r"x is \[1, 8, 16\], and the example's is \[1, 24, 16\]"),
    "another name": ("y", lambda _: torch.ones(1), "has y, which are no inputs"),
}


@pytest.mark.parametrize(("name", "change", "told"), SETS.values(), ids=SETS)
def test_files_that_are_no_sets_of_inputs(
    name: str, change: Any, told: str, tmp_path: Path
) -> None:
    flat, file = flat_inputs(program(), inputs()), tmp_path / "a.safetensors"
    given = dict(flat)
    save_file(given, file)
    assert len(list(sets_of(flat, [file]))) == 2
    given[name] = change(flat.get(name))
    save_file({key: x.contiguous() for key, x in given.items()}, file)
    with pytest.raises(UsageError, match=told):
        list(sets_of(flat, [file]))
    file.write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(UsageError, match=r"--calibration: a\.safetensors is PyTorch's pickle"):
        list(sets_of(flat, [file]))


def test_an_input_of_zeros_has_no_scale() -> None:
    with pytest.raises(CannotConvert, match=r"the input of blocks.0.q has no scale.*is 0\.0"):
        in_fp8(program(), factor=0.0)


def test_a_range_whose_inverse_float32_does_not_hold() -> None:
    with pytest.raises(CannotConvert, match=r"the input of blocks.0.q has no scale.*e-4\d"):
        in_fp8(program(), factor=1e-41)


ZEROS: dict[str, tuple[dict[str, Any], torch.dtype, bool, str]] = {
    "both": ({"weight_scale": 1e-20, "input_scale": 1e-20}, torch.float32, False, "1e-20 is zero"),
    "both, apart": ({"weight_scale": 1e-20, "input_scale": 1e-20}, torch.float32, True, "is zero"),
    "weight": ({"weight_scale": 5e-11}, torch.float16, False, "its weight: 5e-11 .* in float16"),
    "input": ({"input_scale": 5e-11}, torch.float16, False, "its input: 5e-11 .* in float16"),
    "alone": ({"weight_scale": 5e-11, "input_scale": None}, torch.float16, True, "its weight"),
    "enough": ({"weight_scale": 1e-10, "input_scale": 1e-10}, torch.float16, False, ""),
    "enough apart": ({"weight_scale": 5e-11, "input_scale": 1e-20}, torch.float16, True, ""),
    "enough in bfloat16": ({"weight_scale": 1e-18}, torch.bfloat16, False, ""),
}


@pytest.mark.parametrize(("scales", "like", "apart", "told"), ZEROS.values(), ids=ZEROS)
def test_scales_that_leave_zeros(
    scales: dict[str, Any], like: torch.dtype, apart: bool, told: str
) -> None:
    own = replace(Codes(torch.zeros(1).to(FP8), 0.1, 0.1), **scales)
    if not told:
        check_products(own, like, "blocks.0.q", apart=apart)
        return
    with pytest.raises(CannotConvert, match=f"scales of blocks.0.q .*{told}"):
        check_products(own, like, "blocks.0.q", apart=apart)


def test_a_program_with_such_scales_is_refused() -> None:
    chosen, _ = choose(program())
    given = Measured(largest_inputs(program(), chosen, [flat_inputs(program(), inputs())]))
    found = quantized(program(), chosen, given).codes
    stored = {str(n.args[1]): replace(found[n.name], weight_scale=1e-35) for n in chosen}
    alone = {name: replace(own, input_scale=1e-5) for name, own in stored.items()}
    with pytest.raises(CannotConvert, match=r"scales of blocks.0.q leave zeros"):
        quantized(program(), chosen, Stored(alone), alone)


def test_what_a_layer_loses_by_itself() -> None:
    chosen, _ = choose(program())
    flat = flat_inputs(program(), inputs())
    scales = quantized(program(), chosen, Measured(largest_inputs(program(), chosen, [flat]))).codes
    lost = losses(program(), scales, flat)
    assert set(lost) == {node.name for node in chosen}
    assert all(0.01 < one < 0.06 for one in lost.values())
    assert all(0 < one.step < 1 / LARGEST[FP8] for one in scales.values())
