"""The proof passes what is right, and fails for every planted fault."""

import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from cp_convert import ContextParallelInput, ContextParallelOutput
from cp_convert.errors import ProofFailed
from cp_convert.ir.program import copied, module_of
from cp_convert.ir.proof import FLOOR
from cp_convert.model.cast import cast_inputs, cast_module
from cp_convert.prove import Proof, measure, prove
from cp_convert.prove.bounds import LARGEST, bound_of
from cp_convert.prove.lockstep import run
from cp_convert.prove.roundings import DRAWS
from cp_convert.strategies import STRATEGIES
from tests.conftest import (
    TINY_PLAN,
    TinyAttention,
    rewritten,
    sharded,
    sharpened,
    tiny,
    tiny_inputs,
)
from tests.sharding.test_shard import mask_of, model, sdpa, tokens

Sabotage = Callable[[fx.Graph], None]


def proven(
    module: nn.Module,
    inputs: Mapping[str, Any],
    name: str = "ulysses",
    world: int = 2,
    *,
    plan: Mapping[str, Any] = TINY_PLAN,
    sabotage: Sabotage | None = None,
    rtol: float | None = None,
) -> Proof:
    """Prove the rewritten program, after ``sabotage`` has edited its graph."""
    stages = rewritten(module, inputs, name, world, plan)
    if sabotage is not None:
        sabotage(stages.rewritten.graph_module.graph)
    return prove(measure(module, inputs), inputs, stages, rtol=rtol)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("name", list(STRATEGIES))
def test_what_is_right_passes_in_float32(name: str, world: int) -> None:
    proof = proven(tiny(), tiny_inputs(), name, world)
    assert len(proof.ranks) == world
    assert all(error.max < FLOOR for error in proof.ranks)
    assert (proof.control is None) == (world == 1)
    assert proof.control is None or proof.control.max > 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", list(STRATEGIES))
def test_half_precision_is_measured_by_the_dense_models_own_loss(
    name: str, dtype: torch.dtype
) -> None:
    module = tiny()
    cast_module(module, dtype)
    proof = proven(module, cast_inputs(tiny_inputs(), dtype), name, 4)
    assert all(error.max < FLOOR for error in proof.algebra)
    assert proof.dense.max > 100 * FLOOR or dtype == torch.float16
    assert len(proof.spread) == DRAWS
    lost, unit = max(e.max for e in (proof.dense, *proof.spread)), torch.finfo(dtype).eps / 2
    assert proof.bound.max == pytest.approx(max(2 * (1 + 4 / (2 * 24 * 8)) * lost, 2 * unit))
    assert all(error.within(proof.bound) for error in proof.ranks)


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_half_precision_masks(name: str) -> None:
    """An additive mask in the queries' own dtype, as HunyuanVideo has it in bfloat16."""
    inputs = cast_inputs({"x": tokens(24), "given": mask_of((24, 24), "additive")}, torch.bfloat16)
    module = model(sdpa)
    cast_module(module, torch.bfloat16)
    proof = proven(module, inputs, name, plan={})
    assert all(error.max < FLOOR for error in proof.algebra)


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_a_float32_model_that_rounds_on_purpose(name: str) -> None:
    """SanaWM attends in bfloat16 whatever its weights are; float32's bound would not be fair."""

    def rounded(q: Tensor, k: Tensor, v: Tensor, _: Any) -> Tensor:
        return sdpa(q.bfloat16(), k.bfloat16(), v.bfloat16()).float()

    module, inputs = model(rounded), {"x": tokens(24)}
    proof = proven(module, inputs, name, plan={})
    assert all(error.max < FLOOR for error in proof.algebra)
    assert proof.dense.max > FLOOR
    assert all(error.within(proof.bound) for error in proof.ranks)
    with pytest.raises(ProofFailed, match="astray"):
        proven(module, inputs, "ulysses", plan={}, sabotage=drop_the_exchange)


def nodes(graph: fx.Graph, name: str) -> list[fx.Node]:
    target = getattr(torch.ops.cp, name).default
    return list(graph.find_nodes(op="call_function", target=target))


def drop_the_exchange(graph: fx.Graph) -> None:
    """The first collective hands back what it was given."""
    node = nodes(graph, "all_to_all")[0]
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    graph.erase_node(node)


def wrong_order_of_ranks(graph: fx.Graph) -> None:
    node = nodes(graph, "all_gather")[-1]
    node.args = (node.args[0], [1, 0], 2)


def swap_keys_and_values(graph: fx.Graph) -> None:
    node = graph.find_nodes(op="call_function", target=torch.ops.cp.attention.default)[0]
    q, k, v = node.args[:3]
    node.args = (q, v, k, *node.args[3:])


def slice_of_another_rank(graph: fx.Graph) -> None:
    node = nodes(graph, "shard")[0]
    node.args = (node.args[0], node.args[1], [1, 0], 2)


