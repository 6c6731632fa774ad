"""Models that communicate by themselves, and weights that are each rank's own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from cp_convert.backends import BACKENDS
from cp_convert.capture.decompose import decompose
from cp_convert.capture.trace import trace
from cp_convert.engine.build import collectives_of, network_of, prepare
from cp_convert.engine.lower import lower
from cp_convert.engine.readback import constants_of, read_network
from cp_convert.engine.specialise import specialise
from cp_convert.errors import CannotShard, CannotTrace, ModelFileError, ProofFailed, UsageError
from cp_convert.ir.program import Lowered
from cp_convert.ir.source import Source
from cp_convert.job import Job
from cp_convert.mesh import Axis, Mesh
from cp_convert.model.load import load
from cp_convert.prove import flat_inputs, measure_ranks
from cp_convert.prove.lockstep import run
from cp_convert.prove.replay import replay
from cp_convert.sharding.shard import shard
from cp_convert.strategies import choose
from cp_convert.strategies.rewrite import rewrite
from tests.conftest import EXAMPLES, example, table

c10d = torch.ops._c10d_functional
prepare(BACKENDS["tensorrt-rtx"])
TENSOR_PARALLEL = EXAMPLES / "tensor_parallel.py"


def loaded(model: Path, world: int) -> Source:
    return load(Job(model, "ulysses", world, Path("out"), precision="fp32"))


def dense_of(source: Source) -> Lowered:
    traced, _ = trace(
        source.module, source.inputs, {}, peers=source.peers, groups=source.groups
    )  # fmt: skip
    return decompose(traced, table())


def whole_block() -> Tensor:
    """The example's block written once more, without any parallelism."""
    file = example("tensor_parallel")
    w, x = file.full_weights(), file.example_inputs()["x"]
    x = functional.linear(x, w["enter.weight"], w["enter.bias"])
    q, k, v = torch.einsum("bsc,nhdc->nbhsd", x, w["qkv.weight"])
    mixed = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v
    x = x + functional.linear(mixed.transpose(1, 2).flatten(2), w["out.weight"])
    hidden = functional.gelu(functional.linear(x, w["up.weight"]), approximate="tanh")
    x = x + functional.linear(hidden, w["down.weight"])
    return functional.linear(x, w["leave.weight"], w["leave.bias"])


@pytest.mark.engine
@pytest.mark.parametrize(
    ("name", "world"),
    [("ulysses", 2), ("ulysses", 4), ("ring", 6), ("allgather-kv", 4), ("usp", 8)],
)
def test_tensor_and_context_parallelism_together(name: str, world: int) -> None:
    """Program and networks of all ranks against the block without any parallelism."""
    source = loaded(TENSOR_PARALLEL, world)
    axis = Mesh.line(world).free(source.groups.values())
    assert axis.size == world // 2
    split = shard(dense_of(source), axis)
    done, outcomes = rewrite(split, choose(name, 2 if name == "usp" else None), name, axis, table())
    assert [outcome.kept is None for outcome in outcomes] == [world > 2]
    lowered = lower(done)
    truth = whole_block()
    flat = flat_inputs(lowered, source.inputs)
    networks: Any = []
    held = []
    for rank in range(world):
        interpreter = network_of(specialise(lowered, rank))
        held.append(interpreter)
        networks.append(read_network(interpreter.ctx.net, constants_of(networks)))
        own = [c.group for c in collectives_of(interpreter.ctx.net) if c.operator == "all_reduce"]
        assert own == [(rank - rank % 2, rank - rank % 2 + 1)] * 2
    for outputs in (run(lowered, flat, world), replay(networks, flat)):
        for (output,) in outputs:
            torch.testing.assert_close(output, truth, rtol=1e-4, atol=1e-4)


def test_another_ranks_weights_are_noticed() -> None:
    """Ranks 0 and 2 share no group: with other weights they return something else."""
    source = loaded(TENSOR_PARALLEL, 4)
    dense = dense_of(source)
    assert measure_ranks(dense, source.inputs, 4).is_wide
    with torch.no_grad():
        next(source.peers[1].parameters()).mul_(2)
    with pytest.raises(ProofFailed, match="rank 2 returns something else"):
        measure_ranks(dense, source.inputs, 4)


