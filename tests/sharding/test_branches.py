"""Guidance: every rank against the dense model, controls along every axis, and planted faults."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from cp_convert.backends import BACKENDS
from cp_convert.capture.combine import combine
from cp_convert.capture.decompose import decompose
from cp_convert.capture.trace import trace
from cp_convert.engine.build import prepare
from cp_convert.engine.lower import lower
from cp_convert.engine.specialise import specialise
from cp_convert.errors import CannotShard, CannotTrace, ProofFailed, UsageError
from cp_convert.ir import ops
from cp_convert.ir.program import Lowered
from cp_convert.ir.proof import Proof
from cp_convert.ir.sharded import Guided
from cp_convert.ir.source import Branches
from cp_convert.mesh import GUIDANCE, Mesh
from cp_convert.model.branches import blamed_on_rows, branched
from cp_convert.model.cast import cast_inputs, cast_module
from cp_convert.prove import Stages, measure, prove, prove_networks
from cp_convert.sharding.branches import split_branches
from cp_convert.sharding.shard import shard
from cp_convert.strategies import CONTROL
from cp_convert.strategies.rewrite import rewrite
from tests.conftest import networks_of, strategy, table, tiny, tiny_inputs
from tests.sharding.test_shard import Attends, model, sdpa, tokens

Sabotage = Callable[[fx.Graph, Mesh], None]
NONE = Branches()


def proven(
    module: nn.Module,
    inputs: Mapping[str, Any],
    mesh: Mesh,
    name: str = "ulysses",
    *,
    branches: Branches = NONE,
    sabotage: Sabotage | None = None,
    seen: list[Lowered] | None = None,
) -> tuple[Proof, Guided]:
    """What the proof says of ``module`` on this mesh, after ``sabotage``; ``seen`` is proven."""
    truth = measure(module, inputs, branches=branches)
    program, _ = trace(module, inputs, {})
    dense = combine(decompose(program, table()), branches)
    axis = mesh.sequence()
    guided = split_branches(dense, mesh.axis(GUIDANCE))
    split = shard(guided.program, axis)
    control, _ = rewrite(split, CONTROL, "control", axis, table())
    done, outcomes = rewrite(split, strategy(name, axis.size), name, axis, table())
    if sabotage is not None:
        sabotage(done.graph_module.graph, mesh)
    if seen is not None:
        seen.append(done)
    sites = [(o.site, o.node) for o in outcomes]
    stages = Stages(dense, control, done, done, sites, axis, others=mesh.others)
    return prove(truth, {**inputs, **branches.added}, stages), guided


SELDOM = pytest.mark.slow
MESHES = [
    (2, 1, 2, "ulysses"), (3, 1, 3, "ring"), (4, 1, 8, "ulysses"), (2, 2, 2, "ulysses"),
    (3, 2, 6, "stream-kv"), *(
        pytest.param(*mesh, marks=SELDOM) for mesh in (
            (2, 2, 4, "ring"), (2, 3, 2, "allgather-kv"), (2, 4, 2, "usp"), (4, 2, 4, "ring"),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize(("cfg", "cp", "batch", "name"), MESHES)
def test_every_rank_returns_every_branch(cfg: int, cp: int, batch: int, name: str) -> None:
    proof, guided = proven(tiny(), tiny_inputs(batch), Mesh.of(cfg * cp, cfg), name)
    assert len(proof.ranks) == cfg * cp
    assert max(error.max for error in proof.ranks) < 1e-5
    assert proof.controls[GUIDANCE].max > 0.1, "the others' branches are not one's own"
    assert (proof.control is None) == (cp == 1)
    assert guided.inputs == ("x", "text")
    assert [m.operator for m in guided.moves if m.kind == "gather"] == ["the output"]


class Positions(Attends):
    """Tokens at positions: as many as there are branches, or a multiple, and yet no batch."""

    def forward(self, x: Tensor, places: Tensor, given: Any = None) -> Tensor:
        return super().forward(x + places.sin()) * places.cos()


@pytest.mark.parametrize("mesh", [Mesh.of(2, 2), Mesh.of(4, 2)])
def test_what_has_no_batch_stays_whole(mesh: Mesh) -> None:
    torch.manual_seed(0)
    inputs = {"x": tokens(24), "places": torch.randn(24, 48)}
    _, guided = proven(Positions(sdpa).eval(), inputs, mesh)
    assert guided.inputs == ("x",)


class Mixes(Attends):
    """Attention among the rows of the batch."""

    def forward(self, x: Tensor, given: Any = None) -> Tensor:
        return super().forward(x.flatten(0, 1)[None]).view(x.shape)


class Averages(Attends):
    """The batch's mean shifts every row; its attention is by rows."""

    def forward(self, x: Tensor, given: Any = None) -> Tensor:
        shift = functional.softmax(x.mean(1), 0)
        return super().forward(x) + shift.cumsum(0)[:, None]


