"""Conversions that are killed or stopped: no half bundle, nothing left behind, the old one kept."""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import pytest

from cp_convert import bundle
from cp_convert.cache.store import Cache

pytestmark = pytest.mark.engine

DEEP = (
    "        q, k, v = self.qkv(self.enter(x)).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)\n",
    """\
        x = self.enter(x)
        for _ in range(12):
            q, k, v = self.qkv(x).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
            x = functional.scaled_dot_product_attention(8 * q, k, v).transpose(1, 2).flatten(2)
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
""",
)
"""Twelve attentions more than one."""


def started(model: Path, out: Path, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "cp_convert", str(model), "-s", "ulysses", "-w", "2"]
    command += ["--weights-mode", "external", "--no-proof", "-q", "-o", str(out)]
    command += options or ("--no-cache",)
    return subprocess.Popen(command, stderr=subprocess.PIPE)


def is_whole(out: Path) -> bool:
    return not any(check.problem for check in bundle.verify(out))


def test_killed_at_any_moment(model_file: Callable[..., Path], tmp_path: Path) -> None:
    """SIGKILL leaves no bundle, or a whole one; what it leaves behind the next one removes."""
    model, out = model_file(), tmp_path / "out" / "bundle"
    begin = time.perf_counter()
    assert started(model, out).wait() == 0
    whole = time.perf_counter() - begin
    first = (out / "manifest.json").read_bytes()
    moments = random.Random(0)
    cache = tmp_path / "cache"
    for _ in range(3):
        process = started(model, out, "--force", "--cache", str(cache))
        # The second half is where files are written.
        time.sleep(whole * moments.uniform(0.5, 1.0))
        process.send_signal(signal.SIGKILL)
        process.wait()
        # Between two renames, for an instant, the old bundle stands beside, whole.
        there = out if out.exists() else next(out.parent.glob(".bundle.partial-*-old"))
        assert is_whole(there)
        for held in cache.glob("*/[!.]*"):
            assert Cache(cache).find(held.parent.name, held.name), f"{held} is broken"
    assert started(model, out, "--force", "--cache", str(cache)).wait() == 0
    assert is_whole(out)
    assert [path.name for path in out.parent.iterdir()] == ["bundle"]
    assert (out / "manifest.json").read_bytes() != first


def wait_for(process: subprocess.Popen[bytes], happened: Callable[[], bool]) -> None:
    while not happened():
        assert process.poll() is None
        time.sleep(0.02)


def workers(process: subprocess.Popen[bytes], out: Path) -> list[psutil.Process]:
    """The processes that build: children of the server that forks them.

    Before the first of them opens its log, libraries that the server imports have children too.
    """
    if not any(out.parent.glob(".bundle.partial-*/*.log")):
        return []
    try:
        children = psutil.Process(process.pid).children()
        return [worker for child in children for worker in child.children()]
    except psutil.NoSuchProcess:  # one that ended while it was asked
        return []


@pytest.mark.parametrize(
    ("while_building", "number"),
    [
        (False, signal.SIGINT),
        pytest.param(False, signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(True, signal.SIGINT, marks=pytest.mark.slow),
        (True, signal.SIGTERM),
    ],
)
def test_stopped(
    number: int, while_building: bool, model_file: Callable[..., Path], tmp_path: Path
) -> None:
    """Both signals leave no file and no process behind, and it is said so."""
    out = tmp_path / "out" / "bundle"
    process = started(model_file(), out)
    wait_for(process, lambda: any(out.parent.glob(".bundle.partial-*")))
    if while_building:
        wait_for(process, lambda: bool(workers(process, out)))
    family = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, number)
    _, told = process.communicate()
    assert process.returncode == 130
    assert "Interrupted; nothing was written." in told.decode()
    assert "Traceback" not in told.decode()
    assert list(out.parent.iterdir()) == []
    assert not psutil.wait_procs(family, timeout=20)[1]


def test_a_worker_that_is_killed_is_told(model_file: Callable[..., Path], tmp_path: Path) -> None:
    """As the system does when memory runs out. A build of seconds, in which the signal arrives."""
    out = tmp_path / "out" / "bundle"
    process = started(model_file(DEEP), out)
    found: list[psutil.Process] = []
    wait_for(process, lambda: bool(found.extend(workers(process, out)) or found))
    found[0].kill()
    _, told = process.communicate()
    assert process.returncode == 5
    assert "the process that built rank 0 was ended by SIGKILL" in told.decode()
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("room", [pytest.param(100_000, marks=pytest.mark.slow), 1_000_000])
def test_a_full_disk_is_told(room: int, model_file: Callable[..., Path], tmp_path: Path) -> None:
    """While weights are written here, while an engine is written there (a worker does that)."""
    limits = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (room, room))
    model = model_file()
    command = [sys.executable, "-m", "cp_convert", str(model), "-s", "ulysses", "-w", "2"]
    command += ["--no-proof", "--no-cache", "-q", "-o", str(tmp_path / "out" / "bundle")]
    done = subprocess.run(command, preexec_fn=limits, capture_output=True, check=False)
    assert done.returncode == 2, done.stderr.decode()
    assert "File too large. Nothing was left behind." in done.stderr.decode()
    assert list((tmp_path / "out").iterdir()) == []


def test_two_into_the_same_folder(model_file: Callable[..., Path], tmp_path: Path) -> None:
    """One of them wins; the other may say that the folder is taken. Nothing is broken."""
    model, out = model_file(), tmp_path / "bundle"
    both = [started(model, out, "--force", "--cache", str(tmp_path / "cache")) for _ in range(2)]
    codes = sorted(process.wait() for process in both)
    told = [process.stderr.read().decode() for process in both if process.stderr]
    assert codes[0] == 0
    assert codes[1] in (0, 2), told
    assert is_whole(out)
    assert not list(tmp_path.glob(".bundle.*"))
