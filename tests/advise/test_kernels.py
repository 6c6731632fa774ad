"""Kernels of a program, their times by curves, and what of communication they hide."""

from __future__ import annotations

import tomllib
from collections import Counter
from pathlib import Path

import msgspec
import pytest
import torch
from torch import nn

from cp_convert.advise import hardware
from cp_convert.advise.estimate import _end, estimate
from cp_convert.advise.hardware import Measured, at
from cp_convert.advise.kernels import Kernel, kernels_of
from cp_convert.advise.measured import measured, to_toml
from cp_convert.capture.decompose import decompose
from cp_convert.capture.trace import trace
from cp_convert.errors import UsageError
from tests.conftest import rewritten, table, tiny, tiny_inputs

H200 = hardware.read("h200")


class Between(nn.Module):
    """A product, three pointwise operators of which one result is read twice, two products."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right = (nn.Linear(32, 32, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.silu(self.first(x)) * 2
        return self.left(y) + self.right(y)


def of(module: nn.Module, *inputs: torch.Tensor) -> list[Kernel]:
    program, _ = trace(module.eval(), dict(zip(("x",), inputs, strict=True)), {})
    return kernels_of(decompose(program, table()))


def test_what_lies_between_products_is_one_kernel() -> None:
    kernels = of(Between(), torch.ones(4, 32))
    assert [one.kind for one in kernels] == ["product", "fused", "product", "product", "fused"]
    rows = 4 * 32 * 4  # bytes
    assert kernels[1].bytes == 2 * rows  # however many operators: read once, written once
    assert kernels[4].bytes == 3 * rows
    assert [one.inputs for one in kernels] == [(), (0,), (1,), (1,), (2, 3)]


def test_a_result_that_is_read_twice_within_a_kernel_counts_once() -> None:
    class Diamonds(nn.Module):
        """Doubling at each of forty steps, were one to follow every path."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = (nn.Linear(8, 8, bias=False) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.first(x)
            for _ in range(40):
                y = y.sin() + y.cos()
            return self.last(y)

    kernels = of(Diamonds(), torch.ones(4, 8))
    assert [one.kind for one in kernels] == ["product", "fused", "product"]
    assert kernels[1].bytes == 2 * 4 * 8 * 4


def test_a_reshape_costs_only_where_it_is_no_view() -> None:
    class Reshaped(nn.Module):
        def __init__(self, *, moves: bool) -> None:
            super().__init__()
            self.moves, self.a, self.b = moves, nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x).reshape(2, 3, 4, 2)
            y = y.permute(0, 2, 1, 3) if self.moves else y
            return self.b(y.reshape(2, 3, 8))

    x = torch.ones(2, 3, 8)
    assert [one.kind for one in of(Reshaped(moves=False), x)] == ["product", "product"]
    kinds = [one.kind for one in of(Reshaped(moves=True), x)]
    assert kinds == ["product", "fused", "product"]


@pytest.mark.parametrize("strategy", ["ulysses", "allgather-kv", "ring", "stream-kv"])
def test_collectives_and_attentions_are_those_of_the_program(strategy: str) -> None:
    program = rewritten(tiny(), tiny_inputs(), strategy, 2).rewritten
    kinds = Counter(one.kind for one in kernels_of(program))
    names = [str(node.target) for node in program.graph_module.graph.nodes]
    assert kinds["attention"] == sum("cp.attention" in name for name in names)
    assert kinds["collective"] == sum("cp.all" in name or "cp.broadcast" in name for name in names)
    assert kinds["fused"] > 0


def test_work_hides_a_collective_that_nobody_waits_for() -> None:
    wire, work = Kernel("collective", ()), Kernel("product", ())
    reader = Kernel("product", (0,))
    assert _end([wire, work, reader], [3.0, 2.0, 1.0]) == 4.0  # one second of three is exposed
    assert _end([wire, reader, work], [3.0, 1.0, 2.0]) == 6.0
    assert _end([work, wire], [2.0, 3.0]) == 5.0  # it begins after what was started before it


