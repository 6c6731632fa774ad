"""Engines with quantizers: what is built is read out of the engine, for building proves nothing."""

import runpy
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cp_convert.backends import BACKENDS, select
from cp_convert.bundle.manifest import Manifest
from cp_convert.engine.build import build, prepare
from cp_convert.engine.lower import lower
from cp_convert.engine.specialise import specialise
from cp_convert.job import STRATEGY_NAMES, Job
from cp_convert.model.cast import cast_inputs
from cp_convert.pipeline import convert
from cp_convert.progress import Progress
from tests.conftest import rewritten, tiny, tiny_inputs
from tests.engine.plans import Plan, read_plan
from tests.runtime.bundles import FLUX
from tests.runtime.ranks import outputs_of

pytestmark = pytest.mark.engine
prepare(BACKENDS["tensorrt-rtx"])


def exchanging(name: str, world: int, eight: str, path: Path) -> Plan:
    inputs = {key: x.bfloat16() for key, x in tiny_inputs(1).items()}
    stages = rewritten(tiny().bfloat16(), inputs, name, world, eight=eight)
    build(specialise(lower(stages.rewritten), 0), 0, path, ["8.0", "8.9", "12.0"])
    return read_plan(path)


@pytest.mark.parametrize(
    ("name", "kind", "codes"),
    [
        ("ulysses", "all_to_all", 2),
        ("ring", "broadcast", 4),
        ("allgather-kv", "all_gather", 1),
        pytest.param("stream-kv", "all_gather", 4, marks=pytest.mark.slow),
        pytest.param("usp", "all_to_all", 3, marks=pytest.mark.slow),
    ],
)
def test_what_is_built_exchanges_int8(name: str, kind: str, codes: int, tmp_path: Path) -> None:
    assert name in STRATEGY_NAMES
    plan = exchanging(name, 4, "qkvo", tmp_path / "engine")
    assert plan.sent(kind).count("int8") == codes
    plain = exchanging(name, 4, "", tmp_path / "plain")
    assert "int8" not in plain.sent(kind)


def test_only_what_is_asked_for_is_codes(tmp_path: Path) -> None:
    plan = exchanging("ulysses", 2, "kv", tmp_path / "engine")
    assert sorted(plan.sent("all_to_all")) == ["bf16", "bf16", "bf16", "int8"]


def converted(tmp_path: Path, **options: Any) -> tuple[Manifest, Plan]:
    """A small FLUX in FP8, and what its first engine says of itself."""
    (tmp_path / "flux.py").write_text(FLUX)
    job = Job(
        model=tmp_path / "flux.py", out=tmp_path / "out", strategy="ulysses", world=2,
        precision="bf16", quantize="fp8", **{"proof": "network", **options},
    )  # fmt: skip
    manifest = convert(job, select("auto", job.compute_capabilities), Progress())
    return manifest, read_plan(tmp_path / "out" / manifest.engines[0].file)


@pytest.mark.parametrize("mode", [pytest.param("embedded", marks=pytest.mark.slow), "external"])
def test_linear_layers_multiply_fp8(mode: str, tmp_path: Path) -> None:
    manifest, plan = converted(
        tmp_path, weights_mode=mode, compute_capabilities=("8.9", "12.0"), exchange="int8"
    )
    told = manifest.quantization
    assert told is not None
    assert told.linears is not None
    assert told.loss is not None
    assert told.codes is not None
    assert len(told.linears.layers) == 17
    products = Counter(plan.products())
    # Embedded, the builder joins those of one input.
    assert products["fp8_e4m3", "fp8_e4m3"] == (17 if mode == "external" else 10)
    assert not any("fp8_e4m3" in one for one in products if len(set(one)) > 1)
    assert plan.sent("all_to_all").count("int8") == 2
    assert manifest.runs_on.compute_capabilities == ["8.9", "12.0"]
    network = manifest.proof.network
    assert network is not None
    for errors in (manifest.proof.algebra, network.algebra):
        assert max(e.max for e in errors) < 1e-5
    for errors in (told.codes.ranks, told.codes.networks):
        assert len(errors) == 2
        assert max(e.max for e in errors) <= told.codes.bound.max
    assert manifest.proof.control is not None
    assert manifest.proof.control.max > 1e-3


def test_codes_of_external_weights_are_stored_once_and_run_over_gloo(tmp_path: Path) -> None:
    from cp_convert.bundle import folder

    manifest, _ = converted(tmp_path, weights_mode="external", proof="program", program="yes")
    codes = [w for w in manifest.weights if w.dtype == "float8_e4m3fn"]
    assert len(codes) == 17
    assert {w.file for w in codes} == {"constants.safetensors"}
    stored = load_file(tmp_path / "out" / "constants.safetensors")
    for weight in codes:
        assert stored[weight.name].dtype == torch.float8_e4m3fn
        assert f"{weight.name}".startswith("constants.")
    assert all(check.problem is None for check in folder.verify(tmp_path / "out"))
    module = SimpleNamespace(**runpy.run_path(str(tmp_path / "flux.py")))
    inputs = cast_inputs(module.example_inputs(), torch.bfloat16)
    torch.save(inputs, tmp_path / "inputs.pt")
    both = outputs_of([tmp_path / "out"], 2, tmp_path)
    assert torch.equal(both[0][0][0], both[1][0][0])
    with torch.no_grad():
        dense = module.build_model().eval()(**module.example_inputs())[0]
    off = (both[0][0][0].float() - dense).norm() / dense.norm()
    assert 1e-4 < off < 0.2


def test_the_least_that_multiplies_fp8_is_what_an_engine_needs(tmp_path: Path) -> None:
    manifest, _ = converted(tmp_path, weights_mode="external", proof="none", program="no")
    assert manifest.runs_on.compute_capabilities == ["8.9+"]
    assert manifest.backend.compute_capabilities == ["8.9", "12.0+"]
