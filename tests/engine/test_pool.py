"""Worker processes: how many at once, and both ways of starting them."""

from collections.abc import Callable
from pathlib import Path

import click
import pytest

from cp_convert import bundle
from cp_convert.backends import select
from cp_convert.cli import options
from cp_convert.engine import pool
from cp_convert.job import Job
from cp_convert.pipeline import convert
from cp_convert.progress import Progress


class Recorder(Progress):
    """Counts how many items are under way."""

    def __init__(self) -> None:
        self.now = self.most = self.all = 0

    def begin(self, stage: str, item: str) -> None:
        self.now, self.all = self.now + 1, self.all + 1
        self.most = max(self.most, self.now)

    def end(self, stage: str, item: str) -> None:
        self.now -= 1


@pytest.mark.engine
@pytest.mark.parametrize(
    ("jobs", "memory", "at_once"), [(2, 1 << 40, 2), (1, 1 << 40, 1), (2, 1, 1)]
)
def test_as_many_at_once_as_jobs_and_memory_allow(
    jobs: int, memory: int, at_once: int, model_file: Callable[..., Path], tmp_path: Path
) -> None:
    job = Job(
        model=model_file(), strategy="ulysses", world=2, out=tmp_path / "b", proof="none",
        jobs=jobs, memory=memory,
    )  # fmt: skip
    seen = Recorder()
    convert(job, select("auto", ()), seen)
    assert (seen.most, seen.all, seen.now) == (at_once, 2, 0)


@pytest.mark.engine
def test_workers_that_start_afresh_build_the_same(
    monkeypatch: pytest.MonkeyPatch, model_file: Callable[..., Path], tmp_path: Path
) -> None:
    """Where there is a GPU, no process is forked after CUDA was initialised.

    One engine for both ranks: every worker imports TensorRT anew, which takes ten seconds.
    """
    monkeypatch.setattr(pool, "has_driver", lambda: True)
    job = Job(
        model=model_file(), strategy="ring", world=2, out=tmp_path / "b", jobs=1,
        weights_mode="external", layout="shared",
    )  # fmt: skip
    manifest = convert(job, select("auto", ()), Progress())
    assert manifest.proof.level == "network"
    assert not any(check.problem for check in bundle.verify(tmp_path / "b"))


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 << 30), ("1.5 GB", 1_500_000_000), ("512m", 512_000_000), ("7", 7)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert options.Bytes().convert(text, None, None) == size


@pytest.mark.parametrize("text", ["", "GB", "8 GiBs", "-1", "8i"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is no size"):
        options.Bytes().convert(text, None, None)
