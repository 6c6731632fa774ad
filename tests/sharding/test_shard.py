"""Found plans, and what real models do to attention: every rank against the dense model.

Everything is float32, at worlds that divide the tokens and worlds that do not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from cp_convert import ContextParallelInput
from cp_convert.capture.trace import trace
from cp_convert.errors import CannotShard, CannotTrace, UsageError
from cp_convert.ir.sharded import Sharded
from cp_convert.prove import Stages
from cp_convert.prove.lockstep import run
from cp_convert.strategies import STRATEGIES
from tests.conftest import TINY_PLAN, rewritten, sharded, sharpened, tiny, tiny_inputs

WORLDS = (2, 3, 4)
WIDTH, HEADS = 48, 12

SELDOM = {("allgather-kv", 3), ("allgather-kv", 4), ("stream-kv", 2), ("stream-kv", 4), ("ring", 2)}
"""Ways that differ little from others here; :mod:`tests.strategies` has all of them, always."""
WAYS = [
    pytest.param(*way, marks=pytest.mark.slow) if way in SELDOM else way
    for way in [*((name, world) for name in STRATEGIES for world in WORLDS), ("usp", 4)]
]
every_way = pytest.mark.parametrize(("name", "world"), WAYS)


class Attends(nn.Module):
    """Self-attention over ``x``, written as ``how(q, k, v, given)``."""

    def __init__(self, how: Callable[..., Tensor], heads: int = HEADS, kv_heads: int = 0) -> None:
        super().__init__()
        self.how, self.heads, self.kv_heads = how, heads, kv_heads or heads
        head = WIDTH // HEADS
        self.to_q = nn.Linear(WIDTH, heads * head)
        self.to_k = nn.Linear(WIDTH, self.kv_heads * head)
        self.to_v = nn.Linear(WIDTH, self.kv_heads * head)
        self.out = nn.Linear(heads * head, WIDTH)

    def forward(self, x: Tensor, given: Any = None) -> Tensor:
        q = self.to_q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (
            y.unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
            for y in (self.to_k(x), self.to_v(x))
        )
        return x + self.out(self.how(q, k, v, given).transpose(1, 2).flatten(2))


def tokens(count: int = 24, batch: int = 2) -> Tensor:
    return torch.randn(batch, count, WIDTH, generator=torch.Generator().manual_seed(1))


def model(how: Callable[..., Tensor], **options: int) -> nn.Module:
    torch.manual_seed(0)
    return sharpened(Attends(how, **options))


def check(
    module: nn.Module, inputs: dict[str, Any], name: str, world: int, plan: Any = None
) -> Stages:
    """All ranks agree with the dense model, and would not if they did not communicate."""
    stages = rewritten(module, inputs, name, world, plan or {})
    dense = module(**inputs)
    bound = {"rtol": 1e-5, "atol": 1e-5 * dense.abs().max().item()}
    given = {k: v for k, v in inputs.items() if isinstance(v, Tensor)}
    for (out,) in run(stages.rewritten, given, world):
        torch.testing.assert_close(out, dense, **bound)
    alone = run(stages.control, given, world, partial=stages.axis)[0][0]
    assert (alone - dense).abs().max() > 1e-3 * dense.abs().max(), "attention must matter"
    return stages


def split_sites(stages: Stages) -> int:
    return sum(site.keys_sharded for site, _ in stages.sites)


def moves(found: Sharded) -> Counter[str]:
    return Counter(move.kind for move in found.moves)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


# --- padding --------------------------------------------------------------------------------------


@every_way
@pytest.mark.parametrize("count", [23, 25])
def test_tokens_that_do_not_divide_are_padded(name: str, world: int, count: int) -> None:
    stages = check(model(sdpa), {"x": tokens(count)}, name, world)
    layout = stages.sites[0][0].key_layout
    assert layout is not None
    assert layout.padding == -count % world


@pytest.mark.parametrize("world", WORLDS)
def test_heads_that_do_not_divide_are_padded(world: int) -> None:
    stages = check(model(sdpa, heads=5), {"x": tokens(23)}, "ulysses", world)
    assert stages.sites[0][0].heads == 5


# --- masks ----------------------------------------------------------------------------------------


def mask_of(shape: tuple[int, ...], kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    if kind == "additive":
        return 3 * torch.randn(shape, generator=generator)
    mask = torch.rand(shape, generator=generator) > 0.4
    mask[..., 0] = True  # a query that sees nothing is a test of its own
    return mask


@every_way
@pytest.mark.parametrize("kind", ["additive", "boolean"])
@pytest.mark.parametrize(
    "shape",
    [(23, 23), (HEADS, 23, 23), (2, 1, 1, 23), (2, HEADS, 23, 23)],
    ids=str,
)
def test_masks(name: str, world: int, kind: str, shape: tuple[int, ...]) -> None:
    inputs = {"x": tokens(23), "given": mask_of(shape, kind)}
    check(model(sdpa), inputs, name, world)


@every_way
def test_a_query_that_sees_nothing_gives_zeros_as_in_torch(name: str, world: int) -> None:
    mask = mask_of((24, 24), "boolean")
    mask[5] = False
    check(model(sdpa), {"x": tokens(), "given": mask}, name, world)


@every_way
def test_causal_attention(name: str, world: int) -> None:
    def causal(q: Tensor, k: Tensor, v: Tensor, _: Any) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    for count in (24, 23):
        check(model(causal), {"x": tokens(count)}, name, world)


class Joint(Attends):
    """Text and image in one attention, as in SD3 and FLUX."""

    def forward(self, x: Tensor, text: Tensor, given: Any = None) -> Tensor:  # type: ignore[override]
        out = super().forward(torch.cat((text, x), dim=1), given)
        return out[:, text.shape[1] :]


def joint_inputs(text: int = 10, image: int = 24) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {"x": tokens(image), "text": torch.randn(2, text, WIDTH, generator=generator)}


def joint() -> nn.Module:
    torch.manual_seed(0)
    return sharpened(Joint(sdpa))


@every_way
@pytest.mark.parametrize("text", [7, pytest.param(12, marks=pytest.mark.slow)])
def test_text_and_image_in_one_attention(name: str, world: int, text: int) -> None:
    stages = check(joint(), joint_inputs(text), name, world)
    layout = stages.sites[0][0].key_layout
    assert layout is not None
    assert [s.length for s in layout.segments] == [text, 24]


@every_way
def test_masks_stand_in_shard_order(name: str, world: int) -> None:
    """text0, image0, text1, image1, ...: a mask in the model's order would be wrong."""
    inputs = joint_inputs(7)
    for shape in ((31, 31), (2, 1, 1, 31), (2, HEADS, 31, 31)):
        check(joint(), {**inputs, "given": mask_of(shape, "additive")}, name, world)


