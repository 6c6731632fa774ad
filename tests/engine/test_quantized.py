"""Engines with quantizers: what is built is read out of the engine, for building proves nothing."""

import runpy
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.checkpoints.authors import FLUX_LAYERS, original_flux, smaller_flux
from benchmarks.checkpoints.comfy import quantized
from benchmarks.checkpoints.comfy import write as write_file
from benchmarks.checkpoints.modelopt import FILE, smoothed, tensors_of, write
from benchmarks.checkpoints.rowwise import fp8r, qwen_layers, torchao
from benchmarks.plans import Plan, read_plan
from cp_convert.backends import BACKENDS, select
from cp_convert.bundle import folder
from cp_convert.bundle.manifest import Manifest
from cp_convert.engine.build import build, prepare
from cp_convert.engine.lower import lower
from cp_convert.engine.specialise import specialise
from cp_convert.job import STRATEGY_NAMES, Job
from cp_convert.model.cast import cast_inputs
from cp_convert.pipeline import convert
from cp_convert.progress import Progress
from tests.conftest import rewritten, tiny, tiny_inputs
from tests.runtime.bundles import FLUX, QWEN
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
        ("ring", "all_gather", 4),
        pytest.param("allgather-kv", "all_gather", 1, marks=pytest.mark.slow),
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


def converted(tmp_path: Path, model: str = FLUX, **options: Any) -> tuple[Manifest, Plan]:
    """A small FLUX in FP8, or another model, and what its first engine says of itself."""
    (tmp_path / "flux.py").write_text(model)
    job = Job(
        model=tmp_path / "flux.py", out=tmp_path / "out",
        **{"strategy": "ulysses", "world": 2, "precision": "bf16", "weights_mode": "external",
           **options},
    )  # fmt: skip
    manifest = convert(job, select("auto", job.compute_capabilities), Progress())
    return manifest, read_plan(tmp_path / "out" / manifest.engines[0].file)


def checkpoint(path: Path, made: Any = tensors_of, algorithm: str = "FP8") -> Path:
    """That FLUX as ModelOpt would export it: the linear layers of its blocks in FP8."""
    space: dict[str, Any] = {}
    exec(FLUX, space)
    module = space["build_model"]()
    layers = [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, torch.nn.Linear) and "blocks." in name and "norm" not in name
    ]
    return write(path, made(module, layers), algorithm)


def check_proof(manifest: Manifest, world: int = 2) -> None:
    """All three statements, of the networks too."""
    told, network = manifest.quantization, manifest.proof.network
    assert told is not None
    assert told.loss is not None
    assert told.codes is not None
    assert network is not None
    assert manifest.proof.control is not None
    for errors in (manifest.proof.algebra, network.algebra):
        assert max(e.max for e in errors) < 1e-5
    for errors in (told.codes.ranks, told.codes.networks):
        assert len(errors) == world
        assert max(e.max for e in errors) <= told.codes.bound.max
    assert manifest.proof.control.max > 1e-3


def check_run(out: Path, inputs: dict[str, Any], dense: torch.Tensor, most: float = 0.2) -> None:
    """Two processes over gloo."""
    assert all(check.problem is None for check in folder.verify(out))
    torch.save(cast_inputs(inputs, torch.bfloat16), out.parent / "inputs.pt")
    both = outputs_of([out], 2, out.parent)
    assert torch.equal(both[0][0][0], both[1][0][0])
    assert 1e-4 < (both[0][0][0].float() - dense).norm() / dense.norm() < most


def dense_of(model: Path) -> tuple[dict[str, Any], torch.Tensor]:
    module = SimpleNamespace(**runpy.run_path(str(model)))
    with torch.no_grad():
        return module.example_inputs(), module.build_model().eval()(**module.example_inputs())[0]


def test_a_quantized_checkpoint_is_multiplied_as_it_is(tmp_path: Path) -> None:
    weights = checkpoint(tmp_path / "weights")
    manifest, plan = converted(
        tmp_path, weights=weights, exchange="int8", compute_capabilities=("8.9", "12.0"),
        proof="network",
    )  # fmt: skip
    products = Counter(plan.products())
    assert products["fp8_e4m3", "fp8_e4m3"] == 17
    assert all(len(set(one)) == 1 for one in products)
    assert plan.sent("all_to_all").count("int8") == 2
    assert manifest.runs_on.compute_capabilities == ["8.9", "12.0"]
    check_proof(manifest)
    codes = [w for w in manifest.weights if w.dtype == "float8_e4m3fn"]
    assert {w.file for w in codes} == {str((weights / FILE).resolve())}
    raw, stored = (weights / FILE).read_bytes(), load_file(weights / FILE)
    for one in codes:
        own = stored[one.name].view(torch.uint8).numpy().tobytes()
        assert raw[one.offset : one.offset + one.bytes] == own
    assert manifest.quantization is not None
    assert manifest.quantization.linears is not None
    told = {one.module: one for one in manifest.quantization.linears.layers}
    assert len(told) == len(codes) == 17
    for name, layer in told.items():
        assert layer.input_scale == stored[f"{name}.input_scale"].item()
        assert layer.weight_scale == stored[f"{name}.weight_scale"].item()
    check_run(tmp_path / "out", *dense_of(tmp_path / "flux.py"))


