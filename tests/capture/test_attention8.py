"""Which attentions are computed over FP8 codes, and what is refused."""

from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from cp_convert.capture.attention8 import (
    attentions_of,
    choose,
    measured,
    operands,
    over_codes,
    stored,
)
from cp_convert.capture.decompose import decompose
from cp_convert.capture.linear8 import choose as choose_linears
from cp_convert.capture.trace import trace
from cp_convert.errors import CannotConvert, UsageError
from cp_convert.ir.ops import ATTENTION
from cp_convert.ir.program import Lowered, arguments
from cp_convert.prove import flat_inputs
from cp_convert.prove.lockstep import run
from cp_convert.runtime.codes import by_torch
from tests.conftest import table

STEPS = (0.01, 0.02, 0.03)


class Attention(nn.Module):
    def __init__(self, heads: int, keys: int | None = None) -> None:
        super().__init__()
        self.heads, self.keys = heads, keys
        self.qkv = nn.Linear(64, 192)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = (part if i == 0 else part[:, :, : self.keys] for i, part in enumerate(parts))
        return functional.scaled_dot_product_attention(4 * q, k, v).transpose(1, 2).flatten(2)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool = Attention(4)
        self.blocks = nn.ModuleList(
            Attention(heads, keys) for heads, keys in ((4, None), (2, None), (16, None), (4, 31))
        )

    def forward(self, x: Tensor) -> Tensor:
        for one in (self.pool, *self.blocks):
            x = x + one(x)
        return x


def inputs(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"x": torch.randn(1, 40, 64, dtype=dtype)}


@cache
def program(dtype: torch.dtype = torch.bfloat16) -> Lowered:
    torch.manual_seed(0)
    traced, _ = trace(Model().eval().requires_grad_(False).to(dtype), inputs(dtype), {}, ())
    return decompose(traced, table())


def test_what_has_a_kernel_in_the_blocks_is_chosen() -> None:
    chosen, kept = choose(program())
    assert chosen == attentions_of(program())[1:3]
    assert [(one.module, one.reason) for one in kept] == [
        ("pool", "outside of the repeated blocks"),
        ("blocks.2", "there is no FP8 kernel for heads of 4 numbers"),
        ("blocks.3", "there is no FP8 kernel for fewer than 32 keys"),
    ]


def test_what_is_kept_by_name() -> None:
    chosen, kept = choose(program(), ["blocks.1", "blocks.3"])
    assert chosen == attentions_of(program())[1:2]
    assert [one.reason for one in kept if one.module != "pool"][::2] == ["--keep", "--keep"]
    assert len(choose_linears(program(), ["blocks.1"])[0]) == 4  # the layer within it is another
    with pytest.raises(UsageError, match=r"--keep blocks\.7: there is no linear layer, and no att"):
        choose_linears(program(), ["blocks.7"])


def test_nothing_is_left() -> None:
    with pytest.raises(CannotConvert, match="over codes: it is computed in float32"):
        choose(program(torch.float32))
    with pytest.raises(CannotConvert, match="no attention can be computed over codes: --keep"):
        choose(program(), ["blocks.*"])


def test_a_checkpoints_own() -> None:
    chosen, kept = stored(program(), {"pool": STEPS, "blocks.0": STEPS, "blocks.2": STEPS})
    assert chosen == attentions_of(program())[:2]
    assert [(one.module, one.reason) for one in kept] == [
        ("blocks.1", "as in the checkpoint"),
        ("blocks.2", "there is no FP8 kernel for heads of 4 numbers"),
        ("blocks.3", "as in the checkpoint"),
    ]
    with pytest.raises(CannotConvert, match=r"attention of blocks\.9, where the model"):
        stored(program(), {"blocks.0": STEPS, "blocks.9": STEPS})


def test_scales_that_inputs_give() -> None:
    chosen, _ = choose(program())
    names = operands(chosen[0])
    largest = dict(zip(names, (4.48, 8.96, 44.8), strict=True))
    assert measured(chosen[:1], largest) == {chosen[0].name: pytest.approx((0.01, 0.02, 0.1))}
    for bad in (0.0, float("inf"), float("nan")):
        with pytest.raises(CannotConvert, match=r"blocks\.0 attends to has no scale"):
            measured(chosen[:1], {**largest, names[1]: bad})


def test_only_the_named_ones_read_codes() -> None:
    first, second = choose(program())[0]
    after = over_codes(program(), {second.name: STEPS})
    told = {node.name: arguments(node)["steps"] for node in attentions_of(after)}
    assert told[second.name] == list(STEPS)
    assert told[first.name] is None
    assert all(arguments(node)["steps"] is None for node in attentions_of(program()))


def test_torch_leaves_probabilities_as_they_are_on_a_gpu() -> None:
    """There q, k and v are rounded, and its own fused attention reads them."""
    before = over_codes(program(), {choose(program())[0][0].name: STEPS})
    assert by_torch(before, products=False) is before
    after = by_torch(before, products=False, fused=True)
    nodes = after.graph_module.graph.nodes
    assert [arguments(n)["steps"] for n in nodes if n.target is ATTENTION] == 4 * [None]
    sdpa = torch.ops.aten.scaled_dot_product_attention.default
    assert sum(n.target is sdpa for n in nodes) == 1
    outs = [run(p, flat_inputs(p, inputs()), 1)[0][0] for p in (before, after, program())]
    exact, fused, plain = (out.float() for out in outs)
    assert (fused - exact).norm() < 0.8 * (plain - exact).norm()
