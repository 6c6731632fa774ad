"""One thing changes, and nothing else: what was made before must not come back."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cp_convert.backends import BACKENDS, select
from cp_convert.cache import fingerprint
from cp_convert.cache.fingerprint import code_key, program_key, tool_key, versions
from cp_convert.capture.capture import traced
from cp_convert.capture.trace import trace
from cp_convert.ir.identity import identity
from cp_convert.ir.program import Program
from cp_convert.ir.source import Source
from cp_convert.job import Job
from cp_convert.model.load import load, surroundings
from cp_convert.pipeline import convert
from cp_convert.progress import Clock, Progress
from cp_convert.recall import job_key, values_key

MODEL = """
import os
from pathlib import Path
import torch
from torch import nn
from torch.nn import functional as F
import neighbour_of_keys

HERE = Path(__file__).parent
AT_IMPORT = float((HERE / "at_import.txt").read_text())
GLOBAL = 1.5

def closure():
    number = 1.25
    return lambda x: x * number

def defaulted(x, number=1.75):
    return x * number

class Model(nn.Module):
    ATTRIBUTE = 1.125

    def __init__(self):
        super().__init__()
        self.qkv, self.leave = nn.Linear(8, 48), nn.Linear(16, 8)
        self.own = 2.0
        self.scaled = closure()
        self.register_buffer("table", torch.full((8,), 1.5))

    def forward(self, x, factor, mask, chosen):
        x = self.scaled(x * AT_IMPORT * float((HERE / "in_forward.txt").read_text()))
        x = defaulted(x) * float(os.environ.get("CP_TEST_NUMBER", "1")) * GLOBAL * factor
        x = x * self.ATTRIBUTE * self.own * self.table * neighbour_of_keys.NUMBER + mask
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.leave(x) * chosen.sum().item()

def build_model():
    torch.manual_seed(0)
    return Model()

freeze = ("chosen",)

def example_inputs():
    torch.manual_seed(1)
    return {"x": torch.randn(1, 16, 8), "factor": 3, "mask": torch.randn(1, 16, 8),
            "chosen": torch.tensor([1, 0, 1])}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "neighbour_of_keys.py").write_text("NUMBER = 1.0\n")
    for name in ("at_import.txt", "in_forward.txt"):
        (tmp_path / name).write_text("1.0")
    sys.modules.pop("neighbour_of_keys", None)
    yield tmp_path
    sys.modules.pop("neighbour_of_keys", None)


@dataclass
class Start:
    """What a change may reach: files before the model is loaded, then the model itself."""

    folder: Path
    patch: pytest.MonkeyPatch
    source: Source

    @property
    def model(self) -> Any:
        return self.source.module

    @property
    def python(self) -> dict[str, Any]:
        """The model file's globals."""
        found: dict[str, Any] = type(self.model).forward.__globals__
        return found


Change = Callable[[Start], None]


def job_of(folder: Path, **options: Any) -> Job:
    given = {"precision": "fp32", "strategy": "ulysses", "world": 2, **options}
    return Job(model=folder / "model.py", out=folder / "bundle", **given)


@dataclass(frozen=True)
class Keys:
    """Of the traced program alone, of all that is made from it, of the whole job."""

    program: str | None
    made: str | None
    job: str | None


def keys_of(start: Start, change: Change) -> Keys:
    change(start)
    job, source = job_of(start.folder), start.source
    values = values_key(job, source)
    found = traced(source, Clock(Progress()))
    made = program_key(tool_key(BACKENDS["tensorrt-rtx"]), found)
    return Keys(identity(found.program, found.applied), made, job_key(job, values, [made]))


def number_in(name: str) -> Change:
    return lambda start: start.python.update({name: 7.0})


def weights_in_place(start: Start) -> None:
    with torch.no_grad():
        start.model.leave.weight[0, 0] += 1e-3


def package_version(start: Start) -> None:
    """As after an upgrade that left no file of ours as it was, or a patched package did not."""
    start.patch.setattr(fingerprint, "metadata", metadata)  # they are read again
    one = type(metadata.distribution("torch"))
    before = one.version.fget  # type: ignore[attr-defined]
    patched = property(lambda it: "0+other" if it.metadata["Name"] == "numpy" else before(it))
    start.patch.setattr(one, "version", patched)


def given(name: str, value: Any) -> Change:
    return lambda start: start.source.inputs.update({name: value})


IN_THE_PROGRAM: dict[str, Change] = {
    "file read while forward is traced": lambda s: put(s.folder / "in_forward.txt"),
    "environment variable": lambda s: s.patch.setenv("CP_TEST_NUMBER", "7"),
    "global of the model file": number_in("GLOBAL"),
    "what importing it read": number_in("AT_IMPORT"),
    "class attribute": lambda s: setattr(type(s.model), "ATTRIBUTE", 7.0),
    "attribute": lambda s: setattr(s.model, "own", 7.0),
    "closure variable": lambda s: setattr(s.model.scaled.__closure__[0], "cell_contents", 7.0),
    "default argument": lambda s: setattr(s.python["defaulted"], "__defaults__", (7.0,)),
    "neighbour module": lambda s: setattr(s.python["neighbour_of_keys"], "NUMBER", 7.0),
    "buffer": lambda s: s.model.table[0].fill_(7.0),
    "Python number among the inputs": given("factor", 7),
    "frozen input": given("chosen", torch.tensor([1, 1, 1])),
    "frozen input that decides the same": given("chosen", torch.tensor([1, 1, 0])),
    "last bit of a number": lambda s: setattr(s.model, "own", 2.0000000000000004),
    "integer for a float": lambda s: setattr(s.model, "own", 2),
}
BESIDE_THE_PROGRAM: dict[str, Change] = {
    "weights in place": weights_in_place,
    "input": given("mask", torch.ones(1, 16, 8)),
    "package version": package_version,
}