def single_file(tmp_path: Path, patch: pytest.MonkeyPatch, **options: Any) -> Path:
    """That FLUX as ComfyUI would store it, in the authors' names."""
    smaller_flux(patch, 64)
    space: dict[str, Any] = {}
    exec(FLUX, space)
    named = original_flux(space["build_model"]())
    return write_file(tmp_path / "flux.safetensors", *quantized(named, FLUX_LAYERS, **options))


def check_codes_stay(manifest: Manifest, file: Path) -> None:
    """All of them in the user's file: what was joined there is cut by its offsets."""
    codes = [w for w in manifest.weights if w.dtype == "float8_e4m3fn"]
    assert len(codes) == 17
    assert {w.file for w in codes} == {str(file.resolve())}
    stored, raw = load_file(file), file.read_bytes()
    key = next(w for w in codes if w.name == "transformer_blocks.0.attn.to_k.weight")
    whole = stored["double_blocks.0.img_attn.qkv.weight"].view(torch.uint8)
    piece = whole[64:128].contiguous().numpy().tobytes()
    assert raw[key.offset : key.offset + key.bytes] == piece


def test_a_single_file_is_multiplied_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = single_file(tmp_path, monkeypatch)
    manifest, plan = converted(tmp_path, weights=file, proof="network")
    assert Counter(plan.products())["fp8_e4m3", "fp8_e4m3"] == 17
    check_proof(manifest)
    check_codes_stay(manifest, file)
    assert manifest.quantization is not None
    assert manifest.quantization.linears is not None
    stored = load_file(file)
    told = {one.module: one for one in manifest.quantization.linears.layers}
    assert {one.given for one in told.values()} == {"both"}
    for layer, theirs in (
        ("transformer_blocks.0.attn.add_v_proj", "double_blocks.0.txt_attn.qkv"),
        ("single_transformer_blocks.0.proj_mlp", "single_blocks.0.linear1"),
    ):
        assert told[layer].weight_scale == stored[f"{theirs}.scale_weight"].item()
        assert told[layer].input_scale == stored[f"{theirs}.scale_input"].item()
    check_run(tmp_path / "out", *dense_of(tmp_path / "flux.py"))


