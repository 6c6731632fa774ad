"""Pipelines of diffusers with a bundle in the model's place, run by processes over gloo."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cp_convert.diffusers import load_transformer
from tests.diffusers.pipelines import CASES, STEPS
from tests.diffusers.ranks import run_ranks
from tests.runtime.bundles import converted

Made = Callable[..., tuple[Path, Tensor]]

MODEL = """
import torch
from pathlib import Path
from tests.diffusers.pipelines import CASES

freeze = {freeze}

def build_model():
    return CASES["{name}"].model()

def example_inputs():
    return torch.load(Path(__file__).with_name("inputs.pt"))
"""


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A bundle for what the pipeline gives its model, and the plain pipeline's latents."""

    @cache
    def make(name: str, strategy: str, world: int) -> tuple[Path, Tensor]:
        case, folder = CASES[name], tmp_path_factory.mktemp(name)
        latents, inputs = case.recorded()
        torch.save(inputs, folder / "inputs.pt")
        (folder / "model.py").write_text(MODEL.format(name=name, freeze=list(case.freeze)))
        converted(folder / "model.py", folder / "out", strategy, world)
        return folder / "out", latents

    return make


def assert_same(found: Any, latents: Tensor) -> None:
    assert isinstance(found, Tensor), found
    assert (found - latents).abs().max() <= 1e-5 * latents.abs().max()


def by_seed(rank: int, name: str, out: Path) -> Tensor:
    with load_transformer(out) as transformer:
        assert (transformer.rank, transformer.device.type) == (rank, "cpu")
        return CASES[name].latents(transformer)


@pytest.mark.parametrize(("name", "strategy", "world"), [("flux", "ulysses", 2)])
def test_every_rank_runs_the_pipeline(
    made: Made, tmp_path: Path, name: str, strategy: str, world: int
) -> None:
    out, latents = made(name, strategy, world)
    for found in run_ranks(by_seed, world, tmp_path, name, out):
        assert_same(found, latents)


def followed(rank: int, name: str, out: Path) -> Tensor | int:
    with load_transformer(out, timeout=20) as transformer:
        if rank:
            return transformer.follow()
        return CASES[name].latents(transformer)


@pytest.mark.parametrize(("name", "strategy", "world"), [("flux", "allgather-kv", 3)])
def test_rank_0_runs_the_pipeline_and_the_others_follow(
    made: Made, tmp_path: Path, name: str, strategy: str, world: int
) -> None:
    out, latents = made(name, strategy, world)
    first, *others = run_ranks(followed, world, tmp_path, name, out)
    assert_same(first, latents)
    assert others == [2 * STEPS] * (world - 1), "guidance calls twice a step"
