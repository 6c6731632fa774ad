"""What a user named is looked at before the model computes anything."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cp_convert import ContextParallelInput
from cp_convert.backends import BACKENDS
from cp_convert.capture.trace import trace
from cp_convert.early import check_named
from cp_convert.errors import CannotLift, CannotShard, UsageError
from cp_convert.ir.source import Source
from cp_convert.job import Job, Span, Variant
from cp_convert.pipeline import convert
from cp_convert.progress import Progress

Write = Callable[..., Path]


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.again = self.blocks[1]

    def forward(self, x: Tensor, more: dict[str, Any], table: Tensor, count: int) -> Tensor:
        return self.again(self.blocks[0](x)) * more["pair"][0] + more["pair"][1] + table * count


def source() -> Source:
    pair = (torch.ones(8), torch.ones(1, dtype=torch.int64))
    inputs = {"more": {"pair": pair}, "table": torch.ones(8), "x": torch.ones(4, 8), "count": 2}
    return Source(Nested().eval().requires_grad_(False), inputs, {}, ("table",), "", 0, 0)


def job(**options: Any) -> Job:
    given = {"model": Path(__file__), "strategy": "ulysses", "world": 2, "out": Path("out")}
    return Job(**{**given, **options})


def test_a_file_has_the_names_that_a_program_gives_its_inputs(tmp_path: Path) -> None:
    one, file = source(), tmp_path / "a.safetensors"
    program, _ = trace(one.module, one.inputs, {}, one.freeze)
    wanted = {b.name: b.shape for b in program.inputs}
    assert sorted(wanted) == ["more.pair.0", "more.pair.1", "x"]
    save_file({name: torch.ones(shape) for name, shape in wanted.items()}, file)
    asked = job(quantize="fp8", calibration=(file,))
    check_named(asked, one)
    save_file({name: torch.ones(shape) for name, shape in wanted.items() if name != "x"}, file)
    with pytest.raises(UsageError, match=r"lacks x\."):
        check_named(asked, one)


def test_modules_under_all_their_names() -> None:
    check_named(
        job(quantize="fp8", keep=("blocks.*", "again", "model"), split_after=("again",)), source()
    )
    check_named(job(split_after=("blocks.0", "blocks.1")), source())
    with pytest.raises(UsageError, match="cannot freeze tabel"):
        check_named(job(), replace(source(), freeze=("tabel",)))


def test_a_rank_without_tokens_is_told_by_arithmetic_alone() -> None:
    """The plan splits an argument of the model itself, so its length is known once it is loaded."""

    def sized(n: int) -> Source:
        one = source()
        return replace(one, inputs={**one.inputs, "x": torch.ones(n, 8)}, variant=Variant(size=n))

    asked = job(strategy="allgather-kv", world=4, dynamic=Span("n", 5, 40))
    several = [sized(one.size or 0) for one in asked.sizes]
    for dim, told in ((0, "at n=9 the last of 4 ranks holds padding alone"), (1, "")):
        plan = {"": {"x": ContextParallelInput(split_dim=dim, expected_dims=2)}}
        whole = replace(several[0], plan=plan, others=tuple(several[1:]))
        with pytest.raises(CannotLift, match=told) if told else nullcontext():
            check_named(asked, whole)
        check_named(replace(asked, dynamic=Span("n", 10, 40)), whole)
    with pytest.raises(CannotShard, match="a module 'block'"):
        check_named(job(), replace(source(), plan={"block": {}}))


NOBODY: dict[str, tuple[dict[str, Any], str]] = {
    "keep": ({"quantize": "fp8", "keep": ("entr",)}, "--keep entr: Model has no module"),
    "split-after": ({"split_after": ("entr",)}, "--split-after entr: Model has no module"),
    "freeze": ({"freeze": ("y",)}, "cannot freeze y"),
    "a shape": ({"quantize": "fp8"}, r"x is \[1, 3, 8\].*example's is \[1, 16, 8\]"),
}


@pytest.mark.parametrize(("options", "told"), NOBODY.values(), ids=NOBODY)
def test_it_is_told_before_forward_is_called(
    options: dict[str, Any], told: str, model_file: Write, tmp_path: Path
) -> None:
    path = model_file(
        ("    def forward(self, x):", "    def forward(self, x):\n        raise OSError")
    )
    file = tmp_path / "a.safetensors"
    save_file({"x": torch.ones(1, 3, 8)}, file)
    calibration = (file,) if list(options) == ["quantize"] else ()
    given = {"model": path, "out": tmp_path / "out", "cache": None, **options}
    with pytest.raises(UsageError, match=told):
        convert(job(**given, calibration=calibration), BACKENDS["tensorrt-rtx"], Progress())
