"""Releases, what they can, and how a person comes to one that can."""

import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from cp_convert import backends, bundle, cli, releases
from cp_convert.errors import BackendMissing
from cp_convert.job import Job
from cp_convert.releases import are_parts, check_groups, doubt, first_for, release_of
from tests.conftest import EXAMPLES, ROOT


@pytest.mark.parametrize(
    ("backend", "version", "devices", "groups"),
    [
        ("tensorrt-rtx", "0", False, False),
        ("tensorrt-rtx", "1.6.1.120", False, False),
        ("tensorrt-rtx", "1.7.0.5", False, False),
        ("tensorrt-rtx", "1.7.1.116", True, True),
        ("tensorrt-rtx", "2.0", True, True),
        ("tensorrt", "10.14", False, False),
        ("tensorrt", "11.2.1.2", True, False),
        ("tensorrt", "11.4.0", True, True),
        ("tensorrt", "12.0", True, True),
    ],
)
def test_every_release_stands_in_one_row(
    backend: str, version: str, devices: bool, groups: bool
) -> None:
    row = release_of(backend, version)
    assert (row.devices, row.groups) == (devices, groups)
    assert (doubt(backend, version, devices=True, groups=False) is None) == devices
    assert (doubt(backend, version, devices=True, groups=True) is None) == groups
    assert doubt(backend, version, devices=False, groups=False) is None


def test_the_first_release_is_named_by_what_is_needed() -> None:
    assert first_for("tensorrt", devices=True, groups=False) == "11.0"
    assert first_for("tensorrt", devices=True, groups=True) == "11.4"
    assert first_for("tensorrt-rtx", devices=True, groups=False) == "1.7.1"
    assert first_for("tensorrt-rtx", devices=False, groups=False) is None


def test_a_group_is_a_part_of_the_ranks() -> None:
    assert are_parts([(0, 1), (2, 3)], 4)
    assert not are_parts([(0, 1, 2, 3)], 4)
    assert not are_parts([(0,), (1,)], 2)


@pytest.mark.parametrize(
    ("ulysses", "cfg", "named"),
    [
        (1, 1, None),
        (2, 1, "--strategy usp"),
        (4, 1, None),
        (1, 4, None),
        (2, 2, "--mesh cfg=2,cp=2"),
    ],
)
def test_only_a_part_of_the_ranks_is_a_group(ulysses: int, cfg: int, named: str | None) -> None:
    job = Job(EXAMPLES / "plain_dit.py", "usp", 4, Path("out"), cfg=cfg, ulysses=ulysses)
    assert job.named_groups == named


def test_groups_are_refused_where_they_are_ignored_unless_asked_for() -> None:
    with pytest.raises(BackendMissing, match="ignores") as caught:
        check_groups("tensorrt-rtx", "1.6.1.120", "--strategy usp", unsafe=False)
    assert "--unsafe-groups" in str(caught.value.hint)
    check_groups("tensorrt-rtx", "1.6.1.120", "--strategy usp", unsafe=True)
    check_groups("tensorrt-rtx", "1.7.1", "--strategy usp", unsafe=False)


def test_one_requirement_stands_in_every_place() -> None:
    """The extra admits both releases; uv's override, the Makefile and the hint name one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (override,) = project["tool"]["uv"]["override-dependencies"]
    extra = [Requirement(one) for one in project["project"]["optional-dependencies"]["rtx"]]
    (own,) = (one for one in extra if one.name == "tensorrt_rtx")
    assert all(own.specifier.contains(version) for version in ("1.6.1.120", "1.7.1.116"))
    wanted = Requirement(override).specifier
    assert not wanted.contains("1.6.1.120")
    assert release_of("tensorrt-rtx", "1.7.1.116").groups
    for text in ((ROOT / "Makefile").read_text(), releases.NEWER["tensorrt-rtx"]):
        (found,) = re.findall(r"'(tensorrt_rtx[^']*)'", text)
        assert found == override


def convert(*args: object) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in args])
    return int(stop.value.code or 0)


def released(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """Let the conversion believe that this TensorRT-RTX builds."""
    real = backends._version
    other = {"tensorrt_rtx": version}
    monkeypatch.setattr(backends, "_version", lambda name: other.get(name) or real(name))


@pytest.mark.engine
def test_a_bundle_says_where_it_runs(
    model_file: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for version, able in (("1.6.1.120", False), ("1.7.1.116", True)):
        released(monkeypatch, version)
        out = tmp_path / version
        base = [model_file(), "-s", "usp", "--ulysses", 2, "-w", 4, "-o", out, "--proof", "program"]
        if not able:
            assert convert(*base, "--json") == BackendMissing.exit_code
            error = json.loads(capsys.readouterr().out)["error"]
            assert "1.7.1" in error["message"]
            assert not out.exists()
        assert convert(*base, *([] if able else ["--unsafe-groups"])) == 0
        assert ("is not known to run" in capsys.readouterr().err) != able
        runs = bundle.read(out)[0].runs_on
        assert (runs.release, runs.nccl) == ("1.7.1", releases.NCCL)
        assert runs.compute_capabilities == ["8.0+"]
        assert (runs.doubt is None) == able
        assert convert("inspect", out) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert ("tensorrt-rtx 1.7.1 or later, NCCL 2.28.3" in shown) == able
        assert ("may not run" in shown) != able


@pytest.mark.engine
def test_a_model_with_groups_of_its_own_is_refused_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    released(monkeypatch, "1.6.1.120")
    out = tmp_path / "out"
    status = convert(EXAMPLES / "tensor_parallel.py", "-s", "ulysses", "-w", 4, "-o", out, "--json")
    assert status == BackendMissing.exit_code
    assert "process_groups" in json.loads(capsys.readouterr().out)["error"]["message"]


@pytest.mark.engine
def test_the_engine_says_what_it_was_built_for_and_one_rank_needs_nothing(
    model_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    targets = ["--compute-capability", "8.9", "--compute-capability", "12.0"]
    out = tmp_path / "out"
    assert convert(model_file(), "-s", "ring", "-w", 1, "-o", out, "--no-proof", *targets) == 0
    runs = bundle.read(out)[0].runs_on
    assert runs.compute_capabilities == ["8.9", "12.0"]
    assert (runs.release, runs.nccl, runs.doubt) == (None, None, None)
    assert "known to run" not in capsys.readouterr().err
