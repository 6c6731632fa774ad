"""The formats that quantized weights come in, and small models written in each of them.

A format is what a job is told besides the model: a checkpoint that is written for it, or options.
"""

from __future__ import annotations

import operator
import runpy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import torch
from torch import Tensor, nn

from .checkpoints import by_tools, comfy, exported, modelopt, rowwise
from .checkpoints.authors import (
    FLUX_LAYERS,
    original_flux,
    original_flux2,
    original_wan,
    smaller_flux,
    wan_name,
)

WIDTH: Final = 128
"""Of the small models: eight heads of 16 numbers."""
LOW_RANK: Final = 8
_PREFIX: Final = "model.diffusion_model."
_FILE: Final = "weights.safetensors"


@dataclass(frozen=True)
class Small:
    """A small model, and what its layers are called.

    Attributes:
        file: the model file.
        module: what it builds.
        inputs: that it is called with.
        layers: linear layers of the blocks, but for modulation, as diffusers names them.
        attending: the modules of the blocks that attend.
        named: the tensors in bfloat16 as single files name them.
        theirs: ``layers`` in those names, joined as they are there.
        prefix: of those names, in single files.
    """

    file: Path
    module: nn.Module
    inputs: Mapping[str, Any]
    layers: list[str]
    attending: list[str]
    named: dict[str, Tensor]
    theirs: list[str]
    prefix: str

    @property
    def own(self) -> dict[str, Tensor]:
        """The tensors in bfloat16 as diffusers names them."""
        return _half(self.module.state_dict())


def small(name: str) -> Small:
    """One of :data:`MODELS`; of FLUX.1, diffusers' mapping of names is made as narrow."""
    file = Path(__file__).parent / "small" / f"{MODELS[name]}.py"
    space = runpy.run_path(str(file))
    module: nn.Module = space["build_model"]()
    if name == "FLUX.1":
        _narrow_mapping()
    linears = [n for n, one in module.named_modules() if isinstance(one, nn.Linear)]
    layers = [n for n in linears if "blocks." in n and "norm" not in n and "_mod." not in n]
    paths = [n for n, _ in module.named_modules() if "blocks." in n]
    attending = [n for n in paths if n.split(".")[-1] in ("attn", "attn1", "attn2")]
    named, theirs, prefix = _in_single_files(name, module, layers)
    given = space["example_inputs"]()
    return Small(file, module, given, layers, attending, named, theirs, prefix)


@cache
def _narrow_mapping() -> None:
    """Once in a process."""
    smaller_flux(SimpleNamespace(setitem=operator.setitem), WIDTH)


def _in_single_files(
    name: str, module: nn.Module, layers: list[str]
) -> tuple[dict[str, Tensor], list[str], str]:
    if name == "FLUX.1":
        return original_flux(module), FLUX_LAYERS, ""
    if name == "FLUX.2":
        return original_flux2(module), FLUX_LAYERS, ""
    if name == "Wan":
        theirs = [wan_name(f"{layer}.weight").removesuffix(".weight") for layer in layers]
        return _half(original_wan(module)), theirs, _PREFIX
    return _half(module.state_dict()), layers, _PREFIX


def _half(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().bfloat16().contiguous() for name, t in tensors.items()}


MODELS: Final = {"FLUX.1": "flux", "FLUX.2": "flux2", "Wan": "wan", "Qwen-Image": "qwen_image"}
"""Model files by what the models are called."""
FP8_TARGETS, FP4_TARGETS = ("8.9", "12.0"), ("12.0",)


