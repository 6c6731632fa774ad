"""The residual stream in float32: found by what it is, held where float16 overflows, proven."""

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from cp_convert.capture.decompose import decompose
from cp_convert.capture.residual import float32_residual, residual_sums
from cp_convert.capture.trace import trace
from cp_convert.errors import CannotLower, ProofFailed
from cp_convert.ir.program import Lowered
from cp_convert.model.cast import cast_inputs, cast_module
from cp_convert.prove import Stages, measure, measure_program, prove
from cp_convert.sharding.shard import shard
from cp_convert.strategies import CONTROL
from cp_convert.strategies.rewrite import rewrite
from tests.conftest import axis_of, strategy, table


class Block(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.modulation, self.qkv = nn.Linear(width, 3 * width), nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 64), nn.GELU("tanh"), nn.Linear(64, width))

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(functional.silu(temb)).unsqueeze(1).chunk(3, -1)
        y = self.norm(x) * (1 + scale) + shift
        q, k, v = self.qkv(y).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate * self.out(y)
        x = x + self.feed(functional.layer_norm(x, (32,)))
        return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


class Joint(nn.Module):
    """FLUX in small: two streams that become one, embeddings summed, sums beyond float16."""

    def __init__(self, size: float = 1.0) -> None:
        super().__init__()
        self.enter, self.text, self.time = nn.Linear(8, 32), nn.Linear(8, 32), nn.Linear(8, 32)
        self.guide = nn.Linear(8, 32)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.leave, self.size = nn.Linear(32, 8), size

    def forward(self, x: Tensor, text: Tensor, t: Tensor) -> Tensor:
        temb = self.time(t) + self.guide(t) + self.time(t.cos())
        x, text = self.size * self.enter(x), self.size * self.text(text)
        count = text.shape[1]
        x = self.blocks[0](x, temb)
        x = torch.cat([text, x], 1)
        for block in self.blocks[1:]:
            x = block(x, temb)
        return self.leave(functional.layer_norm(x[:, count:], (32,)))


INPUTS = {"x": (1, 24, 8), "text": (1, 5, 8), "t": (1, 8)}


def made(module: nn.Module, dtype: torch.dtype = torch.float16) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(1)
    cast_module(module.eval().requires_grad_(False), dtype)
    return module, cast_inputs({n: torch.randn(shape) for n, shape in INPUTS.items()}, dtype)


def large() -> nn.Module:
    """The residual stream starts near float16's end, and every feed-forward adds more to it."""
    torch.manual_seed(0)
    module = Joint(8000.0)
    for block in module.blocks:
        block.qkv.weight.data.mul_(4.0)  # type: ignore[union-attr, operator]
        block.out.weight.data.mul_(8000.0)  # type: ignore[union-attr, operator]
        block.feed[2].weight.data.mul_(80000.0)  # type: ignore[union-attr, index, operator]
        block.feed[2].bias.data.mul_(50000.0)  # type: ignore[union-attr, index, operator]
    return module


def dense_of(module: nn.Module, inputs: dict[str, Any]) -> Lowered:
    return decompose(trace(module, inputs, {})[0], table())


def test_the_stream_is_found_and_nothing_else() -> None:
    module, inputs = made(Joint())
    graph = dense_of(module, inputs).graph_module.graph
    found = residual_sums(graph)
    assert len(found) == 6
    assert {node.meta["nn_module_stack"].popitem()[1][0] for node in found} == {
        "blocks.0", "blocks.1", "blocks.2"
    }  # fmt: skip


def types(graph: fx.Graph, target: Any) -> set[torch.dtype]:
    return {
        n.args[0].meta["val"].dtype for n in graph.find_nodes(op="call_function", target=target)
    }  # type: ignore[union-attr]


def test_products_stay_in_half_precision_and_saturation_goes() -> None:
    module, inputs = made(Joint())
    before = dense_of(module, inputs)
    after = float32_residual(before)
    graph = after.graph_module.graph
    assert not graph.find_nodes(op="call_function", target=torch.ops.aten.clamp.default)
    assert types(graph, torch.ops.cp.attention.default) == {torch.float16}
    assert types(graph, torch.ops.aten.addmm.default) <= {torch.float16}
    assert [b.dtype for b in after.outputs] == [torch.float16]
    assert residual_sums(graph) == set()
    assert len(residual_sums(before.graph_module.graph)) == 6  # which is as it was


def proven(module: nn.Module, inputs: dict[str, Any], name: str, world: int) -> Any:
    axis = axis_of(world)
    truth = measure(module, inputs, rounded=False)
    dense = float32_residual(dense_of(module, inputs))
    truth = measure_program(truth, dense, inputs)
    split = shard(dense, axis)
    control, _ = rewrite(split, CONTROL, "control", axis, table())
    done, outcomes = rewrite(split, strategy(name, world), name, axis, table())
    sites = [(o.site, o.node) for o in outcomes]
    return prove(truth, inputs, Stages(dense, control, done, done, sites, axis))


@pytest.mark.parametrize("name", ["ulysses", "ring"])
def test_what_overflows_in_float16_is_proven_with_a_float32_stream(name: str) -> None:
    module, inputs = made(large())
    proof = proven(module, inputs, name, 2)
    assert all(error.max < 1e-5 for error in proof.algebra)
    assert proof.dense.max < 0.05


def test_without_it_the_first_that_overflows_is_named() -> None:
    module, inputs = made(large())
    for block in module.blocks:  # type: ignore[union-attr]
        block.forward = _without_saturation(block)
    with pytest.raises(ProofFailed, match=r"is not finite is that of blocks\.\d"):
        measure(module, inputs)


def _without_saturation(block: Any) -> Any:
    original = block.forward

    def forward(x: Tensor, temb: Tensor) -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tensor, "clip", lambda self, *_: self)
            return original(x, temb)

    return forward


def test_a_program_without_a_stream_is_refused() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + x.cos()

    module = Plain()
    cast_module(module, torch.float16)
    inputs = {"x": torch.randn(2, 8).half()}
    with pytest.raises(CannotLower, match="no residual stream") as caught:
        float32_residual(dense_of(module, inputs))
    assert "--float32 'blocks" in (caught.value.hint or "")


def test_a_float32_program_is_left_alone() -> None:
    module, inputs = made(Joint(), torch.float32)
    dense = dense_of(module, inputs)
    assert float32_residual(dense) is dense
