"""Programs cut after modules: numbers bit by bit, what is handed on, and where it is refused."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from cp_convert import ContextParallelInput, ContextParallelOutput
from cp_convert.engine.one_program import by_scatter
from cp_convert.errors import ProofFailed, UsageError
from cp_convert.ir.program import Lowered
from cp_convert.ir.split import RESIDUAL, Pieces, split
from cp_convert.prove.chain import check_pieces, run_pieces
from cp_convert.prove.lockstep import run
from tests.conftest import rewritten

PLAN: Mapping[str, Any] = {
    "": {"x": ContextParallelInput(split_dim=1, expected_dims=3)},
    "leave": ContextParallelOutput(gather_dim=1, expected_dims=3),
}


class Mixed(nn.Module):
    """Attention over what it is given."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(4 * q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Two residuals, and a shift by time that is broadcast over the tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(width), Mixed(width)
        self.time, self.mlp = nn.Linear(8, width), nn.Linear(width, width)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x) + self.time(time)[:, None])
        return x + self.mlp(x).tanh()


class Stack(nn.Module):
    """Three blocks; with ``long`` the last also reads what the first gave, beside its own."""

    def __init__(self, *, long: str = "") -> None:
        super().__init__()
        self.enter, self.embed, self.long = nn.Linear(8, 32), nn.Linear(8, 8), long
        self.blocks = nn.ModuleList(Block(32) for _ in range(3))
        self.join, self.leave = nn.Linear(64, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        x, time = self.enter(x), self.embed(time)
        first = x = self.blocks[0](x, time)
        x = self.blocks[1](x, time)
        if self.long == "cat":
            x = self.join(torch.cat([x, first], dim=-1))
        if self.long == "add":
            x = x + first
        return self.leave(self.blocks[2](x, time))


def inputs() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"x": torch.randn(2, 24, 8), "time": torch.randn(2, 8)}


@cache
def program(world: int, *, long: str = "") -> Lowered:
    torch.manual_seed(0)
    stack = Stack(long=long).eval()
    lowered = rewritten(stack, inputs(), "ulysses", world, PLAN).rewritten
    assert isinstance(lowered, Lowered)
    return lowered


def handed(pieces: Pieces) -> list[list[str]]:
    """What every piece hands on, by what it is of."""
    return [sorted(b.name for b in one.program.outputs) for one in pieces.all]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    "modules",
    [
        ("blocks.0",),
        ("blocks.2", "blocks.0"),
        ("blocks.0", "blocks.1", "blocks.2"),
        ("embed", "blocks.1"),
    ],
)
def test_pieces_return_what_the_whole_does(world: int, modules: tuple[str, ...]) -> None:
    whole = program(world)
    pieces = split(whole, modules)
    assert [one.after for one in pieces.all] == [*sorted(modules, key=order), None]
    assert pieces.programs[-1].outputs == whole.outputs
    check_pieces(pieces.programs, whole, inputs(), world)
    done = {node.name for one in pieces.programs for node in nodes(one)}
    assert done >= {node.name for node in nodes(whole)}


def order(module: str) -> str:
    return "" if module == "embed" else module


def nodes(one: Lowered) -> list[torch.fx.Node]:
    return [node for node in one.graph_module.graph.nodes if node.op == "call_function"]


def test_weights_and_inputs_go_where_they_are_read() -> None:
    first, between, last = split(program(2), ("blocks.0", "blocks.2")).programs
    assert [b.name for b in first.inputs] == ["x", "time"]
    assert not {"x", "time"} & {b.name for b in (*between.inputs, *last.inputs)}
    assert sorted(last.state) == ["p_leave_bias", "p_leave_weight"]
    assert not set(first.state) & set(between.state)
    shapes = {b.name: b.shape for b in first.outputs}
    assert sorted(shapes.values()) == [(2, 8), (2, 12, 32), (2, 12, 32)], "parts, not gathered"


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("first", ["blocks.0", "blocks.1"])
def test_the_residual_is_what_all_blocks_up_to_the_cut_add(first: str, scattered: bool) -> None:
    whole = by_scatter(program(2)) if scattered else program(2)
    pieces = split(whole, (first, "blocks.2"))
    assert pieces.step is not None
    assert pieces.step.residual == RESIDUAL
    ((entered, left),) = pieces.step.streams
    assert left in handed(pieces)[1]
    outputs = run_pieces(pieces.programs[:1], inputs(), 2)
    torch.manual_seed(0)
    stack = Stack().eval()
    with torch.no_grad():
        before = x = stack.enter(inputs()["x"])
        for block in stack.blocks[: int(first[-1]) + 1]:
            x = block(x, stack.embed(inputs()["time"]))
    names = [b.name for b in pieces.programs[0].outputs]
    for name, want in ((RESIDUAL, x - before), (entered, x)):
        got = torch.cat([of_rank[names.index(name)] for of_rank in outputs], dim=1)
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize(
    ("modules", "words"),
    [
        (("blocks.0",), "leave nothing between them to skip"),
        (("embed", "blocks.0"), "no stream"),
        (("enter", "blocks.2"), "enter adds to no stream"),
    ],
)
def test_why_nothing_can_be_skipped(modules: tuple[str, ...], words: str) -> None:
    pieces = split(program(2), modules)
    assert pieces.step is None
    assert words in (pieces.why_not or "")
    assert not any(RESIDUAL in names for names in handed(pieces))


@pytest.mark.parametrize(
    ("modules", "words", "hint"),
    [
        (("blocks.1.attn",), r"residual is still open.*\[2, 12, 32\] of blocks.0", "blocks.1."),
        (("blocks.1.norm",), "blocks.1 adds it later", "--split-after blocks.1."),
        (("blocks.1.attn.qkv",), "a residual is still open", "--split-after blocks.1."),
        (("blocks.7",), "no module of this path", "did you mean blocks."),
        (("blocks",), "computes nothing by itself", "such as blocks.0"),
        (("leave",), "nothing of the program follows it", "a block"),
        (("enter", "embed"), "neither follows from the other", "two blocks"),
        (("blocks.1.mlp", "blocks.1"), "a residual is still open", "--split-after blocks.1."),
    ],
)
def test_refused(modules: tuple[str, ...], words: str, hint: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        split(program(2), modules)
    assert hint in (caught.value.hint or "")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("long", ["add", "cat"])
def test_a_skip_over_several_blocks_is_a_residual_too(long: str) -> None:
    whole = program(1, long=long)
    with pytest.raises(UsageError, match=r"--split-after blocks.1: a residual is still open"):
        split(whole, ("blocks.1",))
    check_pieces(split(whole, ("blocks.0", "blocks.2")).programs, whole, inputs(), 1)


def test_pieces_of_another_program_do_not_pass() -> None:
    whole = program(2)
    pieces = split(whole, ("blocks.0",)).programs
    node = next(n for n in nodes(pieces[1]) if n.target is torch.ops.aten.tanh.default)
    node.target = torch.ops.aten.sigmoid.default
    with pytest.raises(ProofFailed, match="give another output on rank 0 than the program"):
        check_pieces(pieces, whole, inputs(), 2)
    node.target = torch.ops.aten.tanh.default


def test_the_whole_is_not_changed() -> None:
    whole = program(2)
    before = str(whole.graph_module.graph)
    split(whole, ("blocks.0", "blocks.2"))
    assert str(whole.graph_module.graph) == before
    assert all(len(of_rank) == 1 for of_rank in run(whole, inputs(), 2))
