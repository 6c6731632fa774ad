"""Heads in turn: the order of gathers and attentions, what is alive, masks and uneven groups."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, fx
from torch.multiprocessing.reductions import StorageWeakRef

from cp_convert.ir import ops
from cp_convert.ir.attention import Site
from cp_convert.ir.layout import Layout
from cp_convert.ir.program import Lowered
from cp_convert.prove.lockstep import PerRank, run
from cp_convert.strategies import stream_kv
from tests.conftest import axis_of
from tests.strategies.alone import attention_alone, site_of

GATHER = torch.ops.cp.all_gather.default


def qkv(heads: int, kv_heads: int, tokens: int = 24, dim: int = 16) -> list[Tensor]:
    torch.manual_seed(2)
    return [
        torch.randn(2, h, tokens, dim) * scale
        for h, scale in ((heads, 3.0), (kv_heads, 1.0), (kv_heads, 1.0))
    ]


def program(tensors: list[Tensor], world: int) -> Lowered:
    return attention_alone(stream_kv, tensors, None, site_of(tensors, world), axis_of(world))


def gathers_and_attentions(lowered: Lowered) -> list[fx.Node]:
    nodes = lowered.graph_module.graph.nodes
    return [n for n in nodes if n.target in (GATHER, ops.ATTENTION)][:-1]  # the last is the test's


def ancestors(node: fx.Node) -> Iterator[fx.Node]:
    seen, waiting = set[fx.Node](), list(node.all_input_nodes)
    while waiting:
        one = waiting.pop()
        if one not in seen:
            seen.add(one)
            waiting += one.all_input_nodes
            yield one


def test_the_next_gather_is_issued_before_the_present_attention() -> None:
    order = [n.target for n in gathers_and_attentions(program(qkv(8, 8), 2))]
    gather, attention = GATHER, ops.ATTENTION
    assert order == [gather, gather, attention, gather, attention, gather, attention, attention]


def test_a_gather_waits_for_the_attention_before_last_and_not_for_the_last() -> None:
    """Two chains, one of the even and one of the odd groups, each with one group alive."""
    nodes = gathers_and_attentions(program(qkv(8, 8), 2))
    gathers = [n for n in nodes if n.target is GATHER]
    attentions = [n for n in nodes if n.target is ops.ATTENTION]
    for g, gather in enumerate(gathers):
        waited = [n for n in ancestors(gather) if n.target in (GATHER, ops.ATTENTION)]
        assert [a for a in attentions if a in waited] == attentions[g % 2 : g : 2]
        assert [a for a in gathers if a in waited] == gathers[g % 2 : g : 2]


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (12, 3), (10, 5), (7, 7), (6, 1)])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_heads_that_do_not_divide_and_grouped_ones(heads: int, kv_heads: int, world: int) -> None:
    tensors = qkv(heads, kv_heads)
    dense = torch.nn.functional.scaled_dot_product_attention(*tensors, enable_gqa=True)
    for (out,) in run(program(tensors, world), dict(zip("qkv", tensors, strict=True)), world):
        torch.testing.assert_close(out, dense, rtol=1e-5, atol=1e-5 * dense.abs().max().item())


def test_groups_differ_by_one_head_at_most() -> None:
    assert stream_kv.groups_of(24) == [6, 6, 6, 6]
    assert stream_kv.groups_of(10) == [3, 3, 2, 2]
    assert stream_kv.groups_of(3) == [1, 1, 1]


@pytest.mark.parametrize("heads", [8, 10])
def test_two_groups_are_alive_at_most(heads: int) -> None:
    tensors, world = qkv(heads, heads), 4
    lowered = program(tensors, world)
    arrived: list[tuple[int, StorageWeakRef]] = []
    most = 0

    def watch(node: fx.Node, values: PerRank) -> None:
        nonlocal most
        if node.target is GATHER:
            one = values[0]
            arrived.append((one.numel(), StorageWeakRef(one.untyped_storage())))
            most = max(most, sum(size for size, ref in arrived if not ref.expired()))

    run(lowered, dict(zip("qkv", tensors, strict=True)), world, watch=watch)
    site = site_of(tensors, world)
    assert most == stream_kv.cost(site, axis_of(world)).key_values
    assert most < site.own_key_values * world


MASKS = {
    "keys hidden from all": lambda s: torch.arange(s).lt(s - 5).view(1, 1, 1, s),
    "of every row": lambda s: torch.rand(s, s, generator=torch.Generator().manual_seed(0)) > 0.4,
    "of every head": lambda s: torch.randn(1, 10, s, s, generator=torch.Generator().manual_seed(0)),
    "a chunk hidden": lambda s: torch.arange(s).ge(s // 2).view(1, s).expand(s, s).contiguous(),
}


@pytest.mark.parametrize("which", MASKS)
@pytest.mark.parametrize("world", [2, 3])
def test_masks(which: str, world: int) -> None:
    """With text and image tokens, neither of which divides by 3."""
    layout = Layout.even([5, 20], world)
    mask, tensors = MASKS[which](25), qkv(10, 5, tokens=25)
    self_attention(tensors, mask, layout, world)


@pytest.mark.parametrize("world", [2, 3])
def test_causal_order(world: int) -> None:
    self_attention(qkv(10, 5, tokens=25), None, Layout.even([5, 20], world), world, causal=True)


def self_attention(
    tensors: list[Tensor], mask: Tensor | None, layout: Layout, world: int, *, causal: bool = False
) -> None:
    site: Site = site_of(tensors, world, layout=layout, mask=mask, causal=causal)
    lowered = attention_alone(stream_kv, tensors, mask, site, axis_of(world))
    given = dict(zip("qkv", tensors, strict=True)) | ({} if mask is None else {"mask": mask})
    dense = torch.nn.functional.scaled_dot_product_attention(
        *tensors, mask, is_causal=causal, enable_gqa=True
    )
    for (out,) in run(lowered, given, world):
        torch.testing.assert_close(out, dense, rtol=1e-5, atol=1e-5 * dense.abs().max().item())
