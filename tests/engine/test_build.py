"""What reaches the TensorRT network, counted layer by layer."""

import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch.fx.experimental.proxy_tensor import make_fx

from cp_convert.backends import BACKENDS
from cp_convert.converters import WORKAROUNDS, active, register
from cp_convert.engine.build import build, collectives_of, network_of, prepare
from cp_convert.engine.lower import lower
from cp_convert.engine.readback import read_network
from cp_convert.engine.specialise import specialise
from cp_convert.errors import BuildFailed
from cp_convert.ir import ops
from cp_convert.ir.network import Layer
from cp_convert.ir.program import Binding, Lowered
from cp_convert.mesh import Axis
from cp_convert.model.cast import cast_inputs, cast_module
from cp_convert.prove.lockstep import run
from cp_convert.prove.replay import replay
from cp_convert.trt.libraries import trt
from tests.conftest import axis_of, rewritten, tiny, tiny_inputs

pytestmark = pytest.mark.engine

MALFORMED = 1 << 5
"""TensorRT's diagnostic bit for bytes that are no engine (documentation, EngineValidity)."""


IS_OLD = Version(BACKENDS["tensorrt-rtx"].version) < Version("1.7")
"""Whether the TensorRT-RTX that is installed is 1.6, which gathers by another layer."""
GATHER = "ALL_TO_ALL" if IS_OLD else "ALL_GATHER"


def program(name: str, world: int, dtype: torch.dtype = torch.float16) -> Lowered:
    prepare(BACKENDS["tensorrt-rtx"])
    module = tiny()
    cast_module(module, dtype)
    inputs = cast_inputs(tiny_inputs(), dtype)
    return lower(rewritten(module, inputs, name, world).rewritten)


def layers(network: Any) -> Counter[str]:
    return Counter(network.get_layer(i).type.name for i in range(network.num_layers))


@pytest.mark.parametrize("world", [3, 4])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ulysses", lambda w: [("all_to_all", "ALL_TO_ALL", -1)] * 2),
        ("allgather-kv", lambda w: [("all_gather", GATHER, -1)]),
        ("ring", lambda w: [("all_gather", GATHER, -1)] * w),
        ("stream-kv", lambda w: [("all_gather", GATHER, -1)] * 4),
    ],
)
def test_each_collective_is_one_layer_with_the_operators_group(  # type: ignore[no-untyped-def]
    name: str, world: int, expected
) -> None:
    network = network_of(specialise(program(name, world), 1)).ctx.net
    found = list(collectives_of(network))
    assert layers(network)["DIST_COLLECTIVE"] == len(found)
    attention, gather = found[:-1], found[-1]
    assert [(c.operator, c.kind, c.root) for c in attention] == expected(world)
    assert gather.operator == "all_gather"
    assert all(c.group == tuple(range(world)) for c in found)


@pytest.mark.parametrize(
    ("name", "world", "count"),
    [
        ("ulysses", 2, 2),
        ("allgather-kv", 2, 2),
        ("stream-kv", 2, 5),
        ("ring", 2, 2),
        ("ring", 4, 5),
    ],
)
def test_attention_is_tensorrts_own_layer(name: str, world: int, count: int) -> None:
    network = network_of(specialise(program(name, world, torch.bfloat16), 0)).ctx.net
    assert layers(network)["ATTENTION_OUTPUT"] == count


@pytest.mark.parametrize(
    ("name", "moving"),
    [
        ("ulysses", ["Q arrives", "K arrives", "V arrives", "O leaves"]),
        ("allgather-kv", ["K and V arrive"]),
        ("stream-kv", ["a group's K and V arrive"] * 4),
        ("ring", ["a chunk's K and V arrive"] * 4),
        ("usp", ["Q arrives", "K arrives", "V arrives", "K and V of groups arrive", "O leaves"]),
    ],
)
def test_no_transposition_that_another_packing_would_save(name: str, moving: list[str]) -> None:
    """With a batch of 1; each that remains is told in the strategy's docstring.

    Reshapes move nothing, nor does a permutation of dimensions of length 1. A product's own
    ``K^T`` (ring) belongs to the product, of which TensorRT's layer has a flag.
    """
    prepare(BACKENDS["tensorrt-rtx"])
    stages = rewritten(tiny(), tiny_inputs(batch=1), name, 4)
    network = read_network(network_of(specialise(lower(stages.rewritten), 0)).ctx.net)
    ours = f"/{name.replace('-', '_')}_0_"
    found = [x for x in network.layers if x.kind == "SHUFFLE" and ours in x.name and _moves(x)]
    products = {i for x in network.layers if x.kind == "MATRIX_MULTIPLY" for i in x.inputs}
    beside = [x for x in found if x.outputs[0].name not in products]
    assert len(beside) == len(moving)
    assert all(x.parameters["dims"] is None for x in beside)


