"""Which precision is taken when none is named, and modules that compute in float32 in it."""

import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cp_convert.errors import UsageError
from cp_convert.job import Job
from cp_convert.model.cast import cast_inputs, cast_module, usual_precision
from cp_convert.model.load import load
from cp_convert.model.preset import path_of
from cp_convert.prove import measure, prove
from tests.conftest import rewritten, tiny, tiny_inputs

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


def module_in(*types: torch.dtype) -> nn.Module:
    return nn.ParameterList(nn.Parameter(torch.ones(2 + i).to(t)) for i, t in enumerate(types))


@pytest.mark.parametrize(
    ("preset", "held", "stored", "targets", "expected"),
    [
        (None, [F32], [], (), "bf16"),
        (None, [F32], [(F32, 9)], (), "bf16"),
        (None, [F32], [(F32, 99), (F16, 9), (BF16, 8)], (), "fp16"),
        (None, [F32, F16, BF16], [(F16, 9)], (), "bf16"),
        (None, [F16], [(BF16, 9)], (), "fp16"),
        (None, [torch.float8_e4m3fn], [(None, 9)], (), "bf16"),
        (None, [BF16], [], ("8.6", "7.5"), "fp16"),
        (None, [F32], [], ("12.0",), "bf16"),
        ("bf16", [F16], [(F16, 9)], (), "bf16"),
        ("bf16", [F32], [], ("7.5",), "fp16"),
        ("fp32", [F16], [], ("7.5",), "fp32"),
    ],
)
def test_the_precision_of_a_job_that_names_none(
    preset: str | None, held: Any, stored: Any, targets: tuple[str, ...], expected: str
) -> None:
    assert usual_precision(preset, [module_in(*held)], stored, targets) == expected


def test_it_is_decided_where_the_model_is_loaded(
    model_file: Callable[..., Path], tmp_path: Path
) -> None:
    def found(path: Path, **options: Any) -> tuple[str, set[torch.dtype]]:
        source = load(Job(path, "ring", 2, Path("unused"), **options))
        return source.precision, {p.dtype for p in source.module.parameters()}

    path = model_file()
    assert found(path) == ("bf16", {BF16})
    assert found(path, compute_capabilities=("7.5",)) == ("fp16", {F16})
    assert found(path, precision="fp32") == ("fp32", {F32})
    state = load(Job(path, "ring", 2, Path("unused"), precision="fp16")).module.state_dict()
    save_file(dict(state), tmp_path / "half.safetensors")
    for mode in ("embedded", "external"):
        weights = {"weights": tmp_path / "half.safetensors", "weights_mode": mode}
        assert found(path, **weights) == ("fp16", {F16})
    assert found(model_file(("return Model()", "return Model().half()"))) == ("fp16", {F16})
    preset = path_of("flux.1-dev")
    assert preset is not None
    assert found(preset, tiny=True)[0] == "bf16"


def test_bf16_is_refused_for_a_gpu_without_it(model_file: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match=r"--precision bf16: compute capability 7\.5 has none"):
        Job(
            model_file(), "ring", 2, Path("unused"),
            precision="bf16", compute_capabilities=("8.0", "7.5"),
        )  # fmt: skip


class Blocks(nn.Module):
    """Two blocks whose second part overflows float16: 300 * 300 summed over 8 features."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"grow": nn.Linear(8, 8), "norm": nn.LayerNorm(8)}) for _ in range(2)
        )
        for block in self.blocks:
            nn.init.constant_(block["grow"].weight, 300.0)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block["norm"](block["grow"](100 * x.square()))
        return x


def test_modules_that_match_hold_and_compute_float32() -> None:
    module = Blocks().eval()
    cast_module(module, F16, ["blocks.*", "blocks.0.norm"])  # inside another: counts once
    assert {p.dtype for p in module.parameters()} == {F32}
    module = Blocks().eval()
    cast_module(module, F16, ["blocks.*.grow", "*.norm"])
    seen: list[torch.dtype] = []
    module.blocks[0]["grow"].register_forward_hook(lambda m, a, out: seen.append(a[0].dtype))  # type: ignore[index]
    module(torch.ones(2, 8).half())
    assert seen == [F32]


def test_a_pattern_that_names_no_module_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--float32 blocks\.0\.nrm") as caught:
        cast_module(Blocks(), F16, ["blocks.0.nrm"])
    assert caught.value.hint == "did you mean blocks.0.norm?"
    cast_module(Blocks(), F16, ["residual"])


@pytest.mark.parametrize("name", ["ulysses", "ring"])
def test_what_computes_in_float32_is_proven(name: str) -> None:
    inputs, plain, module = cast_inputs(tiny_inputs(), BF16), tiny(), tiny()
    cast_module(plain, BF16)
    cast_module(module, BF16, ["qkv", "enter"])
    assert module.qkv.weight.dtype == F32  # type: ignore[union-attr]
    truth = measure(module, inputs)
    assert truth.reference[0].dtype == F32
    stages = rewritten(module, inputs, name, 2)
    proof = prove(truth, inputs, stages)
    assert all(error.max < 1e-5 for error in proof.algebra)
    products = {
        node.args[0].meta["val"].dtype
        for node in stages.lowered.graph_module.graph.nodes
        if "addmm" in str(node.target) or "linear" in str(node.target)
    }
    assert products == {F32, BF16}
    assert operator.ne(truth.loss, measure(plain, inputs).loss)
