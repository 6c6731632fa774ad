"""Pipelines that call the model once a branch, with ranks that compute all branches at once."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cp_convert.bundle.manifest import Guidance, Io
from cp_convert.diffusers import load_transformer
from cp_convert.diffusers.pairs import Branches
from cp_convert.diffusers.promised import Promised
from cp_convert.errors import UsageError
from tests.diffusers.pipelines import CASES, STEPS
from tests.diffusers.ranks import run_ranks
from tests.diffusers.test_pipelines import MODEL, assert_same
from tests.runtime.bundles import converted

Made = Callable[..., tuple[Path, Tensor]]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A bundle with two branches from what the pipeline gives one, and the plain latents."""

    @cache
    def make(name: str, strategy: str, world: int, combine: str | None = None) -> Any:
        case, folder = CASES[name], tmp_path_factory.mktemp(name)
        latents, inputs = case.recorded()
        torch.save(inputs, folder / "inputs.pt")
        (folder / "model.py").write_text(MODEL.format(name=name, freeze=list(case.freeze)))
        converted(folder / "model.py", folder / "out", strategy, world, cfg=2, combine=combine)
        return folder / "out", latents

    return make


def at_two(rank: int, wan: Path, flux: Path) -> list[Any]:
    """Latents of pipelines with and without guidance, forwards a run, and a refusal."""
    dist.init_process_group("gloo")
    told: list[Any] = []
    for name, out in (("wan", wan), ("flux", flux)):
        with load_transformer(out, guidance="pairs") as transformer:
            told.append(_latents(transformer, name))
            if name == "wan":
                told.append(_latents(transformer, name, guidance_scale=1.0))
    with load_transformer(wan) as transformer, pytest.raises(UsageError) as caught:
        CASES["wan"].latents(transformer)
    dist.destroy_process_group()
    return [*told, str(caught.value.hint)]


def _latents(transformer: Any, name: str, **changed: Any) -> tuple[Tensor, int]:
    forwards: list[Any] = []
    run = type(transformer)._run
    transformer._run = lambda *given: forwards.append(None) or run(transformer, *given)
    return CASES[name].latents(transformer, **changed), len(forwards)


def test_two_calls_are_one_forward(made: Made, tmp_path: Path) -> None:
    (wan, guided), (flux, latents) = made("wan", "ulysses", 2), made("flux", "ring", 2)
    alone = CASES["wan"].latents(CASES["wan"].model(), guidance_scale=1.0)
    for found in run_ranks(at_two, 2, tmp_path, wan, flux):
        assert isinstance(found, list), found
        for (one, count), plain in zip(found[:3], (guided, alone, latents), strict=True):
            assert_same(one, plain)
            assert count == STEPS, "and not one a branch"
        assert 'guidance="pairs") brings the calls of a step together' in found[3]


def followed(rank: int, name: str, out: Path) -> Tensor | int:
    with load_transformer(out, timeout=20, guidance="pairs") as transformer:
        return transformer.follow() if rank else CASES[name].latents(transformer)


@pytest.mark.parametrize(
    ("name", "strategy", "world"),
    [("qwen", "ring", 4), pytest.param("wan", "ulysses", 2, marks=pytest.mark.slow)],
)
def test_the_others_follow_pairs(
    made: Made, tmp_path: Path, name: str, strategy: str, world: int
) -> None:
    out, latents = made(name, strategy, world)
    first, *others = run_ranks(followed, world, tmp_path, name, out)
    assert_same(first, latents)
    assert others == [STEPS] * (world - 1)


def test_bundles_that_have_no_pairs(made: Made, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="guidance 'twice': there is none"):
        load_transformer(made("wan", "ulysses", 2)[0], guidance="twice")
    with pytest.raises(UsageError, match="combine the branches by scale, and the pipeline does"):
        load_transformer(made("wan", "ulysses", 2, "scale")[0], guidance="pairs")
    plain = tmp_path / "plain"
    converted(made("wan", "ulysses", 2)[0].parent / "model.py", plain, "ulysses", 2)
    with pytest.raises(UsageError, match="no guidance branches"):
        load_transformer(plain, guidance="pairs")


# --- the calls themselves, without ranks ---------------------------------------------------------


def branches(count: int = 2, rows: int = 1) -> tuple[Branches, list[dict[str, Tensor]]]:
    """Branches of a model that doubles ``x``, and the forwards that it ran."""
    known = Guidance(branches=count, rows=rows, inputs=["x"], combine=None, pairs=True)
    io = [Io(name="y", mode="output", dtype="float32", shape=[count * rows, 4])]
    ran: list[dict[str, Tensor]] = []

    def run(given: Any) -> dict[str, Tensor]:
        ran.append(given)
        return {"y": 2 * given["x"]}

    manifest: Any = SimpleNamespace(guidance=known, io=io)
    return Branches(manifest, torch.device("cpu"), run), ran


def given(value: float, rows: int = 1, t: float = 0.0) -> dict[str, Tensor]:
    return {"x": torch.full((rows, 4), value), "t": torch.tensor([t])}


def test_a_promise_waits_through_views_and_is_kept_by_the_last_call() -> None:
    both, ran = branches(3, rows=2)
    first, second = (both.called(given(v, 2))["y"] for v in (1.0, 2.0))
    part = first[:, :3].unsqueeze(0).to(torch.float64)
    assert isinstance(part, Promised)
    assert (part.shape, part.dtype) == ((1, 2, 3), torch.float64)
    assert not ran
    third = both.called(given(3.0, 2))["y"]
    assert not isinstance(third, Promised)
    assert [float((x - 1).max()) for x in (first, second, third, part)] == [1, 3, 5, 1]
    assert len(ran) == 1
    assert ran[0]["x"][:, 0].tolist() == [1, 1, 2, 2, 3, 3]


def test_a_promise_that_is_looked_at_early_costs_a_forward_and_is_right() -> None:
    both, ran = branches()
    alone = both.called(given(1.0))["y"] + 0
    assert type(alone) is Tensor
    assert alone.tolist() == [[2.0] * 4]
    pair = [both.called(given(v))["y"] for v in (3.0, 4.0)]
    assert [float(x.sum()) for x in pair] == [24, 32]
    assert len(ran) == 2


def test_what_is_taken_once_must_be_the_same_in_all_calls() -> None:
    both, _ = branches()
    first = both.called(given(1.0, t=1.0))["y"]
    with pytest.raises(UsageError, match="t differs between the calls of one step"):
        both.called(given(2.0, t=2.0))
    with pytest.raises(UsageError, match="t differs"):
        first + 1
    assert float(both.called(given(1.0))["y"].sum()) == 8, "nothing is left of them"