@every_way
def test_whole_text_joined_with_sharded_image_enters_once(name: str, world: int) -> None:
    """The plan splits the image only; the text must not be counted once for every rank."""
    plan = {"": {"x": ContextParallelInput(1)}}
    check(joint(), joint_inputs(12), name, world, plan)


# --- grouped queries ------------------------------------------------------------------------------


@every_way
@pytest.mark.parametrize("kv_heads", [1, pytest.param(3, marks=pytest.mark.slow), 4])
def test_grouped_queries(name: str, world: int, kv_heads: int) -> None:
    def grouped(q: Tensor, k: Tensor, v: Tensor, _: Any) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    for count in (24, 23):
        check(model(grouped, kv_heads=kv_heads), {"x": tokens(count)}, name, world)


# --- attention however it is written --------------------------------------------------------------


def by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = q @ k.transpose(-1, -2) * 0.4
    if mask is not None:
        scores = scores + mask
    return torch.softmax(scores.float(), dim=-1).to(v.dtype) @ v


def batched(q: Tensor, k: Tensor, v: Tensor, _: Any) -> Tensor:
    """diffusers' AttnProcessor before scaled_dot_product_attention."""
    b, h, s, d = q.shape
    q, k, v = (x.reshape(b * h, s, d) for x in (q, k, v))
    empty = torch.empty(b * h, s, s)
    scores = torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=0.5)
    return torch.bmm(scores.softmax(-1), v).reshape(b, h, s, d)


