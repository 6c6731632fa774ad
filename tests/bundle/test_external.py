"""Weights outside the engines, and one engine for all ranks."""

import json
import os
import runpy
from collections.abc import Callable
from pathlib import Path
from threading import Event

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cp_convert import bundle, cli
from cp_convert.bundle import manifest as m
from cp_convert.bundle.external import place
from cp_convert.bundle.folder import CONSTANTS, WEIGHTS
from cp_convert.cache.store import Cache
from cp_convert.engine.fold_weights import fold_weights
from cp_convert.engine.lower import lower
from cp_convert.engine.one_program import by_scatter, why_not_shared
from cp_convert.engine.specialise import specialise
from cp_convert.errors import CannotShard, WeightsError
from cp_convert.job import Job
from cp_convert.model.checkpoint import locate
from cp_convert.model.load import load
from cp_convert.prove.lockstep import run
from cp_convert.prove.measure import flat_inputs
from tests.conftest import rewritten, shorter, tiny, tiny_inputs


def convert(*args: object) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in args])
    return int(stop.value.code or 0)


def manifest_of(folder: Path) -> m.Manifest:
    return bundle.read(folder)[0]


def numbers_of(weight: m.Weight, folder: Path) -> torch.Tensor:
    """What a user of the bundle would bind, read from the bytes that the manifest names."""
    with (folder / weight.file).open("rb") as file:
        file.seek(weight.offset)
        raw = bytearray(file.read(weight.bytes))
    return torch.frombuffer(raw, dtype=getattr(torch, weight.dtype)).reshape(weight.shape)


def test_offsets_are_those_of_the_numbers(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(7), "c": torch.randn(2, 2).bfloat16()}
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    for name, at in locate(path).items():
        raw = path.read_bytes()[at.offset : at.offset + at.size]
        assert at.dtype == tensors[name].dtype
        found = torch.frombuffer(bytearray(raw), dtype=at.dtype).reshape(tensors[name].shape)
        assert torch.equal(found, tensors[name])


def test_what_is_written_is_a_safetensors_file(tmp_path: Path) -> None:
    tensors = {
        "half": torch.randn(3, 5).bfloat16(),
        "turned": torch.randn(4, 6).T,
        "one": torch.tensor(2.0),
        "long": torch.arange(3),
    }
    found = place(tensors, {}, tmp_path, Event(), copy=False, cache=Cache(None))
    loaded = load_file(tmp_path / WEIGHTS)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    for name, (weight,) in found.items():
        digest = bundle.sha256(tmp_path / weight.file, weight.offset, weight.size)
        assert (weight.name, weight.sha256) == (name, digest)
        assert weight.shape == tuple(tensors[name].shape)


def test_a_stopped_search_leaves_at_once(tmp_path: Path) -> None:
    stop = Event()
    stop.set()
    assert place({"a": torch.ones(2)}, {}, tmp_path, stop, copy=False, cache=Cache(None)) == {}


@pytest.mark.engine
@pytest.mark.parametrize(
    ("strategy", "layout"),
    [
        ("ulysses", "shared"),
        ("ulysses", "per-rank"),
        ("ring", "shared"),
        pytest.param("ring", "per-rank", marks=pytest.mark.slow),
        ("allgather-kv", "shared"),
        pytest.param("allgather-kv", "per-rank", marks=pytest.mark.slow),
    ],
)
def test_engines_without_weights_are_proven(strategy: str, layout: str, tmp_path: Path) -> None:
    path, out = shorter("plain_dit", tmp_path), tmp_path / "bundle"
    status = convert(
        path, "-s", strategy, "-w", 3, "-p", "fp32", "-o", out, "-q",
        "--proof", "network", "--weights-mode", "external", "--layout", layout,
    )  # fmt: skip
    assert status == 0
    told = manifest_of(out)
    assert (told.weights_mode, told.layout, told.proof.level) == ("external", layout, "network")
    engines = {(out / engine.file).stat().st_ino for engine in told.engines}
    digests = {engine.sha256 for engine in told.engines}
    assert len(engines) == len(digests) == (1 if layout == "shared" else 3)
    assert {c.kind for c in told.collectives if c.kind == "scatter"} == (
        {"scatter"} if layout == "shared" else set()
    )
    model = runpy.run_path(str(path))["build_model"]()
    parameters = dict(model.named_parameters())
    assert {w.name for w in told.weights} == set(parameters)
    assert all(torch.equal(numbers_of(w, out), parameters[w.name]) for w in told.weights)
    assert {w.file for w in told.weights} == {WEIGHTS}
    assert not any(check.problem for check in bundle.verify(out))