@dataclass(frozen=True)
class Format:
    """A format.

    Attributes:
        told: what it is, for a person.
        write: makes the checkpoint in a folder and returns its path; ``None``: there is none.
        options: what the job is told besides.
        targets: the compute capabilities that multiply it, of those that the table has.
        live: of :data:`.checkpoints.exported.KINDS`, how the model file itself quantizes.
    """

    told: str
    write: Callable[[Small, Path], Path] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    targets: tuple[str, ...] = FP8_TARGETS
    live: str = ""

    def model(self, one: Small, folder: Path) -> Path:
        """The model file."""
        if not self.live:
            return one.file
        path = folder / f"{one.file.stem}_live.py"
        path.write_text(_LIVE.format(name=one.file.stem, kind=self.live))
        return path


_LIVE: Final = """
from benchmarks.checkpoints.exported import quantized
from benchmarks.small.{name} import build_model as plain, example_inputs

def build_model():
    return quantized(plain().bfloat16().eval(), example_inputs(), "{kind}")
"""


def _modelopt(
    algorithm: str, make: Callable[[Small], dict[str, Tensor]]
) -> Callable[[Small, Path], Path]:
    return lambda one, folder: modelopt.write(folder / "weights", make(one), algorithm)


def _by_modelopt(kind: str) -> Callable[[Small, Path], Path]:
    """What ModelOpt itself writes."""
    return lambda one, folder: exported.exported(one.module, one.inputs, kind, folder / "weights")


def _by_torchao(kind: str) -> Callable[[Small, Path], Path]:
    return lambda one, folder: by_tools.by_torchao(one.module, one.layers, kind, folder / _FILE)


def _by_kitchen(kind: str) -> Callable[[Small, Path], Path]:
    return _single(lambda one: by_tools.by_kitchen(one.named, one.theirs, kind))


def _single(
    make: Callable[[Small], tuple[dict[str, Tensor], dict[str, str]]], *, own: bool = False
) -> Callable[[Small, Path], Path]:
    """A single file; ``own``: in the names of diffusers, without a prefix."""
    return lambda one, folder: comfy.write(folder / _FILE, *make(one), "" if own else one.prefix)


