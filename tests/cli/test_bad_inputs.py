"""What a person or a script gives wrongly, by the command line: all end alike.

One exit code of the table, one message without a traceback, nothing written, and what was given is
as it was. What each message says is tested beside the module that says it.
"""

from __future__ import annotations

import hashlib
import json
import runpy
import struct
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file

from benchmarks.checkpoints.comfy import as_json, quantized, write
from cp_convert import cli
from tests.conftest import MODEL_FILE

USAGE, MODEL = 2, 3
Header = dict[str, Any]


def state_of(model: Path) -> dict[str, Any]:
    module = runpy.run_path(str(model))["build_model"]()
    return {name: tensor.contiguous() for name, tensor in module.state_dict().items()}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A model file, and its weights as a safetensors file's bytes."""
    model = tmp_path_factory.mktemp("given") / "model.py"
    model.write_text(MODEL_FILE)
    return model, save(state_of(model))


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if "__pycache__" not in path.parts
    }


def refuses(
    capfd: pytest.CaptureFixture[str], folder: Path, *args: object, code: tuple[int, ...] = (USAGE,)
) -> str:
    """The message of a command that is refused, and leaves ``folder`` as it was."""
    before = digests(folder)
    with pytest.raises(SystemExit) as ended:
        cli.main([str(a) for a in args])
    told = capfd.readouterr()
    assert ended.value.code in code, told
    assert "Traceback" not in told.err and not told.out
    lines = told.err.splitlines()
    message = [line for line in lines if line.strip() and not line.startswith(("  ", "Usage: "))]
    assert 1 <= len(lines) <= 8 and message, told.err
    assert digests(folder) == before
    return told.err


# --- bytes that are no safetensors file, or another -----------------------------------------------


def parts(data: bytes) -> tuple[Header, bytes]:
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def joined(header: str | Header, body: bytes, size: int | None = None) -> bytes:
    text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + body


