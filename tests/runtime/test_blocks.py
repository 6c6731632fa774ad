"""Bundles whose equal blocks share an engine, run by two processes over gloo."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cp_convert import bundle as bundles
from cp_convert import cutting, runtime
from cp_convert.bundle.manifest import Step
from cp_convert.bundle.parts import between, kinds_of, parts_of
from cp_convert.errors import CannotShard, DamagedBundle, ProofFailed, UsageError
from cp_convert.ir.kinds import Twin
from tests.conftest import MODEL_FILE
from tests.diffusers.ranks import run_ranks
from tests.runtime.bundles import FLUX, QWEN, WAN, converted
from tests.runtime.test_pieces import Case, apart, counts, inputs_of, opened_steps

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
    rule = ByHand(reference, threshold)
    with torch.no_grad():
        wanted = [reference(**one)[0] for one in steps]
    assert 0 < sum(rule.skipped) < len(steps) - 1, rule.skipped
    for found in run_ranks(opened_steps, 2, tmp_path / "ranks", out, steps, threshold):
        assert not isinstance(found, str), found
        skipped = [after > before for before, after in pairwise([0, *counts(found)])]
        assert skipped == rule.skipped
        for (value, _), want in zip(found, wanted, strict=True):
            assert apart(value, want) <= 1e-5


class ByHand:
    """First Block Cache's rule around some of FLUX's blocks, of which ``first`` is the last block.

    Both streams are read behind those that may be skipped.
    """

    def __init__(self, module: Any, threshold: float) -> None:
        joint, single = module.transformer_blocks, module.single_transformer_blocks
        self.between = [joint[2], *single[:2]]
        self.threshold, self.skipped = threshold, list[bool]()
        self.residual: Tensor | None = None
        self.entered = torch.zeros(())
        self.after: tuple[Tensor, ...] = ()
        self.added: tuple[Tensor, ...] = ()
        self.forwards = {block: block.forward for block in (joint[0], joint[1], *self.between)}
        joint[0].forward = lambda **given: self._enter(joint[0], given)
        joint[1].forward = lambda **given: self._decide(joint[1], given)
        for block in self.between:
            block.forward = lambda block=block, **given: self._other(block, given)

    def _enter(self, block: Any, given: Any) -> Any:
        self.entered = given["hidden_states"]
        return self.forwards[block](**given)

    def _decide(self, block: Any, given: Any) -> Any:
        self.after = self.forwards[block](**given)
        residual, skips = self.after[1] - self.entered, False
        if self.residual is not None:
            distance = (residual - self.residual).abs().mean() / self.residual.abs().mean()
            skips = bool(distance < self.threshold)
        self.residual = self.residual if skips else residual
        self.skipped.append(skips)
        return self.after

    def _other(self, block: Any, given: Any) -> Any:
        is_last = block is self.between[-1]
        if self.skipped[-1]:
            both = given["encoder_hidden_states"], given["hidden_states"]
            ends = zip(self.after, self.added, strict=True)
            return tuple(a + b for a, b in ends) if is_last else both
        out = self.forwards[block](**given)
        if is_last:
            self.added = tuple(a - b for a, b in zip(out, self.after, strict=True))
        return out


# --- what the manifest and the command line say ---------------------------------------------------


def altered(out: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The bundle's manifest, altered, beside links to its files."""
    told = json.loads((out / "manifest.json").read_text())
    change(told)
    for one in out.iterdir():
        if one.name != "manifest.json":
            target.mkdir(exist_ok=True)
            (target / one.name).symlink_to(one)
    (target / "manifest.json").write_text(json.dumps(told))
    return target


def _misnamed(told: dict[str, Any]) -> None:
    names = told["pieces"][2]["names"]
    names[next(iter(names))] = "transformer_blocks.9.attn.to_q.weight"


def _misshapen(told: dict[str, Any]) -> None:
    names = told["pieces"][2]["names"]
    first, second = (n for n in names if n.endswith(("attn.to_q.weight", "attn.to_q.bias")))
    names[first], names[second] = names[second], names[first]


def _forgotten(told: dict[str, Any]) -> None:
    told["pieces"][2]["names"].popitem()


def _of_no_engine(told: dict[str, Any]) -> None:
    told["pieces"][3]["kind"] = 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_misnamed, "piece 2 does not tell of every binding what it is: .*between.add_15"),
        (_forgotten, "piece 2 does not tell of every binding what it is"),
        (_misshapen, r"piece 2 binds .*\[64\].* to .*\[64, 64\].* of piece 1"),
        (_of_no_engine, "piece 3 runs the engines of piece 2, which has none"),
    ],
)
def test_a_wrong_mapping_is_refused(
    made: Made, tmp_path: Path, change: Callable[[dict[str, Any]], None], words: str
) -> None:
    out = altered(made("flux"), tmp_path / "out", change)
    (problem,) = [c.problem for c in bundles.verify(out) if c.problem is not None]
    assert re.match(words, problem)
    with pytest.raises(DamagedBundle, match=f"the manifest is wrong: {words}"):
        runtime.open(out, rank=0, communicator=SimpleNamespace(size=lambda: 2), executor="torch")


def swapped(twins: tuple[Twin, ...]) -> tuple[Twin, ...]:
    """Two weights of one shape of a piece that runs another's engine, bound to one another."""
    place = next(n for n, twin in enumerate(twins) if twin.of != n)
    names = dict(twins[place].names)
    first, second = (n for n in names if n.endswith(("attn.to_q.weight", "attn.to_k.weight")))
    names[first], names[second] = names[second], names[first]
    return (*twins[:place], Twin(twins[place].of, names), *twins[place + 1 :])


def test_weights_that_are_mistaken_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = cutting.twins_of
    monkeypatch.setattr(cutting, "twins_of", lambda *given: swapped(of(*given)))
    CASES["flux"].module(tmp_path)
    with pytest.raises(ProofFailed, match="give another sample on rank 0 than the program"):
        converted(
            tmp_path / "model.py", tmp_path / "out", "ulysses", 2, proof="program", layout="blocks"
        )


@pytest.mark.parametrize(
    ("text", "options", "error", "words"),
    [
        (MODEL_FILE, {}, CannotShard, "no numbered blocks with attentions"),
        (FLUX, {}, CannotShard, "no two of the 4 pieces are equal but for their weights"),
        (FLUX, {"weights_mode": "embedded"}, UsageError, "--weights-mode embedded"),
    ],
)
def test_refused(
    tmp_path: Path, text: str, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    (tmp_path / "model.py").write_text(text)
    with pytest.raises(error, match=words):
        converted(tmp_path / "model.py", tmp_path / "out", "ulysses", 2, layout="blocks", **options)


def test_values_between_use_memory_again(made: Made) -> None:
    manifest, _ = bundles.read(made("flux"))
    parts = parts_of(manifest, 0)
    planned = between(parts, None)
    held: dict[int, str] = {}
    for part, places in zip(parts, planned.places, strict=True):
        assert {known for known in part.inputs if known.startswith("between.")} <= {*held.values()}
        held |= {place: name for name, place in places.items()}  # written over: no longer there
    names = {one.name for part in parts for one in part.outputs}
    assert len(planned.kinds) < len(names)
    # The time embedding and rotary tables; two streams, read and written in turn; two outputs.
    shapes = sorted(count for _, count in planned.kinds)
    assert shapes == sorted([64, 480, 480, 24 * 64, 24 * 64, 6 * 64, 6 * 64, 48 * 16])
