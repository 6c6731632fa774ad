"""Engines that multiply NVFP4: the types of products are read out of what was built."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.checkpoints.authors import FLUX_LAYERS, original_flux, smaller_flux
from benchmarks.checkpoints.comfy import in_nvfp4 as comfy_nvfp4
from benchmarks.checkpoints.comfy import quantized
from benchmarks.checkpoints.comfy import write as write_file
from benchmarks.checkpoints.modelopt import FILE, in_nvfp4, mixed, said, write
from benchmarks.plans import Plan, read_plan
from cp_convert.bundle.manifest import Manifest, Weight
from tests.engine.test_quantized import (
    check_proof,
    check_run,
    checkpoint,
    converted,
    dense_of,
)
from tests.engine.test_quantized_models import layers_of
from tests.runtime.bundles import FLUX, QWEN

pytestmark = pytest.mark.engine
SLOW = pytest.mark.slow
FP4 = "fp4_e2m1"


def in_nvfp4_engines(tmp_path: Path, model: str, **options: Any) -> tuple[Manifest, Plan]:
    """The conversion for 12.0, proven down to the networks."""
    return converted(
        tmp_path, model, compute_capabilities=("12.0",), proof="network", **options
    )  # fmt: skip


def check_products(manifest: Manifest, plan: Plan, count: int) -> None:
    """That many are of codes, with scales of blocks for both operands; none has one operand."""
    products = Counter(plan.products())
    assert products[FP4, FP4] == count
    assert all(len(set(one)) == 1 for one in products)
    of_codes = [o for o in plan.operators if o.reads[:2] == (FP4, FP4)]
    assert all(o.reads.count("fp8_e4m3") == 2 for o in of_codes)
    assert manifest.quantization is not None
    linears = manifest.quantization.linears
    assert linears is not None
    assert linears.codes == "nvfp4"
    assert linears.products == {"nvfp4": count, "bf16": len(linears.kept)}
    assert len(linears.layers) == count


def check_outside(manifest: Manifest, out: Path, count: int) -> list[Weight]:
    """Codes and scales of their blocks, side by side; the engine has neither."""
    scales = {w.name: w for w in manifest.weights if w.dtype == "float8_e4m3fn"}
    codes = [w for w in manifest.weights if w.dtype == "uint8"]
    assert len(codes) == len(scales) == count
    engine = (out / manifest.engines[0].file).read_bytes()
    for one in codes:
        own = scales[f"{one.name}_scale"]
        assert own.shape == [one.shape[0], one.shape[1] // 8]
        assert Path(own.file).name == Path(one.file).name
        numbers = (out / own.file).read_bytes()[own.offset : own.offset + own.bytes]
        assert len(set(numbers)) > 2
        assert numbers not in engine
    return [*codes, *scales.values()]


@pytest.mark.parametrize(
    ("strategy", "world", "model", "count"),
    [
        ("ulysses", 2, FLUX, 17),
        pytest.param("allgather-kv", 4, FLUX, 17, marks=SLOW),
        pytest.param("ring", 2, QWEN, 9, marks=SLOW),
    ],
)
def test_linear_layers_multiply_codes(
    strategy: str, world: int, model: str, count: int, tmp_path: Path
) -> None:
    manifest, plan = in_nvfp4_engines(
        tmp_path, model, strategy=strategy, world=world, quantize="nvfp4", program="yes"
    )
    check_products(manifest, plan, count)
    assert manifest.runs_on.compute_capabilities == ["12.0"]
    check_proof(manifest, world)
    codes = check_outside(manifest, tmp_path / "out", count)
    assert {w.file for w in codes} == {"constants.safetensors"}
    if world == 2:
        check_run(tmp_path / "out", *dense_of(tmp_path / "flux.py"), most=0.4)


@pytest.mark.parametrize("rank", [0, pytest.param(8, marks=SLOW)])
def test_a_quantized_checkpoint_is_multiplied_as_it_is(rank: int, tmp_path: Path) -> None:
    """Codes and scales stay in the user's file; a low rank beside is two products of numbers."""
    weights = checkpoint(
        tmp_path / "weights",
        lambda module, layers: in_nvfp4(module, layers, rank),
        "NVFP4_SVD" if rank else "NVFP4",
    )
    manifest, plan = in_nvfp4_engines(tmp_path, FLUX, weights=weights, exchange="int8")
    check_products(manifest, plan, 17)
    assert plan.sent("all_to_all").count("int8") == 2
    assert (Counter(plan.products())["bf16", "bf16"] > 17) == bool(rank)
    check_proof(manifest)
    codes = check_outside(manifest, tmp_path / "out", 17)
    assert {w.file for w in codes} == {str((weights / FILE).resolve())}
    raw, stored = (weights / FILE).read_bytes(), load_file(weights / FILE)
    for one in codes:
        own = stored[one.name].view(torch.uint8).numpy().tobytes()
        assert raw[one.offset : one.offset + one.bytes] == own
    assert manifest.quantization is not None
    assert manifest.quantization.linears is not None
    for layer in manifest.quantization.linears.layers:
        assert layer.input_scale == stored[f"{layer.module}.input_scale"].item()
        assert layer.weight_scale == stored[f"{layer.module}.weight_scale_2"].item()
        assert (layer.given, layer.smooth) == ("both", bool(rank))
    check_run(tmp_path / "out", *dense_of(tmp_path / "flux.py"), most=0.4)