def filled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = (q @ k.mT) / 2.0
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v


@every_way
@pytest.mark.parametrize(
    ("how", "mask"),
    [(by_hand, None), (by_hand, "additive"), (batched, None), (filled, "boolean")],
    ids=["matmul", "matmul-mask", "baddbmm", "masked-fill"],
)
def test_attention_written_out_is_recognised(
    name: str, world: int, how: Callable[..., Tensor], mask: str | None
) -> None:
    inputs: dict[str, Any] = {"x": tokens(23)}
    if mask:
        inputs["given"] = mask_of((23, 23), mask)
    assert split_sites(check(model(how), inputs, name, world)) == 1


@every_way
@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention_is_recognised(name: str, world: int, need_weights: bool) -> None:
    class Torch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.attention(x, x, x, need_weights=need_weights)[0]

    torch.manual_seed(0)
    module = sharpened(Torch())
    # With a batch of one, heads and batch are one dimension, which every strategy can split.
    stages = check(module, {"x": tokens(23, batch=1)}, name, world)
    assert split_sites(stages) == 1


def test_what_only_looks_like_attention_is_left_alone() -> None:
    class Other(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            weights = (x @ x.mT).softmax(dim=1)  # over queries
            return weights @ x + (x @ x.mT + 1).softmax(-1).sum()

    program, _ = trace(Other(), {"x": tokens()}, {})
    found = program.graph_module.graph.find_nodes(
        op="call_function", target=torch.ops.cp.attention.default
    )
    assert not list(found)


# --- batches and rotary embeddings ----------------------------------------------------------------


@every_way
def test_a_batch_of_two_for_classifier_free_guidance(name: str, world: int) -> None:
    class Guided(Attends):
        def forward(self, x: Tensor, given: Any = None) -> Tensor:
            conditional, unconditional = super().forward(x, given).chunk(2)
            return unconditional + 3.5 * (conditional - unconditional)

    torch.manual_seed(0)
    assert split_sites(check(sharpened(Guided(sdpa)), {"x": tokens(23)}, name, world)) == 1


def double_rotary(x: Tensor) -> Tensor:
    positions = torch.arange(x.shape[2], dtype=torch.float64)
    angles = torch.outer(positions, 1e4 ** -torch.linspace(0, 1, x.shape[-1] // 2).double())
    cos, sin = angles.cos(), angles.sin()
    a, b = x.double().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1).to(x.dtype)


def complex_rotary(x: Tensor) -> Tensor:
    positions = torch.arange(x.shape[2]).float()
    angles = torch.outer(positions, 1e4 ** -torch.linspace(0, 1, x.shape[-1] // 2))
    turns = torch.polar(torch.ones_like(angles), angles)
    turned = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * turns
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


@every_way
@pytest.mark.parametrize("rotary", [double_rotary, complex_rotary])
def test_rotary_embeddings(name: str, world: int, rotary: Callable[[Tensor], Tensor]) -> None:
    def turned(q: Tensor, k: Tensor, v: Tensor, _: Any) -> Tensor:
        return sdpa(rotary(q), rotary(k), v)

    stages = check(model(turned), {"x": tokens(23)}, name, world)
    nodes = stages.rewritten.graph_module.graph.nodes
    assert not any(v.is_complex() for n in nodes if isinstance(v := n.meta.get("val"), Tensor))


# --- what mixes tokens outside attention ----------------------------------------------------------


class Around(Attends):
    """Something that mixes tokens, then attention."""

    def __init__(self, before: Callable[[Tensor], Tensor]) -> None:
        super().__init__(sdpa)
        self.before = before
        self.first = Attends(sdpa)

    def forward(self, x: Tensor, given: Any = None) -> Tensor:
        return super().forward(x + self.before(self.first(x)))


@pytest.mark.parametrize(
    ("before", "kind"),
    [
        (lambda x: x.mean(1, keepdim=True), "all_reduce"),
        (lambda x: x.sum(1, keepdim=True), "all_reduce"),
        (lambda x: x.amax(1, keepdim=True), "all_reduce"),
        (lambda x: x @ (x.mT @ x) * 1e-3, "all_reduce"),  # linear attention
        (lambda x: x.cumsum(1), "gather"),
        (lambda x: x.flip(1), "gather"),
        (lambda x: x.sort(1).values, "gather"),
        (lambda x: functional.conv1d(x.mT, torch.ones(WIDTH, 1, 3), None, 1, 1, 1, WIDTH).mT,
         "gather"),
    ],
    ids=["mean", "sum", "max", "linear-attention", "cumsum", "flip", "sort", "convolution"],
)  # fmt: skip
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("count", [24, 23])
def test_what_mixes_tokens_is_reduced_or_gathered(
    before: Callable[[Tensor], Tensor], kind: str, world: int, count: int
) -> None:
    torch.manual_seed(0)
    module, inputs = sharpened(Around(before), 1.5), {"x": tokens(count)}
    check(module, inputs, "ring", world)
    found = sharded(module, inputs, {}, world)
    # One gather is the output's own.
    assert moves(found)[kind] > (kind == "gather")
    assert all(move.where for move in found.moves)


# --- the found plan -------------------------------------------------------------------------------


def test_the_found_plan_splits_the_input_and_gathers_the_output() -> None:
    found = sharded(tiny(), tiny_inputs(), {}, 4)
    told = [(move.kind, move.operator, move.dim, move.layout.length) for move in found.moves]
    assert told == [("split", "x", 1, 24), ("gather", "the output", 1, 24)]


def test_text_that_only_cross_attention_reads_stays_whole() -> None:
    stages = rewritten(tiny(), tiny_inputs(), "ring", 2, {})
    assert [site.keys_sharded for site, _ in stages.sites] == [True, False]


def test_too_few_tokens_are_named() -> None:
    with pytest.raises(CannotShard, match="24 tokens along dimension 1 are fewer than the 25"):
        sharded(tiny(), tiny_inputs(), TINY_PLAN, 25)
    with pytest.raises(CannotShard, match="nothing would be sharded"):
        sharded(tiny(), tiny_inputs(), {}, 25)


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(CannotShard, match="no attention that is recognised"):
        sharded(nn.Linear(4, 4), {"input": torch.ones(2, 8, 4)}, {}, 2)


# --- frozen arguments -----------------------------------------------------------------------------


class Ragged(nn.Module):
    """A mask decides how many tokens there are."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Attends(sdpa)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        kept = x[:, mask.bool()[0]]
        real = int(mask.sum().item())
        return self.inner(kept)[:, :real]


def ragged_inputs() -> dict[str, Tensor]:
    return {"x": tokens(30), "mask": torch.tensor([[1] * 23 + [0] * 7])}


@every_way
def test_a_frozen_mask_decides_the_shapes(name: str, world: int) -> None:
    from cp_convert.capture.decompose import decompose
    from cp_convert.mesh import Mesh
    from cp_convert.sharding.shard import shard
    from cp_convert.strategies.rewrite import rewrite
    from tests.conftest import strategy, table

    torch.manual_seed(0)
    module, inputs = sharpened(Ragged()), ragged_inputs()
    program, _ = trace(module, inputs, {}, ("mask",))
    assert [c.name for c in program.frozen] == ["mask"]
    assert torch.equal(program.frozen[0].value, inputs["mask"])
    axis = Mesh.line(world).whole
    split = shard(decompose(program, table()), axis)
    done, _ = rewrite(split, strategy(name, world), name, axis, table())
    for (out,) in run(done, {"x": inputs["x"]}, world):
        torch.testing.assert_close(out, module(**inputs), rtol=1e-4, atol=1e-4)


def test_a_mask_that_must_be_frozen_says_so() -> None:
    with pytest.raises(CannotTrace) as caught:
        trace(Ragged().eval(), ragged_inputs(), {})
    assert "--freeze" in (caught.value.hint or "")
    assert "test_shard.py" in (caught.value.where or "")


def test_freezing_what_is_not_there_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="cannot freeze length"):
        trace(Ragged(), ragged_inputs(), {}, ("length",))
