"""Two conversions into one place: one of them is refused, and no bundle is mixed of two."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cp_convert import bundle, cli
from cp_convert.bundle.lock import alone
from cp_convert.errors import OutputError
from tests.bundle.test_folder import manifest, problems, written


def test_a_second_writer_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with bundle.staged(out) as folder:
        for rank in range(2):
            (folder / bundle.engine_name(rank)).write_bytes(b"first")
        with pytest.raises(OutputError, match=f"process {os.getpid()}") as caught:
            written(out)
        assert "--out" in str(caught.value.hint)
        written(tmp_path / "other")
        bundle.publish(folder, out, manifest(folder), force=False)
    assert problems(out) == {}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "out"]
    written(out)


def test_many_at_once_are_never_two(tmp_path: Path) -> None:
    """Also where one opens the lock's file while its owner removes it."""
    inside, most, taken = [], [], []

    def work() -> None:
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            try:
                with alone(tmp_path / "out"):
                    inside.append(1)
                    most.append(len(inside))
                    taken.append(1)
                    inside.pop()
            except OutputError:
                pass

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    assert len(taken) > 50
    assert list(tmp_path.iterdir()) == []


HOLD = """
import sys, time
from pathlib import Path
from cp_convert.bundle.lock import alone
with alone(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_another_process_is_seen_and_one_that_was_killed_is_not(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", HOLD, str(out)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(OutputError, match=f"process {holder.pid}"):
        written(out)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    written(out)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_came_meanwhile_is_not_replaced_unasked(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with bundle.staged(out) as folder:
        for rank in range(2):
            (folder / bundle.engine_name(rank)).write_bytes(b"late")
        written(tmp_path / "other").rename(out)
        with pytest.raises(OutputError, match="already holds a bundle"):
            bundle.publish(folder, out, manifest(folder), force=False)
    assert (out / "rank0.engine").read_bytes() == b"engine\0"


def test_the_command_ends_with_one_message_before_anything_is_made(
    model_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = model_file(), tmp_path / "out" / "bundle"
    out.parent.mkdir()
    args = [str(a) for a in (model, "-s", "ulysses", "-w", 2, "-o", out, "--json", "--force")]
    with alone(out), pytest.raises(SystemExit) as stop:
        cli.main(args)
    assert stop.value.code == OutputError.exit_code
    said = capsys.readouterr()
    assert "another conversion is writing" in json.loads(said.out)["error"]["message"]
    assert "Traceback" not in said.err
    assert list(out.parent.iterdir()) == []
