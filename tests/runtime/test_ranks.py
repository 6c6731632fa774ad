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

    def made(self, folder: Path, **more: Any) -> Path:
        folder.mkdir()
        (folder / "model.py").write_text(self.text)
        options: dict[str, Any] = {"ulysses": 2} if self.strategy == "usp" else {}
        options |= more
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


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.slow), 3, 4])
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


EIGHT = [
    (Case(FLUX, "ulysses", 2, "external"), "int8:qkvo", "qkvo"),
    (Case(WAN, "ring", 2, "embedded"), "int8", "kv"),
    (Case(QWEN, "usp", 4, "embedded"), "int8", "qkv"),
    (Case(FLUX, "stream-kv", 4, "external"), "int8:kv", "kv"),
    (Case(WAN, "ulysses", 4, "external"), "int8", "qkv"),
]


def rounding(eight: str, patch: pytest.MonkeyPatch) -> None:
    """Attention with what is exchanged rounded, in the dense model: who attends to all keys."""
    whole = torch.nn.functional.scaled_dot_product_attention

    def rounded(x: torch.Tensor) -> torch.Tensor:
        step = x.abs().amax(-1, keepdim=True) / 127
        return (x / step).round() * step

    def attention(query: Any, key: Any, value: Any, **options: Any) -> torch.Tensor:
        if query.shape[2] != key.shape[2]:  # to text that every rank has
            return whole(query, key, value, **options)
        q, k, v = (
            rounded(x) if name in eight else x
            for name, x in (("q", query), ("k", key), ("v", value))
        )
        out = whole(q, k, v, **options)
        return rounded(out) if "o" in eight else out

    patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_an_exchange_in_8_bits_over_the_wire(
    world: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [case for case in EIGHT if case[0].world == world]
    made, expected = [], []
    for number, (case, exchange, rounded) in enumerate(cases):
        made.append(case.made(tmp_path / str(number), exchange=exchange))
        module = SimpleNamespace(**runpy.run_path(str(made[-1].parent / "model.py")))
        inputs = module.example_inputs()
        torch.save(inputs, made[-1].parent / "inputs.pt")
        with torch.no_grad(), monkeypatch.context() as patch:
            plain = module.build_model().eval()(**inputs)[0]
            rounding(rounded, patch)
            expected.append((module.build_model().eval()(**inputs)[0], plain))
    for rank in outputs_of(made, world, tmp_path):
        for one, (want, plain) in zip(rank, expected, strict=True):
            cost = (want - plain).abs().max()
            assert cost > 5e-5 * want.abs().max()
            # Codes next to a tie may flip, other ones on other processors (0.18 was seen); if only
            # one of q, k and v were not rounded, it would be a half and more (0.49 to 0.73).
            assert (one[0] - want).norm() <= 0.3 * (want - plain).norm()