@SLOW
def test_embedded_codes_are_multiplied_and_the_least_gpu_is_told(tmp_path: Path) -> None:
    manifest, plan = converted(
        tmp_path, quantize="nvfp4", weights_mode="embedded", proof="network", exchange="int8"
    )
    # The builder may join those of one input.
    assert plan.products().count((FP4, FP4)) >= 10
    assert manifest.runs_on.compute_capabilities == ["12.0+"]
    assert manifest.backend.compute_capabilities == ["12.0+"]
    check_proof(manifest)


@pytest.mark.parametrize(
    ("inputs", "quantize"),
    [
        pytest.param(True, None, marks=SLOW),
        (False, None),
        pytest.param(False, "nvfp4", marks=SLOW),
    ],
)
def test_a_single_file_in_another_order(
    inputs: bool, quantize: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has no scale of its input is not called NVFP4, unless it is calibrated."""
    smaller_flux(monkeypatch, 64)
    space: dict[str, Any] = {}
    exec(FLUX, space)
    named = original_flux(space["build_model"]())
    tensors = comfy_nvfp4(named, FLUX_LAYERS, inputs=inputs)
    file = write_file(tmp_path / "flux.safetensors", tensors, {})
    manifest, plan = in_nvfp4_engines(tmp_path, FLUX, weights=file, quantize=quantize)
    if inputs or quantize:
        check_products(manifest, plan, 17)
        check_proof(manifest)
    else:
        products = Counter(plan.products())
        assert set(products) == {("bf16", "bf16")}
        assert manifest.quantization is not None
        assert manifest.quantization.linears is not None
        assert manifest.quantization.linears.products == {"bf16": 30}
        assert max(e.max for e in manifest.proof.algebra) < 1e-5
    codes = check_outside(manifest, tmp_path / "out", 17)
    assert {w.file for w in codes} == {"weights.safetensors"}


@SLOW
def test_a_file_of_two_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both kinds of products, each as its layer is stored."""
    smaller_flux(monkeypatch, 64)
    space: dict[str, Any] = {}
    exec(FLUX, space)
    named = original_flux(space["build_model"]())
    single = [layer for layer in FLUX_LAYERS if layer.startswith("single")]
    others = [layer for layer in FLUX_LAYERS if layer not in single]
    tensors, _ = quantized(comfy_nvfp4(named, others), single, style="comfy_quant")
    file = write_file(tmp_path / "flux.safetensors", tensors, {})
    manifest, plan = in_nvfp4_engines(tmp_path, FLUX, weights=file)
    products = Counter(plan.products())
    assert products[FP4, FP4] == 12
    assert products["fp8_e4m3", "fp8_e4m3"] == 5
    assert all(len(set(one)) == 1 for one in products)
    assert manifest.quantization is not None
    linears = manifest.quantization.linears
    assert linears is not None
    assert linears.codes == "mixed"
    assert linears.products == {"nvfp4": 12, "fp8": 5, "bf16": len(linears.kept)}
    assert {one.codes for one in linears.layers if "single" in one.module} == {"fp8"}
    check_proof(manifest)
    check_run(tmp_path / "out", *dense_of(tmp_path / "flux.py"), most=0.4)


def test_a_checkpoint_of_several_kinds(tmp_path: Path) -> None:
    """ModelOpt's: FP8 with factors of the input's columns, INT8, NVFP4 and SVDQuant."""
    space: dict[str, Any] = {}
    exec(FLUX, space)
    module = space["build_model"]()
    every = ("FP8", "W8A8_SQ_PER_CHANNEL", "NVFP4", "NVFP4_SVD")
    kinds = {layer: every[number % 4] for number, layer in enumerate(layers_of(module))}
    tensors = mixed(module, kinds, smooth=True)
    weights = write(tmp_path / "weights", tensors, layers=said(kinds))
    manifest, plan = in_nvfp4_engines(tmp_path, FLUX, weights=weights)
    products = Counter(plan.products())
    assert [products[one, one] for one in ("fp8_e4m3", "int8", FP4)] == [5, 4, 8]
    assert all(len(set(one)) == 1 for one in products)
    assert manifest.runs_on.compute_capabilities == ["12.0"]
    assert manifest.quantization is not None
    linears = manifest.quantization.linears
    assert linears is not None
    assert linears.codes == "mixed"
    assert linears.products == {"fp8": 5, "int8": 4, "nvfp4": 8, "bf16": len(linears.kept)}
    for one in linears.layers:
        assert one.smooth == (kinds[one.module] != "NVFP4")
        assert one.rows == (kinds[one.module] == "W8A8_SQ_PER_CHANNEL")
    codes = [w for w in manifest.weights if w.dtype in ("uint8", "int8", "float8_e4m3fn")]
    assert {w.file for w in codes} == {str((weights / FILE).resolve())}
    check_proof(manifest)


@SLOW
def test_pieces_have_their_own_scales(tmp_path: Path) -> None:
    """Constants of the program go with the piece that reads them."""
    manifest, _ = in_nvfp4_engines(
        tmp_path, FLUX, quantize="nvfp4", split_after=("transformer_blocks.0",)
    )
    files = {engine.file for engine in manifest.engines}
    plans = [read_plan(tmp_path / "out" / file) for file in files]
    counts = sorted(Counter(plan.products())[FP4, FP4] for plan in plans)
    assert counts == [5, 5, 12, 12]  # each rank's
    check_proof(manifest)
