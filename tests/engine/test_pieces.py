"""Engines of the pieces of a program: built, replayed one after another, kept, and shown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from torch import Tensor

from cp_convert import bundle
from cp_convert.backends import select
from cp_convert.bundle import manifest as m
from cp_convert.bundle.difference import differences
from cp_convert.bundle.parts import kinds_of
from cp_convert.cli import cli
from cp_convert.errors import ProofFailed, UsageError
from cp_convert.job import Job
from cp_convert.pipeline import convert
from cp_convert.progress import Progress
from cp_convert.prove import network
from cp_convert.runtime import triton

MODEL = """
import torch
from tests.ir.test_split import PLAN as cp_plan
from tests.ir.test_split import Stack, inputs as example_inputs

def build_model():
    torch.manual_seed(0)
    return Stack()
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Three pieces, whose weights lie beside the engines, which all ranks share."""
    folder = tmp_path_factory.mktemp("stack")
    (folder / "model.py").write_text(MODEL)
    return Job(
        model=folder / "model.py", strategy="ulysses", world=2, out=folder / "a",
        cache=folder / "cache", precision="fp32", weights_mode="external", proof="network",
        split_after=("blocks.0", "blocks.2"), command="cp-convert x --split-after blocks.0",
    )  # fmt: skip


@pytest.fixture(scope="module")
def first(job: Job) -> m.Manifest:
    """The job, done."""
    return convert(job, select("auto"), Progress())


@pytest.mark.engine
def test_networks_of_pieces_are_proven_as_a_chain(job: Job, first: m.Manifest) -> None:
    assert first.layout == "shared"
    assert first.proof.network is not None
    assert max(error.max for error in first.proof.network.algebra) < 1e-5
    files = [engine.file for engine in first.engines]
    assert files == [f"piece{piece}/rank{rank}.engine" for piece in range(3) for rank in range(2)]
    assert sum(one.count for one in first.collectives if one.kind == "all_to_all") == 2 * 3
    assert not [one for one in bundle.verify(job.out) if one.problem is not None]
    handed = [one.shape for one in first.pieces[0].io if one.mode == "output"]
    assert sorted(handed) == [[2, 8], [2, 12, 32], [2, 12, 32]]


@pytest.mark.engine
def test_the_cut_counts_where_engines_are_kept(job: Job, first: m.Manifest) -> None:
    again = convert(replace(job, out=job.out.with_name("b")), select("auto"), Progress())
    assert list(again.timings) == ["load", "trace", "recall"]
    assert all(engine.recalled for engine in again.engines)
    assert (again.pieces, again.step) == (first.pieces, first.step)
    assert not [one for one in bundle.verify(job.out.with_name("b")) if one.problem is not None]
    other = replace(job, out=job.out.with_name("c"), split_after=("blocks.0",))
    found = convert(other, select("auto"), Progress())
    assert not found.proof.recalled
    assert [engine.recalled for engine in found.engines] == [False] * 4
    told = {one.name: (one.before, one.after) for one in differences(first, found)}
    assert told["split after"] == ("blocks.0, blocks.2", "blocks.0")
    assert told["rank 1, piece 2"][1] is None


@pytest.mark.engine
def test_a_later_piece_that_is_wrong_is_found(
    job: Job, first: m.Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    replay = network.replay_pieces

    def altered(
        pieces: Sequence[Sequence[network.Network]], *args: Any, **options: Any
    ) -> list[list[Tensor]]:
        return replay([pieces[0], [wrong(one) for one in pieces[1]], pieces[2]], *args, **options)

    monkeypatch.setattr(network, "replay_pieces", altered)
    with pytest.raises(ProofFailed, match="the networks go astray"):
        convert(replace(job, out=job.out.with_name("d"), rtol=1e-5), select("auto"), Progress())
    assert not job.out.with_name("d").exists()


def wrong(one: network.Network) -> network.Network:
    """With its first tanh a sigmoid."""
    layers = list(one.layers)
    place = next(n for n, layer in enumerate(layers) if layer.parameters.get("op") == "TANH")
    layers[place] = replace(layers[place], parameters={**layers[place].parameters, "op": "SIGMOID"})
    return replace(one, layers=tuple(layers))


@pytest.mark.engine
def test_what_a_person_sees(job: Job, first: m.Manifest) -> None:
    shown = CliRunner().invoke(cli, ["inspect", str(job.out)], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    assert "piece2/rank1.engine" in shown.output
    assert "A step cache may skip piece 1." in shown.output
    assert "blocks.2" in shown.output
    told = CliRunner().invoke(cli, ["inspect", str(job.out), "--json"])
    assert json.loads(told.output)["step"]["residual"] == "between.residual"


@pytest.mark.engine
def test_triton_serves_one_engine_a_rank(job: Job, first: m.Manifest, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="every rank has 3 engines") as caught:
        triton.export(job.out, tmp_path)
    assert "--split-after" not in (caught.value.hint or "")


# --- one engine for every kind of block ----------------------------------------------------------


@pytest.fixture(scope="module")
def by_kinds(job: Job) -> m.Manifest:
    """The same model by kinds of blocks."""
    asked = replace(job, out=job.out.with_name("kinds"), layout="blocks", split_after=())
    return convert(asked, select("auto"), Progress())


@pytest.mark.engine
def test_equal_blocks_share_an_engine(job: Job, first: m.Manifest, by_kinds: m.Manifest) -> None:
    assert kinds_of(by_kinds) == [0, 1, 1, 1, 4]
    out = job.out.with_name("kinds")
    assert sorted(one.name for one in out.iterdir() if one.is_dir()) == [
        "piece0", "piece1", "piece4", "program",
    ]  # fmt: skip
    assert by_kinds.proof.network is not None
    assert max(error.max for error in by_kinds.proof.network.algebra) < 1e-5
    assert not [one for one in bundle.verify(out) if one.problem is not None]
    sent = [{one.kind: one.count for one in of.collectives} for of in (first, by_kinds)]
    assert sent[0] == sent[1], "an engine counts as often as it runs"
    again = replace(job, out=out.with_name("kinds-again"), layout="blocks", split_after=())
    assert convert(again, select("auto"), Progress()).pieces == by_kinds.pieces
    told = {one.name: (one.before, one.after) for one in differences(first, by_kinds)}
    assert told["pieces of one kind"] == (None, "2 as 1, 3 as 1")
    shown = CliRunner().invoke(cli, ["inspect", str(out)], env={"COLUMNS": "200"})
    assert "1 to 3" in shown.output
    assert "blocks.0 to 2" in shown.output


@pytest.mark.engine
def test_the_networks_are_given_every_piece_own_weights(
    job: Job, by_kinds: m.Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    replay = network.replay_pieces

    def mistaken(*args: Any, names: Sequence[dict[str, str]], **options: Any) -> list[list[Tensor]]:
        other = dict(names[2])
        one, two = "blocks.0.time.bias", "blocks.0.mlp.bias"
        other[one], other[two] = other[two], other[one]
        return replay(*args, names=[*names[:2], other, *names[3:]], **options)

    monkeypatch.setattr(network, "replay_pieces", mistaken)
    asked = replace(job, out=job.out.with_name("e"), layout="blocks", split_after=(), rtol=1e-5)
    with pytest.raises(ProofFailed, match="the networks go astray"):
        convert(asked, select("auto"), Progress())
