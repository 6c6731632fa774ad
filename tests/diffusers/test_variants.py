"""A bundle of several shapes as a model of diffusers: rank 0's calls, and those of all ranks."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cp_convert.diffusers import load_transformer
from cp_convert.errors import ConvertError
from tests.conftest import MODEL_FILE
from tests.diffusers.ranks import run_ranks
from tests.runtime.bundles import converted

LENGTHS = (16, 24, 10, 24, 16)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several")
    text = MODEL_FILE.replace("def example_inputs():", "def example_inputs(tokens=16):")
    text = text.replace("torch.randn(1, 16, 8)", "torch.randn(1, tokens, 8)")
    variants = {"usual": {}, "long": {"tokens": 24}, "odd": {"tokens": 10}}
    (folder / "model.py").write_text(f"{text}\nvariants = {variants}\n")
    converted(folder / "model.py", folder / "out", "ulysses", 2, weights_mode="external")
    return folder / "out"


def _x(length: int) -> Tensor:
    return torch.randn(1, length, 8, generator=torch.Generator().manual_seed(length))


def _wanted(out: Path) -> list[Tensor]:
    model = SimpleNamespace(**runpy.run_path(str(out.parent / "model.py"))).build_model()
    with torch.no_grad():
        return [model(_x(length)) for length in LENGTHS]


def follows(rank: int, out: Path) -> Any:
    with load_transformer(out, timeout=20) as transformer:
        if rank:
            return transformer.follow()
        return [transformer(x=_x(length)) for length in LENGTHS]


def calls(rank: int, out: Path, *, check: bool = True) -> Any:
    """All call; then the second and the third time rank 1 gives something else."""
    found: list[Any] = []
    with load_transformer(out, timeout=20, check=check) as transformer:
        for length in (16, (16, 24), (24, 17), *LENGTHS):
            own = length[rank] if isinstance(length, tuple) else length
            try:
                found.append(transformer(x=_x(own)))
            except ConvertError as error:
                found.append(f"{type(error).__name__}: {error.message}")
    return found


def calls_unchecked(rank: int, out: Path) -> Any:
    return calls(rank, out, check=False)


def test_ranks_follow_into_every_variant(out: Path, tmp_path: Path) -> None:
    found, count = run_ranks(follows, 2, tmp_path, out)
    assert count == len(LENGTHS)
    for one, want in zip(found, _wanted(out), strict=True):
        assert (one - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("work", [pytest.param(calls, marks=pytest.mark.slow), calls_unchecked])
def test_ranks_that_call_agree_on_the_variant(work: Any, out: Path, tmp_path: Path) -> None:
    first, second = run_ranks(work, 2, tmp_path, out)
    other = "RunFailed: rank 1 was given inputs of the variant long, and rank 0 of usual."
    assert first[1] == second[1] == other
    refused = "RunFailed: rank 1 cannot run what it is asked for: no variant of the bundle has"
    assert first[2].startswith(refused)
    assert second[2] == (
        "UsageError: no variant of the bundle has these inputs; the nearest is usual, and "
        "dimension 1 of x is 16 there, 17 here."
    )
    for rank in (first, second):
        for one, want in zip(rank[3:], _wanted(out), strict=True):
            assert (one - want).abs().max() <= 1e-5 * want.abs().max()