@pytest.fixture
def saved(model_file: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """A model file and its weights, in the precision that it is converted in."""
    path = model_file()
    namespace: dict[str, object] = {}
    exec(compile(path.read_text(), str(path), "exec"), namespace)
    module = namespace["build_model"]()  # type: ignore[operator]
    weights = tmp_path / "weights" / "model.safetensors"
    weights.parent.mkdir()
    state = {name: tensor.half().contiguous() for name, tensor in module.state_dict().items()}
    save_file(state, weights)
    return path, weights


@pytest.mark.engine
def test_the_users_own_file_is_named_and_not_copied(
    saved: tuple[Path, Path], tmp_path: Path
) -> None:
    path, weights = saved
    out = tmp_path / "bundle"
    options = ["-s", "ulysses", "-w", 2, "-q", "--weights", weights, "--weights-mode", "external"]
    assert convert(path, *options, "-o", out) == 0
    told = manifest_of(out)
    assert told.proof.status == "passed"
    assert {w.file for w in told.weights} == {str(weights.resolve())}
    assert not (out / WEIGHTS).exists()
    with safe_open(weights, framework="pt") as stored:
        assert all(torch.equal(numbers_of(w, out), stored.get_tensor(w.name)) for w in told.weights)
    assert convert(path, *options, "-o", out, "--force", "--copy-weights") == 0
    assert {w.file for w in manifest_of(out).weights} == {WEIGHTS}
    # In another precision the numbers are others, so they are the bundle's own.
    assert convert(path, *options, "-o", out, "--force", "-p", "fp32") == 0
    assert {(w.file, w.dtype) for w in manifest_of(out).weights} == {(WEIGHTS, "float32")}


@pytest.mark.engine
def test_a_changed_weight_is_noticed(saved: tuple[Path, Path], tmp_path: Path) -> None:
    path, weights = saved
    out = tmp_path / "bundle"
    options = ["-s", "ring", "-w", 2, "-q", "--weights", weights, "--weights-mode", "external"]
    assert convert(path, *options, "-o", out, "--no-proof") == 0
    assert not any(check.problem for check in bundle.verify(out))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    (problem,) = [check.problem for check in bundle.verify(out) if check.problem]
    assert problem.startswith("SHA-256 of 1 weights differs")
    os.truncate(weights, len(data) - 8)
    assert [c.problem[:11] for c in bundle.verify(out) if c.problem] == ["ends before"]
    weights.unlink()
    (last,) = [check for check in bundle.verify(out) if check.problem]
    assert (last.subject, last.problem) == (str(weights.resolve()), "missing")


@pytest.mark.engine
@pytest.mark.parametrize("name", ["ulysses", "ring", "allgather-kv"])
def test_one_program_for_all_ranks_means_the_same(name: str) -> None:
    stages = rewritten(tiny(), tiny_inputs(), name, 4)
    program = stages.rewritten
    assert why_not_shared(program) is None  # type: ignore[arg-type]
    lowered = lower(by_scatter(program))  # type: ignore[arg-type]
    flat = flat_inputs(program, tiny_inputs())
    for (ours,), (theirs,) in zip(run(lowered, flat, 4), run(program, flat, 4), strict=True):
        torch.testing.assert_close(ours, theirs)
    first, last = (specialise(lowered, rank).graph_module.graph for rank in (0, 3))
    assert [n.format_node() for n in first.nodes] == [n.format_node() for n in last.nodes]


def test_groups_cannot_share_an_engine() -> None:
    stages = rewritten(tiny(), tiny_inputs(), "usp", 4)
    assert "groups" in str(why_not_shared(stages.rewritten))  # type: ignore[arg-type]


@pytest.mark.engine
def test_a_layout_that_cannot_be_is_refused(
    model_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = convert(
        model_file(), "-s", "usp", "--ulysses", 2, "-w", 4, "--layout", "shared", "--unsafe-groups",
        "-o", tmp_path / "bundle", "--no-proof", "--json",
    )  # fmt: skip
    assert status == CannotShard.exit_code
    assert "groups of ranks" in json.loads(capsys.readouterr().out)["error"]["message"]
    assert not (tmp_path / "bundle").exists()


def test_a_truncated_header_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((1000).to_bytes(8, "little") + b"{")
    with pytest.raises(WeightsError):
        locate(path)


PARTS = (
    "self.enter, self.qkv, self.leave = nn.Linear(8, 64), nn.Linear(64, 192), nn.Linear(64, 8)",
    """self.enter, self.leave = nn.Linear(8, 64), nn.Linear(64, 8)
        self.qk, self.v = nn.Linear(64, 128, bias=False), nn.Linear(64, 64, bias=False)
        self.scale, self.shift = nn.Parameter(torch.randn(64)), nn.Parameter(torch.randn(64))""",
)
JOINED = (
    "self.qkv(self.enter(x))",
    "functional.linear(self.enter(x), torch.cat([self.qk.weight, self.v.weight]))",
)
APART = (
    "self.qkv(self.enter(x))",
    "torch.cat([self.qk(self.enter(x)), self.v(self.enter(x))], -1)",
)


def scaled(expression: str) -> tuple[str, str]:
    flat = "mixed.transpose(1, 2).flatten(2)"
    return flat, f"{flat} * {expression}"


@pytest.mark.engine
@pytest.mark.parametrize("layout", ["shared", "per-rank"])
def test_what_follows_from_weights_is_computed_once(
    layout: str, model_file: Callable[..., Path], tmp_path: Path
) -> None:
    """A QKV that forward joins becomes one input, exactly; its parts are no inputs any more."""
    model = model_file(PARTS, JOINED, scaled("self.scale.sigmoid()"))
    options = ["-s", "ulysses", "-w", 2, "--weights-mode", "external", "--layout", layout, "-q"]
    options += ["--precision", "fp32", "--proof", "network", "--cache", tmp_path / "cache"]
    held = dict(load(Job(model, "ulysses", 2, Path(), precision="fp32")).module.named_parameters())
    for out in (tmp_path / "first", tmp_path / "again"):
        assert convert(model, *options, "-o", out) == 0
        told = manifest_of(out)
        assert told.proof.recalled == (out.name == "again")
        assert not any(check.problem for check in bundle.verify(out))
        names = {w.name for w in told.weights}
        computed = [w for w in told.weights if w.name.startswith("constants.")]
        assert {w.file for w in computed} == {CONSTANTS}
        assert not names & {"qk.weight", "v.weight", "scale"}
        assert names >= {"enter.weight", "leave.bias"}
        scale, qkv = sorted(computed, key=lambda w: len(w.shape))
        assert torch.equal(numbers_of(scale, out), held["scale"].sigmoid())
        joined = torch.cat([held["qk.weight"], held["v.weight"]])
        assert torch.equal(numbers_of(qkv, out).reshape(joined.shape), joined)


@pytest.mark.parametrize(
    ("expression", "precision", "computed"),
    [
        ("(self.scale + self.shift)", "fp32", 1),
        ("(self.scale.float() + self.shift.float())", "bf16", 1),
        ("(self.scale + self.shift)", "bf16", 1),  # in float32, rounded in the engine
        ("self.scale.reshape(8, 8).reshape(64)", "fp32", 0),  # a view
        ("torch.sigmoid(x.mean() + self.scale)", "fp32", 0),  # of an input as well
    ],
)
def test_what_is_not_exact_or_costs_nothing_stays_in_the_engine(
    expression: str, precision: str, computed: int, model_file: Callable[..., Path]
) -> None:
    model = model_file(PARTS, APART, scaled(f"({expression}).to(mixed.dtype)"))
    source = load(Job(model, "ulysses", 2, Path(), precision=precision, plan="model"))
    stages = rewritten(source.module, source.inputs, "ulysses", 2, source.plan)
    program = stages.rewritten
    names = {name: name for name in program.state}
    folded = fold_weights(program, names)  # type: ignore[arg-type]
    assert len(folded.constants) == computed
    assert {tensor.dtype for tensor in folded.constants.values()} <= {torch.float32}
    embedded = fold_weights(program, {})  # type: ignore[arg-type]
    assert (embedded.names, embedded.constants) == ({}, {})
    assert len(embedded.program.state) - len(program.state) == computed


NORMED = """
        self.leave = nn.utils.parametrizations.weight_norm(nn.Linear(64, 8))
        self.qkv = nn.utils.parametrizations.spectral_norm(self.qkv).eval()
        self.left = nn.Linear(3, 3)

    def forward"""


@pytest.mark.engine
@pytest.mark.parametrize("mode", ["embedded", "external"])
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_normed_weights_are_computed_once(
    mode: str, precision: str, model_file: Callable[..., Path], tmp_path: Path
) -> None:
    """weight_norm has no converter; spectral_norm would run at every call. ``left`` is not read."""
    model = model_file(("\n    def forward", NORMED))
    options = ["-s", "ulysses", "-w", 2, "--weights-mode", mode, "-p", precision, "-q"]
    out = tmp_path / "bundle"
    assert convert(model, *options, "--proof", "network", "--no-cache", "-o", out) == 0
    told = manifest_of(out)
    assert [check.problem for check in bundle.verify(out) if check.problem] == []
    if mode == "external":
        constants = [w for w in told.weights if w.name.startswith("constants.")]
        assert sorted(w.shape for w in constants) == [[8, 64], [192, 64]]
        others = {w.name for w in told.weights} - {w.name for w in constants}
        assert others == {"enter.weight", "enter.bias", "qkv.bias", "leave.bias"}
