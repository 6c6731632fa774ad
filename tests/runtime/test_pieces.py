"""Bundles in pieces, run by two processes over gloo: whole, and with blocks that are skipped.

The reference is First Block Cache's rule, written here around the dense model of diffusers.
"""

from __future__ import annotations

import json
import runpy
import shutil
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cp_convert import bundle as bundles
from cp_convert import runtime
from cp_convert.errors import RunFailed, UsageError
from cp_convert.lora.add import add
from cp_convert.runtime import session
from cp_convert.runtime.step_cache import StepCache
from tests.conftest import MODEL_FILE
from tests.diffusers.ranks import run_ranks
from tests.lora.files import diffusers_names, factors, fused, linears
from tests.runtime.bundles import FLUX, QWEN, WAN, converted

STEPS = 8


class Case(NamedTuple):
    """A model's file, and the first and the last of its blocks."""

    text: str
    first: str
    last: str
    mode: str = "embedded"
    strategy: str = "ulysses"

    def module(self, folder: Path) -> Any:
        file = folder / "model.py"
        file.write_text(self.text)
        return SimpleNamespace(**runpy.run_path(str(file)))


CASES = {
    "flux": Case(FLUX, "transformer_blocks.0", "single_transformer_blocks.0", "external"),
    "wan": Case(WAN.replace("num_layers=1", "num_layers=3"), "blocks.0", "blocks.2"),
    "qwen": Case(
        QWEN.replace("num_layers=1", "num_layers=2"), "transformer_blocks.0",
        "transformer_blocks.1", strategy="ring",
    ),
}  # fmt: skip
Made = Callable[[str], Path]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The bundle of a case by its name, in three pieces and proven."""

    @cache
    def make(name: str) -> Path:
        case, folder = CASES[name], tmp_path_factory.mktemp(name)
        case.module(folder)
        converted(
            folder / "model.py", folder / "out", case.strategy, 2, proof="program",
            weights_mode=case.mode, split_after=(case.last, case.first),
        )  # fmt: skip
        return folder / "out"

    return make


def inputs_of(case: Case, folder: Path) -> list[dict[str, Tensor]]:
    """A few steps: noise that is taken away, faster and faster."""
    given = case.module(folder).example_inputs()
    torch.manual_seed(3)
    noise = torch.randn_like(given["hidden_states"])
    return [
        {**given, "hidden_states": given["hidden_states"] + 0.012 * step**1.5 * noise}
        for step in range(STEPS)
    ]


class ByHand:
    """First Block Cache around the blocks of a dense model."""

    def __init__(self, module: nn.Module, threshold: float) -> None:
        lists = [module.get_submodule(n) for n, m in module.named_children() if is_list(m)]
        first, *others = [block for blocks in lists for block in blocks.children()]
        self.threshold, self.skipped = threshold, list[bool]()
        self.residual: Tensor | None = None
        self.added = self.after = torch.zeros(())
        self.forwards = {block: block.forward for block in (first, *others)}
        first.forward = lambda *args, **kwargs: self._first(first, args, kwargs)
        for block in others:
            is_last = block is others[-1]
            block.forward = lambda *args, block=block, is_last=is_last, **kwargs: self._other(
                block, is_last, args, kwargs
            )

    def _first(self, block: nn.Module, args: Any, kwargs: Any) -> Any:
        out = self.forwards[block](*args, **kwargs)
        self.after = stream_of(out)
        residual = self.after - (kwargs["hidden_states"] if kwargs else args[0])
        skips = False
        if self.residual is not None:
            apart = (residual - self.residual).abs().mean() / self.residual.abs().mean()
            skips = bool(apart < self.threshold)
        if not skips:
            self.residual = residual
        self.skipped.append(skips)
        return out

    def _other(self, block: nn.Module, is_last: bool, args: Any, kwargs: Any) -> Any:
        if not self.skipped[-1]:
            out = self.forwards[block](*args, **kwargs)
            if is_last:
                self.added = stream_of(out) - self.after
            return out
        x = kwargs["hidden_states"] if kwargs else args[0]
        x = self.after + self.added if is_last else x
        return (kwargs["encoder_hidden_states"], x) if kwargs else x


def is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList)


def stream_of(out: Any) -> Tensor:
    return out[-1] if isinstance(out, tuple) else out


def opened_steps(
    rank: int, out: Path, steps: list[dict[str, Tensor]], threshold: float | None
) -> list[tuple[Tensor, int]]:
    """The outputs of every step, and how many were skipped up to it."""
    dist.init_process_group("gloo")
    found = []
    with runtime.open(out, executor="torch", device="cpu", step_cache=threshold) as opened:
        for one in steps:
            value = opened(**one)[0]
            found.append((value, 0 if opened.steps is None else opened.steps.skipped))
    dist.destroy_process_group()
    return found


@pytest.mark.parametrize("name", CASES)
def test_steps_are_skipped_by_the_rule(made: Made, tmp_path: Path, name: str) -> None:
    case, out, threshold = CASES[name], made(name), 0.05
    steps = inputs_of(case, tmp_path)
    module = case.module(tmp_path)
    dense, reference = module.build_model().eval(), module.build_model().eval()
    rule = ByHand(reference, threshold)
    with torch.no_grad():
        wanted = [reference(**one)[0] for one in steps]
        whole = [dense(**one)[0] for one in steps]
    assert 0 < sum(rule.skipped) < STEPS - 1, rule.skipped
    ranks = run_ranks(opened_steps, 2, tmp_path / "ranks", out, steps, threshold)
    for found in ranks:
        assert not isinstance(found, str), found
        skipped = [after > before for before, after in pairwise([0, *counts(found)])]
        assert skipped == rule.skipped, "all ranks decide as the rule does on the whole residual"
        for (value, _), want, full, skips in zip(found, wanted, whole, skipped, strict=True):
            assert apart(value, want) <= 1e-5
            assert (apart(value, full) > 1e-4) == skips, "what is skipped is another number"


def opened_loras(rank: int, out: Path, one: dict[str, Tensor]) -> list[tuple[Tensor, int]]:
    """The same step twice without a set, twice with one, and without again."""
    dist.init_process_group("gloo")
    found = []
    with runtime.open(out, executor="torch", device="cpu", step_cache=0.05) as opened:
        for asked in (None, "a", None):
            opened.use_lora(asked)
            for _ in range(2):
                value = opened(**one)[0]
                assert opened.steps is not None
                found.append((value.clone(), opened.steps.skipped))
    dist.destroy_process_group()
    return found


def test_other_weights_begin_anew(made: Made, tmp_path: Path) -> None:
    """A set that leaves the first block as it is: the residual alone would tell no difference."""
    case, out = CASES["flux"], Path(shutil.copytree(made("flux"), tmp_path / "out"))
    one, dense = inputs_of(case, tmp_path)[0], case.module(tmp_path).build_model().eval()
    given = factors(linears(dense, lambda name: name == "single_transformer_blocks.0.proj_out"), 1)
    add(out, diffusers_names(given, tmp_path / "a.safetensors"))
    with torch.no_grad():
        plain = dense(**one)[0]
        changed = fused(dense, [(given, 1.0)])(**one)[0]
    assert apart(changed, plain) > 1e-3
    for found in run_ranks(opened_loras, 2, tmp_path / "ranks", out, one):
        assert not isinstance(found, str), found
        assert counts(found) == [0, 1, 1, 2, 2, 3]
        wanted = [plain, plain, changed, changed, plain, plain]
        assert all(apart(v, want) <= 1e-5 for (v, _), want in zip(found, wanted, strict=True))


def counts(found: list[tuple[Tensor, int]]) -> list[int]:
    return [skipped for _, skipped in found]


def apart(value: Tensor, want: Tensor) -> float:
    return float((value - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("threshold", [None, 0.0])
def test_without_a_threshold_nothing_is_skipped(
    made: Made, tmp_path: Path, threshold: float | None
) -> None:
    """The same inputs twice: nothing is as near as that."""
    case, out = CASES["flux"], made("flux")
    one = inputs_of(case, tmp_path)[0]
    with torch.no_grad():
        want = case.module(tmp_path).build_model().eval()(**one)[0]
    for found in run_ranks(opened_steps, 2, tmp_path / "ranks", out, [one, one], threshold):
        assert not isinstance(found, str), found
        assert counts(found) == [0, 0]
        assert all(apart(value, want) <= 1e-5 for value, _ in found)


@pytest.mark.usefixtures("forked_ranks")
def test_the_command_line_times_what_is_left(made: Made, run: Run) -> None:
    """The same inputs again are as near as can be, and what is skipped would be the same."""
    asked = ("run", made("flux"), "--devices", "cpu", "--repeat", 2, "--step-cache", 0.05)
    code, said, error = run(*asked, "--json")
    assert code == 0, error
    told = json.loads(said)
    assert [one["skipped"] for one in told["ranks"]] == [3, 3]  # one of them is not timed
    assert [len(one["forwards"]) for one in told["ranks"]] == [2, 2]
    assert told["check"]["error"] <= 1e-5


SLOW: dict[str, tuple[dict[str, Any], int]] = {
    "plain": ({}, 1),
    "a graph": ({"graph": True}, 2),
    "a cache": ({"step_cache": 0.1}, 2),
    "both": ({"step_cache": 0.0, "graph": True}, 3),
}


@pytest.mark.parametrize(("options", "slow"), SLOW.values(), ids=SLOW)
def test_what_is_done_once_is_not_timed(
    options: dict[str, Any], slow: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock is one on for every forward, and a thousand for those that compile."""
    now = SimpleNamespace(seconds=0.0, calls=0)

    def forward(**_: Tensor) -> dict[str, Tensor]:
        now.calls += 1
        now.seconds += 1000 if now.calls <= slow else 1
        return {}

    monkeypatch.setattr(session, "together", lambda: None)
    monkeypatch.setattr(session.time, "perf_counter", lambda: now.seconds)
    for repeat, calls in ((3, slow + 3), (0, 1)):
        now.calls = 0
        request, report = (
            session.Request(bundle="b", repeat=repeat, **options),
            session.Report(rank=0, executor="", device=""),
        )
        work = session._Work(request, None, 0, torch.device("cpu"), lambda _: None)  # type: ignore[arg-type]
        work.timed(forward, {}, report)  # type: ignore[arg-type]
        assert (report.first, report.forwards) == (1000.0, [1.0] * repeat)
        assert now.calls == calls