def forget_the_scale(graph: fx.Graph) -> None:
    node = graph.find_nodes(op="call_function", target=torch.ops.cp.attention.default)[0]
    node.kwargs = {**node.kwargs, "scale": 1.0}


@pytest.mark.parametrize(
    "sabotage",
    [
        drop_the_exchange,
        wrong_order_of_ranks,
        swap_keys_and_values,
        slice_of_another_rank,
        forget_the_scale,
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_planted_faults_are_caught(sabotage: Sabotage, dtype: torch.dtype) -> None:
    module = tiny()
    cast_module(module, dtype)
    with pytest.raises(ProofFailed, match="went astray"):
        proven(module, cast_inputs(tiny_inputs(), dtype), sabotage=sabotage)


def test_a_fault_below_half_precision_is_caught_all_the_same() -> None:
    """1 % on one value: far below what bfloat16 loses, far above what float32 does."""

    def nudge(graph: fx.Graph) -> None:
        node = graph.find_nodes(op="call_function", target=torch.ops.cp.attention.default)[0]
        with graph.inserting_after(node):
            scaled = graph.call_function(torch.ops.aten.mul.Tensor, (node, 1.001))
        node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)

    module = tiny()
    cast_module(module, torch.bfloat16)
    inputs = cast_inputs(tiny_inputs(), torch.bfloat16)
    loss = proven(module, inputs).dense
    assert loss.max > 0.002
    with pytest.raises(ProofFailed, match="all ranks together went astray"):
        proven(module, inputs, sabotage=nudge)


def test_the_first_attention_that_differs_is_named() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = TinyAttention(), TinyAttention()

        def forward(self, x: Tensor, text: Tensor) -> Tensor:
            return self.second(self.first(x, text), text)

    torch.manual_seed(0)
    module = sharpened(Two())
    plan = {
        "": {"x": ContextParallelInput(1)},
        "second.leave": ContextParallelOutput(1),
    }

    def second_only(graph: fx.Graph) -> None:
        late = [n for n in nodes(graph, "all_to_all") if n.name.startswith("ulysses_2")]
        late[0].replace_all_uses_with(late[0].args[0])  # type: ignore[arg-type]
        graph.erase_node(late[0])

    with pytest.raises(ProofFailed, match="first attention to differ is number 2") as caught:
        proven(module, tiny_inputs(), plan=plan, sabotage=second_only)
    assert (caught.value.where or "").startswith("second ")
    assert "conftest.py" in (caught.value.where or "")


def test_a_model_whose_attention_does_not_matter_proves_nothing() -> None:
    module = tiny()
    with torch.no_grad():
        # Values of zero: attention adds nothing, so no fault in it could be seen.
        module.qkv.weight[2 * 96 :] = 0  # type: ignore[operator, index]
        module.qkv.bias[2 * 96 :] = 0  # type: ignore[operator, index]
    with pytest.raises(ProofFailed, match="nothing was proven") as caught:
        proven(module, tiny_inputs())
    assert "--weights" in (caught.value.hint or "")
    # The first attention already gives the same, whatever key a value belongs to.
    assert re.search(r"conftest\.py:\d+\)$", caught.value.where or "")


class Gated(nn.Module):
    """Two attentions, the second behind a gate that is closed."""

    def __init__(self, *gates: float) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(8, 32), nn.Linear(32, 8)
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
        self.gates = nn.Parameter(torch.tensor(gates))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for number, layer in enumerate((self.first, self.second)):
            q = (4 * layer(x)).unflatten(-1, (4, 8)).transpose(1, 2)
            out = nn.functional.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)
            x = x + self.gates[number] * out
        return self.leave(x)


def test_the_first_that_loses_what_attention_found_is_named() -> None:
    torch.manual_seed(0)
    with pytest.raises(ProofFailed, match="is lost in model") as caught:
        proven(sharpened(Gated(0.0, 0.0)), {"x": tokens(24)[..., :8]}, plan={})
    line = int((caught.value.where or "").rpartition(":")[2].rstrip(")"))
    source, first = inspect.getsourcelines(Gated)
    assert "self.gates[number] * out" in source[line - first]
    module = sharpened(Gated(1.0, 1.0))
    module.leave.weight.data.zero_()  # type: ignore[operator, union-attr]
    with pytest.raises(ProofFailed, match="is lost in leave"):
        proven(module, {"x": tokens(24)[..., :8]}, plan={})
    proven(sharpened(Gated(0.0, 1.0)), {"x": tokens(24)[..., :8]}, plan={})


def test_a_model_that_overflows_is_told_so() -> None:
    module = tiny()
    with torch.no_grad():
        module.leave.weight.mul_(1e38)  # type: ignore[operator, union-attr]
    with pytest.raises(ProofFailed, match=r"in float32\..* is not finite is that of leave\."):
        proven(module, tiny_inputs())


