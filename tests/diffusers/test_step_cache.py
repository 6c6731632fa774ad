"""FLUX's pipeline with a bundle that skips blocks, against diffusers' First Block Cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig
from torch import Tensor

from cp_convert.diffusers import load_transformer
from cp_convert.errors import UsageError
from tests.diffusers.pipelines import CASES
from tests.diffusers.ranks import run_ranks
from tests.diffusers.test_pipelines import MODEL, assert_same
from tests.runtime.bundles import converted

STEPS, THRESHOLD = 5, 0.48
FLUX = CASES["flux"]
Told = tuple[list[Tensor], int, int]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FLUX for two ranks in three pieces."""
    folder = tmp_path_factory.mktemp("flux")
    _, inputs = FLUX.recorded()
    torch.save(inputs, folder / "inputs.pt")
    (folder / "model.py").write_text(MODEL.format(name="flux", freeze=[]))
    after = ("transformer_blocks.0", "single_transformer_blocks.0")
    converted(folder / "model.py", folder / "out", "ulysses", 2, split_after=after)
    return folder / "out"


def latents(transformer: torch.nn.Module) -> list[Tensor]:
    """Two pictures, one after another, each with two branches."""
    return [FLUX.latents(transformer, seed=n, num_inference_steps=STEPS) for n in range(2)]


@pytest.fixture(scope="module")
def wanted() -> list[Tensor]:
    """What the plain pipeline makes with diffusers' own cache, which is not what it makes else."""
    module = FLUX.model()
    plain = latents(module)
    module.enable_cache(FirstBlockCacheConfig(threshold=THRESHOLD))  # type: ignore[operator]
    cached = latents(module)
    assert all(
        (a - b).abs().max() > 1e-3 * b.abs().max() for a, b in zip(cached, plain, strict=True)
    )
    return cached


def by_seed(rank: int, out: Path) -> Told:
    with load_transformer(out, step_cache=THRESHOLD) as transformer:
        assert transformer.is_cache_enabled
        found = latents(transformer)
        assert transformer.steps is not None
        return found, transformer.steps.computed, transformer.steps.skipped


def test_every_rank_runs_the_pipeline(bundle: Path, wanted: list[Tensor], tmp_path: Path) -> None:
    for told in run_ranks(by_seed, 2, tmp_path, bundle):
        assert not isinstance(told, str), told
        found, computed, skipped = told
        assert computed + skipped == 2 * 2 * STEPS
        assert 0 < skipped < 2 * 2 * (STEPS - 1)
        for one, want in zip(found, wanted, strict=True):
            assert_same(one, want)


def followed(rank: int, out: Path) -> list[Tensor] | tuple[int, int]:
    with load_transformer(out, timeout=20, step_cache=THRESHOLD) as transformer:
        if rank:
            transformer.follow()
            assert transformer.steps is not None
            return transformer.steps.computed, transformer.steps.skipped
        return latents(transformer)


@pytest.mark.slow
def test_rank_0_runs_the_pipeline(bundle: Path, wanted: list[Tensor], tmp_path: Path) -> None:
    found, told = run_ranks(followed, 2, tmp_path, bundle)
    assert not isinstance(found, str), found
    for one, want in zip(found, wanted, strict=True):
        assert_same(one, want)
    assert sum(told) == 2 * 2 * STEPS
    assert told[1] > 0


def without(rank: int, out: Path) -> str:
    with load_transformer(out) as transformer:
        assert not transformer.is_cache_enabled
        with pytest.raises(UsageError, match="enable_cache: a step cache is chosen when") as caught:
            transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
        assert "step_cache=0.1" in (caught.value.hint or "")
        transformer.close()
    return "closed"


def test_a_cache_is_not_switched_on_later(bundle: Path, tmp_path: Path) -> None:
    assert run_ranks(without, 2, tmp_path, bundle) == ["closed"] * 2