def put(file: Path) -> None:
    file.write_text("7.0")


def loaded(folder: Path, patch: pytest.MonkeyPatch) -> Start:
    return Start(folder, patch, load(job_of(folder)))


@pytest.mark.parametrize("what", [*IN_THE_PROGRAM, *BESIDE_THE_PROGRAM])
def test_one_thing_changes(what: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No source changes here, only the one value; in every case the job has another key."""
    before = keys_of(loaded(folder, monkeypatch), lambda _: None)
    assert None not in (before.program, before.made, before.job)
    assert keys_of(loaded(folder, monkeypatch), lambda _: None) == before
    after = keys_of(loaded(folder, monkeypatch), (IN_THE_PROGRAM | BESIDE_THE_PROGRAM)[what])
    assert after.job is not None
    assert after.job != before.job
    assert (after.program != before.program) == (what in IN_THE_PROGRAM)
    expected = what in IN_THE_PROGRAM or what == "package version"
    assert (after.made != before.made) == expected  # weights are no part of a trace


def test_a_number_in_a_file_gives_other_engines(folder: Path) -> None:
    """The whole way, with a proof: made, recalled, made anew, and the first one still there."""
    found = []
    for number in ("1.0", "1.0", "7.0", "1.0"):
        (folder / "in_forward.txt").write_text(number)
        job = job_of(folder, cache=folder / "cache", force=True, proof="program", jobs=1)
        found.append(convert(job, select("auto"), Progress()))
    one, same, other, first = ([e.sha256 for e in m.engines] for m in found)
    assert one == same == first
    assert not set(one) & set(other)
    assert [m.proof.recalled for m in found] == [False, True, False, True]
    # What was loaded to look it up had been traced; it is loaded again to be measured.
    assert [list(m.timings)[:4] for m in found[2:]] == [
        ["load", "trace", "recall", "measure"],
        ["load", "trace", "recall"],
    ]


class Regions(nn.Module):
    """Autocast, and a part without gradients: graphs within the graph."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16, factor: float = 2.0) -> None:
        super().__init__()
        self.dtype, self.factor = dtype, factor
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", self.dtype):
            x = self.linear(x * self.factor)
        with torch.enable_grad():
            return x.float() * self.factor


def program_of(module: nn.Module, x: Tensor) -> Program:
    return trace(module.eval(), {"x": x}, {})[0]


def test_regions_are_told_with_all_they_hold() -> None:
    x = torch.randn(2, 8)
    program = program_of(Regions(), x)
    assert any("wrap_with" in str(n.target) for n in program.graph_module.graph.nodes)
    digests = {
        identity(program_of(module, x))
        for module in (Regions(), Regions(), Regions(torch.float16), Regions(factor=3.0))
    }
    assert None not in digests
    assert len(digests) == 3


def test_how_a_parameter_lies_counts() -> None:
    module, x = Regions(), torch.randn(2, 8)
    first = identity(program_of(module, x))
    module.linear.weight = nn.Parameter(module.linear.weight.detach().t().contiguous().t())
    assert identity(program_of(module, x)) != first


def test_what_cannot_be_read_gives_no_key() -> None:
    program = program_of(Regions(), torch.randn(2, 8))
    assert identity(program) is not None
    odd = program.exported.constants
    name, node = "odd", program.graph_module.graph.find_nodes(op="placeholder")[0].name
    odd[name] = torch.empty(2, device="meta")
    program.exported.graph_signature.input_specs[0].target = name
    program.exported.graph_signature.input_specs[0].kind = type(
        program.exported.graph_signature.input_specs[0].kind
    ).CONSTANT_TENSOR
    assert program.state[node].is_meta
    assert identity(program) is None


def test_ranks_with_parameters_of_their_own_have_no_key(folder: Path) -> None:
    source = load(job_of(folder))
    found = traced(source, Clock(Progress()))
    peered = replace(found, program=replace(found.program, peers=({},)))
    assert program_key("tool", found) is not None
    assert program_key("tool", peered) is None
    assert values_key(job_of(folder), replace(source, peers=(source.module,))) is None


def test_settings_of_torch_count(folder: Path) -> None:
    found = traced(load(job_of(folder)), Clock(Progress()))
    key = program_key("tool", found)
    assert program_key("another tool", found) != key
    torch.set_default_dtype(torch.float64)
    try:
        assert program_key("tool", found) != key
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_code_of_a_neighbour_counts(folder: Path) -> None:
    """For the proof: what the model does when it is called stands in no trace."""
    job = job_of(folder)
    with surroundings(job):
        load(job)
        first = code_key()
        assert code_key() == first
        (folder / "neighbour_of_keys.py").write_text("NUMBER = 1.0  # and more\n")
        assert code_key() != first


def test_versions_follow_requirements() -> None:
    found = versions(["torch", "no-such-distribution"])
    assert found["torch"] == metadata.version("torch")
    assert "sympy" in found  # torch requires it
    assert "pytest" not in found
