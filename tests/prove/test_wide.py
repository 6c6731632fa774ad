"""The float32 reference is the very module: whatever holds on to it computes in float32 as well."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cp_convert.model.cast import cast_inputs, cast_module
from cp_convert.prove import measure
from cp_convert.prove.wide import in_float32
from tests.conftest import tiny, tiny_inputs


def half(module: nn.Module) -> nn.Module:
    cast_module(module.eval().requires_grad_(False), torch.float16)
    return module


def reference(module: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return measure(module, cast_inputs(inputs, torch.float16)).reference[0]


def wrapped(module: nn.Module) -> nn.Module:
    """A forward that is replaced on the instance, by a closure over the original."""
    original = module.forward

    @functools.wraps(original)
    def forward(*args: Tensor, **kwargs: Tensor) -> Tensor:
        return original(*args, **kwargs) * 2

    module.forward = forward  # type: ignore[method-assign]
    return module


def hooked(module: nn.Module) -> nn.Module:
    """A hook that computes with the parameters of the module that it was made for."""
    module.register_forward_hook(lambda _, args, out: out + module.leave.bias.float())  # type: ignore[union-attr, operator]
    return module


@pytest.mark.parametrize("how", [wrapped, hooked])
def test_closures_and_hooks_see_the_wide_numbers(how: Any) -> None:
    wide = half(tiny())
    wide.float()  # rounded, then wide: what the reference has to be
    rounded = cast_inputs(cast_inputs(tiny_inputs(), torch.float16), torch.float32)
    expected = how(wide)(**rounded)
    torch.testing.assert_close(reference(how(half(tiny())), tiny_inputs()), expected)


def test_afterwards_everything_is_as_it_was() -> None:
    module = half(tiny())
    module.twin = module.leave  # tied
    module.register_buffer("table", torch.arange(3.0))
    before = {name: (id(t), t.data_ptr(), t.dtype) for name, t in module.state_dict().items()}
    owned = [id(p) for p in module.parameters()]

    def fails() -> None:
        with in_float32(module):
            assert {t.dtype for t in module.state_dict().values()} == {torch.float32}
            assert module.twin.weight is module.leave.weight  # type: ignore[union-attr]
            module.kept, module.table[0] = torch.ones(1), 7.0  # type: ignore[operator, index]
            module.leave._buffers["new"] = torch.ones(1)  # type: ignore[union-attr]
            raise RuntimeError("of forward")

    with pytest.raises(RuntimeError, match="of forward"):
        fails()
    after = {name: (id(t), t.data_ptr(), t.dtype) for name, t in module.state_dict().items()}
    assert [p[1:] for p in after.values()] == [p[1:] for p in before.values()]
    assert owned == [id(p) for p in module.parameters()]
    assert not hasattr(module, "kept")
    assert module.table.tolist() == [0, 1, 2]  # type: ignore[union-attr, operator]


def test_names_of_one_memory_stay_that_and_files_are_left_alone(tmp_path: Any) -> None:
    path = tmp_path / "numbers"
    torch.arange(16, dtype=torch.float16).numpy().tofile(path)
    mapped = torch.from_file(str(path), shared=True, size=16, dtype=torch.float16)
    module = nn.Module()
    module.one, module.other = nn.Parameter(mapped, False), nn.Parameter(mapped.detach(), False)
    with in_float32(module):
        assert module.one.data_ptr() == module.other.data_ptr() != mapped.data_ptr()  # type: ignore[operator]
        module.one.zero_()  # type: ignore[operator]
        assert not module.other.any()  # type: ignore[operator]
    assert module.one.data_ptr() == mapped.data_ptr()  # type: ignore[operator]
    assert torch.equal(mapped, torch.arange(16, dtype=torch.float16))


def test_a_table_that_forward_keeps_is_not_the_references() -> None:
    """Else the trace that follows would hold float32 constants in a float16 model."""

    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.tables = nn.Linear(4, 4), {}

        def forward(self, x: Tensor) -> Tensor:
            if x.shape not in self.tables:
                self.tables[x.shape] = self.layer(x).cos()
            return self.layer(x) * self.tables[x.shape]

    module = half(Keeps())
    inputs = {"x": torch.randn(3, 4)}
    assert reference(module, inputs).dtype == torch.float32
    (kept,) = module.tables.values()  # type: ignore[union-attr, operator]
    assert kept.dtype == torch.float16


def test_a_parameter_that_is_returned_stays_wide() -> None:
    class Returns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x * self.weight, self.weight

    truth = measure(half(Returns()), {"x": torch.randn(4).half()})
    assert {t.dtype for t in truth.reference} == {torch.float32}