def test_an_attention_over_all_branches_is_refused_with_its_line() -> None:
    with pytest.raises(CannotShard, match=r"sees all branches at once .*first to mix") as caught:
        proven(Mixes(sdpa).eval(), {"x": tokens(24)}, Mesh.of(2, 2))
    assert "test_shard.py" in str(caught.value.where), "the attention's own line"


def test_a_model_without_a_batch_is_refused() -> None:
    with pytest.raises(CannotShard, match="no input has as many rows"):
        proven(model(sdpa), {"x": tokens(24, 1)}, Mesh.of(2, 2))


def test_channels_are_no_batch() -> None:
    """An output that begins with channels, as many as branches, of a model without a batch."""

    class Channels(Attends):
        def forward(self, x: Tensor, given: Any = None) -> Tensor:
            return super().forward(x)[0].t()

    with pytest.raises(CannotShard, match="no input has as many rows"):
        proven(Channels(sdpa).eval(), {"x": tokens(24, 1)}, Mesh.of(2, 2))
    with pytest.raises(UsageError, match="no argument is a tensor of two dimensions"):
        branched({"x": [tokens(24)]}, Channels(sdpa), 2)


@pytest.mark.parametrize("mesh", [Mesh.of(2, 2), Mesh.of(4, 2)])
def test_what_mixes_the_batch_elsewhere_is_gathered(mesh: Mesh) -> None:
    torch.manual_seed(0)
    _, guided = proven(Averages(sdpa).eval(), {"x": tokens(24)}, mesh)
    gathered = [m.operator for m in guided.moves if m.kind == "gather"]
    assert "aten._softmax.default" in gathered
    assert all(move.axis == GUIDANCE for move in guided.moves)


def test_branches_that_are_alike_prove_nothing() -> None:
    inputs = {name: torch.cat([x[:1], x[:1]]) for name, x in tiny_inputs().items()}
    with pytest.raises(ProofFailed, match="keeps its own guidance branches along the axis cfg"):
        proven(tiny(), inputs, Mesh.of(4, 2))


def collectives(graph: fx.Graph, mesh: Mesh) -> list[fx.Node]:
    """Those along the axis of guidance, shards included."""
    flat = mesh.axis(GUIDANCE).flat
    return [n for n in graph.nodes if n.op == "call_function" and flat in n.args]


def stale_group(graph: fx.Graph, mesh: Mesh) -> None:
    node = collectives(graph, mesh)[-1]
    axis = mesh.sequence()
    node.args = (*node.args[:-2], axis.flat, axis.size)


def swapped_rows(graph: fx.Graph, mesh: Mesh) -> None:
    """Every rank takes the other branch's rows, and the gather does not know."""
    swapped = [rank for group in mesh.axis(GUIDANCE).groups for rank in reversed(group)]
    for node in collectives(graph, mesh):
        if node.target is torch.ops.cp.shard.default:
            node.args = (*node.args[:-2], swapped, node.args[-1])


def swapped_in_one_input(graph: fx.Graph, mesh: Mesh) -> None:
    swapped = [rank for group in mesh.axis(GUIDANCE).groups for rank in reversed(group)]
    node = collectives(graph, mesh)[0]
    assert node.target is torch.ops.cp.shard.default
    node.args = (*node.args[:-2], swapped, node.args[-1])


def dropped(graph: fx.Graph, mesh: Mesh) -> None:
    """The last collective hands on what it was given, as often as there are branches."""
    node = collectives(graph, mesh)[-1]
    with graph.inserting_before(node):
        again = graph.call_function(torch.ops.aten.cat.default, ([node.args[0]] * 2,))
        again.meta = dict(node.meta)
    node.replace_all_uses_with(again)
    graph.erase_node(node)


@pytest.mark.parametrize("sabotage", [stale_group, swapped_rows, swapped_in_one_input, dropped])
def test_planted_faults_are_found(sabotage: Sabotage) -> None:
    with pytest.raises(ProofFailed, match="astray"):
        proven(tiny(), tiny_inputs(), Mesh.of(4, 2), sabotage=sabotage)


def scaled(rows: int, scale: float = 4.0) -> Branches:
    return Branches(rows, added={"s": torch.tensor([scale])})


