"""External weights are those that were proven: digests, files that change, ties, NaN."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cp_convert.bundle import external
from cp_convert.bundle import manifest as m
from cp_convert.bundle.describe import weight_entry
from cp_convert.bundle.external import Placing, place
from cp_convert.cache.store import Cache
from cp_convert.errors import WeightsError
from cp_convert.model.checkpoint import locate
from cp_convert.model.meta import unallocated
from cp_convert.model.weights import load_weights
from cp_convert.prove.wide import in_float32
from tests.bundle.test_external import convert, manifest_of, numbers_of


def placed(path: Path, folder: Path, cache: Cache, between: Callable[[], object]) -> m.Weight:
    """Load one weight of a file, do something, and find its place and digest."""
    module = torch.nn.Linear(2, 3, bias=False)
    with unallocated():
        module = torch.nn.Linear(2, 3, bias=False)
    filled = load_weights(module, locate(path), path, lazily=True)
    parameters = dict(module.named_parameters())
    with Placing(parameters, filled.located, folder, copy=False, cache=cache) as placing:
        placing._found.result()
        between()
        return weight_entry(*placing.weights["weight"])


def test_the_digest_is_of_the_numbers_that_were_loaded(tmp_path: Path) -> None:
    path, cache = tmp_path / "one.safetensors", Cache(tmp_path / "cache")
    value = torch.randn(3, 2)
    save_file({"first": torch.ones(5, dtype=torch.uint8), "weight": value}, path)
    for _ in range(2):  # the second time from the cache
        with pytest.raises(WeightsError, match="unexpected: first"):
            placed(path, tmp_path, cache, lambda: None)
        save_file({"weight": value}, path)
        found = placed(path, tmp_path, cache, lambda: None)
        assert torch.equal(numbers_of(found, tmp_path), value)
        assert found.sha256 == hashlib.sha256(value.numpy().tobytes()).hexdigest()
        save_file({"first": torch.ones(5, dtype=torch.uint8), "weight": value}, path)


@pytest.mark.parametrize("how", ["written", "replaced", "removed", "touched"])
def test_a_file_that_changes_under_the_conversion_is_noticed(how: str, tmp_path: Path) -> None:
    path, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    save_file({"weight": torch.ones(3, 2)}, path)
    save_file({"weight": torch.zeros(3, 2)}, other)

    def write() -> None:
        with path.open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(b"1234")

    change = {
        "written": write,
        "replaced": lambda: other.replace(path),
        "removed": path.unlink,
        "touched": path.touch,
    }[how]
    with pytest.raises(WeightsError, match=r"one\.safetensors was changed"):
        placed(path, tmp_path, Cache(None), change)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_stays_in_its_file_is_finite(dtype: torch.dtype, tmp_path: Path) -> None:
    path, module = tmp_path / "one.safetensors", torch.nn.Linear(2, 3, bias=False, dtype=dtype)
    with torch.no_grad():
        module.weight[2, 1] = torch.inf
    save_file(module.state_dict(), path)
    parameters, cache = dict(module.named_parameters()), Cache(tmp_path / "cache")
    for _ in range(2):
        with pytest.raises(WeightsError, match="weight holds NaN or infinity in one"):
            place(parameters, locate(path), tmp_path, Event(), copy=False, cache=cache)


TIED = ("\n    def forward", """
        self.again = nn.Linear(8, 64)
        self.again.weight = self.enter.weight

    def forward""")  # fmt: skip
TWICE = ("self.qkv(self.enter(x))", "self.qkv(self.enter(x) + self.again(x).sin())")


def state_of(path: Path) -> dict[str, torch.Tensor]:
    namespace: dict[str, Any] = {}
    exec(compile(path.read_text(), str(path), "exec"), namespace)
    state = namespace["build_model"]().state_dict()
    return {name: tensor.clone() for name, tensor in state.items()}


@pytest.mark.engine
def test_tied_weights_are_one_input(model_file: Callable[..., Path], tmp_path: Path) -> None:
    path, weights = model_file(TIED, TWICE), tmp_path / "w.safetensors"
    state = {"transformer." + name: tensor for name, tensor in state_of(path).items()}
    del state["transformer.again.weight"]
    save_file(state, weights)
    options = ["-s", "ulysses", "-w", 2, "-p", "fp32", "--weights-mode", "external", "--no-cache"]
    out = tmp_path / "bundle"
    assert convert(path, *options, "--weights", weights, "-o", out) == 0
    told = manifest_of(out)
    assert len(told.weights) == 7
    assert len({(w.file, w.offset) for w in told.weights}) == 7
    assert told.model.matched == ["names in the file begin with 'transformer.', the model's do not"]


@pytest.mark.engine
@pytest.mark.parametrize("mode", ["embedded", "external"])
def test_wrong_weights_end_with_one_message(
    mode: str,
    model_file: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit 2, the tensor and the file named, no traceback, nothing written."""
    path, weights, out = model_file(), tmp_path / "w.safetensors", tmp_path / "bundle"
    right = state_of(path)
    broken = right["qkv.weight"].clone()
    broken[3, 3] = torch.nan
    for changed in (
        {"qkv.weight": broken},
        {"qkv.weight": broken.to(torch.int8)},
        {"qkv.weight": right["qkv.weight"].to(torch.float8_e4m3fn)},
        {"qkv.weight": broken[:, :8].clone()},
    ):
        save_file({**right, **changed}, weights)
        options = ["--weights", weights, "--weights-mode", mode, "-p", "fp32", "--json", "-q"]
        assert convert(path, "-s", "ulysses", "-w", 2, *options, "-o", out) == 2
        streams = capsys.readouterr()
        told = json.loads(streams.out)["error"]
        assert "qkv.weight" in told["message"] and "w.safetensors" in str(told)
        assert "Traceback" not in streams.err
        assert [p for p in tmp_path.iterdir() if "bundle" in p.name] == []


def test_the_proof_lends_the_module_other_numbers_and_the_bundle_gets_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that writes is held until the module is in float32 for its reference."""
    is_wide, real = Event(), external.save

    def late(*args: Any, **more: Any) -> Any:
        assert is_wide.wait(60)
        return real(*args, **more)

    monkeypatch.setattr(external, "save", late)
    module = torch.nn.Linear(2, 3, bias=False).half()
    expected = module.weight.detach().clone()
    parameters, cache = dict(module.named_parameters()), Cache(None)
    placing = Placing(parameters, {}, tmp_path, copy=False, cache=cache)
    with placing, in_float32(module):
        is_wide.set()
        weight = weight_entry(*placing.weights["weight"])
    assert torch.equal(numbers_of(weight, tmp_path), expected)
    assert weight.sha256 == hashlib.sha256(expected.numpy().tobytes()).hexdigest()