def _mixed(one: Small) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every second layer in FP8, the others in NVFP4."""
    named = comfy.in_nvfp4(one.named, one.theirs[1::2])
    return comfy.quantized(named, one.theirs[::2], "comfy_quant")


def _merely_cast(one: Small) -> tuple[dict[str, Tensor], dict[str, str]]:
    return {name: t.to(torch.float8_e4m3fn) for name, t in one.named.items()}, {}


FORMATS: Final[Mapping[str, Format]] = {
    "modelopt-fp8": Format(
        "ModelOpt's FP8",
        _modelopt("FP8", lambda one: modelopt.tensors_of(one.module, one.layers)),
    ),
    "modelopt-fp8-attention": Format(
        "ModelOpt's FP8 with quantized attention",
        _modelopt(
            "FP8",
            lambda one: modelopt.with_attention(
                modelopt.tensors_of(one.module, one.layers), one.attending
            ),
        ),
    ),
    "modelopt-int8": Format(
        "ModelOpt's INT8 with SmoothQuant",
        _modelopt("W8A8_SQ_PER_CHANNEL", lambda one: modelopt.smoothed(one.module, one.layers)),
    ),
    "modelopt-nvfp4": Format(
        "ModelOpt's NVFP4",
        _modelopt("NVFP4", lambda one: modelopt.in_nvfp4(one.module, one.layers)),
        targets=FP4_TARGETS,
    ),
    "modelopt-nvfp4-svd": Format(
        "ModelOpt's NVFP4 with a low rank",
        _modelopt("NVFP4_SVD", lambda one: modelopt.in_nvfp4(one.module, one.layers, LOW_RANK)),
        targets=FP4_TARGETS,
    ),
    "exported-fp8": Format("written by ModelOpt 0.47 itself: FP8", _by_modelopt("fp8")),
    "exported-fp8-attention": Format(
        "by itself: FP8 with quantized attention", _by_modelopt("fp8-attention")
    ),
    "exported-int8": Format("by itself: INT8 with SmoothQuant", _by_modelopt("int8")),
    "exported-nvfp4": Format("by itself: NVFP4", _by_modelopt("nvfp4"), targets=FP4_TARGETS),
    "exported-nvfp4-svd": Format(
        "by itself: NVFP4 with a low rank", _by_modelopt("nvfp4-svd"), targets=FP4_TARGETS
    ),
    "exported-nvfp4-attention": Format(
        "by itself: NVFP4 with quantized attention",
        _by_modelopt("nvfp4-attention"),
        targets=FP4_TARGETS,
    ),
    "exported-mixed": Format(
        "by itself: feed-forward layers in NVFP4, the others in FP8",
        _by_modelopt("mixed"),
        targets=FP4_TARGETS,
    ),
    "live-fp8": Format("quantized by ModelOpt in `model.py`: FP8", live="fp8"),
    "live-fp8-attention": Format("so: FP8 with quantized attention", live="fp8-attention"),
    "live-int8": Format("so: INT8 with SmoothQuant", live="int8"),
    "live-nvfp4": Format("so: NVFP4", live="nvfp4", targets=FP4_TARGETS),
    "live-nvfp4-svd": Format("so: NVFP4 with a low rank", live="nvfp4-svd", targets=FP4_TARGETS),
    "comfy-fp8-scaled": Format(
        "a single file, `scale_weight` and `scale_input`",
        _single(lambda one: comfy.quantized(one.named, one.theirs, "fp8_scaled")),
    ),
    "comfy-fp8": Format(
        "a single file, `weight_scale` and `input_scale`",
        _single(lambda one: comfy.quantized(one.named, one.theirs, "comfy_quant")),
    ),
    "comfy-nvfp4": Format(
        "a single file in NVFP4, nibbles swapped, scales in tiles",
        _single(lambda one: (comfy.in_nvfp4(one.named, one.theirs), {})),
        targets=FP4_TARGETS,
    ),
    "comfy-mixed": Format(
        "a single file, layers in FP8 and in NVFP4", _single(_mixed), targets=FP4_TARGETS
    ),
    "bfl-fp8r": Format(
        "BFL's FP8 with a scale for each row",
        _single(lambda one: (rowwise.fp8r(one.named, one.theirs), {})),
    ),
    "torchao-fp8": Format(
        "torchao's FP8 with a scale for each row",
        _single(lambda one: rowwise.torchao(one.own, one.layers), own=True),
    ),
    "by-torchao-fp8": Format(
        "by torchao 0.18 itself: FP8 with a scale for each row", _by_torchao("row")
    ),
    "by-torchao-fp8-tensor": Format(
        "by itself: FP8 with one scale (`PerTensor`), with `--quantize fp8`",
        _by_torchao("tensor"),
        {"quantize": "fp8"},
    ),
    "by-diffusers-torchao": Format(
        "by diffusers with torchao: all linear layers, modulation and embedders too",
        lambda one, folder: by_tools.by_diffusers(one.module, folder / "weights"),
    ),
    "by-kitchen-fp8": Format(
        "by comfy-kitchen 0.2.40, ComfyUI's library: FP8", _by_kitchen("float8_e4m3fn")
    ),
    "by-kitchen-nvfp4": Format("by itself: NVFP4", _by_kitchen("nvfp4"), targets=FP4_TARGETS),
    "fp8-cast": Format(
        "a single file merely cast to FP8, `--allow-cast float8`",
        _single(_merely_cast),
        {"allow_cast": ("float8",)},
    ),
    "quantize-fp8": Format("`--quantize fp8`", options={"quantize": "fp8"}),
    "quantize-fp8-attention": Format(
        "`--quantize fp8 --attention fp8`", options={"quantize": "fp8", "attention": "fp8"}
    ),
    "quantize-int8": Format("`--quantize int8`", options={"quantize": "int8"}),
    "quantize-nvfp4": Format(
        "`--quantize nvfp4`", options={"quantize": "nvfp4"}, targets=FP4_TARGETS
    ),
}