def opened_otherwise(rank: int, out: Path) -> None:
    dist.init_process_group("gloo")
    runtime.open(out, executor="torch", device="cpu", step_cache=(0.1, None)[rank])


def test_ranks_that_ask_for_different_caches_end(made: Made, tmp_path: Path) -> None:
    told = run_ranks(opened_otherwise, 2, tmp_path, made("flux"), seconds=40)
    assert told == ["RunFailed: rank 1 asks for step_cache=None, and rank 0 for 0.1."] * 2


def test_what_the_manifest_tells(made: Made) -> None:
    manifest, folder = bundles.read(made("flux"))
    case = CASES["flux"]
    assert [one.after for one in manifest.pieces] == [case.first, case.last, None]
    places = [(engine.piece, engine.rank) for engine in manifest.engines]
    assert places == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert all((folder / one.file).parent.name == f"piece{one.piece}" for one in manifest.engines)
    assert not isinstance(manifest.step, str)
    assert manifest.step is not None
    first, between, last = manifest.pieces
    assert manifest.step.residual in {one.name for one in first.io if one.mode == "output"}
    assert {b.name for b in last.io if b.mode == "output"} == {"sample"}
    weights = [set(one.weights) for one in manifest.pieces]
    assert set.union(*weights) == {one.name for one in manifest.weights}
    assert "x_embedder.weight" in weights[0] - weights[1]
    assert not [c for c in bundles.verify(folder) if c.problem is not None]
    (folder / "piece1" / "rank1.engine").rename(folder / "kept")
    problems = {c.subject: c.problem for c in bundles.verify(folder) if c.problem is not None}
    (folder / "kept").rename(folder / "piece1" / "rank1.engine")
    assert problems == {"piece1/rank1.engine": "missing"}
    assert between.after == case.last


