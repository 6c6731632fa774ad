"""Pipelines of diffusers with a bundle in the model's place, run by processes over gloo."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import FluxPipeline, WanPipeline
from torch import Tensor

from cp_convert.diffusers import load_transformer
from cp_convert.errors import UsageError
from tests.diffusers.pipelines import CASES, STEPS, unipc
from tests.diffusers.ranks import run_ranks
from tests.runtime.bundles import converted

ALIKE = [("flux", "ulysses", 2), ("qwen", "ulysses", 2), ("cosmos3", "allgather-kv", 3)]
LED = [("flux", "allgather-kv", 3), ("wan", "ring", 2)]
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


@pytest.mark.parametrize(
    ("name", "strategy", "world"),
    [
        ("flux", "ulysses", 2),
        pytest.param("qwen", "ulysses", 2, marks=pytest.mark.slow),
        pytest.param("cosmos3", "allgather-kv", 3, marks=pytest.mark.slow),
    ],
)
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


@pytest.mark.parametrize(
    ("name", "strategy", "world"), [("flux", "allgather-kv", 3), ("wan", "ring", 2)]
)
def test_rank_0_runs_the_pipeline_and_the_others_follow(
    made: Made, tmp_path: Path, name: str, strategy: str, world: int
) -> None:
    out, latents = made(name, strategy, world)
    first, *others = run_ranks(followed, world, tmp_path, name, out)
    assert_same(first, latents)
    assert others == [2 * STEPS] * (world - 1), "guidance calls twice a step"


def of_two_models(rank: int, out: Path) -> Tensor:
    """Wan 2.2: one model for the noisy steps, another for the rest; in a group of the script's."""
    dist.init_process_group("gloo")
    with load_transformer(out) as first, load_transformer(out) as second:
        calls: list[Any] = []
        second.register_forward_hook(lambda *_: calls.append(None))
        pipeline = WanPipeline(None, None, None, unipc(), first, second, boundary_ratio=0.9)
        latents = replace(CASES["wan"], pipeline=lambda _: pipeline).latents(first)
    assert 0 < len(calls) < 2 * STEPS
    assert dist.is_initialized(), "it was not ours to end"
    dist.destroy_process_group()
    return latents


def test_a_pipeline_of_two_models(made: Made, tmp_path: Path) -> None:
    out, latents = made("wan", "ring", 2)
    for found in run_ranks(of_two_models, 2, tmp_path, out):
        assert_same(found, latents)


def test_from_pretrained_takes_a_bundle(made: Made, tmp_path: Path) -> None:
    plain = CASES["flux"].pipeline(CASES["flux"].model())
    plain.save_pretrained(tmp_path)
    nothing = {name: None for name, part in plain.components.items() if part is None}
    out, latents = made("flux", "ulysses", 1)
    with load_transformer(out) as transformer:
        pipeline = FluxPipeline.from_pretrained(tmp_path, transformer=transformer, **nothing)
        assert pipeline.to("cpu").to(torch.float32).transformer is transformer
        case = replace(CASES["flux"], pipeline=lambda _: pipeline)
        assert_same(case.latents(transformer), latents)
        with pytest.raises(UsageError, match=r"s has the shape \[1, 16, 16\]; .*s \[1, 24, 16\]"):
            case.latents(transformer, width=64)


def test_ranks_are_started_by_a_launcher(made: Made) -> None:
    out, _ = made("wan", "ring", 2)
    with pytest.raises(UsageError, match="for 2 ranks, and this process was started alone"):
        load_transformer(out)
    with pytest.raises(UsageError, match="executor 'trt': there is none"):
        load_transformer(out, executor="trt")
