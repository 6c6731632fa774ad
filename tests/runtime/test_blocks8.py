"""Quantized blocks that share an engine: their scales, run by two processes and mistaken."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from cp_convert import bundle as bundles
from cp_convert import cutting
from cp_convert.bundle.parts import kinds_of
from cp_convert.errors import ProofFailed
from cp_convert.ir.kinds import Twin
from tests.diffusers.ranks import run_ranks
from tests.runtime.bundles import FLUX, WAN, converted
from tests.runtime.test_pieces import Case, apart, inputs_of, opened_steps

CASE = Case(
    FLUX.replace("num_layers=1, num_single_layers=1", "num_layers=2, num_single_layers=3"),
    "transformer_blocks.0",
    "",
    "external",
)


def made(folder: Path, **options: Any) -> Path:
    """The bundle in FP8, proven."""
    CASE.module(folder)
    usual = {"proof": "program", "layout": "blocks", "quantize": "fp8"}
    converted(folder / "model.py", folder / "out", "ulysses", 2, **usual | options)
    return folder / "out"


def test_fp8_blocks_share_engines_and_return_what_they_lose(tmp_path: Path) -> None:
    out = made(tmp_path)
    manifest, folder = bundles.read(out)
    assert kinds_of(manifest) == [0, 1, 1, 3, 3, 5, 6]
    assert not [c for c in bundles.verify(folder) if c.problem is not None]
    assert manifest.quantization is not None
    assert manifest.quantization.linears is not None
    assert manifest.quantization.linears.products["fp8"] == 2 * 12 + 3 * 5
    assert max(e.max for e in manifest.proof.algebra) < 1e-5
    scales = [w for w in manifest.weights if w.shape == [1]]
    kinds = Counter(w.name.rpartition(".")[2] for w in scales)
    assert kinds["scale"] == 39
    assert 0 < kinds["input_scale"] < 39
    assert {w.file for w in scales} == {"constants.safetensors"}
    own = {w.name for w in scales if w.name.startswith("constants.transformer_blocks.1.")}
    assert len(own) > 12
    assert own <= set(manifest.pieces[2].names.values())
    given = inputs_of(CASE, tmp_path)[0]
    with torch.no_grad():
        want = CASE.module(tmp_path).build_model().eval()(**given)[0]
    found = run_ranks(opened_steps, 2, tmp_path / "ranks", out, [given], None)
    assert not any(isinstance(one, str) for one in found), found
    values = [value for ((value, _),) in found]
    assert torch.equal(*values)
    loss = manifest.quantization.loss
    assert loss is not None
    assert 0.5 * loss.max <= apart(values[0], want) <= 1.5 * loss.max


def with_mistaken(twins: tuple[Twin, ...], what: str) -> tuple[Twin, ...]:
    """Two scales of a piece that runs another's engine, bound to one another."""
    place = next(n for n, twin in enumerate(twins) if twin.of != n)
    names = dict(twins[place].names)
    first, second, *_ = (n for n in names if n.endswith(f".{what}"))
    names[first], names[second] = names[second], names[first]
    return (*twins[:place], Twin(twins[place].of, names), *twins[place + 1 :])


@pytest.mark.parametrize("what", ["scale", pytest.param("input_scale", marks=pytest.mark.slow)])
def test_scales_that_are_mistaken_are_found(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = cutting.twins_of
    monkeypatch.setattr(cutting, "twins_of", lambda *given: with_mistaken(of(*given), what))
    with pytest.raises(ProofFailed, match="give another sample on rank 0 than the program"):
        made(tmp_path)


def test_named_pieces_that_are_equal_share_one(tmp_path: Path) -> None:
    (tmp_path / "wan.py").write_text(WAN.replace("num_layers=1", "num_layers=4"))
    cuts = tuple(f"blocks.{n}" for n in range(3))
    manifest = converted(
        tmp_path / "wan.py", tmp_path / "out", "ring", 2, quantize="fp8", split_after=cuts,
        weights_mode="external",
    )  # fmt: skip
    assert kinds_of(manifest) == [0, 1, 1, 3]