@pytest.mark.parametrize(
    ("options", "threshold", "words"),
    [
        ({}, 0.1, "every rank has one engine, and nothing can be skipped"),
        ({"split_after": ("enter",)}, 0.1, "leave nothing between them to skip"),
        ({"split_after": ("enter", "qkv")}, 0.1, "the last piece reads linear_1 of qkv, no stream"),
    ],
)
def test_a_bundle_of_which_nothing_can_be_skipped(
    run: Run, tmp_path: Path, options: dict[str, Any], threshold: float, words: str
) -> None:
    (tmp_path / "model.py").write_text(MODEL_FILE)
    converted(tmp_path / "model.py", tmp_path / "out", "ulysses", 1, **options)
    with pytest.raises(UsageError, match=words) as caught:
        runtime.open(tmp_path / "out", executor="torch", device="cpu", step_cache=threshold)
    assert "--split-after FIRST_BLOCK" in (caught.value.hint or "")
    code, _, said = run("run", tmp_path / "out", "--step-cache", threshold, "--devices", "cpu")
    assert code == 2 and "--step-cache: " in said and words in " ".join(said.split())
    with runtime.open(tmp_path / "out", executor="torch", device="cpu") as opened, torch.no_grad():
        module = SimpleNamespace(**runpy.run_path(str(tmp_path / "model.py")))
        given = module.example_inputs()
        assert apart(opened(**given), module.build_model()(**given)) <= 1e-5


