"""Conversions that are killed or stopped: no half bundle, nothing left behind, the old one kept.

Each is a process of its own, forked from a server that has imported what all of them need.
"""

import multiprocessing
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from cp_convert import bundle
from cp_convert.cache.store import Cache
from tests.server import fork_server, missing

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


class Started:
    """A command line at work in a process of its own.

    Args:
        folder: where what it says is kept.
        command: its arguments.
        room: bytes that a file may have at most.
    """

    def __init__(self, folder: Path, command: list[str], room: int = resource.RLIM_INFINITY):
        context = multiprocessing.get_context("forkserver")
        self._said = folder / f"said-{time.monotonic_ns()}"
        self._process = context.Process(target=_run, args=(command, self._said, room))
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def wait(self) -> int:
        """How it ended; by a signal, its number below zero."""
        self._process.join(300)
        assert self._process.exitcode is not None
        return self._process.exitcode

    def signal(self, number: int) -> None:
        """Send it, unless it has ended."""
        if self._process.is_alive():
            os.kill(self.pid, number)

    def is_alive(self) -> bool:
        """Whether it goes on."""
        return self._process.is_alive()

    def told(self) -> str:
        """What it has said."""
        return self._said.read_text()


def _run(command: list[str], said: Path, room: int) -> None:
    with said.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    fork_server()
    from cp_convert import cli

    cli.main(command)


def started(model: Path, out: Path, *options: str) -> Started:
    command = [str(model), "-s", "ulysses", "-w", "2"]
    command += ["--weights-mode", "external", "--no-proof", "-q", "-o", str(out)]
    return Started(model.parent, command + list(options or ("--no-cache",)))


def is_whole(out: Path) -> bool:
    return not any(check.problem for check in bundle.verify(out))


def test_the_server_finds_what_it_is_to_import() -> None:
    """It would keep silent, and every process would import it for itself."""
    assert not missing()


def test_killed_at_any_moment(model_file: Callable[..., Path], tmp_path: Path) -> None:
    """SIGKILL leaves no bundle, or a whole one; what it leaves behind the next one removes."""
    model, out = model_file(), tmp_path / "out" / "bundle"
    assert Started(tmp_path, ["--version"]).wait() == 0  # the server has imported everything
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
        process.signal(signal.SIGKILL)
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


def wait_for(process: Started, happened: Callable[[], bool]) -> None:
    while not happened():
        assert process.is_alive()
        time.sleep(0.02)


def workers(process: Started, out: Path) -> list[psutil.Process]:
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
    process.signal(number)
    assert process.wait() == 130
    assert "Interrupted; nothing was written." in process.told()
    assert "Traceback" not in process.told()
    assert list(out.parent.iterdir()) == []
    assert not psutil.wait_procs(family, timeout=20)[1]


def test_a_worker_that_is_killed_is_told(model_file: Callable[..., Path], tmp_path: Path) -> None:
    """As the system does when memory runs out. A build of seconds, in which the signal arrives."""
    out = tmp_path / "out" / "bundle"
    process = started(model_file(DEEP), out)
    found: list[psutil.Process] = []
    wait_for(process, lambda: bool(found.extend(workers(process, out)) or found))
    found[0].kill()
    assert process.wait() == 5
    assert "the process that built rank 0 was ended by SIGKILL" in process.told()
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("room", [pytest.param(100_000, marks=pytest.mark.slow), 1_000_000])
def test_a_full_disk_is_told(room: int, model_file: Callable[..., Path], tmp_path: Path) -> None:
    """While weights are written here, while an engine is written there (a worker does that)."""
    command = [str(model_file()), "-s", "ulysses", "-w", "2"]
    command += ["--no-proof", "--no-cache", "-q", "-o", str(tmp_path / "out" / "bundle")]
    done = Started(tmp_path, command, room)
    assert done.wait() == 2, done.told()
    assert "File too large. Nothing was left behind." in done.told()
    assert list((tmp_path / "out").iterdir()) == []


def test_two_into_the_same_folder(model_file: Callable[..., Path], tmp_path: Path) -> None:
    """One of them wins; the other may say that the folder is taken. Nothing is broken."""
    model, out = model_file(), tmp_path / "bundle"
    both = [started(model, out, "--force", "--cache", str(tmp_path / "cache")) for _ in range(2)]
    codes = sorted(process.wait() for process in both)
    assert codes[0] == 0
    assert codes[1] in (0, 2), [process.told() for process in both]
    assert is_whole(out)
    assert not list(tmp_path.glob(".bundle.*"))