def _moves(layer: Layer) -> bool:
    """Whether numbers change their order in memory."""
    shape = layer.outputs[0].shape
    for order in (layer.parameters["first"], layer.parameters["second"]):
        given = order[: len(shape)]
        lengths = {dim: shape[place] for place, dim in enumerate(given)}
        real = [dim for dim in given if lengths[dim] > 1]
        if layer.parameters["dims"] is None and real != sorted(real):
            return True
    return False


def test_the_environment_has_no_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "7")
    network = network_of(specialise(program("ulysses", 2), 0)).ctx.net
    ranks = [
        network.get_layer(i).num_ranks
        for i in range(network.num_layers)
        if network.get_layer(i).type == trt.LayerType.DIST_COLLECTIVE
    ]
    assert all(c.group == (0, 1) for c in collectives_of(network))
    assert ranks == [2, 2, 2]


def test_bindings_carry_names_full_shapes_and_dtypes() -> None:
    network = network_of(specialise(program("ulysses", 2), 1)).ctx.net
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    output = network.get_output(0)
    assert [(t.name, tuple(t.shape)) for t in inputs] == [("x", (2, 24, 8)), ("text", (2, 5, 8))]
    assert (output.name, tuple(output.shape)) == ("output", (2, 24, 8))
    assert {t.dtype for t in [*inputs, output]} == {trt.float16}


@pytest.fixture
def without_workarounds() -> Iterator[None]:
    """Converters as they would be for a release without defects."""
    prepare(BACKENDS["tensorrt-rtx"])
    register({})
    yield
    prepare(BACKENDS["tensorrt-rtx"])


