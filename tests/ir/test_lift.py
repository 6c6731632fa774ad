"""Programs of several sizes as one in which whole numbers are expressions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode

from cp_convert.errors import CannotLift
from cp_convert.ir.lift import Range, Slots, fill, lift, range_of, value
from cp_convert.ir.program import Binding, Lowered
from cp_convert.ir.serialize import Packed, pack, unpack
from cp_convert.ir.writer import Writer

aten = torch.ops.aten
THIRDS = Slots(scale=1, offset=0, under=1, over=3, times=1)
SIZES = (4, 5, 8, 11)
Made = Callable[[Writer, nn.Module, fx.Node, int], fx.Node]


def program(n: int, made: Made) -> Packed:
    """A program that pads ``n`` rows to three ranks, with what ``made`` adds."""
    mode, graph, root = FakeTensorMode(), fx.Graph(), nn.Module()
    write = Writer(graph, mode)
    x = graph.placeholder("x")
    with mode:
        x.meta["val"] = torch.empty(n, 2)
    result = made(write, root, x, n)
    graph.output((result,))
    shape = tuple(result.meta["val"].shape)
    inputs = (Binding("x", "x", torch.float32, (n, 2)),)
    outputs = (Binding("y", result.name, torch.float32, shape),)
    return pack(Lowered(fx.GraphModule(root, graph), {}, inputs, outputs))


def padded(write: Writer, root: nn.Module, x: fx.Node, n: int) -> fx.Node:
    """Rows in equal parts, zeros behind them."""
    slots = -(-n // 3)
    zeros = write.op(aten.full.default, [3 * slots - n, 2], 0, dtype=torch.float32)
    whole = write.op(aten.cat.default, [x, zeros], 0)
    return write.op(aten._reshape_copy.default, whole, [3, slots, 2])


def held(write: Writer, root: nn.Module, table: Tensor) -> fx.Node:
    """A table of the program."""
    root.register_buffer("table", table, persistent=False)
    node = write.graph.get_attr("table")
    with write.mode:
        node.meta["val"] = torch.empty(table.shape)
    return node


def lifted(made: Made, sizes: Sequence[int] = SIZES, last: int = 11) -> Packed:
    return lift({n: program(n, made) for n in sizes}, Range("n", 4, last, 1, (THIRDS,)))


def run(packed: Packed, x: Tensor) -> Tensor:
    module = unpack(packed).graph_module
    module.recompile()
    (result,) = module(x)
    assert isinstance(result, Tensor)
    return result


def test_a_program_with_a_size_filled_in_is_that_sizes_program() -> None:
    whole = lifted(padded)
    told = range_of(msgspec.msgpack.decode(whole.document))
    assert told is not None and told.values == range(4, 12)
    for n in (4, 5, 7, 8, 10, 11):  # 7 and 10 are none that it was made from
        assert fill(whole, n).document == program(n, padded).document
    x = torch.randn(9, 2)  # no padding at all: the parts are the rows
    assert torch.equal(run(fill(whole, 9), x), x.reshape(3, 3, 2))


def test_a_program_that_is_not_lifted_has_no_size() -> None:
    with pytest.raises(ValueError, match="fixed shapes"):
        fill(program(4, padded), 4)


def test_expressions_are_whole_numbers() -> None:
    assert value([2, 1, 3], [1, 5]) == 8
    with pytest.raises(ValueError, match="no whole number"):
        value([2, 1, 3], [1, 4])


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda w, r, x, n: w.op(aten.mul.Tensor, x, 1 / n), "more than whole numbers"),
        (
            lambda w, r, x, n: w.op(aten.expand.default, w.op(aten.unsqueeze.default, x, 0),
                                    [n * n, n, 2]),
            "follows no rule",
        ),
        (
            lambda w, r, x, n: w.op(aten.relu.default if n > 5 else aten.tanh.default, x),
            "has aten.tanh.default at 4 where it has aten.relu.default at 8",
        ),
        (
            lambda w, r, x, n: w.op(aten.mul.Tensor, x, held(w, r, torch.full((n, 1), 1.0 / n))),
            "other numbers from size to size",
        ),
    ],
)  # fmt: skip
def test_what_is_more_than_sizes_is_refused(made: Made, words: str) -> None:
    with pytest.raises(CannotLift, match=words):
        lifted(made)


def test_one_of_a_kind_is_hinted_at() -> None:
    def copied(write: Writer, root: nn.Module, x: fx.Node, n: int) -> fx.Node:
        return write.op(aten.relu.default if n > 1 else aten.tanh.default, x)

    with pytest.raises(CannotLift) as refused:
        lift({n: program(n, copied) for n in (1, 2, 3, 4)}, Range("n", 1, 4, 1))
    assert (refused.value.hint or "").startswith("begin at 2")
    assert lift({n: program(n, copied) for n in (2, 3, 4, 5)}, Range("n", 2, 5, 1)).document


def test_a_half_is_refused_where_a_size_in_between_has_none() -> None:
    def halved(write: Writer, root: nn.Module, x: fx.Node, n: int) -> fx.Node:
        return write.op(aten.slice.Tensor, x, 0, 0, n // 2)

    even = (4, 6, 8, 10)
    assert lift({n: program(n, halved) for n in even}, Range("n", 4, 10, 2)).document
    with pytest.raises(CannotLift, match="follows no rule"):
        lift({n: program(n, halved) for n in even}, Range("n", 4, 10, 1))


PLACES = torch.arange(1.0, 25.0).reshape(12, 2)


def rows(write: Writer, root: nn.Module, x: fx.Node, n: int) -> fx.Node:
    """The first rows of a table, as many as there are of ``x``."""
    return write.op(aten.add.Tensor, x, held(write, root, PLACES[:n].clone()))


def rows_and_zeros(write: Writer, root: nn.Module, x: fx.Node, n: int) -> fx.Node:
    """The same with padding, as a folded table has it."""
    table = torch.cat([PLACES[:n], torch.zeros(-n % 3, 2)]).reshape(3, -1, 2)
    parts = held(write, root, table.reshape(-1, 2))
    return write.op(aten.add.Tensor, padded_rows(write, root, x, n), parts)


def padded_rows(write: Writer, root: nn.Module, x: fx.Node, n: int) -> fx.Node:
    zeros = write.op(aten.full.default, [-(-n // 3) * 3 - n, 2], 0, dtype=torch.float32)
    return write.op(aten.cat.default, [x, zeros], 0)


def ones(write: Writer, root: nn.Module, x: fx.Node, n: int) -> fx.Node:
    return write.op(aten.add.Tensor, x, held(write, root, torch.ones(n, 2)))


@pytest.mark.parametrize("made", [rows, rows_and_zeros])
def test_a_table_has_the_rows_of_the_last_size(made: Made) -> None:
    with pytest.raises(CannotLift, match="that of 12 is not known") as refused:
        lifted(made, last=12)
    assert refused.value.hint == "let the range end at 11."
    assert lifted(ones, last=12).document


@pytest.mark.parametrize("made", [rows, rows_and_zeros, ones])
def test_tables_that_grow_with_the_size(made: Made) -> None:
    whole = lifted(made)
    for n in (4, 6, 7, 9, 10, 11):
        x = torch.randn(n, 2)
        assert torch.equal(run(fill(whole, n), x), run(program(n, made), x)), n
