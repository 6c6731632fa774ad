from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from cp_convert.errors import CannotShard, ModelFileError, UsageError
from cp_convert.job import Job
from cp_convert.model.cast import cast_inputs, cast_module
from cp_convert.model.load import load

Write = Callable[..., Path]


def job(model: Path, **options: object) -> Job:
    return Job(model=model, strategy="ring", world=2, out=Path("unused"), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)],
)
def test_the_model_comes_in_eval_mode_and_the_wanted_precision(
    model_file: Write, precision: str, dtype: torch.dtype
) -> None:
    source = load(job(model_file(), precision=precision))
    assert not source.module.training
    assert {p.dtype for p in source.module.parameters()} == {dtype}
    assert source.inputs["x"].dtype == dtype
    assert source.parameters == 8 * 64 + 64 + 64 * 192 + 192 + 64 * 8 + 8
    assert source.bytes == source.parameters * dtype.itemsize
    assert len(source.sha256) == 64


def test_a_neighbour_of_the_model_file_can_be_imported(model_file: Write, tmp_path: Path) -> None:
    (tmp_path / "sizes_beside.py").write_text("WIDTH = 8")
    path = model_file(("import torch\n", "import torch\nfrom sizes_beside import WIDTH\n"))
    assert load(job(path)).inputs["x"].shape == (1, 16, 8)


@pytest.mark.parametrize(
    ("old", "new", "message", "line"),
    [
        ("def build_model():", "def build_model(:", "not valid Python", ":22"),
        ("import torch\n", "import torch, absent_module\n", "needs the module absent_module", ":2"),
        ("def build_model", "def make_model", r"does not define build_model\(\)", ""),
        (
            "def example_inputs",
            "example_inputs = None\ndef _",
            "does not define example_inputs",
            "",
        ),
        (
            "    return Model()",
            "    return 3",
            "returned a value of type int, not a torch.nn.Module",
            ":22",
        ),
        (
            '    return {"x"',
            '    return 1 or {"x"',
            "returned a value of type int, not a dict",
            ":26",
        ),
        (
            "    return Model()",
            "    return 1 / 0",
            r"build_model\(\) failed with ZeroDivision",
            ":24",
        ),
        ("class Model", "raise RuntimeError('no')\nclass Model", "importing it failed", ":12"),
    ],
)
def test_mistakes_in_the_model_file_are_named(
    model_file: Write, old: str, new: str, message: str, line: str
) -> None:
    path = model_file((old, new))
    with pytest.raises(ModelFileError, match=message) as caught:
        load(job(path))
    assert (caught.value.where or "").endswith(f"model.py{line}")


def test_a_model_without_a_plan_is_refused_only_when_its_plan_is_asked_for(
    model_file: Write,
) -> None:
    path = model_file(("cp_plan = {", "unused = {"))
    with pytest.raises(CannotShard, match="Model has no plan") as caught:
        load(job(path, plan="model"))
    assert "cp_plan" in (caught.value.hint or "")
    assert load(job(path)).plan == {}


def test_auto_leaves_the_models_plan_aside(model_file: Write) -> None:
    assert load(job(model_file(), plan="auto")).plan == {}


def test_arguments_to_freeze_come_from_the_file_and_the_command(model_file: Write) -> None:
    path = model_file(("cp_plan = {", "freeze = ('x',)\ncp_plan = {"))
    assert load(job(path, freeze=("ids",))).freeze == ("x", "ids")


def test_the_modules_own_plan_is_used(model_file: Write) -> None:
    path = model_file(
        ("cp_plan = {", "plan = {"),
        ("class Model(nn.Module):\n", "class Model(nn.Module):\n    _cp_plan = plan\n"),
    )
    assert set(load(job(path)).plan) == {"enter", "leave"}


def test_a_missing_file_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="there is no file absent"):
        job(Path("absent.py"))


class Tables(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.norm1 = nn.LayerNorm(2)
        self.register_buffer("kept", torch.ones(1), persistent=False)
        self.register_buffer("saved", torch.ones(1))
        self.register_buffer("index", torch.ones(1, dtype=torch.int64))
        self.register_buffer("wide", torch.ones(1, dtype=torch.float64))

    _keep_in_fp32_modules = ("norm1",)


def test_what_is_cast_and_what_is_not() -> None:
    module = Tables()
    cast_module(module, torch.float16)
    found = {name: t.dtype for name, t in [*module.named_parameters(), *module.named_buffers()]}
    assert found == {
        "weight": torch.float16,
        "norm1.weight": torch.float32,
        "norm1.bias": torch.float32,
        "kept": torch.float32,
        "saved": torch.float16,
        "index": torch.int64,
        "wide": torch.float64,
    }


def test_inputs_are_cast_but_for_integers_doubles_and_the_kept() -> None:
    inputs = {
        "x": [torch.ones(1)],
        "ids": torch.ones(1),
        "step": torch.ones(1, dtype=torch.int64),
        "table": torch.ones(1, dtype=torch.float64),
        "flag": True,
    }
    cast = cast_inputs(inputs, torch.bfloat16, keep=("ids",))
    assert cast["x"][0].dtype == torch.bfloat16
    assert cast["ids"].dtype == torch.float32
    assert cast["step"].dtype == torch.int64
    assert cast["table"].dtype == torch.float64
    assert cast["flag"] is True


def test_a_buffer_that_is_a_view_is_cast_with_all_that_tracing_sees_of_it() -> None:
    """SD3's position table is one; torch.export compares a view with its base."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.ones(4, 8).unsqueeze(0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.table

    module = Table()
    cast_module(module, torch.bfloat16)
    exported = torch.export.export(module, (torch.ones(1, 4, 8, dtype=torch.bfloat16),))
    assert exported.state_dict["table"].dtype == torch.bfloat16
