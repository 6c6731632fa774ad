"""The C++ runner as a user builds it, and the stand-ins that it runs on; built once a session."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from cp_convert.runtime import cpp_project

STANDIN = Path(__file__).parent / "standin"
JSON = str(files("nlohmann_json") / "include")
SONAMES = {"nvinfer": "libnvinfer.so.11", "nccl": "libnccl.so.2", "cudart": "libcudart.so.13"}


@dataclass(frozen=True)
class Done:
    """What a run left."""

    code: int
    stdout: str
    stderr: str
    log: list[str]


@dataclass(frozen=True)
class Runner:
    """``cp_run``, with the stand-ins as its TensorRT, NCCL and CUDA run-time."""

    program: Path
    libraries: Path

    def __call__(
        self, words: Sequence[object], log: Path, settings: Mapping[str, object] | None = None
    ) -> Done:
        """Run it; ``settings`` are the stand-ins' ``STANDIN_*`` variables, without the prefix."""
        told = {f"STANDIN_{name}": str(value) for name, value in (settings or {}).items()}
        environment = {**os.environ, "LD_LIBRARY_PATH": str(self.libraries), **told}
        log.unlink(missing_ok=True)
        done = subprocess.run(
            [str(self.program), *map(str, words)],
            env={**environment, "STANDIN_LOG": str(log)},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        lines = log.read_text().splitlines() if log.exists() else []
        return Done(done.returncode, done.stdout, done.stderr, lines)


def built(folder: Path) -> Runner:
    """The runner in ``folder``; the first of several test processes builds it."""
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            _build(folder)
            (folder / "done").touch()
    return Runner(folder / "build" / "cp_run", folder / "lib")


def _build(folder: Path) -> None:
    project, build, libraries = folder / "project", folder / "build", folder / "lib"
    for stale in (project, build, libraries):
        shutil.rmtree(stale, ignore_errors=True)
    cpp_project.export(project)
    libraries.mkdir()
    cmake = _cmake()
    configure = [
        cmake, "-S", project, "-B", build, "-DCMAKE_BUILD_TYPE=None",
        f"-DTENSORRT_INCLUDE={STANDIN / 'include'}", f"-DNLOHMANN_JSON_INCLUDE={JSON}",
        "-DCMAKE_UNITY_BUILD=ON", "-DCMAKE_CXX_FLAGS=-O0 -Wall -Wextra -Werror",
    ]  # fmt: skip
    _run(configure)
    _run([cmake, "--build", build, "-j2"])
    with ThreadPoolExecutor(2) as pool:
        for _ in pool.map(lambda item: _library(*item, libraries), SONAMES.items()):
            pass


def _cmake() -> str:
    """The one that pip put beside Python; the environment need not be activated."""
    beside = str(Path(sys.executable).parent)
    found = shutil.which("cmake", path=os.pathsep.join([beside, os.environ["PATH"]]))
    assert found is not None, "pip install cmake"
    return found


def _library(name: str, soname: str, folder: Path) -> None:
    _run([
        "g++", "-std=c++17", "-O0", "-fPIC", "-shared", "-pthread", f"-I{STANDIN / 'include'}",
        "-isystem", JSON, STANDIN / f"{name}.cpp", "-o", folder / soname,
        f"-Wl,-soname,{soname}", "-ldl",
    ])  # fmt: skip


def _run(words: Sequence[object]) -> None:
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
