"""The one server from which tests fork processes, so that what takes seconds to import is imported
once a worker of pytest and not once a process.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from multiprocessing import forkserver, get_context, resource_tracker, util
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

from cp_convert.trt.offline import has_driver

PRELOADED = (
    "cp_convert.cli.main",
    "cp_convert.engine.worker",
    "cp_convert.runtime.lora",
    "cp_convert.runtime.session",
    "cp_convert.runtime.torch_executor",
    "cp_convert.diffusers",
    "diffusers.pipelines.flux.pipeline_flux",
    "diffusers.pipelines.qwenimage.pipeline_qwenimage",
    "diffusers.pipelines.wan.pipeline_wan",
)
"""What processes of tests need: those that build engines, and ranks. A server that cannot import
one of them says nothing, and every process imports it again; :func:`share` looks before."""


def share() -> None:
    """Whoever asks for the server first gets one that has imported what all of them need.

    A server keeps what it was started with: without this, the ranks that ask for it after the
    builder of engines (or the other way round) import seconds' worth of modules, each of them.
    With a GPU driver that is how it stays, because there nobody may be forked from a process that
    has imported Torch-TensorRT.
    """
    if not has_driver():
        forkserver._forkserver.set_forkserver_preload(list(PRELOADED))  # type: ignore[attr-defined]
        forkserver.set_forkserver_preload = lambda _: None


def missing() -> list[str]:
    """Those of :data:`PRELOADED` that are not there."""
    return [name for name in PRELOADED if find_spec(name) is None]


def fork_server() -> None:
    """Let this process's own server be a fork of it, where it has imported everything already.

    A process that was forked from a server starts another one for its own children, which is a new
    interpreter. To be called before anything else is done: threads and handlers would be copied.
    """
    right = util.spawnv_passfds

    def forked(path: bytes, args: Sequence[Any], passed: Sequence[int]) -> int:
        if "multiprocessing.forkserver" not in str(args[-1]):
            return right(path, args, passed)
        pid = os.fork()
        if pid == 0:
            try:
                _serve(passed)
            finally:
                os._exit(0)
        return pid

    util.spawnv_passfds = forked
    try:
        forkserver.ensure_running()
    finally:
        util.spawnv_passfds = right


def _serve(passed: Sequence[int]) -> None:
    """As a new interpreter would: with the two files that it is passed and no others."""
    for held in [int(one.name) for one in Path("/proc/self/fd").iterdir()]:
        if held > 2 and held not in passed:
            with contextlib.suppress(OSError):
                os.close(held)
    resource_tracker._resource_tracker._fd = None  # type: ignore[attr-defined]
    listener, alive = passed
    forkserver.main(listener, alive, [])


class Forked:
    """What the launcher of ranks uses of :class:`subprocess.Popen`, forked from the server."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        stdout: IO[bytes],
        env: Mapping[str, str],
        pass_fds: Sequence[int],
        **_: object,
    ) -> None:
        _python, _m, *words, pipe = command
        assert [int(pipe)] == list(pass_fds)
        telling = Connection(os.dup(int(pipe)), readable=False)
        self._process = get_context("forkserver").Process(
            target=_as_module, args=(words, telling, Path(stdout.name), dict(env))
        )
        self._process.start()
        telling.close()
        assert self._process.pid is not None
        self.pid: int = self._process.pid
        while self.poll() is None and not self._leads():
            pass  # its group is what signals are sent to

    def _leads(self) -> bool:
        try:
            return os.getpgid(self.pid) == self.pid
        except ProcessLookupError:
            return False

    @property
    def returncode(self) -> int | None:
        """How it ended; by a signal, its number below zero."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The same."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Until it has ended."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("rank", timeout or 0.0)
        return self._process.exitcode


def _as_module(words: list[str], telling: Connection, said: Path, env: dict[str, str]) -> None:
    """``python -m WORDS PIPE``, in a session of its own."""
    os.setsid()
    with said.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.clear()
    os.environ.update(env)
    import torch

    torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
    module, *arguments = words
    sys.argv = [module, *arguments, str(os.dup(telling.fileno()))]
    telling.close()
    runpy.run_module(module, run_name="__main__")
