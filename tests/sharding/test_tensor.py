"""Weights shared by ranks: every rank against the dense model, what stays whole, planted faults."""

from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from cp_convert.capture.decompose import decompose
from cp_convert.capture.trace import trace
from cp_convert.errors import CannotShard, ProofFailed
from cp_convert.ir.ops import COLLECTIVES
from cp_convert.ir.program import Lowered
from cp_convert.ir.proof import Proof
from cp_convert.ir.shares import Divided, Shared
from cp_convert.mesh import AXES, TENSOR, Mesh
from cp_convert.model.tp_plan import declared
from cp_convert.prove import Stages, measure, prove
from cp_convert.sharding.others import along_others
from cp_convert.sharding.shard import shard
from cp_convert.strategies import CONTROL
from cp_convert.strategies.rewrite import rewrite
from tests.conftest import networks_of, sharpened, strategy, table, tiny, tiny_inputs
from tests.runtime.test_tensor import MODELS

WIDTH, HEADS = 96, 12
Sabotage = Callable[[Lowered, Mesh], Lowered]


def heads_of(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attended(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    mixed = functional.scaled_dot_product_attention(q, k, v, **options)
    return mixed.transpose(1, 2).flatten(2)


class Apart(nn.Module):
    """Queries, keys and values by matrices of their own, with an RMS norm over all heads (Wan)."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.norm(self.q(x)), self.norm(self.k(x))
        return self.out(attended(*(heads_of(one, HEADS) for one in (q, k, self.v(x)))))


class Packed(nn.Module):
    """One matrix for queries, keys, values and a gated MLP, one for what both give (FLUX.2)."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.enter = nn.Linear(WIDTH, 3 * WIDTH + 4 * WIDTH, bias=bias)
        self.out = nn.Linear(3 * WIDTH, WIDTH, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        qkv, mlp = self.enter(x).split([3 * WIDTH, 4 * WIDTH], dim=-1)
        mixed = attended(*(heads_of(one, HEADS) for one in qkv.chunk(3, -1)))
        gate, up = mlp.chunk(2, -1)
        return self.out(torch.cat([mixed, functional.silu(gate) * up], -1))


class Stacked(nn.Module):
    """Queries, keys and values as parts of one view: heads are not its outermost dimension."""

    def __init__(self, order: str = "3 heads") -> None:
        super().__init__()
        self.order = order
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.order == "3 heads":
            q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = self.qkv(x).unflatten(-1, (HEADS, 3, -1)).permute(3, 0, 2, 1, 4)
        return self.out(attended(q, k, v))


class Grouped(nn.Module):
    """Fewer key heads than query heads, repeated or left to the attention."""

    def __init__(self, keys: int, *, repeats: bool) -> None:
        super().__init__()
        self.keys, self.repeats = keys, repeats
        size = WIDTH // HEADS
        self.q, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = (nn.Linear(WIDTH, keys * size) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = heads_of(self.q(x), HEADS), *(heads_of(m(x), self.keys) for m in (self.k, self.v))
        if not self.repeats:
            return self.out(attended(q, k, v, enable_gqa=True))
        k, v = (one.repeat_interleave(HEADS // self.keys, 1) for one in (k, v))
        return self.out(attended(q, k, v))


class Block(nn.Module):
    """A mixer and an MLP on a residual stream, both modulated by one token."""

    def __init__(self, mixer: nn.Module, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 8)
        self.mixer, self.norm = mixer, norm(WIDTH)
        self.modulation = nn.Linear(WIDTH, 3 * WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        x = self.enter(x)
        shift, scale, gate = self.modulation(functional.silu(time))[:, None].chunk(3, -1)
        x = x + gate * self.mixer(self.norm(x) * (1 + scale) + shift)
        return self.leave(x + self.down(functional.gelu(self.up(self.norm(x)))))


def inputs(tokens: int = 24) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"x": torch.randn(1, tokens, 8), "time": torch.randn(1, WIDTH)}


def block(mixer: nn.Module, norm: type[nn.Module] = nn.LayerNorm) -> nn.Module:
    torch.manual_seed(0)
    return sharpened(Block(mixer, norm), 1.5)


def proven(
    module: nn.Module,
    given: dict[str, Tensor],
    mesh: Mesh,
    name: str = "ulysses",
    sabotage: Sabotage | None = None,
    late: Sabotage | None = None,
) -> tuple[Proof, Divided, Lowered]:
    """What the proof says of ``module`` here, after ``sabotage``, or ``late`` at the end."""
    truth = measure(module, given)
    program, _ = trace(module, given, {})
    dense = decompose(program, table())
    _, divided = along_others(dense, mesh)
    if sabotage is not None:
        divided = replace(divided, program=sabotage(divided.program, mesh))
    axis = mesh.sequence()
    split = shard(divided.program, axis)
    control, _ = rewrite(split, CONTROL, "control", axis, table())
    done, outcomes = rewrite(split, strategy(name, axis.size), name, axis, table())
    sites = [(o.site, o.node) for o in outcomes]
    done = done if late is None else late(done, mesh)
    stages = Stages(dense, control, done, done, sites, axis, others=mesh.others)
    return prove(truth, given, stages), divided, done


MIXERS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "apart": (Apart, 2),
    "packed": (Packed, 0),
    "packed, no bias": (lambda: Packed(bias=False), 0),
    "stacked": (Stacked, 0),
    "stacked by heads": (lambda: Stacked("heads 3"), 0),
    "grouped": (lambda: Grouped(4, repeats=True), 0),
    "grouped by attention": (lambda: Grouped(4, repeats=False), 0),
    "one key head": (lambda: Grouped(1, repeats=False), 0),
}


@pytest.mark.parametrize("tp", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", MIXERS)
def test_one_all_reduce_a_pair(name: str, tp: int) -> None:
    """The mixer's and the MLP's; an RMS norm over all heads has one more, of one number a token."""
    mixer, norms = MIXERS[name]
    proof, divided, _ = proven(block(mixer()), inputs(), Mesh.of(tp, tp=tp))
    kinds = [move.kind for move in divided.moves]
    assert kinds.count("all_reduce") == 2 + norms
    assert kinds.count("gather") == 1  # the modulation
    assert max(error.max for error in proof.algebra) <= 1e-5
    assert proof.controls["tp"].max > 1e-2
    whole = {"p_enter_weight", "p_leave_weight"} | (
        {"p_mixer_k_weight", "p_mixer_v_weight"} if name == "one key head" else set()
    )
    matrices = {n for n, t in divided.program.state.items() if t.dim() > 1}
    assert matrices - divided.shares.keys() == whole


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("ulysses", Mesh.of(6, tp=2)), ("stream-kv", Mesh.of(6, tp=3)),
        ("ring", Mesh.of(4, tp=2)),
        pytest.param("allgather-kv", Mesh.of(8, tp=4), marks=pytest.mark.slow),
        pytest.param("usp", Mesh.of(8, tp=2), marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_the_sequence_is_shared_within_every_tensor_parallel_place(name: str, mesh: Mesh) -> None:
    proof, _, done = proven(block(Packed()), inputs(), mesh, name)
    assert max(error.max for error in proof.algebra) <= 1e-5
    assert proof.control is not None
    assert proof.control.max > 1e-3
    assert proof.controls["tp"].max > 1e-2
    groups = [n.args[-2] for n in done.graph_module.graph.nodes if n.target in COLLECTIVES]
    assert mesh.axis(TENSOR).flat in groups
    assert mesh.sequence().flat in groups or name == "usp"


def test_guidance_weights_and_sequence_on_one_mesh() -> None:
    given = {name: torch.cat([x, x.flip(-1)]) for name, x in inputs().items()}
    proof, _, _ = proven(block(Packed()), given, Mesh.of(8, cfg=2, tp=2))
    assert max(error.max for error in proof.algebra) <= 1e-5
    assert set(proof.controls) == {"cfg", "tp"}


def test_every_rank_network_is_of_its_own_share() -> None:
    from cp_convert.backends import select
    from cp_convert.engine.build import prepare
    from cp_convert.engine.lower import lower
    from cp_convert.prove.errors import worst
    from cp_convert.prove.measure import flat_inputs
    from cp_convert.prove.replay import replay

    module, given = block(Packed()), inputs()
    proof, _, done = proven(module, given, Mesh.of(4, tp=2))
    prepare(select("auto"))
    lowered = lower(done)
    for outputs in replay(networks_of(lowered, 4), flat_inputs(lowered, given)):
        assert worst(outputs, proof.reference).max <= 1e-5


def test_where_heads_do_not_divide_only_the_rest_is_shared() -> None:
    _, divided, _ = proven(block(Apart()), inputs(), Mesh.of(8, tp=8))
    assert {n for n in divided.shares if n.endswith("weight")} == {
        "p_up_weight", "p_down_weight", "p_modulation_weight",
    }  # fmt: skip
    (kept,) = divided.kept
    assert kept.reason == "its 12 heads cannot be shared equally by 8 ranks"
    assert kept.module == "mixer"


def test_a_residual_stream_stays_whole() -> None:
    """RMS norms would let it be split; every matrix that reads it would have to be reduced."""
    _, divided, _ = proven(block(Packed(), nn.RMSNorm), inputs(), Mesh.of(2, tp=2))
    assert [move.kind for move in divided.moves].count("all_reduce") == 2
    assert "p_enter_weight" not in divided.shares


def test_an_attention_that_nothing_reduces_is_gathered() -> None:
    proof, divided, _ = proven(tiny(), tiny_inputs(), Mesh.of(4, tp=2))
    assert {move.kind for move in divided.moves} == {"gather"}
    assert proof.controls["tp"].max > 1e-2


class Returned(nn.Module):
    """An MLP whose hidden layer is an output."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 64), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = functional.gelu(self.up(x))
        return self.down(hidden), hidden


@pytest.mark.parametrize(
    ("module", "given", "tp", "why"),
    [
        (Returned(), {"x": torch.randn(1, 24, 8)}, 2, "no attention and no pair of matrices"),
        (tiny(), tiny_inputs(), 5, "its 12 heads cannot be shared equally by 5 ranks"),
    ],
)  # fmt: skip
def test_nothing_to_share_is_refused_with_the_reason(
    module: nn.Module, given: dict[str, Tensor], tp: int, why: str
) -> None:
    program, _ = trace(module, given, {})
    with pytest.raises(CannotShard, match=why):
        along_others(decompose(program, table()), Mesh.of(tp, tp=tp))


class Twice(nn.Module):
    """One pair of matrices, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 64), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + self.down(functional.gelu(self.up(x)))
        return x


def test_a_weight_that_is_used_twice_is_cut_once() -> None:
    torch.manual_seed(0)
    proof, divided, _ = proven(Twice(), {"x": torch.randn(1, 24, 8)}, Mesh.of(2, tp=2))
    assert set(divided.shares) == {"p_up_weight", "p_up_bias", "p_down_weight"}
    assert max(error.max for error in proof.algebra) <= 1e-5


# ---------------------------------------------------------------- planted faults


def _edited(program: Lowered, edit: Callable[[fx.Graph], None]) -> Lowered:
    edit(program.graph_module.graph)
    return program


def bias_twice(program: Lowered, mesh: Mesh) -> Lowered:
    """Every rank adds the bias of rows to its partial sum, too."""

    def edit(graph: fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor):
            reduced, bias = node.args
            if getattr(reduced, "target", None) is torch.ops.cp.all_reduce.default:
                reduced.args[0].args = (*reduced.args[0].args, bias)
                return

    return _edited(program, edit)


def stale_group(program: Lowered, mesh: Mesh) -> Lowered:
    """The last all-reduce is of the ranks that share the sequence."""

    def edit(graph: fx.Graph) -> None:
        *_, node = graph.find_nodes(op="call_function", target=torch.ops.cp.all_reduce.default)
        node.args = (*node.args[:-2], mesh.sequence().flat, mesh.sequence().size)

    return _edited(program, edit)


def swapped(program: Lowered, mesh: Mesh) -> Lowered:
    """Members hold each other's rows of one matrix."""
    assert isinstance(program.own, Shared)
    own = {key: program.own[key] for key in program.own}
    first, second, *rest = own["p_mixer_out_weight"]
    own["p_mixer_out_weight"] = (second, first, second, first)
    assert len(rest) == 2
    return replace(program, own=own)


def cut_as_one(program: Lowered, mesh: Mesh) -> Lowered:
    """A packed matrix is cut into halves, whatever it holds."""
    own = {key: program.own[key] for key in program.own}
    whole = own["p_mixer_out_weight"]
    joined = torch.cat(whole[:2], 1)
    halves = joined.chunk(2, 1)
    attention = WIDTH // 2
    order = [*range(attention), *range(whole[0].shape[1], whole[0].shape[1] + attention)]
    rest = [i for i in range(joined.shape[1]) if i not in order]
    halves = joined[:, [*order, *rest]].chunk(2, 1)
    own["p_mixer_out_weight"] = (halves[0], halves[1]) * 2
    return replace(program, own=own)


def not_reduced(program: Lowered, mesh: Mesh) -> Lowered:
    def edit(graph: fx.Graph) -> None:
        node, *_ = graph.find_nodes(op="call_function", target=torch.ops.cp.all_reduce.default)
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)

    return _edited(program, edit)


@pytest.mark.parametrize("sabotage", [bias_twice, stale_group, swapped, cut_as_one, not_reduced])
def test_planted_faults_are_found(sabotage: Sabotage) -> None:
    with pytest.raises(ProofFailed, match="astray"):
        proven(block(Packed()), inputs(), Mesh.of(4, tp=2), sabotage=sabotage)


@pytest.mark.parametrize(("axis", "other"), permutations(AXES, 2))
def test_a_group_of_another_axis_is_found_on_a_mesh_of_three(axis: str, other: str) -> None:
    """All axes have two ranks, so that every shape is right."""

    def mistaken(program: Lowered, mesh: Mesh) -> Lowered:
        def edit(graph: fx.Graph) -> None:
            own = mesh.axis(axis).flat
            found = [n for n in graph.nodes if n.target in COLLECTIVES and n.args[-2] == own]
            found[-1].args = (*found[-1].args[:-2], mesh.axis(other).flat, 2)

        return _edited(program, edit)

    given = {name: torch.cat([x, x.flip(-1)]) for name, x in inputs().items()}
    with pytest.raises(ProofFailed, match="astray"):
        proven(block(Packed()), given, Mesh.of(8, cfg=2, tp=2), late=mistaken)


# ---------------------------------------------------------------- against diffusers' own plans


@pytest.mark.parametrize("name", ["flux", "flux2", "qwen"])
def test_what_is_found_contains_what_diffusers_plans(name: str) -> None:
    """Every matrix and bias of ``_tp_plan``, along the same dimension, in the same blocks.

    As a plan, it is read as diffusers reads it, and nothing else is shared then.
    """
    from diffusers.hooks.tensor_parallel import resolve_tp_shard_specs

    namespace: dict[str, Any] = {}
    exec(MODELS[name], namespace)
    module, given = namespace["build_model"]().eval(), namespace["example_inputs"]()
    program, _ = trace(module, given, {}, ("img_shapes",) if name == "qwen" else ())
    _, divided = along_others(decompose(program, table()), Mesh.of(2, tp=2))
    found = {program.parameters[node]: share for node, share in divided.shares.items()}
    placeholders = divided.program.graph_module.graph.find_nodes(op="placeholder")
    read = {program.parameters.get(n.name) for n in placeholders if n.users}
    planned = resolve_tp_shard_specs(module, module._tp_plan, 2)
    for parameter, (dim, blocks) in planned.items():
        if parameter not in read:
            continue  # the last block's text, which nothing returns
        if dim is None:
            assert parameter not in found
            continue
        assert found[parameter].dim == dim
        assert [s.length for s in found[parameter].layout.segments] == blocks, parameter
    plan = declared(module._tp_plan, module)
    weights = {name: spec for name, spec in planned.items() if name.endswith(".weight")}
    assert {name: (one.dim, list(one.blocks)) for name, one in plan.items()} == weights
    by_node = {node: plan[name] for node, name in program.parameters.items() if name in plan}
    _, strict = along_others(decompose(program, table()), Mesh.of(2, tp=2), by_node)
    shared = {program.parameters[node]: share for node, share in strict.shares.items()}
    assert {name for name, share in shared.items() if name in plan} == weights.keys() & read
    assert all(found[name] == share for name, share in shared.items())
    others = {n for n in shared if n.endswith("weight") and "norm" not in n} - weights.keys()
    assert not others
