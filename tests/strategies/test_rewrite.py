"""What is left alone, what is rewritten, what is refused."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from cp_convert import ContextParallelInput
from cp_convert.errors import CannotShard
from cp_convert.ir.attention import Outcome
from cp_convert.ir.ops import ATTENTION
from cp_convert.ir.program import Lowered
from cp_convert.job import STRATEGY_NAMES
from cp_convert.prove.lockstep import run
from cp_convert.strategies import STRATEGIES
from cp_convert.strategies.rewrite import rewrite
from tests.conftest import (
    TINY_PLAN,
    TinyAttention,
    axis_of,
    rewritten,
    sharded,
    strategy,
    table,
    tiny,
    tiny_inputs,
)


def done(name: str, world: int = 2) -> tuple[Lowered, tuple[Outcome, ...]]:
    """The tiny model with a strategy in it."""
    axis = axis_of(world)
    split = sharded(tiny(), tiny_inputs(), TINY_PLAN if world > 1 else {}, world)
    return rewrite(split, strategy(name, world), name, axis, table())


def attentions(program: Lowered) -> list[torch.fx.Node]:
    return [n for n in program.graph_module.graph.nodes if n.target is ATTENTION]


def test_cross_attention_to_whole_text_is_left_alone() -> None:
    program, outcomes = done("ring")
    assert [o.kept for o in outcomes] == [None, "its keys are whole on every rank"]
    assert [n.name for n in attentions(program)] == ["ring_0_attention", outcomes[1].node]
    assert [(o.site.keys, o.site.global_keys) for o in outcomes] == [(12, 24), (5, 5)]
    assert outcomes[0].site.global_queries == 24


def test_a_world_of_one_is_left_alone() -> None:
    program, outcomes = done("ulysses", 1)
    assert {o.kept for o in outcomes} == {"the world is 1"}
    assert len(attentions(program)) == 2


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("name", STRATEGY_NAMES)
@pytest.mark.parametrize("batch", [1, 2])
def test_all_ranks_compute_what_the_model_computes(name: str, world: int, batch: int) -> None:
    module, inputs = tiny(), tiny_inputs(batch)
    program = rewritten(module, inputs, name, world).rewritten
    dense = module(**inputs)
    for (out,) in run(program, inputs, world):
        torch.testing.assert_close(out, dense, rtol=1e-5, atol=1e-5 * dense.abs().max().item())


def test_the_sharded_program_is_not_changed() -> None:
    split = sharded(tiny(), tiny_inputs(), TINY_PLAN, 2)
    before = split.program.graph_module.print_readable(print_output=False)
    rewrite(split, STRATEGIES["ulysses"], "ulysses", axis_of(2), table())
    assert split.program.graph_module.print_readable(print_output=False) == before


def test_new_nodes_carry_the_strategys_name_and_the_models_line() -> None:
    program, _ = done("allgather-kv")
    gathers = program.graph_module.graph.find_nodes(
        op="call_function", target=torch.ops.cp.all_gather.default
    )
    assert gathers[0].name.startswith("allgather_kv_0")
    assert "conftest.py" in gathers[0].meta["stack_trace"]


def test_an_attention_that_is_returned_keeps_the_programs_outputs() -> None:
    class Bare(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return functional.scaled_dot_product_attention(x, x, x)

    plan = {"": {"x": ContextParallelInput(split_dim=2)}}
    x = torch.randn(1, 4, 8, 16)
    program = rewritten(Bare(), {"x": x}, "ulysses", 2, plan).rewritten
    for (out,) in run(program, {"x": x}, 2):
        torch.testing.assert_close(out, Bare()(x))


def test_more_ranks_than_heads_are_refused_with_what_would_do() -> None:
    split = sharded(tiny(heads=3), tiny_inputs(), TINY_PLAN, 4)
    with pytest.raises(CannotShard, match="3 heads are fewer than the 4 ranks") as caught:
        rewrite(split, STRATEGIES["ulysses"], "ulysses", axis_of(4), table())
    assert "ring" in (caught.value.hint or "")
    assert "conftest.py" in (caught.value.where or "")
    rewrite(split, STRATEGIES["ring"], "ring", axis_of(4), table())


def test_equal_attentions_are_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Twice(TinyAttention):
        def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            for _ in range(2):
                x = super().forward(x, text)
            return x

    calls: list[int] = []
    attend = STRATEGIES["ring"].attend
    monkeypatch.setattr(
        STRATEGIES["ring"], "attend", lambda *a, **k: calls.append(1) or attend(*a, **k)
    )
    rewritten(Twice().eval(), tiny_inputs(), "ring", 2, {"": TINY_PLAN[""]})
    assert len(calls) == 1
