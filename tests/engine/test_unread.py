"""Quantized checkpoints whose numbers nobody reads, against the same ones dequantized in memory."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.checkpoints.authors import FLUX_LAYERS, original_flux, smaller_flux
from benchmarks.checkpoints.comfy import write as write_file
from benchmarks.checkpoints.modelopt import FILE, FP8, in_nvfp4, smoothed
from benchmarks.checkpoints.rowwise import fp8r
from cp_convert import stages
from cp_convert.backends import BACKENDS, select
from cp_convert.bundle.manifest import Manifest
from cp_convert.engine.build import prepare
from cp_convert.errors import WeightsError
from cp_convert.ir.serialize import pack
from cp_convert.job import Job
from cp_convert.model.load import load, surroundings
from cp_convert.pipeline import convert
from cp_convert.progress import Progress
from tests.engine.test_quantized import checkpoint, single_file
from tests.runtime.bundles import FLUX, _stand_ins

pytestmark = pytest.mark.engine
prepare(BACKENDS["tensorrt-rtx"])


def job(folder: Path, weights: Path, out: str, **options: Any) -> Job:
    (folder / "flux.py").write_text(FLUX)
    usual: dict[str, Any] = {
        "precision": "bf16", "weights_mode": "external", "layout": "shared", "program": "yes",
        "proof": "none", "command": "cp-convert",
    }  # fmt: skip
    return Job(
        model=folder / "flux.py", out=folder / out, strategy="ulysses", world=2, weights=weights,
        **usual | options,
    )  # fmt: skip


def converted(asked: Job) -> tuple[Manifest, str, list[torch.Tensor]]:
    """The manifest, the digest of what TensorRT would be given, and the bundle's own numbers."""
    told: list[str] = []

    def built(loaded: Any, emitted: Any, *others: Any) -> Any:
        told.append(pack(emitted.program, described=emitted.names).digest())
        assert not any(one.is_meta for one in emitted.program.state.values())
        return _stand_ins(loaded, emitted, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "_built", built)
        manifest = convert(asked, select("auto"), Progress())
    own = [load_file(file) for file in sorted(asked.out.rglob("*.safetensors"))]
    return manifest, told[0], [held[name] for held in own for name in sorted(held)]


def plain(manifest: Manifest) -> dict[str, Any]:
    """What does not depend on whether anything was computed."""
    told: dict[str, Any] = msgspec.to_builtins(manifest)
    for name in ("created", "timings", "proof"):
        del told[name]
    for name in ("codes", "loss"):
        del told["quantization"][name]
    for layer in told["quantization"]["linears"]["layers"]:
        del layer["loss"]
    for engine in told["engines"]:
        engine.pop("seconds", None)
    return told


def losses(manifest: Manifest) -> list[float | None]:
    assert manifest.quantization is not None
    assert manifest.quantization.linears is not None
    return [one.loss for one in manifest.quantization.linears.layers]


