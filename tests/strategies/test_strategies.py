"""Every strategy by itself: numerics, dependence on other ranks, collectives, memory."""

import math

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.multiprocessing.reductions import StorageWeakRef

from cp_convert.ir import ops
from cp_convert.ir.layout import Layout
from cp_convert.ir.program import Binding, Lowered
from cp_convert.job import STRATEGY_NAMES
from cp_convert.prove.lockstep import PerRank, run
from cp_convert.strategies import STRATEGIES, Site, Usp
from cp_convert.strategies.parts import EXTRA
from tests.conftest import axis_of, strategy

WORLDS = (2, 3, 4)
HEADS, DIM, SEQUENCE = 12, 16, 24


def sdpa_inputs(batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    scales = (3.0, 1.0, 1.0)  # peaked attention, so that every key matters somewhere
    return [torch.randn(batch, HEADS, SEQUENCE, DIM, generator=generator) * s for s in scales]


def site_of(world: int, **changes: object) -> Site:
    layout = Layout.even([SEQUENCE], world)
    values: dict[str, object] = {
        "index": 0, "module": "blocks.0.attn", "source": None, "batch": 2, "heads": HEADS,
        "kv_heads": HEADS, "head_dim": DIM, "queries": layout.local, "keys": layout.local,
        "query_layout": layout, "key_layout": layout, "dtype": torch.float32,
    }  # fmt: skip
    return Site(**{**values, **changes})  # type: ignore[arg-type]


def program(
    name: str, world: int, like: list[Tensor], scale: float | None = None, by: Usp | None = None
) -> Lowered:
    """The strategy alone: shards its three inputs, attends, gathers the output."""
    axis = axis_of(world)
    site = site_of(world, scale=scale, kv_heads=like[1].shape[1], dtype=like[0].dtype)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [ops.shard(x, 2, axis) for x in (q, k, v)]
        out = (by or strategy(name, world)).attend(*parts, None, site=site, axis=axis)
        return ops.all_gather(out.movedim(2, 0), axis).movedim(0, 2)

    with torch._subclasses.FakeTensorMode() as mode, torch.no_grad():
        graph_module = make_fx(forward)(*[mode.from_tensor(x) for x in like])
    nodes = [n.name for n in graph_module.graph.find_nodes(op="placeholder")]
    inputs = [
        Binding(b, n, x.dtype, tuple(x.shape)) for b, n, x in zip("qkv", nodes, like, strict=True)
    ]
    result = graph_module.graph.output_node().all_input_nodes[0].name
    output = Binding("out", result, like[0].dtype, tuple(like[0].shape))
    return Lowered(graph_module, {}, tuple(inputs), (output,))


def outputs(lowered: Lowered, world: int, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    return [out for (out,) in run(lowered, {"q": q, "k": k, "v": v}, world)]


def collectives(lowered: Lowered) -> list[torch.fx.Node]:
    """Those of the attention itself, without the final gather."""
    nodes = [n for n in lowered.graph_module.graph.nodes if n.target in ops.COLLECTIVES]
    return nodes[:-1]


def test_the_command_line_offers_exactly_these() -> None:
    assert (*sorted(STRATEGIES), "usp") == STRATEGY_NAMES


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", STRATEGY_NAMES)
@pytest.mark.parametrize("scale", [None, 0.5])
def test_equals_the_dense_attention(name: str, world: int, scale: float | None) -> None:
    q, k, v = sdpa_inputs()
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
    for out in outputs(program(name, world, [q, k, v], scale), world, q, k, v):
        torch.testing.assert_close(out, dense, rtol=1e-5, atol=1e-5 * dense.abs().max().item())


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", STRATEGY_NAMES)
@pytest.mark.parametrize("which", [1, 2], ids=["keys", "values"])
def test_every_rank_sees_every_other_ranks_keys_and_values(
    name: str, world: int, which: int
) -> None:
    qkv = sdpa_inputs()
    lowered = program(name, world, qkv)
    before = outputs(lowered, world, *qkv)[0].chunk(world, dim=2)
    for changed in range(world):
        altered = [x.clone() for x in qkv]
        altered[which].chunk(world, dim=2)[changed].mul_(-1)
        after = outputs(lowered, world, *altered)[0].chunk(world, dim=2)
        moved = [(a - b).abs().max().item() for a, b in zip(after, before, strict=True)]
        assert min(moved) > 1e-3, f"changing rank {changed} moved the ranks by {moved}"


@pytest.mark.parametrize("world", [2, 3, 4, 6])
@pytest.mark.parametrize(
    ("name", "count", "sent"),
    [
        # bytes that one rank sends, as a multiple of one full Q
        ("ulysses", lambda w: 2, lambda w: 4 * (w - 1) / w**2),
        ("allgather-kv", lambda w: 1, lambda w: 2 * (w - 1) / w),
        ("ring", lambda w: 1 if w == 2 else min(w, 24 // w), lambda w: 2 * (w - 1) / w),
        ("stream-kv", lambda w: 4, lambda w: 2 * (w - 1) / w),
    ],
)
def test_collectives_are_at_the_lower_bound(name, count, sent, world: int) -> None:  # type: ignore[no-untyped-def]
    from cp_convert.mesh import bytes_sent

    qkv = sdpa_inputs()
    nodes = collectives(program(name, world, qkv))
    assert len(nodes) == count(world)
    payload = [n.args[0].meta["val"] for n in nodes]  # type: ignore[union-attr]
    total = sum(
        bytes_sent(str(n.target).split(".")[1].upper(), x.numel() * x.element_size(), world)
        for n, x in zip(nodes, payload, strict=True)
    )
    assert total == pytest.approx(sent(world) * qkv[0].numel() * qkv[0].element_size())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("world", [3, 4, 8])
def test_ring_holds_the_present_and_the_next_chunk(world: int, dtype: torch.dtype) -> None:
    """When a chunk is sent for, nothing of those before the present one is alive any more."""
    half = [x.to(dtype) for x in sdpa_inputs()]
    lowered = program("ring", world, half)
    sent_for, arrived = 0, list[tuple[int, StorageWeakRef]]()
    alive: list[set[int]] = []

    def watch(node: torch.fx.Node, values: PerRank) -> None:
        nonlocal sent_for
        if node.target is torch.ops.cp.all_gather.default:
            alive.append({chunk for chunk, storage in arrived if not storage.expired()})
            sent_for += 1
        if sent_for and any(user.target is torch.ops.aten.unbind.int for user in node.users):
            # What was gathered, as K and V of all ranks.
            arrived.append((len(arrived), StorageWeakRef(values[0].untyped_storage())))

    run(lowered, dict(zip("qkv", half, strict=True)), world, watch=watch)
    chunks = min(world, 24 // world)
    assert len(arrived) == chunks
    # The last gather is that of the output.
    assert alive == [set(), *({n} for n in range(chunks - 1)), set()]


@pytest.mark.parametrize("world", [3, 4, 8])
def test_a_ring_gathers_every_key_once(world: int) -> None:
    """Over uneven segments: tokens of two kinds, padding at the end of both."""
    from cp_convert.ir.layout import Layout
    from cp_convert.strategies.parts import chunk_of, slices_of

    layout = Layout.even([5, 3 * world + 1], world)
    held = [(layout.slots_of(rank), layout.tokens_of(rank)) for rank in range(world)]
    seen = []
    for cut in slices_of(layout.local, world):
        slots, tokens = chunk_of(cut, held)
        width = cut[1] - cut[0]
        places = [slot for start, stop in slots for slot in range(start, stop)]
        which = [token for start, stop in tokens for token in range(start, stop)]
        assert len(places) == len(which)
        for place, token in zip(places, which, strict=True):
            rank, slot = place // width, cut[0] + place % width
            assert spelt(held[rank])[slot] == token
        seen += which
    assert sorted(seen) == list(range(layout.length))


def spelt(held: tuple[list[tuple[int, int]], list[tuple[int, int]]]) -> dict[int, int]:
    """Which token is in which slot."""
    slots, tokens = ([n for r in ranges for n in range(*r)] for ranges in held)
    return dict(zip(slots, tokens, strict=True))


def test_with_two_ranks_a_ring_is_one_gather_and_one_attention() -> None:
    nodes = program("ring", 2, sdpa_inputs()).graph_module.graph.nodes
    targets = [n.target for n in nodes if n.target in {*ops.COLLECTIVES, ops.ATTENTION}][:-1]
    assert targets == [torch.ops.cp.all_gather.default, ops.ATTENTION]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", STRATEGY_NAMES)
def test_half_precision_loses_no_more_than_the_dense_attention(
    name: str, dtype: torch.dtype
) -> None:
    exact = [x.to(dtype) for x in sdpa_inputs()]
    truth = torch.nn.functional.scaled_dot_product_attention(*[x.double() for x in exact])
    dense = torch.nn.functional.scaled_dot_product_attention(*exact)
    loss = (dense - truth).norm() / truth.norm()
    for out in outputs(program(name, 4, exact), 4, *exact):
        assert out.dtype == dtype
        assert (out - truth).norm() / truth.norm() <= 1.5 * loss


def test_only_ulysses_is_limited() -> None:
    for name in STRATEGY_NAMES:
        assert strategy(name, 4).why_not(site_of(4), axis_of(4)) is None
    for name in ("ring", "allgather-kv"):
        assert STRATEGIES[name].why_not(site_of(4, heads=3), axis_of(4)) is None


def test_ulysses_says_why_not() -> None:
    refusal = STRATEGIES["ulysses"].why_not(site_of(4, heads=3), axis_of(4))
    assert refusal is not None
    assert refusal.reason == "3 heads are fewer than the 4 ranks that share the sequence."
    assert refusal.hint is not None
    assert "ring" in refusal.hint
    assert "allgather-kv" in refusal.hint


def test_usp_says_why_not() -> None:
    refusal = Usp(4).why_not(site_of(8, heads=3), axis_of(8))
    assert refusal is not None
    assert refusal.reason == "3 heads are fewer than the 4 ranks of --ulysses."


def sent_by_one(lowered: Lowered) -> int:
    """Bytes, of the attention's own collectives."""
    from cp_convert.mesh import bytes_sent

    total = 0
    for node in collectives(lowered):
        value, size = node.args[0], node.args[-1]
        assert isinstance(value, torch.fx.Node)
        assert isinstance(size, int)
        x = value.meta["val"]
        kind = str(node.target).split(".")[1].upper()
        total += bytes_sent(kind, x.numel() * x.element_size(), size)
    return total


@pytest.mark.parametrize(("ulysses", "ring"), [(2, 2), (4, 2), (2, 4), (1, 4), (4, 1)])
def test_usp_is_at_its_lower_bound(ulysses: int, ring: int) -> None:
    """Both exchanges of Ulysses among U ranks, and the ring's gathers of what U ranks share."""
    qkv, world = sdpa_inputs(), ulysses * ring
    lowered = program("usp", world, qkv, by=Usp(ulysses))
    assert len(collectives(lowered)) == 2 + (ring if ring > 2 else 1)
    of_q = 4 * (ulysses - 1) / (ulysses * world) + 2 * (ring - 1) / world
    assert sent_by_one(lowered) == pytest.approx(of_q * qkv[0].numel() * 4)


@pytest.mark.parametrize("world", [2, 3, 4, 8])
@pytest.mark.parametrize("kv_heads", [3, 12])
@pytest.mark.parametrize("name", STRATEGY_NAMES)
def test_the_arithmetic_of_cost_is_what_the_program_does(
    name: str, kv_heads: int, world: int
) -> None:
    q, k, v = sdpa_inputs()
    qkv = [q, k[:, :kv_heads].contiguous(), v[:, :kv_heads].contiguous()]
    lowered = program(name, world, qkv)
    told = strategy(name, world).cost(site_of(world, kv_heads=kv_heads), axis_of(world))
    assert told.collectives == len(collectives(lowered))
    assert 4 * told.sent == pytest.approx(sent_by_one(lowered))
    dense = 4 * 2 * HEADS * SEQUENCE**2 * (DIM + (EXTRA if told.way == "fused" else 0))
    assert told.operations * world == dense * told.heads / HEADS


@pytest.mark.parametrize(("name", "world"), [("ring", 4), ("usp", 3)])
def test_long_chunks_are_worked_off_in_blocks(
    name: str, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores are never larger than allowed, and the result is the same."""
    from cp_convert.strategies import online

    qkv = [x.half() for x in sdpa_inputs()]  # the scores are written out in float16
    whole = program(name, world, qkv)
    limit = max_scores(whole) // 2
    monkeypatch.setattr(online, "SCORES", limit)
    lowered = program(name, world, qkv)
    assert max_scores(lowered) <= limit
    told = strategy(name, world).cost(site_of(world, dtype=torch.float16), axis_of(world))
    assert told.scores == max_scores(lowered)
    for out, once in zip(outputs(lowered, world, *qkv), outputs(whole, world, *qkv), strict=True):
        torch.testing.assert_close(out, once, rtol=1e-3, atol=1e-3)


def max_scores(lowered: Lowered) -> int:
    """The largest operand of an exponential: the scores."""
    nodes = lowered.graph_module.graph.find_nodes(
        op="call_function", target=torch.ops.aten.exp.default
    )
    return max(n.meta["val"].numel() for n in nodes)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("kv_heads", [1, 3, 6])
@pytest.mark.parametrize(
    ("name", "heads_sent"),
    [
        # heads of K (and of V) that a rank sends a token's worth of, to how many others
        ("allgather-kv", lambda kv, w: kv * (w - 1)),
        ("ring", lambda kv, w: kv * (w - 1)),
        ("stream-kv", lambda kv, w: kv * (w - 1)),
        ("ulysses", lambda kv, w: math.lcm(kv, w) * (w - 1) / w),
    ],
)
def test_grouped_keys_move_no_more_bytes_than_they_must(  # type: ignore[no-untyped-def]
    name, heads_sent, kv_heads: int, world: int
) -> None:
    from cp_convert.mesh import bytes_sent

    q, k, v = sdpa_inputs()
    qkv = [q, k[:, :kv_heads].contiguous(), v[:, :kv_heads].contiguous()]
    lowered = program(name, world, qkv)
    dense = torch.nn.functional.scaled_dot_product_attention(*qkv, enable_gqa=True)
    for out in outputs(lowered, world, *qkv):
        torch.testing.assert_close(out, dense, rtol=1e-5, atol=1e-5 * dense.abs().max().item())
    payload = [(n, n.args[0].meta["val"]) for n in collectives(lowered)]  # type: ignore[union-attr]
    sent = sum(
        bytes_sent(str(n.target).split(".")[1].upper(), x.numel() * 4, world) for n, x in payload
    )
    token_head = 2 * SEQUENCE // world * DIM * 4  # batch, local tokens, numbers of 4 bytes
    if name == "ulysses":  # Q and O travel as well
        sent -= round(2 * HEADS * (world - 1) / world * token_head)
    assert sent == pytest.approx(2 * heads_sent(kv_heads, world) * token_head)
