"""Bundles whose equal blocks share an engine, run by two processes over gloo."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cp_convert import bundle as bundles
from cp_convert import cutting, runtime
from cp_convert.bundle.manifest import Manifest, Step
from cp_convert.bundle.parts import between, parts_of
from cp_convert.errors import CannotShard, DamagedBundle, ProofFailed, UsageError
from cp_convert.ir.kinds import Twin
from tests.conftest import MODEL_FILE
from tests.diffusers.ranks import run_ranks
from tests.runtime.bundles import FLUX, QWEN, WAN, converted
from tests.runtime.test_pieces import ByHand, Case, apart, counts, inputs_of, opened_steps

DEEP = ("num_layers=1, num_single_layers=1", "num_layers=3, num_single_layers=4")
CASES = {
    "flux": Case(
        FLUX.replace(*DEEP), "transformer_blocks.1", "single_transformer_blocks.1", "external"
    ),
    "wan": Case(WAN.replace("num_layers=1", "num_layers=4"), "blocks.0", "blocks.2"),
    "qwen": Case(QWEN.replace("num_layers=1", "num_layers=4"), "transformer_blocks.0", ""),
}
KINDS = {
    # What leads to the blocks; blocks of both lists; the last block, whose text nobody reads; head.
    "flux": [0, 1, 1, 1, 4, 4, 4, 7, 8],
    "wan": [0, 1, 1, 1, 1, 5],
    "qwen": [0, 1, 1, 1, 4, 5],
}


def kinds_of(manifest: Manifest) -> list[int]:
    return [n if one.kind is None else one.kind for n, one in enumerate(manifest.pieces)]


Made = Callable[..., Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The bundle of a case by its name, by kinds of blocks and proven."""

    @cache
    def make(name: str, *split_after: str) -> Path:
        case, folder = CASES[name], tmp_path_factory.mktemp(name)
        case.module(folder)
        converted(
            folder / "model.py", folder / "out", case.strategy, 2, proof="program",
            layout="blocks", split_after=split_after,
        )  # fmt: skip
        return folder / "out"

    return make


@pytest.mark.parametrize("name", CASES)
def test_blocks_return_what_the_dense_model_does(made: Made, tmp_path: Path, name: str) -> None:
    case, out = CASES[name], made(name)
    manifest, folder = bundles.read(out)
    assert kinds_of(manifest) == KINDS[name]
    assert (manifest.layout, manifest.weights_mode) == ("shared", "external")
    kinds = sorted(set(KINDS[name]))
    places = [(engine.piece, engine.rank) for engine in manifest.engines]
    assert places == [(kind, rank) for kind in kinds for rank in range(2)]
    assert not [c for c in bundles.verify(folder) if c.problem is not None]
    assert "no --split-after says" in str(manifest.step)
    given = inputs_of(case, tmp_path)[0]
    with torch.no_grad():
        want = case.module(tmp_path).build_model().eval()(**given)[0]
    for found in run_ranks(opened_steps, 2, tmp_path / "ranks", out, [given, given], None):
        assert not isinstance(found, str), found
        assert all(apart(value, want) <= 1e-5 for value, _ in found)


def test_a_step_cache_goes_by_the_named_cuts(made: Made, tmp_path: Path) -> None:
    case, threshold = CASES["flux"], 0.05
    out = made("flux", case.first, case.last)
    manifest, _ = bundles.read(out)
    assert isinstance(manifest.step, Step)
    # What leads to the blocks and two of them; one and two; two and the head.
    assert (manifest.step.first, manifest.step.last, len(manifest.pieces)) == (3, 3, 9)
    # The block at whose end the residual is known returns it besides: a kind of its own.
    assert kinds_of(manifest) == [0, 1, 2, 1, 4, 4, 4, 7, 8]
    steps = inputs_of(case, tmp_path)
    reference = case.module(tmp_path).build_model().eval()
    rule = _by_hand(reference, threshold)
    with torch.no_grad():
        wanted = [reference(**one)[0] for one in steps]
    assert 0 < sum(rule.skipped) < len(steps) - 1, rule.skipped
    for found in run_ranks(opened_steps, 2, tmp_path / "ranks", out, steps, threshold):
        assert not isinstance(found, str), found
        skipped = [after > before for before, after in pairwise([0, *counts(found)])]
        assert skipped == rule.skipped
        for (value, _), want in zip(found, wanted, strict=True):
            assert apart(value, want) <= 1e-5


def _by_hand(module: Any, threshold: float) -> ByHand:
    """The rule around blocks 2 to 4 of 7: those before are the first, those behind the last."""
    joint, single = module.transformer_blocks, module.single_transformer_blocks
    return ByHand(module, threshold, first=list(joint[:2]), others=[joint[2], *single[:2]])