class Talking(nn.Module):
    """All functional collectives one after another, over groups of two."""

    def forward(self, x: Tensor) -> Tensor:
        x = c10d.wait_tensor(c10d.all_gather_into_tensor(x, 2, "pair"))
        x = c10d.wait_tensor(c10d.all_to_all_single(2 * x, [4, 4], [4, 4], "pair"))
        x = x + c10d.wait_tensor(c10d.broadcast(x, 1, "pair"))
        x = c10d.wait_tensor(c10d.reduce_scatter_tensor(x, "avg", 2, "pair"))
        return c10d.wait_tensor(c10d.all_reduce(x, "max", "pair"))


def test_every_functional_collective() -> None:
    pair = Axis("pair", ((0, 2), (1, 3)))
    inputs = {"x": torch.randn(4, 3)}
    traced, _ = trace(Talking(), inputs, {}, groups={"pair": pair})
    dense = decompose(traced, table())
    targets = [n.target for n in dense.graph_module.graph.nodes if "cp" in str(n.target)]
    names = ("all_gather", "all_to_all", "broadcast", "reduce_scatter", "all_reduce")
    assert targets == [getattr(torch.ops.cp, name).default for name in names]
    (out,) = run(dense, inputs, 4)[3]
    x = inputs["x"]
    halves = [2 * torch.cat((x, x)).chunk(2)[rank].repeat(2, 1) for rank in range(2)]
    mine = [(half + halves[1]) for half in halves]
    mean = torch.stack(mine).mean(0)
    torch.testing.assert_close(out, torch.stack(mean.chunk(2)).amax(0))


class Calls(nn.Module):
    """One call of the user's."""

    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x) + 1


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda x: c10d.all_reduce(x, "sum", "dp"), "called 'dp'"),
        (lambda x: c10d.all_gather_into_tensor(x, 3, "tp"), "has 3 ranks"),
        (lambda x: c10d.all_to_all_single(x, [1, 3], [2, 2], "tp"), "receives"),
        (lambda x: c10d.all_reduce_(x.clone(), "sum", "tp"), "not understood"),
    ],
)
def test_what_is_not_understood_is_refused(call: Callable[[Tensor], Tensor], reason: str) -> None:
    groups = {"tp": Axis("tp", ((0, 1),))}
    with pytest.raises(CannotTrace, match=reason) as caught:
        trace(Calls(call), {"x": torch.randn(4, 2)}, {}, groups=groups)
    assert "test_c10d.py" in str(caught.value.where)


def test_ranks_of_different_programs_are_refused() -> None:
    first, second = Calls(lambda x: 2 * x), Calls(lambda x: 3 * x)
    with pytest.raises(CannotTrace, match="rank 1 is another program"):
        trace(first, {"x": torch.randn(4, 2)}, {}, peers=[second])


def test_free_axes() -> None:
    line = Mesh.line(4)
    assert line.free([]) == line.whole
    pairs = Axis("tp", ((0, 1), (2, 3)))
    assert line.free([pairs]).groups == ((0, 2), (1, 3))
    assert line.free([pairs, Axis("dp", ((0, 2), (1, 3)))]).size == 1
    with pytest.raises(UsageError, match="unequally"):
        line.free([Axis("odd", ((0, 1), (2,), (3,)))])


def test_groups_that_miss_a_rank_are_refused(model_file: Callable[..., Path]) -> None:
    path = model_file(("def build_model", "process_groups = {'tp': [[0, 1]]}\ndef build_model"))
    with pytest.raises(ModelFileError, match="divide the 4 ranks"):
        loaded(path, 4)


def test_ranks_of_different_shapes_are_refused(model_file: Callable[..., Path]) -> None:
    path = model_file(
        ("def build_model():", "def build_model(rank):"),
        ("return Model()", "m = Model(); m.leave = nn.Linear(64, 8 + rank); return m"),
    )
    with pytest.raises(ModelFileError, match=r"leave\.weight"):
        loaded(path, 2)


def test_usp_must_divide_what_is_left() -> None:
    source = loaded(TENSOR_PARALLEL, 4)
    axis = Mesh.line(4).free(source.groups.values())
    with pytest.raises(CannotShard, match="2 ranks share the sequence"):
        rewrite(shard(dense_of(source), axis), choose("usp", 4), "usp", axis, table())