@pytest.mark.parametrize("threshold", [-0.1, float("nan"), float("inf")])
def test_no_threshold(threshold: float) -> None:
    from cp_convert.runtime.step_cache import opened_cache

    with pytest.raises(UsageError, match="a threshold is a relative distance, 0 or more"):
        opened_cache(threshold, 1, None, None)


class Told(StepCache):
    """A rank whose peer told these sums."""

    other: tuple[float, float] = (0.0, 0.0)

    def _everyone(self, own: Tensor) -> list[list[float]]:
        return [own.tolist(), list(self.other)]


def test_all_ranks_decide_by_the_sum_of_their_parts() -> None:
    cache = Told(0.1, 2)
    assert not cache.skips(None, torch.ones(4)), "there is nothing before the first step"
    cache.keep(None, STEP, {"r": torch.ones(4), "a": torch.zeros(1), "b": torch.ones(1)})
    cache.other = (0.0, 4.0)
    assert cache.skips(None, 1.15 * torch.ones(4)), "0.15 here, nothing there"
    assert cache.distance == pytest.approx(0.6 / 8)
    cache.other = (4.0, 4.0)
    assert not cache.skips(None, torch.ones(4)), "nothing here, much there"
    cache.other = (-1.0, -1.0)
    assert not cache.skips(None, torch.ones(4)), "the other rank has no step before"
    assert (cache.computed, cache.skipped) == (3, 1)


STEP = SimpleNamespace(residual="r", streams=(("a", "b"),))


def test_contexts_and_pictures_are_apart() -> None:
    cache = StepCache(0.1, 1)
    held = {"r": torch.ones(4), "a": torch.zeros(1), "b": torch.ones(1)}
    for context in ("cond", "uncond"):
        cache.enter(0, context)
        assert not cache.skips(None, held["r"])
        cache.keep(None, STEP, held)
    held["r"] *= 2  # an engine writes to the same place again
    held["b"] += 5
    assert not cache.skips(None, held["r"])
    cache.enter(0, "cond")
    assert cache.skips(None, torch.ones(4))
    assert cache.streams(None, STEP, {"a": torch.full((1,), 3.0)})["b"] == 4
    assert not cache.skips("wide", torch.ones(4)), "another variant"
    cache.enter(1, "cond")
    assert not cache.skips(None, torch.ones(4)), "another picture"


def test_a_residual_of_nothing_is_computed() -> None:
    cache = StepCache(0.1, 1)
    held = {"r": torch.zeros(4), "a": torch.zeros(1), "b": torch.ones(1)}
    cache.keep(None, STEP, held)
    assert not cache.skips(None, torch.zeros(4))


def test_an_error_says_which_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    from cp_convert.runtime import step_cache

    told = [(0.1, None), (0.1, "no threshold")]
    monkeypatch.setattr(step_cache, "everyone", lambda *_: told)
    with pytest.raises(RunFailed, match="rank 1 cannot have the step cache that it asks for"):
        step_cache.opened_cache(0.1, 2, None, None)