def stored(of: str, folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """The small FLUX in a format that gives all scales, or in one that gives weights alone."""
    if of == "modelopt":
        return checkpoint(folder / "weights")
    if of == "int8":
        return checkpoint(folder / "weights", smoothed, "W8A8_SQ_PER_CHANNEL")
    if of == "nvfp4":
        return checkpoint(folder / "weights", lambda *of: in_nvfp4(*of, 4), "NVFP4_SVD")
    if of == "comfy":
        return single_file(folder, patch, style="comfy_quant", inputs=False)
    smaller_flux(patch, 64)
    space: dict[str, Any] = {}
    exec(FLUX, space)
    layers = [*FLUX_LAYERS, "final_layer.adaLN_modulation.1"]  # whose halves are swapped
    named = original_flux(space["build_model"]())
    return write_file(folder / "weights.safetensors", fp8r(named, layers), {})


@pytest.mark.parametrize(
    "of", ["modelopt", "bfl", "nvfp4", pytest.param("int8", marks=pytest.mark.slow),
           pytest.param("comfy", marks=pytest.mark.slow)],
)  # fmt: skip
def test_the_road_without_numbers_is_the_one_with_them(
    of: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = stored(of, tmp_path, monkeypatch)
    unread, network, own = converted(job(tmp_path, weights, "unread"))
    monkeypatch.setattr("cp_convert.model.load.are_unread", lambda *_: False)
    read, same, numbers = converted(job(tmp_path, weights, "read"))
    assert network == same
    assert plain(unread) == plain(read)
    types = ("uint8",) if of == "nvfp4" else ("float8_e4m3fn", "int8")
    codes = [w for w in unread.weights if w.dtype in types]
    assert len(own) == len(numbers)
    for one, other in zip(own, numbers, strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
    assert all(loss is None for loss in losses(unread))
    assert all(loss is not None and loss > 1e-3 for loss in losses(read))
    assert len(losses(unread)) == len(losses(read)) == (0 if of == "comfy" else len(codes))
    assert len(codes) == (18 if of == "bfl" else 17)
    elsewhere = [one.name for one in codes if Path(one.file).parent == Path()]
    assert elsewhere == (["norm_out.linear.weight"] if of == "bfl" else [])


def test_the_module_has_no_numbers_that_could_be_computed_with(tmp_path: Path) -> None:
    weights = checkpoint(tmp_path / "weights")
    asked = job(tmp_path, weights, "out")
    with surroundings(asked):
        source = load(asked)
    held = dict(source.module.named_parameters())
    assert {name for name, one in held.items() if one.is_meta} == set(source.codes)
    assert len(source.codes) == 17
    for name, one in source.codes.items():
        assert held[name].dtype == torch.bfloat16
        assert held[name].shape == one.codes.shape
    for options in ({"proof": "auto"}, {"allow_cast": ("float8",)}):
        asked = job(tmp_path, weights, "out", **options)
        with surroundings(asked):
            assert not any(one.is_meta for one in load(asked).module.parameters())


@pytest.mark.parametrize(
    ("mode", "copy"), [("external", False), ("external", True), ("embedded", False)]
)
def test_codes_that_are_no_numbers_are_found_without_computing_them(
    mode: str, copy: bool, tmp_path: Path
) -> None:
    weights = checkpoint(tmp_path / "weights")
    tensors = load_file(weights / FILE)
    name = "transformer_blocks.0.attn.to_k.weight"
    tensors[name].view(torch.uint8)[3, 5] = 0xFF
    save_file(tensors, weights / FILE)
    asked = job(tmp_path, weights, "out", weights_mode=mode, copy_weights=copy)
    with pytest.raises(WeightsError, match=f"{name}.* holds NaN"):
        converted(asked)
    assert not asked.out.exists()


TIED = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(32, 32) for _ in range(3)])
        self.blocks[2].weight = self.blocks[0].weight

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x

def build_model():
    torch.manual_seed(0)
    return Model()

def example_inputs():
    return {"x": torch.randn(1, 8, 32)}
"""


def tied(folder: Path, *, alike: bool) -> Path:
    """A checkpoint that holds a tied weight under both names, and all linear layers in FP8."""
    space: dict[str, Any] = {"__name__": "tied"}
    exec(TIED, space)
    module: nn.Module = space["build_model"]()
    held: dict[str, torch.Tensor] = {}
    for name, one in module.state_dict().items():
        held[name] = one.clone().bfloat16()
        if name.endswith("weight"):
            held[name] = (one / 0.001).to(FP8)
            held[f"{name}_scale"] = torch.tensor(0.001)
            held[name.replace("weight", "input_scale")] = torch.tensor(0.02)
    if not alike:
        held["blocks.2.weight_scale"] = torch.tensor(0.002)
    folder.mkdir()
    save_file(held, folder / FILE)
    return folder


def test_tied_codes_are_compared_by_their_numbers(tmp_path: Path) -> None:
    for alike in (True, False):
        asked = job(tmp_path, tied(tmp_path / f"weights{alike}", alike=alike), "out")
        (tmp_path / "flux.py").write_text(TIED)
        with surroundings(asked):
            if alike:
                source = load(asked)
                assert set(source.codes) == {f"blocks.{i}.weight" for i in range(3)}
                assert set(source.parameters_outside) >= set(source.codes)
                assert source.module.blocks[0].weight is source.module.blocks[2].weight  # type: ignore[index]
            else:
                with pytest.raises(WeightsError, match=r"one piece of memory.* numbers differ"):
                    load(asked)