@pytest.mark.parametrize("quantize", [None, pytest.param("fp8", marks=pytest.mark.slow)])
def test_what_has_no_scale_of_its_input_is_not_called_fp8(
    quantize: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights stay codes, and products are in half precision unless they are calibrated."""
    file = single_file(tmp_path, monkeypatch, style="comfy_quant", inputs=False)
    manifest, plan = converted(tmp_path, weights=file, quantize=quantize, proof="network")
    products = Counter(plan.products())
    assert products["fp8_e4m3", "fp8_e4m3"] == (0 if quantize is None else 17)
    assert all(len(set(one)) == 1 for one in products)
    check_codes_stay(manifest, file)
    assert manifest.quantization is not None
    linears = manifest.quantization.linears
    assert linears is not None
    alone = [one for one in linears.kept if one.reason.startswith("only its weight is codes")]
    layers = [(one.given, one.loss > 0.001) for one in linears.layers]
    if quantize is None:
        assert (len(alone), layers, linears.sets) == (17, [], 0)
        assert manifest.quantization.codes is not None
        assert manifest.quantization.codes.codes == 0
    else:
        assert (len(alone), layers, linears.sets) == (0, 17 * [("weight", True)], 1)
        check_proof(manifest)
    assert max(e.max for e in manifest.proof.algebra) < 1e-5
    assert "10 weights" in manifest.model.matched[-1]  # as they are stored


@pytest.mark.parametrize("of", ["bfl", pytest.param("torchao", marks=pytest.mark.slow)])
def test_scales_of_rows_stay_products_of_codes(
    of: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BFL's file is in the authors' names; torchao's is the diffusers model's own, here Qwen's."""
    smaller_flux(monkeypatch, 64)
    space: dict[str, Any] = {}
    exec(FLUX if of == "bfl" else QWEN, space)
    module = space["build_model"]()
    file = tmp_path / "weights.safetensors"
    count, theirs, own = 18, "double_blocks.0.txt_attn.qkv", "transformer_blocks.0.attn.add_v_proj"
    if of == "bfl":
        layers = [*FLUX_LAYERS, "final_layer.adaLN_modulation.1"]  # whose halves are swapped
        write_file(file, fp8r(original_flux(module), layers), {})
    else:
        layers, named = qwen_layers(module), module.state_dict()
        write_file(file, *torchao({n: t.bfloat16() for n, t in named.items()}, layers))
        count, theirs = 9, own  # nothing reads what the only block makes of the text
    model = FLUX if of == "bfl" else QWEN
    manifest, plan = converted(tmp_path, model, weights=file, proof="network")
    assert Counter(plan.products())["fp8_e4m3", "fp8_e4m3"] == count
    check_proof(manifest)
    assert manifest.quantization is not None
    assert manifest.quantization.linears is not None
    told = {one.module: one for one in manifest.quantization.linears.layers}
    assert {(one.rows, one.input_scale, one.given) for one in told.values()} == {
        (True, None, "both")
    }
    stored, name = load_file(file), "weight_scale" if of == "bfl" else "_weight_scale"
    scales = stored[f"{theirs}.{name}"].flatten()
    assert told[own].weight_scale == scales[-64:].max().item()
    codes = [w for w in manifest.weights if w.dtype == "float8_e4m3fn"]
    assert len(codes) == count
    moved = [w.name for w in codes if w.file != str(file.resolve())]
    assert moved == (["norm_out.linear.weight"] if of == "bfl" else [])
    check_run(tmp_path / "out", *dense_of(tmp_path / "flux.py"))


def test_own_codes_are_stored_once(tmp_path: Path) -> None:
    manifest, plan = converted(tmp_path, quantize="fp8", proof="program", program="yes")
    assert plan.products().count(("fp8_e4m3", "fp8_e4m3")) == 17
    # None was named: the least that multiplies FP8, and later ones.
    assert manifest.runs_on.compute_capabilities == ["8.9+"]
    assert manifest.backend.compute_capabilities == ["8.9", "12.0+"]
    codes = [w for w in manifest.weights if w.dtype == "float8_e4m3fn"]
    assert len(codes) == 17
    assert {w.file for w in codes} == {"constants.safetensors"}
    assert {w.name.split(".")[0] for w in codes} == {"constants"}
    stored = load_file(tmp_path / "out" / "program" / "tensors.safetensors")
    assert not any(t.dtype == torch.float8_e4m3fn for t in stored.values())
    check_run(tmp_path / "out", *dense_of(tmp_path / "flux.py"))


def check_int8(manifest: Manifest, plan: Plan, *, smooth: bool) -> None:
    assert Counter(plan.products())["int8", "int8"] == 17
    check_proof(manifest)
    assert manifest.quantization is not None
    linears = manifest.quantization.linears
    assert linears is not None
    assert linears.codes == "int8"
    assert {(one.rows, one.smooth) for one in linears.layers} == {(True, smooth)}


def test_int8_is_multiplied_on_every_gpu(tmp_path: Path) -> None:
    manifest, plan = converted(tmp_path, quantize="int8", proof="network", program="yes")
    check_int8(manifest, plan, smooth=False)
    assert manifest.backend.compute_capabilities == ["8.0", "8.6", "8.9", "12.0+"]
    codes = [w for w in manifest.weights if w.dtype == "int8"]
    assert len(codes) == 17
    assert {w.file for w in codes} == {"constants.safetensors"}
    check_run(tmp_path / "out", *dense_of(tmp_path / "flux.py"))


@pytest.mark.slow
def test_a_smoothed_int8_checkpoint_is_multiplied_as_it_is(tmp_path: Path) -> None:
    weights = checkpoint(tmp_path / "weights", smoothed, "W8A8_SQ_PER_CHANNEL")
    (tmp_path / "flux.py").write_text(FLUX)
    manifest, plan = converted(
        tmp_path, weights=weights, compute_capabilities=("7.5", "8.6"), precision="fp16",
        proof="network",
    )  # fmt: skip
    check_int8(manifest, plan, smooth=True)
    assert manifest.runs_on.compute_capabilities == ["7.5", "8.6"]
    codes = [w for w in manifest.weights if w.dtype == "int8"]
    assert {w.file for w in codes} == {str((weights / FILE).resolve())}


@pytest.mark.slow
def test_embedded_codes_are_multiplied(tmp_path: Path) -> None:
    manifest, plan = converted(
        tmp_path, quantize="fp8", weights_mode="embedded", proof="network", exchange="int8:qkvo"
    )
    # The builder may join those of one input.
    assert plan.products().count(("fp8_e4m3", "fp8_e4m3")) >= 10
    assert plan.sent("all_to_all").count("int8") == 4
    check_proof(manifest)
