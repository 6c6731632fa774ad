"""Calibration: measured on CPUs, over gloo, and refused where it cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from cp_convert.advise import hardware
from cp_convert.advise.measured import like, measured, to_toml
from cp_convert.errors import RunFailed, UsageError
from cp_convert.runtime import calibrate, wires
from cp_convert.runtime.launch import launch
from cp_convert.runtime.replayed import Replayed
from tests.cli.test_cli import Run, cp_convert  # noqa: F401

MODULE = "cp_convert.runtime.calibrate"


def launched(tmp_path: Path, world: int) -> list[dict[str, Any]]:
    request = {
        "devices": ["cpu"] * world,
        "store": str(tmp_path / "store"),
        "timeout": 120.0,
        "shrink": 512,
    }
    return launch(request, world, timeout=120, module=MODULE)


def test_two_ranks_measure_and_the_file_can_be_read(tmp_path: Path) -> None:
    found, other = launched(tmp_path, 2)
    assert set(found["collectives"]) == set(other["collectives"]) == set(wires._OPERATIONS)
    assert all(set(by_size) == {"2"} for by_size in found["collectives"].values())
    told = measured(found, like("", "h200"), "by a test")
    file = tmp_path / "own.toml"
    file.write_text(to_toml(told))
    assert hardware.read(str(file)) == told
    assert told.measured is not None
    assert min(spent for _, spent in told.measured.matmul) > 0


def test_ranks_that_all_end_at_once_without_a_word_are_no_success(tmp_path: Path) -> None:
    """Pipes close before a process can be seen to have ended."""
    request = {"devices": ["nothing"] * 2, "store": "", "timeout": 60.0}
    with pytest.raises(RunFailed, match=r"rank \d ended with exit code 1"):
        launch(request, 2, timeout=60, module="tests.runtime.speechless")


def test_without_a_gpu_there_is_nothing_to_measure(cp_convert: Run, tmp_path: Path) -> None:  # noqa: F811
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    out = tmp_path / "my.toml"
    run = cp_convert("calibrate", "--out", out)
    assert run.code == 2
    assert "torch sees no GPU here" in run.err
    assert cp_convert("calibrate", "--out", out, "--devices", "0").code == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--out", "my.txt"), "a hardware file ends in .toml"),
        (("--out", "there.toml"), "there.toml exists"),
        (("--out", "nowhere/my.toml"), "there is no folder"),
        (("--devices", "0,0"), "named twice"),
        (("--devices", ","), "not a list of GPUs"),
        (("--devices", "cpu"), "not a list of GPUs"),
        (("--like", "h300"), "h300: not known"),
        (("--timeout", "0"), "--timeout"),
    ],
)
def test_bad_options_are_told_at_once(
    options: tuple[str, ...],
    said: str,
    cp_convert: Run,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.toml").write_text("mine")
    run = cp_convert("calibrate", *options)
    assert (run.code, said in run.err) == (2, True), run.err
    assert [path.name for path in tmp_path.iterdir()] == ["there.toml"]
    assert Path("there.toml").read_text() == "mine"


def test_gpus_of_two_kinds_and_busy_ones_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunFailed, match=r"not of one kind \(0: A100, 1: H100\)"):
        calibrate._check_alike(["A100", "H100"])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 << 30, 80 << 30))
    with pytest.raises(RunFailed, match=r"cuda:1 is busy: 75\.2 GB"):
        calibrate._check_free(torch.device("cuda", 1))


def test_published_rates_are_found_by_the_name_of_the_gpu() -> None:
    assert like("NVIDIA H200", None).title == hardware.read("h200").title
    with pytest.raises(UsageError, match=r"belong to NVIDIA H100 .*h100-nvl, h100-sxm would fit"):
        like("NVIDIA H100 80GB HBM3", None)
    with pytest.raises(UsageError, match="belong to Sample GPU"):
        like("Sample GPU", None)


def test_every_kind_of_curve_is_in_the_struct() -> None:
    names = {field.name for field in msgspec.structs.fields(calibrate.Found)}
    assert {f.name for f in msgspec.structs.fields(hardware.Measured)} - {"by"} <= names


class _Graph:
    """Stands in for CUDA's: what was called while capturing is called again."""

    current: _Graph | None = None

    def __enter__(self) -> None:
        _Graph.current = self

    def __exit__(self, *_: object) -> None:
        _Graph.current = None

    def replay(self) -> None:
        self.work()


def test_a_graph_reads_new_inputs_and_is_made_anew_for_new_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, captured = torch.zeros(2), []

    def call(x: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
        graph = _Graph.current
        if graph is not None:
            captured.append(graph)
            graph.work = lambda: out.copy_(x * weight)
            return [out]  # not computed before it is replayed
        return [x * weight]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", _Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **_: graph)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    replayed = Replayed(call, torch.device("cuda"))
    one, other = torch.full((2,), 2.0), torch.full((2,), 10.0)
    given = [True, False]
    results = [
        replayed([torch.full((2,), number), weight], given)[0]
        for number, weight in ((1.0, one), (3.0, one), (4.0, one), (5.0, other))
    ]
    assert [float(result[0]) for result in results] == [2.0, 6.0, 8.0, 50.0]
    assert len(captured) == 2
