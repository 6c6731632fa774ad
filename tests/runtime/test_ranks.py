"""Bundles of four models, run by as many processes as they have ranks, against the dense model."""

import runpy
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cp_convert import bundle as bundles
from tests.conftest import MODEL_FILE
from tests.runtime.bundles import FLUX, QWEN, WAN, converted
from tests.runtime.ranks import outputs_of


@dataclass(frozen=True)
class Case:
    text: str
    strategy: str
    world: int
    mode: str

    def made(self, folder: Path) -> Path:
        folder.mkdir()
        (folder / "model.py").write_text(self.text)
        options: dict[str, Any] = {"ulysses": 2} if self.strategy == "usp" else {}
        converted(
            folder / "model.py", folder / "out", self.strategy, self.world,
            weights_mode=self.mode, **options,
        )  # fmt: skip
        return folder / "out"


CASES = [
    Case(FLUX, "ulysses", 2, "external"),
    Case(WAN, "allgather-kv", 2, "embedded"),
    Case(MODEL_FILE, "ring", 2, "external"),
    Case(WAN, "ring", 3, "external"),
    Case(QWEN, "allgather-kv", 3, "embedded"),
    Case(FLUX, "usp", 4, "embedded"),
    Case(QWEN, "ulysses", 4, "external"),
    Case(MODEL_FILE, "usp", 4, "external"),
]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_all_ranks_return_what_the_dense_model_does(world: int, tmp_path: Path) -> None:
    cases = [case for case in CASES if case.world == world]
    made, expected = [], []
    for number, case in enumerate(cases):
        made.append(case.made(tmp_path / str(number)))
        module = SimpleNamespace(**runpy.run_path(str(made[-1].parent / "model.py")))
        inputs = module.example_inputs()
        torch.save(inputs, made[-1].parent / "inputs.pt")
        with torch.no_grad():
            expected.append(module.build_model().eval()(**inputs))
    for rank in outputs_of(made, world, tmp_path):
        for one, dense, out in zip(rank, expected, made, strict=True):
            value, want = (one[0], dense[0]) if hasattr(dense, "sample") else (one, dense)
            assert bundles.read(out)[0].world == world
            assert (value - want).abs().max() <= 1e-5 * want.abs().max()
            assert type(one).__name__ == ("Fields" if hasattr(dense, "sample") else "Tensor")
