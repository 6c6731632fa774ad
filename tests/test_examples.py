"""Every example, with every strategy, to real engines: the whole road."""

import json
import runpy
from collections import Counter
from itertools import product
from pathlib import Path

import jsonschema
import pytest
import torch
from safetensors.torch import save_file

from cp_convert import bundle, cli
from cp_convert.bundle import manifest as m
from cp_convert.strategies import STRATEGIES
from cp_convert.trt.libraries import trt
from tests.conftest import EXAMPLES, SHORTER, example, shorter

pytestmark = pytest.mark.engine

MALFORMED = 1 << 5
CROSS = {"flux": 0, "wan": 2, "plain_dit": 0}
REWRITTEN = {"flux": 4, "wan": 2, "plain_dit": 1}


def convert(*args: object) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in args])
    return int(stop.value.code or 0)


def assert_built_by_tensorrt(engine: Path) -> None:
    """TensorRT itself looks at the bytes; running them would need a GPU."""
    runtime = trt.Runtime(trt.Logger(trt.Logger.INTERNAL_ERROR))
    _, diagnostics = runtime.get_engine_validity(engine.read_bytes())
    assert not diagnostics & MALFORMED


SELDOM = {
    *(("flux", one) for one in ("stream-kv", "ring", "allgather-kv")),
    *(("wan", one) for one in ("stream-kv", "ring", "allgather-kv")),
}


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        pytest.param(*one, marks=pytest.mark.slow) if one in SELDOM else one
        for one in product(("flux", "wan", "plain_dit"), STRATEGIES)
    ],
)
def test_an_example_becomes_a_proven_bundle(
    name: str, strategy: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    model = shorter(name, tmp_path) if name in SHORTER else EXAMPLES / f"{name}.py"
    args = [model, "--strategy", strategy, "--world", 2, "-o", out]
    assert convert(*args, "--proof", "network", "--json") == 0
    document = json.loads(capfd.readouterr().out)
    jsonschema.validate(document["manifest"], json.loads(m.SCHEMA_FILE.read_text()))
    manifest, _ = bundle.read(out)
    assert all(check.problem is None for check in bundle.verify(out))
    for rank in range(2):
        assert_built_by_tensorrt(out / bundle.engine_name(rank))
    assert manifest.proof.status == "passed"
    assert max(e.max for e in manifest.proof.algebra) < 1e-5
    assert manifest.proof.control is not None
    assert manifest.proof.control.max > 1e-3
    assert manifest.proof.level == "network"
    assert manifest.proof.network is not None
    assert max(e.max for e in manifest.proof.network.algebra) < 1e-5
    done = Counter(site.rewritten for site in manifest.attention)
    assert (done[True], done[False]) == (REWRITTEN[name], CROSS[name])
    per_attention = {"ulysses": 2, "allgather-kv": 1, "ring": 1, "stream-kv": 4}[strategy]
    total = sum(one.count for one in manifest.collectives)
    assert total == per_attention * REWRITTEN[name] + 1
    assert [io.name for io in manifest.io if io.mode == "input"] == list(
        example(name).example_inputs()
    )


@pytest.mark.parametrize(
    ("name", "attentions"), [pytest.param("flux", 4, marks=pytest.mark.slow), ("plain_dit", 3)]
)
def test_an_example_as_long_as_it_is(name: str, attentions: int, tmp_path: Path) -> None:
    """The tests above shorten it."""
    out = tmp_path / "out"
    args = [EXAMPLES / f"{name}.py", "-s", "ulysses", "-w", 2, "-o", out]
    assert convert(*args, "--proof", "network") == 0
    manifest, _ = bundle.read(out)
    assert [site.rewritten for site in manifest.attention] == [True] * attentions
    assert manifest.proof.network is not None
    assert max(e.max for e in manifest.proof.network.algebra) < 1e-5


def test_a_world_of_four_in_bfloat16(tmp_path: Path) -> None:
    out = tmp_path / "out"
    args = [shorter("plain_dit", tmp_path), "-s", "ring", "-w", 4, "-p", "bf16", "-o", out]
    assert convert(*args) == 0
    manifest, _ = bundle.read(out)
    assert [e.rank for e in manifest.engines] == [0, 1, 2, 3]
    assert len({e.sha256 for e in manifest.engines}) == 4, "each rank's slice is its own"
    assert {io.dtype for io in manifest.io} == {"bfloat16", "int64"}
    assert all(e.max <= manifest.proof.bound.max for e in manifest.proof.ranks)  # type: ignore[union-attr]


def test_a_ring_of_three_over_heads_of_64_is_built_in_bfloat16(tmp_path: Path) -> None:
    """1.7.1 ended by SIGSEGV: attentions that share a query are made different."""
    out, external = tmp_path / "out", ("--weights-mode", "external", "--layout", "shared")
    args = [EXAMPLES / "flux.py", "-s", "ring", "-w", 3, "-p", "bf16", "-o", out, *external]
    assert convert(*args, "--no-proof") == 0
    manifest, _ = bundle.read(out)
    assert {site.way for site in manifest.attention if site.rewritten} == {"fused"}
    assert_built_by_tensorrt(out / manifest.engines[0].file)


def test_a_world_of_one_is_a_plain_engine(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert convert(shorter("plain_dit", tmp_path), "-s", "ulysses", "-w", 1, "-o", out) == 0
    manifest, _ = bundle.read(out)
    assert manifest.collectives == []
    assert manifest.backend.workarounds == []
    assert {site.reason for site in manifest.attention} == {"the world is 1"}


def test_weights_are_taken_from_the_file_and_no_proof_is_said(tmp_path: Path) -> None:
    path = shorter("plain_dit", tmp_path)
    model = runpy.run_path(str(path))["build_model"]()
    torch.manual_seed(7)
    tensors = {n: torch.randn_like(t) * 0.05 for n, t in model.state_dict().items()}
    save_file(tensors, tmp_path / "w.safetensors")
    args = [path, "-s", "allgather-kv", "-w", 2, "-p", "fp16"]
    weights = ["--weights", tmp_path / "w.safetensors"]
    assert convert(*args, "-o", tmp_path / "own", *weights, "--no-proof") == 0
    assert convert(*args, "-o", tmp_path / "own", *weights, "--force") == 0
    manifest, _ = bundle.read(tmp_path / "own")
    assert manifest.model.weights == str(tmp_path / "w.safetensors")
    engine = (tmp_path / "own" / "rank0.engine").read_bytes()
    needle = tensors["blocks.0.qkv.bias"].half().numpy().tobytes()
    assert needle in engine, "the file's numbers are inside the engine"


def test_no_proof_is_recorded(tmp_path: Path) -> None:
    out = tmp_path / "out"
    args = [shorter("plain_dit", tmp_path), "-s", "ring", "-w", 1, "-o", out]
    assert convert(*args, "--no-proof") == 0
    manifest, _ = bundle.read(out)
    assert manifest.proof.status == "skipped"
    assert "prove" not in manifest.timings
