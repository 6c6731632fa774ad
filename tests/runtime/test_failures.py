"""A rank that dies, hangs, lies or raises: all end in time, with its words, and nothing stays."""

import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import save_file

from cp_convert.bundle import read
from cp_convert.errors import BackendMissing, ConvertError, DamagedBundle, RunFailed, UsageError
from cp_convert.runtime import open as open_bundle
from cp_convert.runtime.check import check_finite
from cp_convert.runtime.given import given_inputs
from cp_convert.runtime.launch import launch
from tests.conftest import MODEL_FILE
from tests.runtime.bundles import converted

TIMEOUT = 8.0
FAULTY = """
import os, signal, sys, threading, time
fault = os.environ.get("FAULT")
if fault and "cp_convert.runtime.rank" in " ".join(sys.orig_argv):
    from cp_convert.runtime.torch_executor import TorchExecutor
    right = TorchExecutor.__call__

    def wrong(self, **arguments):
        if fault == "late":
            time.sleep(3)
        if fault == "killed":  # while it waits for the other, who comes late
            threading.Timer(1, os.kill, (os.getpid(), signal.SIGKILL)).start()
        if fault == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        if fault == "sleeps":
            time.sleep(100)
        if fault == "raises":
            raise KeyError("the rank's own words")
        outputs = right(self, **arguments)
        if fault == "lies":
            return {name: value + 1 for name, value in outputs.items()}
        return outputs

    TorchExecutor.__call__ = wrong
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("failures")
    (folder / "model.py").write_text(MODEL_FILE)
    converted(folder / "model.py", folder / "out", "ulysses", 2, weights_mode="external")
    return folder / "out"


def launched(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *faults: str, **more: Any
) -> list[Mapping[str, Any]]:
    (tmp_path / "sitecustomize.py").write_text(FAULTY)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    path = os.pathsep.join([str(tmp_path), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    request = {
        "bundle": str(bundle), "devices": ["cpu"] * 2, "executor": "torch", "timeout": TIMEOUT,
        "store": str(tmp_path / "store"), "local_world": 2, **more,
    }  # fmt: skip
    environments = [{"FAULT": fault, "PYTHONPATH": path} for fault in faults or ("", "")]
    try:
        return list(launch(request, 2, timeout=TIMEOUT, environments=environments))
    finally:
        assert not list(scratch.iterdir())
        assert not [p for p in psutil.Process().children(recursive=True) if _is_rank(p)]


def _is_rank(process: psutil.Process) -> bool:
    return "cp_convert.runtime.rank" in " ".join(process.cmdline())


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        (("late", "killed"), r"rank 1 was ended by SIGKILL while running forward 1 of 1"),
        (("", "stopped"), r"rank 1 said nothing for \d+ s.*rank 1 was running forward 1 of 1"),
        (("sleeps", ""), r"rank 0 failed while running.*got no further.*sitecustomize"),
        (("", "raises"), r"rank 1 ended with exit code 1 while(.|\n)*KeyError: .the rank's own"),
        (("", "lies"), r"rank 1 of 2 returns something else than rank 0"),
    ],
)
def test_one_rank_ends_all(
    faults: tuple[str, str],
    words: str,
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun = time.monotonic()
    with pytest.raises(RunFailed, match=words) as caught:
        launched(bundle, tmp_path, monkeypatch, *faults)
    assert caught.value.exit_code == 7
    assert time.monotonic() - begun < 4 * TIMEOUT  # importing torch on a busy machine counts


def test_what_all_ranks_refuse_keeps_its_own_exit_code(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"x": torch.zeros(1, 16, 9)}, tmp_path / "inputs.safetensors")
    with pytest.raises(UsageError, match=r"x has the shape \[1, 16, 9\]") as caught:
        launched(bundle, tmp_path, monkeypatch, inputs=str(tmp_path / "inputs.safetensors"))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"y": torch.zeros(1, 16, 8)}, "lacks x and has y, which the bundle does not take"),
        ({"x": torch.zeros(1, 16, 8).half()}, "x is float16; the engines take float32"),
        ({"x": torch.zeros(2, 16, 8)}, "built for"),
    ],
)
def test_other_inputs_are_refused(
    tensors: dict[str, torch.Tensor], words: str, bundle: Path, tmp_path: Path
) -> None:
    save_file(tensors, tmp_path / "inputs.safetensors")
    with pytest.raises(UsageError, match=words):
        given_inputs(read(bundle)[0], str(tmp_path / "inputs.safetensors"), 0)


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A bundle of one rank, which needs no process group."""
    (tmp_path / "model.py").write_text(MODEL_FILE)
    converted(tmp_path / "model.py", tmp_path / "out", "ulysses", 1, weights_mode="external")
    return tmp_path / "out"


def test_damage_is_told_and_verify_can_be_left_out(single: Path) -> None:
    with open_bundle(single, executor="torch", device="cpu") as opened:
        right = opened(torch.ones(1, 16, 8))
    with pytest.raises(UsageError, match="has no input 'xx'"):
        open_bundle(single, executor="torch", device="cpu")(xx=torch.ones(1, 16, 8))
    weights, tensors = single / "weights.safetensors", single / "program/tensors.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    _refused(single, DamagedBundle, "holds other numbers for")
    with open_bundle(single, executor="torch", device="cpu", verify=False) as opened:
        assert opened(x=torch.ones(1, 16, 8)).shape == right.shape
    weights.write_bytes(kept[:-8])
    _refused(single, DamagedBundle, "ends before")
    weights.unlink()
    _refused(single, DamagedBundle, "No such file")
    weights.write_bytes(kept)
    document = single / "program/program.json"
    text = document.read_bytes()
    document.write_bytes(text.replace(b":", b";", 1))
    _refused(single, DamagedBundle, "program.json: SHA-256")
    document.write_bytes(text)
    tensors.unlink()
    _refused(single, DamagedBundle, "tensors.safetensors: missing")


def _refused(bundle: Path, kind: type[ConvertError], words: str) -> None:
    with pytest.raises(kind, match=words):
        open_bundle(bundle, executor="torch", device="cpu")


def test_infinities_and_nan_are_refused() -> None:
    check_finite({"y": torch.ones(3)}, 0)
    with pytest.raises(RunFailed, match="the output y of rank 1 has 2 infinities or NaN among 3"):
        check_finite({"y": torch.tensor([1.0, torch.nan, torch.inf])}, 1)


def test_no_such_rank_world_or_gpu(bundle: Path) -> None:
    with pytest.raises(UsageError, match="ranks 0 to 1"):
        open_bundle(bundle, rank=2, executor="torch", device="cpu")
    with pytest.raises(UsageError, match="for 2 ranks, and 1 were started"):
        open_bundle(bundle, rank=0, executor="torch", device="cpu")
    with pytest.raises(BackendMissing, match="rank 1 is to run on cuda:7, and torch sees 0 GPUs"):
        open_bundle(bundle, rank=1, executor="torch", device="cuda:7")
