"""Writes in place as values, against eager torch."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from cp_convert.capture.functionalize import Unclear, functionalized
from cp_convert.capture.once import decompose_once
from tests.conftest import table


class Model(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> object:
        """What the function gives."""
        return self.function(x)


def rotary(x: Tensor) -> Tensor:
    """As Wan 2.1 has it."""
    out = torch.empty_like(x)
    out[..., 0::2] = x[..., 0::2].cos()
    out[..., 1::2] = x[..., 1::2].sin()
    return out.type_as(x)


def mask(x: Tensor) -> Tensor:
    """As HunyuanVideo has it."""
    keep = (x[:, :, None] > 0) & (x[:, :, None].transpose(1, 2) < 1)
    keep[:, 0, :] = True
    return torch.where(keep, x[:, None], 0.0)


def through_views(x: Tensor) -> Tensor:
    y = x * 2
    y.transpose(0, 1)[1].mul_(3)
    y.unsqueeze(0)[:, :, 2:4].add_(1)
    y.permute(1, 0)[-1, 1:].fill_(7.0)
    return y


def seen_before_and_after(x: Tensor) -> tuple[Tensor, ...]:
    y = x + 1
    early, view = y * 2, y[1:]
    y[1] = 5.0
    return early, view * 2, y


def two_tensors(x: Tensor) -> Tensor:
    a, b = x + 1, x + 2
    a[0] = b[1]
    b[1:] = a[:-1]
    a.sub_(b)
    return a * b


def written_to_itself(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 1:] = y[:, :-1] + 1
    return y.index_put_((torch.tensor([0, 2]),), y[0] * 3)


def an_alias_that_no_schema_tells(x: Tensor) -> Tensor:
    y = x + 1
    same = nn.functional.dropout(y, 0.5, training=False)
    other = y.type_as(x)
    y[0] = 9.0
    return same + 2 * other


KNOWN = [rotary, mask, through_views, seen_before_and_after, two_tensors, written_to_itself]


@pytest.mark.parametrize("function", [*KNOWN, an_alias_that_no_schema_tells])
def test_it_computes_what_eager_torch_computes(function: Callable[[Tensor], object]) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    program = torch.export.export(Model(function), (x,))
    graph = functionalized(program.graph)
    operators = {str(node.target) for node in graph.nodes if node.op == "call_function"}
    writing = {name for name in operators if name.split(".")[1].removesuffix("__").endswith("_")}
    assert writing <= {"aten.detach_.default"}  # of a constant; it writes nothing
    module = fx.GraphModule(program.graph_module, graph)
    held = [*program.constants.values(), *program.buffers()]
    expected = function(x)
    wanted = expected if isinstance(expected, tuple) else (expected,)
    for one, other in zip(fx.Interpreter(module).run(*held, x), wanted, strict=True):
        assert torch.equal(one, other)
    assert decompose_once(program.graph_module, table()) is not None


def chunks(x: Tensor) -> Tensor:
    a, b = (x + 1).chunk(2)
    a.add_(b)
    return a


def flattened(x: Tensor) -> Tensor:
    y = x + 1
    y.flatten()[3] = 1.0
    return y


def an_input(x: Tensor) -> Tensor:
    x[0] = 1.0
    return x * 2


def an_input_under_another_name(x: Tensor) -> Tensor:
    y = x.to(x.dtype)
    y[0] = 1.0
    return y * 2


@pytest.mark.parametrize("function", [chunks, flattened, an_input, an_input_under_another_name])
def test_what_is_not_understood_is_left_to_torch(function: Callable[[Tensor], object]) -> None:
    program = torch.export.export(Model(function), (torch.randn(4, 6),))
    with pytest.raises(Unclear):
        functionalized(program.graph)
    assert decompose_once(program.graph_module, table()) is None


def test_a_graph_without_writes_is_left_alone() -> None:
    graph = torch.export.export(Model(lambda x: x + 1), (torch.randn(4, 6),)).graph
    assert functionalized(graph) is graph