def test_a_model_that_overflows_in_half_precision_only() -> None:
    module = tiny()
    with torch.no_grad():
        module.to_q.weight.mul_(1e5)  # type: ignore[operator, union-attr]
    cast_module(module, torch.float16)
    with pytest.raises(ProofFailed, match=r"in float16\..* is that of to_q\.") as caught:
        measure(module, cast_inputs(tiny_inputs(), torch.float16))
    assert "--float32" in (caught.value.hint or "")
    assert re.fullmatch(r"to_q \(.*conftest\.py:\d+\)", caught.value.where or "")


def test_rtol_replaces_the_bound() -> None:
    assert proven(tiny(), tiny_inputs(), rtol=1e-3).bound.max == 1e-3
    with pytest.raises(ProofFailed, match=r"the bound of 1\.0e-12"):
        proven(tiny(), tiny_inputs(), "ring", 3, rtol=1e-12)


def test_an_error_that_is_not_finite_is_never_within_a_bound() -> None:
    from cp_convert.ir.proof import Error
    from cp_convert.prove.errors import error_of

    x = torch.tensor([1.0, math.nan])
    assert not error_of(x, torch.ones(2)).within(Error(1e9, 1e9))
    assert not error_of(torch.ones(3), torch.ones(2)).within(Error(1e9, 1e9))


def test_ranks_do_not_see_one_anothers_writes() -> None:
    """Strided writes into a tensor that all ranks created alike (Wan's rotary embedding)."""

    class Interleaved(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            out = torch.zeros_like(x)
            out[..., 0::2] = x[..., :2]
            out[..., 1::2] = x[..., 2:]
            return out

    x = torch.randn(4, 4)
    plan = {"": {"x": ContextParallelInput(0)}}
    program = sharded(Interleaved(), {"x": x}, plan, 2).program
    ((out,), _) = run(program, {"x": x}, 2)
    torch.testing.assert_close(out, x.unflatten(-1, (2, 2)).transpose(1, 2).flatten(1))


def test_what_all_ranks_have_in_common_is_computed_once() -> None:
    program = rewritten(tiny(), tiny_inputs(), "ulysses", 4).control
    common: dict[str, bool] = {}
    run(program, tiny_inputs(), 4, watch=lambda n, v: common.update({n.name: v.is_common}))
    parts = [name for name in common if name.startswith(("shard", "control_0_attention"))]
    assert parts
    assert not any(common[name] for name in parts)
    assert common["linear_3"], "the text's projection does not depend on the rank"


class Scaled(nn.Module):
    """FLUX's guidance: a number that bfloat16 does not hold decides what is added to all tokens."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, text: Tensor, guidance: Tensor) -> Tensor:
        """``[B, S, 8]``, ``[B, T, 8]`` and ``[1]`` to ``[B, S, 8]``."""
        angle = guidance.to(x.dtype) * 1000
        return self.inner(x, text) + 8 * torch.sin(angle.float()).to(x.dtype)


@pytest.mark.parametrize(("guidance", "is_held"), [(3.5, False), (4.0, True)])
def test_a_bound_that_shows_nothing_is_not_used(guidance: float, is_held: bool) -> None:
    """bfloat16 has 3504 for 3.5 * 1000: the dense model is elsewhere, and so are the ranks."""
    module = Scaled(tiny())
    cast_module(module, torch.bfloat16)
    given = {**tiny_inputs(), "guidance": torch.tensor([guidance])}
    inputs = cast_inputs(given, torch.bfloat16)
    proof = proven(module, inputs, plan={})
    assert (proof.dense.max < LARGEST / 4) == is_held
    assert (proof.rounded is None) == is_held
    assert proof.bound.max <= LARGEST
    assert max(error.max for error in proof.ranks) < 0.05
    assert max(error.max for error in proof.algebra) < FLOOR


def test_a_fault_of_half_precision_is_seen_beside_a_large_loss_of_the_dense_model() -> None:
    """A third too much, in the lowered program alone: within twice what the dense model loses."""
    module = Scaled(tiny())
    cast_module(module, torch.bfloat16)
    inputs = cast_inputs({**tiny_inputs(), "guidance": torch.tensor([3.5])}, torch.bfloat16)
    stages, truth = rewritten(module, inputs, "ulysses", 2, {}), measure(module, inputs)
    right = stages.lowered
    graph = copied(right.graph_module.graph)
    result = graph.output_node().all_input_nodes[0].all_input_nodes[0]
    with graph.inserting_after(result):
        wrong = graph.call_function(torch.ops.aten.mul.Tensor, (result, 4 / 3))
    result.replace_all_uses_with(wrong, lambda user: user is not wrong)
    faulty = replace(right, graph_module=module_of(right.graph_module, graph))
    assert bound_of(truth, None).max > 2 * LARGEST
    with pytest.raises(ProofFailed, match="nothing can be proven in this precision"):
        prove(truth, inputs, replace(stages, lowered=faulty))
    assert prove(truth, inputs, stages).bound.max == LARGEST