def bare_gather_and_attention(world: int = 2) -> Lowered:
    """Keys that are gathered as they come in, the case in which the defect was found."""
    axis = axis_of(world)
    local, whole = torch.randn(1, 8, 64, 64).half(), torch.randn(world, 8, 64, 64).half()

    def forward(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        gathered = ops.all_gather(k, axis)
        return ops.attention(q, gathered, gathered, scale=None)

    return bare(forward, q=whole, k=local)


def bare(forward: Callable[..., torch.Tensor], **inputs: torch.Tensor) -> Lowered:
    """A program of nothing but ``forward``'s operators."""
    with torch._subclasses.FakeTensorMode() as mode:
        graph_module = make_fx(forward)(*map(mode.from_tensor, inputs.values()))
    graph = graph_module.graph
    out = graph.output_node().all_input_nodes[0]
    graph.output_node().args = ((out,),)
    placeholders = graph.find_nodes(op="placeholder")
    bindings = [
        Binding(name, node.name, x.dtype, tuple(x.shape))
        for (name, x), node in zip(inputs.items(), placeholders, strict=True)
    ]
    returned = out.meta["val"]
    outputs = (Binding("out", out.name, returned.dtype, tuple(returned.shape)),)
    return Lowered(graph_module, {}, tuple(bindings), outputs)


@pytest.mark.parametrize("axis", [axis_of(2), axis_of(4).outer(2)], ids=["all ranks", "groups"])
def test_all_eight_collectives_build_and_mean_what_the_program_means(
    axis: Axis, tmp_path: Path
) -> None:
    """Only the root's results of ``reduce`` and ``gather`` are defined, so it passes them on."""
    prepare(BACKENDS["tensorrt-rtx"])
    ranks = list(range(len(axis.flat)))

    def forward(x: torch.Tensor) -> torch.Tensor:
        x = ops.shard(x, 0, axis)
        x = ops.broadcast(ops.reduce(x, "max", 1, axis), 1, axis) + x
        x = ops.scatter(ops.gather(x, 1, axis) * 2, 1, axis) + ops.all_reduce(x, "avg", axis)
        x = ops.all_to_all(ops.reduce_scatter(ops.all_gather(x, axis), "sum", axis), axis)
        return x + 0

    given = torch.randn(16, 3)
    program = bare(forward, x=given)
    held = [network_of(specialise(program, rank)) for rank in ranks]
    told = [c.operator for c in collectives_of(held[0].ctx.net)]
    assert sorted(told) == sorted(
        ["reduce", "broadcast", "gather", "scatter", "all_reduce", "all_gather", "reduce_scatter",
         "all_to_all"]
    )  # fmt: skip
    truth = run(program, {"x": given}, len(ranks))
    replayed = replay([read_network(one.ctx.net) for one in held], {"x": given})
    for (expected,), (ours,) in zip(truth, replayed, strict=True):
        assert not expected.isnan().any()
        torch.testing.assert_close(ours, expected)
    assert build(specialise(program, 0), 0, tmp_path / "x.engine", []).size


def test_the_table_applies_to_the_releases_that_have_the_defect() -> None:
    gathering, *others = WORKAROUNDS
    assert active("tensorrt-rtx", "1.6.1.120") == {"all_gather": gathering}
    assert list(active("tensorrt-rtx", "1.7.1.116").values()) == others
    assert {row.operator for row in others} == {
        "attention", "all_gather", "reduce_scatter", "broadcast", "reduce", "gather", "scatter"
    }  # fmt: skip
    assert active("tensorrt", "11.1.0.106") == {}


def test_the_all_gather_defect_is_worked_around(tmp_path: Path) -> None:
    prepare(BACKENDS["tensorrt-rtx"])
    engine = build(bare_gather_and_attention(), 0, tmp_path / "x.engine", [])
    (gathered,) = engine.collectives
    assert (gathered.operator, gathered.kind) == ("all_gather", GATHER)
    assert gathered.instead == ("all_gather_by_all_to_all" if IS_OLD else None)


def bare_parts() -> Lowered:
    """Collectives of a part of the ranks that change the shape, before one of all ranks."""
    part, whole = axis_of(4).outer(2), axis_of(4)

    def forward(x: torch.Tensor) -> torch.Tensor:
        x = ops.all_gather(ops.shard(x, 0, whole), part) * 2
        x = ops.reduce_scatter(x, "sum", part) + 1
        return ops.all_gather(x, whole) + 0

    return bare(forward, x=torch.randn(16, 3))


@pytest.mark.skipif(IS_OLD, reason="1.6 knows no parts")
def test_collectives_of_parts_are_built_beside_those_of_all_ranks(tmp_path: Path) -> None:
    """1.7.1 infers a part's shapes by the most ranks of any: all-to-all keeps its shape."""
    prepare(BACKENDS["tensorrt-rtx"])
    program, given = bare_parts(), {"x": torch.randn(16, 3)}
    engine = build(specialise(program, 0), 0, tmp_path / "x.engine", [])
    told = [(c.operator, c.kind, c.instead, tuple(c.group)) for c in engine.collectives]
    assert told == [
        ("all_gather", "ALL_TO_ALL", "all_gather_of_parts_by_all_to_all", (0, 2)),
        ("reduce_scatter", "ALL_TO_ALL", "reduce_scatter_of_parts_by_all_to_all", (0, 2)),
        ("all_gather", "ALL_GATHER", None, (0, 1, 2, 3)),
    ]
    held = [network_of(specialise(program, rank)) for rank in range(4)]
    replayed = replay([read_network(one.ctx.net) for one in held], given)
    for (expected,), (ours,) in zip(run(program, given, 4), replayed, strict=True):
        torch.testing.assert_close(ours, expected)


def test_attentions_of_one_query_build_in_float32(tmp_path: Path) -> None:
    """1.7.1 ends by SIGSEGV, unless their queries differ: by powers of two, which round nothing."""
    prepare(BACKENDS["tensorrt-rtx"])

    def forward(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        told = [ops.attention(q, k * i, k, None, scale=scale) for i, scale in ((1, 0.3), (2, None))]
        return torch.cat([*told, ops.attention(q, k * 3, k, None, scale=None)], 1) + 0

    given = {"q": torch.randn(2, 3, 12, 8), "k": torch.randn(2, 3, 12, 8)}
    program = bare(forward, **given)
    interpreter = network_of(program)  # it holds the weights of its network
    network = read_network(interpreter.ctx.net)
    torch.testing.assert_close(replay([network], given)[0][0], run(program, given, 1)[0][0])
    child = multiprocessing.get_context("fork").Process(
        target=build, args=(program, 0, tmp_path / "x.engine", [])
    )
    child.start()
    child.join()
    assert child.exitcode == 0 and (tmp_path / "x.engine").stat().st_size


@pytest.mark.parametrize("inner", [True, False])
def test_a_group_of_the_first_ranks_is_no_world(
    inner: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What TensorRT is given cannot be read back: an empty array means all ranks, so it is seen."""
    prepare(BACKENDS["tensorrt-rtx"])
    axis = axis_of(4).inner(2) if inner else axis_of(4)
    program = bare(lambda x: ops.all_to_all(ops.shard(x, 0, axis), axis) + 0, x=torch.randn(16, 3))
    given: list[list[int]] = []
    real = trt.INetworkDefinition.add_dist_collective

    def seen(network: Any, x: Any, kind: Any, reduce: Any, root: int, group: Any) -> Any:
        given.append(group.tolist())
        return real(network, x, kind, reduce, root, group)

    monkeypatch.setattr(trt.INetworkDefinition, "add_dist_collective", seen)
    for rank in range(4):
        network_of(specialise(program, rank))
    assert given == ([[0, 1], [0, 1], [2, 3], [2, 3]] if inner else [[]] * 4)


def bare_roots(dtype: torch.dtype) -> tuple[Lowered, torch.Tensor]:
    """Every collective that has a root, and an input for it, of numbers that add up exactly."""
    axis = axis_of(2)

    def forward(x: torch.Tensor) -> torch.Tensor:
        x = ops.broadcast(ops.reduce(x, "sum", 0, axis), 0, axis)
        return ops.broadcast(ops.gather(ops.scatter(x, 1, axis), 0, axis), 0, axis) * 2

    given = torch.arange(48.0).reshape(16, 3).to(dtype)
    return bare(forward, x=given), given


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_collectives_with_a_root_are_built_in_half_precision(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    """1.7.1 refuses bfloat16: it goes as float16 or float32, to the bit the same."""
    prepare(BACKENDS["tensorrt-rtx"])
    told, given = bare_roots(dtype)
    engine = build(specialise(told, 0), 0, tmp_path / "x.engine", [])
    assert {c.operator for c in engine.collectives} == {"broadcast", "reduce", "gather", "scatter"}
    is_lent = dtype == torch.bfloat16 and not IS_OLD
    ways = {"broadcast": "16", "reduce": "32", "gather": "32", "scatter": "32"}
    assert {c.instead for c in engine.collectives} == (
        {f"{operator}_in_float{bits}" for operator, bits in ways.items()} if is_lent else {None}
    )
    first = engine.collectives[0]
    assert first.operator == "reduce"
    assert first.payload == given.numel() * (4 if is_lent else 2)
    held = [network_of(specialise(told, rank)) for rank in range(2)]
    networks = [read_network(one.ctx.net) for one in held]
    assert torch.equal(replay(networks, {"x": given})[0][0], run(told, {"x": given}, 2)[0][0])


@pytest.mark.skipif(IS_OLD, reason="sends bfloat16 as it is")
@pytest.mark.parametrize("shape", [(3, 40), (2, 1, 3, 7, 4), (5,)])
@pytest.mark.parametrize("largest", [0.0, 1e-30, 3.0, 65504.0, 1e30])
def test_a_broadcast_in_float16_is_the_same_to_the_bit(
    shape: tuple[int, ...], largest: float
) -> None:
    """Numbers over nine powers of ten, whatever the largest is; only the root's count."""
    prepare(BACKENDS["tensorrt-rtx"])
    axis = axis_of(2)
    generator = torch.Generator().manual_seed(0)
    spread = 10 ** (-9 * torch.rand(shape, generator=generator))
    signs = torch.randn(shape, generator=generator).sign()
    x = (largest * spread * signs).to(torch.bfloat16)
    told = bare(lambda x: ops.broadcast(x, 1, axis) * 2, x=x)
    held = [network_of(specialise(told, rank)) for rank in range(2)]
    networks = [read_network(one.ctx.net) for one in held]
    (moved,) = [layer for layer in networks[0].layers if layer.kind == "DIST_COLLECTIVE"]
    assert moved.outputs[0].dtype == torch.float16
    for out in replay(networks, {"x": x}):
        assert torch.equal(out[0], x * 2)


@pytest.mark.usefixtures("without_workarounds")
def test_without_the_workaround_this_release_refuses_and_is_quoted(tmp_path: Path) -> None:
    defect = "requires world_size" if IS_OLD else "does not support BF16 asymmetric"
    refused = bare_gather_and_attention() if IS_OLD else bare_roots(torch.bfloat16)[0]
    with pytest.raises(BuildFailed, match=rf"(?s)TensorRT said: .*{defect}"):
        build(specialise(refused, 0), 0, tmp_path / "x.engine", [])
    assert list(tmp_path.iterdir()) == []


def test_a_compute_capability_can_be_named(tmp_path: Path) -> None:
    engine = build(specialise(program("ulysses", 2), 0), 0, tmp_path / "x.engine", ["8.9", "12.0"])
    runtime = trt.Runtime(trt.Logger(trt.Logger.INTERNAL_ERROR))
    _, diagnostics = runtime.get_engine_validity(engine.path.read_bytes())
    _, garbage = runtime.get_engine_validity(b"no engine" * 1000)
    assert garbage & MALFORMED
    assert not diagnostics & MALFORMED