def test_prefetching_exposes_less() -> None:
    slow = msgspec.structs.replace(H200, link_gb_per_s=0.01)
    at_once, streamed = (
        estimate(rewritten(tiny(), tiny_inputs(), name, 2).rewritten, slow)
        for name in ("allgather-kv", "stream-kv")
    )
    assert at_once.exposed == pytest.approx(at_once.communication, rel=0.01)
    assert streamed.exposed < streamed.communication
    assert streamed.seconds == streamed.compute + streamed.exposed


def test_a_curve_is_followed_between_its_points_and_beyond() -> None:
    curve = [(1.0, 10.0), (100.0, 1000.0)]
    assert at(curve, 10) == pytest.approx(100e-6)
    assert at(curve, 0.01) == pytest.approx(0.1e-6)
    assert at(curve, 1000) == pytest.approx(10000e-6)
    floor = [(1.0, 10.0), (2.0, 9.9), (4.0, 20.0)]
    assert at(floor, 0.5) == at(floor, 0) == pytest.approx(10e-6)


def curves(**more: object) -> Measured:
    line = [(1.0, 10.0), (100.0, 1000.0)]
    given = {
        "by": "hand",
        "processors": 10,
        "matmul": line,
        "attention": {"64": line, "128": [(1.0, 5.0)]},
        "copies": [(1e-6, 1.0), (1.0, 2.0)],
        "fused": [(1e-6, 3.0), (1.0, 4.0)],
        "collectives": {"ALL_GATHER": {"2": [(1e-6, 50.0)]}},
    }
    return msgspec.convert(given | more, Measured)


def test_measured_curves_go_before_published_rates() -> None:
    told = msgspec.structs.replace(H200, measured=curves())
    assert told.product(10 * 10**9, 4, half=True) == pytest.approx(100e-6)
    assert told.product(10 * 10**9, 4, half=False) != pytest.approx(100e-6)  # measured in half
    of_64 = told.attention(10**9, 4, head_dim=72, tiles=10, half=True)
    assert of_64 == pytest.approx(10e-6 * 96 / 72)  # kernels compute with heads of 96
    few = told.attention(10**9, 4, head_dim=64, tiles=1, half=True)
    assert few == pytest.approx(100e-6)  # nine of ten processors are idle
    of_136 = told.attention(10**9, 4, head_dim=136, tiles=10, half=True)
    assert of_136 == pytest.approx(5e-6 * 192 / 136)
    assert told.attention(10**9, 4, head_dim=128, tiles=10, half=True) == pytest.approx(5e-6)
    assert told.fused(1) == pytest.approx(3e-6)
    assert told.collective("ALL_GATHER", 2, 1) == pytest.approx(50e-6)
    assert told.collective("ALL_GATHER", 4, 0) == pytest.approx(told.collective_us * 1e-6)


def test_a_hardware_file_is_read_as_it_was_written() -> None:
    told = msgspec.structs.replace(H200, measured=curves())
    assert msgspec.convert(tomllib.loads(to_toml(told)), hardware.Hardware) == told
    found = msgspec.to_builtins(curves())
    assert measured(found, H200, "hand").measured == curves()


@pytest.mark.parametrize(
    "curve", [[], [(1.0, 0.0)], [(2.0, 1.0), (1.0, 1.0)], [(1.0, 1.0), (1.0, 2.0)], [(-1.0, 1.0)]]
)
def test_a_curve_that_is_none_is_refused(curve: list[tuple[float, float]]) -> None:
    with pytest.raises(msgspec.ValidationError, match="a curve's sizes ascend"):
        curves(matmul=curve)


@pytest.mark.parametrize("text", ["title = 'x'", "[measured]\nby = 'x'", "= 3", "\xff"])
def test_a_file_that_describes_no_hardware_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match="describes no hardware"):
        hardware.read(str(file))
