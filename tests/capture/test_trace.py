from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cp_convert import ContextParallelInput, ContextParallelOutput
from cp_convert.capture.trace import trace
from cp_convert.errors import CannotShard, CannotTrace
from cp_convert.prove.lockstep import run
from tests.conftest import TINY_PLAN, sharded, tiny, tiny_inputs


@dataclass
class Fields:
    sample: Tensor
    extra: list[Tensor]


torch.export.register_dataclass(Fields)


class Nested(nn.Module):
    """Nested inputs, arguments that are no tensors, a nested output."""

    def forward(
        self,
        x: Tensor,
        pair: tuple[Tensor, Tensor],
        options: dict[str, Tensor],
        scale: float = 1.0,
        nothing: Tensor | None = None,
    ) -> Fields:
        return Fields(x * scale + pair[0], [pair[1], options["deep"] + 1])


def test_bindings_are_named_after_arguments_and_fields() -> None:
    t = torch.ones(2, 4)
    inputs = {"x": t, "pair": (t, t), "options": {"deep": t}, "scale": 2.0, "nothing": None}
    program, _ = trace(Nested(), inputs, {})
    assert [b.name for b in program.inputs] == ["x", "pair.0", "pair.1", "options.deep"]
    assert [b.name for b in program.outputs] == ["sample", "extra.0", "extra.1"]
    assert [(c.name, c.value) for c in program.frozen] == [("scale", 2.0), ("nothing", None)]


@pytest.mark.parametrize(
    ("module", "names"),
    [(nn.Identity(), ["output"]), (nn.Softmax(-1), ["output"])],
)
def test_a_single_output_is_called_output(module: nn.Module, names: list[str]) -> None:
    program, _ = trace(module, {"input": torch.ones(2, 4)}, {})
    assert [b.name for b in program.outputs] == names


def test_the_plan_is_reported_as_it_was_met() -> None:
    plan: Mapping[str, Any] = {
        "": {
            "x": ContextParallelInput(1, expected_dims=3),
            "text": ContextParallelInput(1, expected_dims=2),
        },
        "leave": ContextParallelOutput(1),
    }
    _, applied = trace(tiny(), tiny_inputs(), plan)
    assert [(a.cut.tensor, a.global_size, a.reason) for a in applied] == [
        ("input x", 24, None),
        ("input text", None, "has 3 dimensions, the plan expects 2"),
        ("output 0", 24, None),
    ]


def test_lists_of_tensors_and_outputs_are_split() -> None:
    class Rotary(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.cos(), x.sin()

    class Block(nn.Module):
        def forward(self, x: Tensor, tables: list[Tensor]) -> Tensor:
            return x * tables[0] + tables[1]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rotary, self.block = Rotary(), Block()

        def forward(self, x: Tensor, table: Tensor) -> Tensor:
            cos, _ = self.rotary(table)
            return self.block(x, [cos, table])

    x, table = torch.randn(8, 2), torch.randn(8, 2)
    plan = {
        "rotary": {0: ContextParallelInput(0, split_output=True)},
        "block": {
            "x": ContextParallelInput(0),
            "tables": [ContextParallelInput(0, expected_dims=9), ContextParallelInput(0)],
        },
    }
    inputs = {"x": x, "table": table}
    _, applied = trace(Model(), inputs, plan)
    assert sum(a.reason is not None for a in applied) == 1
    found = sharded(Model(), inputs, plan, 2)
    assert sum(move.kind == "split" for move in found.moves) >= 2
    for (out,) in run(found.program, inputs, 2):
        torch.testing.assert_close(out, x * table.cos() + table)


def test_hooks_are_gone_afterwards() -> None:
    module = tiny()
    trace(module, tiny_inputs(), TINY_PLAN)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in module.modules())


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"": {"y": ContextParallelInput(1)}}, "no such argument"),
        ({"leave": {3: ContextParallelInput(1, split_output=True)}}, "leave, which has 1 tensor"),
        ({"": {"x": ContextParallelInput(1, expected_dims=7)}}, "nothing would be sharded"),
        ({"leave": ContextParallelOutput(1)}, "nothing would be sharded"),
        ({"enterr": {"input": ContextParallelInput(1)}}, "a module 'enterr' that the model"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(plan: Mapping[str, Any], message: str) -> None:
    with pytest.raises(CannotShard, match=message):
        trace(tiny(), tiny_inputs(), plan)


def test_inputs_that_do_not_fit_forward_show_its_signature() -> None:
    with pytest.raises(CannotTrace, match="it gives no 'text', which has no default") as caught:
        trace(tiny(), {"x": torch.ones(1, 24, 8)}, {})
    assert "forward(x: 'Tensor', text: 'Tensor')" in (caught.value.hint or "")


def test_wrong_shapes_show_the_models_line() -> None:
    inputs = {**tiny_inputs(), "x": torch.ones(1, 24, 9)}
    with pytest.raises(CannotTrace) as caught:
        trace(tiny(), inputs, {})
    assert "conftest.py" in (caught.value.where or "")


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return -x


def test_a_data_dependent_branch_is_refused_with_its_line() -> None:
    with pytest.raises(CannotTrace) as caught:
        trace(Branch(), {"x": torch.ones(2)}, {})
    assert "test_trace.py" in (caught.value.where or "")


class Mapped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.func.vmap(lambda row: row + 1)(x)


def test_a_vmap_is_refused_by_the_name_it_was_written_with() -> None:
    with pytest.raises(CannotTrace, match=r"forward uses torch\.func\.vmap, as FlexAttention's"):
        trace(Mapped(), {"x": torch.ones(2, 3)}, {})


class Counted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * float(x.long().numpy().max())


def test_numpy_in_forward_is_refused_in_words() -> None:
    with pytest.raises(CannotTrace, match="takes a tensor's numbers to NumPy") as caught:
        trace(Counted(), {"x": torch.ones(2)}, {})
    assert "test_trace.py" in (caught.value.where or "")
