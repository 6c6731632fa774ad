"""What is left alone, what is rewritten, what is refused."""

import pytest
import torch
from conftest import TINY_PLAN, TinyAttention, axis_of, tiny, tiny_inputs
from torch import nn
from torch.nn import functional

from cp_convert.errors import CannotShard
from cp_convert.job import STRATEGY_NAMES
from cp_convert.program import Program
from cp_convert.prove.lockstep import run
from cp_convert.rewrite import ATTENTION, rewrite, sharded_nodes
from cp_convert.strategies import STRATEGIES
from cp_convert.trace import trace


def traced(module: nn.Module, world: int = 2, **inputs: torch.Tensor) -> Program:
    plan = TINY_PLAN
    return trace(module, inputs or tiny_inputs(), plan, axis_of(world))[0]


def attentions(program: Program) -> list[torch.fx.Node]:
    return [n for n in program.graph_module.graph.nodes if n.target is ATTENTION]


def test_cross_attention_to_whole_text_is_left_alone() -> None:
    program, outcomes = rewrite(traced(tiny()), STRATEGIES["ring"], "ring", axis_of(2))
    assert [o.kept for o in outcomes] == [None, "its keys are whole on every rank"]
    assert len(attentions(program)) == 1
    assert [(o.site.keys, o.site.global_keys) for o in outcomes] == [(12, 24), (5, 5)]
    assert [o.site.global_queries for o in outcomes] == [24, 24]


def test_a_world_of_one_is_left_alone() -> None:
    program, outcomes = rewrite(traced(tiny(), 1), STRATEGIES["ulysses"], "ulysses", axis_of(1))
    assert {o.kept for o in outcomes} == {"the world is 1"}
    assert len(attentions(program)) == 2


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("name", STRATEGY_NAMES)
@pytest.mark.parametrize("batch", [1, 2])
def test_all_ranks_compute_what_the_model_computes(name: str, world: int, batch: int) -> None:
    module, inputs = tiny(), tiny_inputs(batch)
    program, _ = rewrite(traced(module, world, **inputs), STRATEGIES[name], name, axis_of(world))
    dense = module(**inputs)
    for (out,) in run(program, inputs, world):
        torch.testing.assert_close(out, dense, rtol=1e-5, atol=1e-5 * dense.abs().max().item())


def test_the_traced_program_is_not_changed() -> None:
    program = traced(tiny())
    before = program.graph_module.print_readable(print_output=False)
    rewrite(program, STRATEGIES["ulysses"], "ulysses", axis_of(2))
    assert program.graph_module.print_readable(print_output=False) == before


def test_new_nodes_carry_the_strategys_name_and_the_models_line() -> None:
    program, _ = rewrite(traced(tiny()), STRATEGIES["allgather-kv"], "allgather-kv", axis_of(2))
    gathers = program.graph_module.graph.find_nodes(
        op="call_function", target=torch.ops.cp.all_gather.default
    )
    assert gathers[0].name.startswith("allgather_kv_0")
    assert "conftest.py" in gathers[0].meta["stack_trace"]


def test_an_attention_that_is_returned_keeps_the_programs_outputs() -> None:
    class Bare(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return functional.scaled_dot_product_attention(x, x, x)

    from cp_convert import ContextParallelInput

    plan = {"": {"x": ContextParallelInput(split_dim=2)}}
    x = torch.randn(1, 4, 8, 16)
    program, _ = trace(Bare(), {"x": x}, plan, axis_of(2))
    rewritten, _ = rewrite(program, STRATEGIES["ulysses"], "ulysses", axis_of(2))
    parts = [out for (out,) in run(rewritten, {"x": x}, 2)]
    torch.testing.assert_close(torch.cat(parts, 2), Bare()(x))


class Variant(TinyAttention):
    """The self-attention with other arguments."""

    def __init__(self, heads: int = 12, kv_heads: int = 12, **arguments: object) -> None:
        super().__init__()
        self.kv_heads, self.arguments = kv_heads, arguments

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.enter(x)).unflatten(-1, (3, 12, -1)).permute(2, 0, 3, 1, 4)
        k, v = k[:, : self.kv_heads], v[:, : self.kv_heads]
        mask = self.arguments.get("mask")
        rest = {name: value for name, value in self.arguments.items() if name != "mask"}
        length = x.shape[1]
        bias = torch.zeros(length, length) if mask else None
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, **rest)  # type: ignore[arg-type]
        return self.leave(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("variant", "reason"),
    [
        (Variant(is_causal=True), "causal"),
        (Variant(mask=True), "mask"),
        (Variant(kv_heads=4, enable_gqa=True), "12 query heads but 4 key heads"),
    ],
)
@pytest.mark.parametrize("name", STRATEGY_NAMES)
def test_what_is_not_supported_is_refused(variant: nn.Module, reason: str, name: str) -> None:
    program = traced(variant.eval())
    with pytest.raises(CannotShard, match=reason) as caught:
        rewrite(program, STRATEGIES[name], name, axis_of(2))
    assert "test_rewrite.py" in (caught.value.where or "")


def test_heads_that_do_not_divide_are_named_with_what_would_do() -> None:
    program = traced(tiny(heads=6), 4)
    with pytest.raises(CannotShard, match="6 heads do not divide among 4 ranks") as caught:
        rewrite(program, STRATEGIES["ulysses"], "ulysses", axis_of(4))
    assert "ring" in (caught.value.hint or "")
    assert "conftest.py" in (caught.value.where or "")
    rewrite(program, STRATEGIES["ring"], "ring", axis_of(4))


def test_what_is_gathered_is_no_longer_sharded() -> None:
    program = traced(tiny())
    sharded = sharded_nodes(program.graph_module.graph)
    result = program.graph_module.graph.output_node().all_input_nodes[-1]
    assert any(n.target is torch.ops.cp.shard.default for n in sharded)
    assert result not in sharded
