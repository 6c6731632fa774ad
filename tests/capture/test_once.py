"""Decomposition operator by operator, against torch's own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from cp_convert.capture.once import decompose_once
from tests.conftest import table


class Blocks(nn.Module):
    """Equal blocks with what diffusion transformers are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 48) for _ in range(3))
        self.norms = nn.ModuleList(nn.RMSNorm(16) for _ in range(3))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Two tensors of one shape, which must not be taken for one."""
        for layer, norm in zip(self.layers, self.norms, strict=True):
            a, b, c = layer(functional.layer_norm(norm(x), (16,))).chunk(3, dim=-1)
            x = x + functional.gelu(a, approximate="tanh") * b.sigmoid() - y
            y = y * functional.silu(c) + functional.dropout(x, 0.5, training=False)
        return x, y


def exported(module: nn.Module, *inputs: Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(module.eval().requires_grad_(False), inputs)


def test_it_computes_what_torchs_own_decomposition_computes() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    program = exported(Blocks(), *inputs)
    graph = decompose_once(program.graph_module, table())
    assert graph is not None
    whole = program.run_decompositions(dict(table()))
    values = [*program.state_dict.values(), *inputs]
    ours = fx.Interpreter(fx.GraphModule(program.graph_module, graph)).run(*values)
    theirs = fx.Interpreter(whole.graph_module).run(*values)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)
    names = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert "aten.rms_norm.default" not in names
    assert "aten.dropout.default" not in names


def test_every_node_has_its_value_and_its_origin() -> None:
    inputs = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    graph = decompose_once(exported(Blocks(), *inputs).graph_module, table())
    assert graph is not None
    for node in graph.nodes:
        if node.op == "call_function":
            assert "val" in node.meta
            assert "test_once.py" in node.meta["stack_trace"]


def one_behind_another(module: nn.Module) -> None:
    held = [parameter.data for parameter in module.parameters()]
    memory, begin = torch.cat([one.flatten() for one in held]), 0
    for parameter in module.parameters():
        values = memory[begin : begin + parameter.numel()].view(parameter.shape)
        parameter.data, begin = values, begin + parameter.numel()


@pytest.mark.parametrize("located", [False, True])
def test_equal_calls_are_traced_once(located: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of a file, which lie one behind another in one memory, are no other calls."""
    from cp_convert.capture import once as module

    counted: list[Any] = []
    make: Callable[..., Any] = module.make_fx
    monkeypatch.setattr(module, "make_fx", lambda *a, **k: counted.append(a) or make(*a, **k))
    counts = []
    for depth in (1, 3):
        blocks = Blocks()
        blocks.layers, blocks.norms = blocks.layers[:depth], blocks.norms[:depth]
        if located:
            one_behind_another(blocks)
        counted.clear()
        decompose_once(
            exported(blocks, torch.randn(2, 5, 16), torch.randn(2, 5, 16)).graph_module, table()
        )
        counts.append(len(counted))
    assert counts[0] == counts[1] > 0


def test_an_assertion_has_no_value() -> None:
    class Coded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.one_hot(x, 4)  # decomposed into one, and into assertions

    codes = torch.tensor([0, 3, 1])
    graph = decompose_once(exported(Coded(), codes).graph_module, table())
    assert graph is not None
    found = fx.GraphModule(nn.Module(), graph)(codes)
    assert torch.equal(found[0], nn.functional.one_hot(codes, 4))