def damaged(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Files that are cut, or whose header says something else than what is there."""
    header, body = parts(data)
    whole = json.dumps(header)
    for length in (0, 1, 7, 8, 9, 100, 8 + len(whole) // 2, len(data) // 2, len(data) - 1):
        yield f"cut to {length}", data[:length]
    for size in (0, 1, 10, len(whole) - 1, len(data), 2**31, 2**62, 2**64 - 1):
        yield f"a header of {size}", joined(whole, body, size)
    for text in ("", "{", "[]", "null", "3", '"x"', whole + "}", whole[:-1], "nul"):
        yield f"header {text[:12]!r} {len(text)}", joined(text, body)
    yield "bytes behind", data + b"more"
    yield "a body that lacks its first", joined(header, body[1:])
    for name in header:
        for label, change in CHANGES.items():
            changed = {key: dict(value) for key, value in header.items()}
            change(changed, name)
            yield f"{name} {label}", joined(changed, body)
        first = json.dumps({name: header[name]})[:-1]
        yield f"{name} twice", joined(f"{first}, {whole[1:]}", body)


def _set(key: str, value: Any) -> Callable[[Header, str], None]:
    def change(header: Header, name: str) -> None:
        header[name][key] = value

    return change


CHANGES: dict[str, Callable[[Header, str], None]] = {
    "is gone": lambda header, name: header.pop(name),
    "has another name": lambda header, name: header.update({f"{name}x": header.pop(name)}),
    "has no type": lambda header, name: header[name].pop("dtype"),
    "has no place": lambda header, name: header[name].pop("data_offsets"),
    "is of an unknown type": _set("dtype", "F17"),
    "is of integers": _set("dtype", "I32"),
    "has another shape": _set("shape", [3, 5]),
    "has a negative shape": _set("shape", [-64, -8]),
    "has a huge shape": _set("shape", [2**62, 2**62]),
    "begins before the file": _set("data_offsets", [-4, 4]),
    "ends after the file": _set("data_offsets", [0, 2**40]),
    "ends before it begins": _set("data_offsets", [64, 0]),
    "stands nowhere": _set("data_offsets", []),
    "stands in a word": _set("data_offsets", "all"),
}


def test_files_that_are_no_weights_of_this_model(
    given: tuple[Path, bytes], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, data = given
    cases = list(damaged(data))
    assert len(cases) >= 110
    file, out = tmp_path / "weights.safetensors", tmp_path / "out"
    for (label, content), mode in zip(cases, cycle(("embedded", "external")), strict=False):
        file.write_bytes(content)
        args = [model, "-s", "ulysses", "-w", 2, "-q", "--weights", file, "-o", out]
        told = refuses(capfd, tmp_path, *args, "--weights-mode", mode)
        assert "weights.safetensors" in told, (label, told)


# --- indices --------------------------------------------------------------------------------------


def indices(names: list[str]) -> Iterator[tuple[str, str]]:
    good = dict.fromkeys(names, "a.safetensors")
    for text in ("", "{", "[]", "null", "7", "{}", '{"weight_map": 3}', '{"weight_map": []}'):
        yield text, text
    for to in (
        "b.safetensors",
        "../a.safetensors",
        "/a.safetensors",
        "",
        ".",
        "a/../../x",
        3,
        None,
    ):
        for name in names:
            yield f"{name} in {to}", json.dumps({"weight_map": {**good, name: to}})
    for name in names:
        rest = {key: value for key, value in good.items() if key != name}
        yield f"without {name}", json.dumps({"weight_map": rest})
        text = json.dumps({"weight_map": good})
        yield f"{name} twice", text.replace(f'"{name}"', f'"{name}": "a.safetensors", "{name}"')
    yield "one more", json.dumps({"weight_map": {**good, "other.weight": "a.safetensors"}})


def test_indices_that_lead_astray(
    given: tuple[Path, bytes], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, data = given
    folder, out = tmp_path / "weights", tmp_path / "out"
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(data)
    cases = list(indices(list(parts(data)[0])))
    assert len(cases) >= 60
    index = folder / "model.safetensors.index.json"
    for label, text in cases:
        index.write_text(text)
        args = [model, "-s", "ulysses", "-w", 2, "-q", "--weights", index, "-o", out]
        assert refuses(capfd, tmp_path, *args), label


# --- options, paths and model files ---------------------------------------------------------------

OPTIONS = (
    ["-w", 0], ["-w", -2], ["-w", "two"], ["-w", 1.5], ["-s", "ulises"], ["-s", ""],
    ["-s", "usp", "--ulysses", 3, "-w", 4], ["-s", "usp", "--ulysses", 0, "-w", 4],
    ["-s", "ulysses", "-w", 4, "--mesh", "cfg=2,x=2"], ["-s", "ulysses", "-w", 3, "--cfg", 2],
    ["-s", "ulysses", "-w", 4, "--mesh", "cfg=2", "--cfg", 2], ["-s", "ulysses", "--tp", 0],
    ["-s", "ulysses", "-w", 4, "--mesh", "cfg=2,cp=4"], ["-s", "ulysses", "-w", 2, "--cfg", -1],
    ["-s", "usp", "--ulysses", 4, "-w", 4, "--cfg", 2], ["--unbatched", "x"],
    ["--cfg", 2, "--unbatched", "y"], ["--combine", "s"], ["--cfg", 2, "--combine", "x"],
    ["--cfg", 2, "--combine", "a b"], ["-s", "ulysses", "-w", 3, "--cfg", 3, "--combine", "s"],
    ["-s", "ulysses", "--ring", 2], ["-s", "usp", "--ulysses", 2, "--ring", 3, "-w", 4],
    ["-p", "fp4"], ["-p", ""], ["--backend", "onnx"], ["--weights", "none.safetensors"],
    ["--weights", "."], ["--weights-mode", "inside"], ["--layout", "wide"], ["--proof", "maybe"],
    ["--rtol", "much"], ["--rtol", -1], ["--jobs", 0], ["--jobs", "all"], ["--memory", "lots"],
    ["--memory", "-1G"], ["--compute-capability", "9"], ["--compute-capability", "sm_90"],
    ["--compute-capability", "99.9"], ["--config", "none.toml"], ["--freeze", "y"],
    ["--resolution", "1x1"], ["--tiny"], ["--plan", "mine"], ["--float32", "nothing.*"],
    ["--allow-cast", "int4"], ["--hardware", "abacus", "-s", "auto"], ["--program", "perhaps"],
    ["--no-proof", "--proof", "network"], ["--unknown"], ["--weights"], ["extra", "words"],
    ["--proof-device", "tpu"], ["--copy-weights", "--weights-mode", "embedded"],
    ["--exchange", "int4"], ["--exchange", ""], ["--quantize", "fp4"], ["--keep", "*"],
    ["--max-loss", 2, "--exchange", "int8"], ["--max-loss", 0.1], ["--calibration", "x"],
    ["--quantize", "fp8", "--calibration", "none.safetensors"],
    ["--quantize", "fp8", "--compute-capability", "8.6"], ["--quantize", "fp8", "--keep", "no"],
    ["--split-after", "nothing"], ["--split-after", "leave"], ["--split-after"],
    ["--split-after", "enter", "--split-after", "enter"],
)  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(map(str, options)))
def test_options(
    options: list[object],
    given: tuple[Path, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    refuses(capfd, tmp_path, given[0], "-s", "ulysses", "-w", 2, "-q", "-o", "out", *options)


RETURN = '    return {"x": torch.randn(1, 16, 8)}'
FILES: dict[str, tuple[str, str]] = {
    "no python": ("import torch\n", "import torch(\n"),
    "an import that fails": ("import torch\n", "import torch, no_such_module\n"),
    "a name that is not there": ("import torch\n", "import torch\nno_such_name\n"),
    "it exits": ("import torch\n", "import torch\nraise SystemExit(0)\n"),
    "no model": ("def build_model", "def built_model"),
    "no inputs": ("def example_inputs", "def examples"),
    "a model that is none": ("    return Model()", "    return 3"),
    "a class instead": ("    return Model()", "    return Model"),
    "a model that raises": ("    return Model()", "    raise ValueError('no weights')"),
    "inputs that raise": (RETURN, "    raise RuntimeError('no inputs')"),
    "inputs that are a list": (RETURN, "    return [torch.randn(1, 16, 8)]"),
    "inputs that are nothing": (RETURN, "    return None"),
    "no inputs at all": (RETURN, "    return {}"),
    "another name": (RETURN, '    return {"y": torch.randn(1, 16, 8)}'),
    "one too many": (RETURN, '    return {"x": torch.randn(1, 16, 8), "y": torch.ones(1)}'),
    "another width": (RETURN, '    return {"x": torch.randn(1, 16, 9)}'),
    "no tensor": (RETURN, '    return {"x": "picture"}'),
    "integers": (RETURN, '    return {"x": torch.ones(1, 16, 8, dtype=torch.int64)}'),
    "no tokens": (RETURN, '    return {"x": torch.randn(1, 0, 8)}'),
    "not a number": (RETURN, '    return {"x": torch.full((1, 16, 8), float("nan"))}'),
    "a plan for nobody": ('"enter": {', '"entrance": {'),
    "a plan for another input": ('{"input": Con', '{"output": Con'),
    "a dimension that is not there": ("split_dim=1", "split_dim=7"),
    "a plan that is none": ("cp_plan = {", "cp_plan = [1]\nother = {"),
    "a module that prints no number": ("return self.leave(", "return str("),
    "nothing returned": ("return self.leave(", "self.leave("),
    "a branch on a number": ("mixed =", "mixed = q if x.sum() > 0 else k; mixed ="),
    "as many tokens as a number says": ("mixed =", "x = x[:, : int(x.abs().sum())]; mixed ="),
    "tokens that are not zero": ("mixed =", "q = q[q > 0]; mixed ="),
}


@pytest.mark.parametrize("name", FILES)
def test_model_files(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    old, new = FILES[name]
    assert old in MODEL_FILE
    model = tmp_path / "model.py"
    model.write_text(MODEL_FILE.replace(old, new))
    out = tmp_path / "out"
    args = [model, "-s", "ulysses", "-w", 2, "-q", "--no-cache", "-o", out]
    refuses(capfd, tmp_path, *args, code=(USAGE, MODEL, 4))


@pytest.mark.parametrize("path", ["none.py", ".", "model.txt", "flux.9-dev", "no.module", ""])
def test_models_that_are_not_there(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    refuses(capfd, tmp_path, "convert", path, "-s", "ulysses", "-w", 2, "-q", "-o", "out")


@pytest.mark.parametrize(
    ("style", "name", "value"),
    [
        ("fp8_scaled", "scale_weight", torch.tensor(-1.0)),
        ("comfy_quant", "input_scale", torch.tensor(torch.nan)),
        ("comfy_quant", "comfy_quant", as_json({"format": "nvfp4"})),
        ("metadata", "weight_scale", torch.ones(3)),
    ],
)
def test_codes_whose_scales_are_wrong(
    style: str,
    name: str,
    value: torch.Tensor,
    capfd: pytest.CaptureFixture[str],
    given: tuple[Path, bytes],
    tmp_path: Path,
) -> None:
    state = {n: t.detach().bfloat16() for n, t in state_of(given[0]).items()}
    layer = next(n for n, t in state.items() if t.dim() == 2).removesuffix(".weight")
    tensors, metadata = quantized(state, [layer], style)
    assert f"{layer}.{name}" in tensors
    file = write(tmp_path / "x.safetensors", {**tensors, f"{layer}.{name}": value}, metadata)
    args = [given[0], "-s", "ulysses", "-w", 2, "-q", "--weights", file, "-o", tmp_path / "out"]
    assert layer in refuses(capfd, tmp_path, *args)


def test_weights_of_another_model(
    given: tuple[Path, bytes], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each tensor in turn is narrower, wider, of one dimension more, or all of another name."""
    model, _ = given
    state, file = state_of(model), tmp_path / "weights.safetensors"
    for name, tensor in state.items():
        for other in (tensor[:-1], tensor[..., :-1], tensor[None], tensor.flatten()[:1]):
            save_file({**state, name: other.contiguous()}, file)
            args = [model, "-s", "ulysses", "-w", 2, "-q", "--weights", file]
            assert name in refuses(capfd, tmp_path, *args, "-o", tmp_path / "out")
