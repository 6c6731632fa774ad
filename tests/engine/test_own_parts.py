"""What is made of weights that ranks share: nothing before it is read, and little at a time.

At a model's real size every part is hundreds of megabytes, and there are hundreds of them.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from torch import Tensor

from cp_convert import stages
from cp_convert.bundle import external
from cp_convert.bundle.external import place
from cp_convert.cache.store import Cache
from cp_convert.errors import WeightsError
from cp_convert.ir import tensors
from cp_convert.ir.layout import Layout
from cp_convert.ir.records import Emitted
from cp_convert.ir.serialize import pack
from cp_convert.ir.shares import Share, Shared, Shares
from cp_convert.mesh import Mesh
from tests.engine.test_pieces import MODEL
from tests.runtime.bundles import converted

RUNS = 6
"""How often a proof runs all ranks: pieces and the whole that they were cut from, the rewritten
program in float32, the lowered one, and a control of each axis."""


def test_nothing_is_made_before_a_proof_reads_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A whole conversion by kinds of blocks: parts once in every run, and none between."""
    made, whole, emitted = Counter[str](), Shared.__getitem__, stages._emitted
    found: list[Emitted] = []

    def counted(self: Shared, name: str) -> tuple[Tensor, ...]:
        parts = whole(self, name)
        made[name] += 1
        return parts

    def unread(*given: Any) -> Emitted:
        found.append(emitted(*given))
        for program in found[-1].programs:
            pack(program, described=found[-1].names_in(program))
        draft = found[-1].draft
        assert draft is not None
        assert len(draft.run_by_engines) == len(found[-1].programs)
        assert not made
        return found[-1]

    monkeypatch.setattr(Shared, "__getitem__", counted)
    monkeypatch.setattr(stages, "_emitted", unread)
    (tmp_path / "model.py").write_text(MODEL)
    converted(
        tmp_path / "model.py", tmp_path / "out", "ulysses", 4, tp=2, layout="blocks",
        weights_mode="external", proof="program",
    )  # fmt: skip
    (one,) = found
    assert len(one.kinds) < len(one.programs)
    assert len(one.program.own) >= 6
    assert set(made) == set(one.program.own)
    assert set(made.values()) == {RUNS}


@pytest.mark.parametrize("dim", [0, 1])
def test_what_is_repacked_is_copied_piece_by_piece(
    dim: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = torch.randn(24, 40)
    share = Share(dim, Layout.even([whole.shape[dim] // 2] * 2, 2))
    most, seen = 48, list[int]()
    monkeypatch.setattr(external, "_PART", most)
    monkeypatch.setattr(external, "is_finite", lambda one: not seen.append(one.numel()))
    shares = Shares({"w": share}, Mesh.of(2, tp=2).axis("tp"))
    found = place(
        {"w": whole}, {}, tmp_path, Event(), copy=False, cache=Cache(None), shares=shares
    )  # fmt: skip
    assert max(seen) <= most
    assert sum(seen) == whole.numel()
    for member, weight in enumerate(found["w"]):
        part = share.of(whole, member).contiguous()
        assert weight.sha256 == hashlib.sha256(part.numpy().tobytes()).hexdigest()
        assert torch.equal(tensors.mapped(tmp_path / weight.file)["w"], part)


def test_a_part_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    whole = torch.zeros(8, 8)
    whole[7, 7] = torch.nan
    shares = Shares({"w": Share(1, Layout.even([8], 2))}, Mesh.of(2, tp=2).axis("tp"))
    with pytest.raises(WeightsError, match="w holds NaN"):
        place({"w": whole}, {}, tmp_path, Event(), copy=False, cache=Cache(None), shares=shares)


def test_zeros_are_holes_in_a_file(tmp_path: Path) -> None:
    given = {
        "none": torch.zeros(3 << 19),
        "last": torch.cat([torch.zeros(1 << 20), torch.ones(1)]),
        "minus": torch.full((1 << 12,), -0.0),
        "few": torch.zeros(3),
        "end": torch.zeros(1 << 18),
    }
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"\1" * (1 << 20))  # what was there before does not shine through
    found = tensors.save(given, path)
    size = sum(one.nbytes for one in given.values())
    assert path.stat().st_size == size + found["none"][0]
    for name, value in tensors.mapped(path).items():
        assert torch.equal(value, given[name])
        assert torch.equal(torch.signbit(value), torch.signbit(given[name]))
        assert found[name][1] == hashlib.sha256(given[name].numpy().tobytes()).hexdigest()
    assert path.stat().st_blocks * 512 < size