@pytest.mark.parametrize(
    ("mesh", "batch", "name"),
    [(Mesh.of(2, 2), 2, "ulysses"), (Mesh.of(4, 2), 4, "ring"), (Mesh.of(6, 2), 2, "ulysses")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_branches_are_combined_by_one_all_reduce(
    mesh: Mesh, batch: int, name: str, dtype: torch.dtype
) -> None:
    module, inputs = tiny(), tiny_inputs(batch)
    cast_module(module, dtype)
    proof, guided = proven(module, cast_inputs(inputs, dtype), mesh, name, branches=scaled(batch))
    assert max(error.max for error in proof.algebra) < 1e-5
    assert proof.controls[GUIDANCE].max > 0.1
    assert [m.kind for m in guided.moves if m.kind != "split"] == ["all_reduce"]
    assert proof.reference[0].shape[0] == batch // 2


@pytest.mark.engine
@pytest.mark.parametrize("combined", [True, False])
def test_networks_have_groups_of_both_axes(combined: bool) -> None:
    prepare(BACKENDS["tensorrt-rtx"])
    module, inputs, mesh = tiny(), tiny_inputs(), Mesh.of(4, 2)
    branches = scaled(2) if combined else NONE
    made: list[Lowered] = []
    proof, _ = proven(module, inputs, mesh, branches=branches, seen=made)
    lowered = lower(made[0])
    networks = networks_of(lowered, 4)
    flat = {**inputs, **branches.added}
    assert prove_networks(networks, flat, proof, lowered).ranks[0].max < 1e-5
    called = [
        list(node.args[-2])
        for node in specialise(lowered, 3).graph_module.graph.nodes
        if node.target in ops.COLLECTIVES
    ]
    along_cfg, along_cp = [1, 3, 0, 2], [2, 3, 0, 1]
    assert called.count(along_cfg) == 1, "rank 3's own group stands first"
    assert called.count(along_cp) == len(called) - 1 > 1


def test_the_scale_is_an_input_and_the_first_half_is_uncond() -> None:
    module, inputs = tiny(), tiny_inputs(2)
    uncond, cond = module(**inputs).detach().chunk(2)
    for scale in (0.0, 1.0, 7.5):
        proof, _ = proven(module, inputs, Mesh.of(2, 2), branches=scaled(2, scale))
        torch.testing.assert_close(proof.reference[0], uncond + scale * (cond - uncond))


def swapped_weights(graph: fx.Graph, mesh: Mesh) -> None:
    """The weights' shard alone; all shards swapped together give the same sum."""
    swapped = [rank for group in mesh.axis(GUIDANCE).groups for rank in reversed(group)]
    node = collectives(graph, mesh)[-2]
    assert node.target is torch.ops.cp.shard.default
    node.args = (*node.args[:-2], swapped, node.args[-1])


@pytest.mark.parametrize("sabotage", [stale_group, swapped_weights, swapped_in_one_input])
def test_planted_faults_in_the_combination_are_found(sabotage: Sabotage) -> None:
    with pytest.raises(ProofFailed, match="astray"):
        proven(tiny(), tiny_inputs(), Mesh.of(4, 2), branches=scaled(2), sabotage=sabotage)


def test_one_branch_is_repeated_and_not_copied() -> None:
    given = {
        "x": torch.randn(1, 24, 8), "text": torch.randn(1, 5, 8), "ids": torch.arange(5)[None],
        "table": torch.randn(24, 3), "how": "so",
    }  # fmt: skip

    class Takes(nn.Module):
        def forward(self, table: Tensor, x: Tensor, **_: Any) -> Tensor:
            return x

    found, known = branched({k: given[k] for k in given if k != "table"}, Takes(), 3)
    assert known == Branches(3, widened=True)
    x = found["x"]
    assert x.shape == (3, 24, 8)
    assert torch.equal(x[0], given["x"][0])
    assert not torch.equal(x[1], x[0])
    assert not torch.equal(x[1], x[2])
    assert all(torch.equal(row.flatten().sort().values, x[0].flatten().sort().values) for row in x)
    assert torch.equal(found["ids"], given["ids"].expand(3, -1)), "positions are the same"
    assert found["how"] == "so"
    kept, _ = branched({"x": given["x"], "ids": given["ids"]}, Takes(), 2, kept=("ids",))
    assert kept["ids"].shape == (1, 5)
    same, _ = branched({"x": given["x"], "text": given["text"]}, Takes(), 2, frozen=("text",))
    assert torch.equal(same["text"], given["text"].expand(2, -1, -1)), "part of the engines"
    with pytest.raises(UsageError, match="no argument idz"):
        branched({"x": x}, Takes(), 3, kept=("idz",))
    assert replace(known, widened=False) == branched({"x": x}, Takes(), 3)[1]


class OneRow(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(1, 24, 8)


def test_a_forward_that_takes_one_row_is_told_of_the_others() -> None:
    given, known = branched({"x": torch.randn(1, 24, 8)}, OneRow(), 2)
    told = r"one row 2 times, once a branch, and failed: RuntimeError: shape '\[1, 24, 8\]'"
    with pytest.raises(CannotTrace, match=told) as caught, blamed_on_rows(known):
        measure(OneRow(), given)
    assert "test_branches.py" in (caught.value.where or "")
    with pytest.raises(CannotTrace, match=r"^RuntimeError"), blamed_on_rows(NONE):
        measure(OneRow(), given)
