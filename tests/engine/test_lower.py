"""Decomposition, our passes, and what becomes of one rank."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from cp_convert.backends import BACKENDS
from cp_convert.capture.decompose import decompose
from cp_convert.capture.trace import trace
from cp_convert.engine.build import network_of, prepare
from cp_convert.engine.lower import lower
from cp_convert.engine.readback import read_network
from cp_convert.engine.specialise import specialise
from cp_convert.errors import CannotLower
from cp_convert.ir import ops
from cp_convert.ir.passes import interleave_strided_writes
from cp_convert.ir.program import Lowered
from cp_convert.ir.serialize import pack, unpack
from cp_convert.mesh import Mesh
from cp_convert.model.cast import cast_module
from cp_convert.prove.lockstep import run
from cp_convert.prove.replay import replay
from cp_convert.strategies import STRATEGIES
from tests.conftest import example, rewritten, sharded, table, tiny, tiny_inputs

prepare(BACKENDS["tensorrt-rtx"])

SCATTER = torch.ops.aten.slice_scatter.default


def lowered(name: str = "ulysses", world: int = 2) -> Lowered:
    return lower(rewritten(tiny(), tiny_inputs(), name, world).rewritten)


def traced(module: nn.Module, inputs: dict[str, Tensor]) -> Lowered:
    return decompose(trace(module, inputs, {})[0], table())


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_the_lowered_program_computes_the_same(name: str) -> None:
    dense = tiny()(**tiny_inputs())
    for (out,) in run(lowered(name, 3), tiny_inputs(), 3):
        torch.testing.assert_close(out, dense, rtol=1e-5, atol=1e-5 * dense.abs().max().item())


def test_attention_stays_whole_and_parameters_stay_outside() -> None:
    program = lowered()
    targets = [n.target for n in program.graph_module.graph.nodes]
    assert targets.count(torch.ops.cp.attention.default) == 2
    assert not any("softmax" in str(target) for target in targets)
    assert len(program.state) == len(list(tiny().parameters()))
    assert not list(program.graph_module.parameters())


def test_the_shard_of_a_constant_is_not_folded_away() -> None:
    """Wan splits rotary tables that depend on constants alone."""
    wan = example("wan")
    module = wan.build_model().eval()
    cast_module(module, torch.float16)
    inputs = {k: v.half() if v.is_floating_point() else v for k, v in wan.example_inputs().items()}
    program = sharded(module, inputs, module._cp_plan, 2).program
    graph = lower(program).graph_module.graph
    shards = graph.find_nodes(op="call_function", target=torch.ops.cp.shard.default)
    tables = [node for node in shards if node.args[0].op == "get_attr"]
    assert len(tables) >= 2, "cosines and sines"
    assert not graph.find_nodes(op="call_function", target=SCATTER)


def test_a_ranks_program_slices_what_is_its_own() -> None:
    program = lowered(world=4)
    for rank in range(4):
        own = specialise(program, rank).graph_module.graph
        assert not own.find_nodes(op="call_function", target=torch.ops.cp.shard.default)
        slices = [n for n in own.nodes if n.name.startswith("shard")]
        assert all(n.target is torch.ops.aten.slice.Tensor for n in slices)
        assert [n.args[1:] for n in slices] == [(1, 6 * rank, 6 * rank + 6)]
    shards = program.graph_module.graph.find_nodes(
        op="call_function", target=torch.ops.cp.shard.default
    )
    assert len(shards) == 1, "the shared program is left as it is"


def test_a_ranks_program_names_its_own_group_first() -> None:
    axis = Mesh((("ring", 2), ("ulysses", 2))).axis("ring")

    def forward(x: Tensor) -> Tensor:
        return ops.all_gather(ops.shard(x, 0, axis), axis)

    with torch._subclasses.FakeTensorMode() as mode:
        graph_module = make_fx(forward)(mode.from_tensor(torch.ones(4, 2)))
    program = Lowered(graph_module, {}, (), ())
    graph = specialise(program, 3).graph_module.graph
    gather = next(n for n in graph.nodes if n.target in ops.COLLECTIVES)
    assert gather.args[1:] == ([1, 3, 0, 2], 2)
    part = next(n for n in graph.nodes if n.target is torch.ops.aten.slice.Tensor)
    assert part.args[1:] == (0, 2, 4)


def test_an_operator_without_a_converter_is_named_with_its_line() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.qr(x).R

    program = traced(Odd(), {"x": torch.ones(3, 3)})
    with pytest.raises(CannotLower, match=r"no converter for aten\.linalg_qr") as caught:
        lower(program)
    assert "test_lower.py" in (caught.value.where or "")


def test_a_forward_that_writes_to_its_state_is_refused() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x + self.calls

    with pytest.raises(CannotLower, match="writes to calls"):
        traced(Counter(), {"x": torch.ones(1)})


def test_a_table_of_large_angles_keeps_its_last_bit() -> None:
    """LTX-Video's rotary angles reach 15,000: one bit of a decomposed linspace is 1e-3 there."""

    class Rotary(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            angles = 10000.0 ** torch.linspace(0.0, 1.0, 10) * torch.pi / 2
            return x * angles.cos()

    inputs = {"x": torch.ones(1, 10)}
    program = lower(traced(Rotary(), inputs))
    ((out,),) = run(program, inputs, 1)
    torch.testing.assert_close(out, Rotary()(**inputs), rtol=0, atol=1e-6)


def test_every_output_is_a_tensor_of_its_own() -> None:
    """TensorRT would otherwise rename an input, or lose one of two names."""

    class Returns(nn.Module):
        def forward(self, x: Tensor, unused: Tensor) -> dict[str, Tensor | None]:
            y = x + 1
            return {"y": y, "again": y, "input": x, "none": None}

    inputs = {"x": torch.randn(2, 3), "unused": torch.ones(1)}
    program = lower(traced(Returns(), inputs))
    interpreter = network_of(specialise(program, 0))  # it holds the weights of its network
    network = read_network(interpreter.ctx.net)
    assert [b.name for b in network.inputs] == ["x", "unused"]
    assert [b.name for b in network.outputs] == ["y", "again", "input"]
    ((y, again, same),) = replay([network], inputs)
    assert torch.equal(y, inputs["x"] + 1)
    assert torch.equal(again, y)
    assert torch.equal(same, inputs["x"])


def scatter(base: Tensor, part: Tensor, start: int, end: int, step: int) -> Tensor:
    return torch.ops.aten.slice_scatter.default(base, part, 1, start, end, step)


def graph_of(forward: Callable[..., Tensor], *inputs: Tensor) -> fx.GraphModule:
    with torch._subclasses.FakeTensorMode() as mode:
        return make_fx(forward)(*[mode.from_tensor(x) for x in inputs])


HIT = [
    lambda a, b: scatter(scatter(torch.zeros(2, 6), a, 0, 6, 2), b, 1, 2**63 - 1, 2),
    lambda a, b: scatter(scatter(torch.zeros(2, 6), b, 1, 6, 2), a, 0, 6, 2),
    lambda a, b: scatter(
        scatter(torch.zeros(2, 6), torch.ops.aten.copy.default(torch.zeros(2, 3), a[:1]), 0, 6, 2),
        torch.ops.aten.copy.default(torch.zeros(2, 3), b.double()), 1, 6, 2,
    ),
    lambda a, b: scatter(
        scatter(scatter(torch.zeros(2, 6), b, 0, 6, 2), b, 1, 6, 2), a, 0, 6, 2
    ),
]  # fmt: skip
NO_HIT = [
    lambda a, b: scatter(torch.zeros(2, 6), a, 0, 6, 2),
    lambda a, b: scatter(scatter(torch.zeros(2, 6), a, 0, 6, 2), b, 0, 6, 2),
    lambda a, b: scatter(scatter(torch.zeros(2, 7), a, 0, 6, 2), b, 1, 7, 2),
    lambda a, b: scatter(scatter(torch.zeros(2, 6), a, 0, 3, 1), b, 3, 6, 1),
]


@pytest.mark.parametrize("forward", HIT)
def test_writes_that_fill_a_tensor_become_one_stack(forward: Callable[..., Tensor]) -> None:
    a, b = torch.randn(2, 3), torch.randn(2, 3)
    module = graph_of(forward, a, b)
    assert interleave_strided_writes(module.graph) == 1
    module.recompile()
    assert not module.graph.find_nodes(op="call_function", target=SCATTER)
    torch.testing.assert_close(module(a, b), forward(a, b), rtol=0, atol=0)


@pytest.mark.parametrize("forward", NO_HIT)
def test_other_writes_are_left_alone(forward: Callable[..., Tensor]) -> None:
    module = graph_of(forward, torch.randn(2, 3), torch.randn(2, 3))
    before = [n.target for n in module.graph.nodes]
    assert interleave_strided_writes(module.graph) == 0
    assert [n.target for n in module.graph.nodes] == before


class TablesOfTheirOwn(nn.Module):
    """Every block makes the same table; one makes another."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x * torch.arange(8.0).cos() + torch.ones(8)
        return x * torch.arange(8.0).sin()


def test_equal_constants_are_held_once() -> None:
    inputs = {"x": torch.randn(2, 8)}
    program, _ = trace(TablesOfTheirOwn(), inputs, {})
    dense = decompose(program, table())
    held = list(dense.graph_module.graph.find_nodes(op="get_attr"))
    assert len(held) == 3
    ((ours,),) = run(dense, inputs, 1)
    torch.testing.assert_close(ours, TablesOfTheirOwn()(**inputs))


def test_an_argument_may_be_called_like_a_python_builtin() -> None:
    """fx renames such nodes when a graph is copied or read; bindings know them by their names."""

    class Filters(nn.Module):
        def forward(self, input: Tensor, filter: Tensor) -> Tensor:  # noqa: A002
            return input * filter

    inputs = {"input": torch.randn(2, 3), "filter": torch.randn(2, 3)}
    program = lower(traced(Filters(), inputs))
    for whole in (program, unpack(pack(program, described={}, provenance=False))):
        interpreter = network_of(specialise(whole, 0))  # it holds the weights of its network
        network = read_network(interpreter.ctx.net)
        assert [b.name for b in network.inputs] == ["input", "filter"]
        ((out,),) = replay([network], inputs)
        assert torch.equal(out, inputs["input"] * inputs["filter"])
