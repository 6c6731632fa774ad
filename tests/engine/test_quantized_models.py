"""FLUX.2 and Wan, small, in the FP8 formats: built for two GPUs and proven to the network."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from benchmarks.checkpoints.comfy import quantized
from benchmarks.checkpoints.comfy import write as write_file
from benchmarks.checkpoints.modelopt import tensors_of, write
from benchmarks.checkpoints.rowwise import fp8r, torchao
from cp_convert.backends import BACKENDS
from cp_convert.engine.build import prepare
from tests.engine.test_quantized import check_proof, converted
from tests.runtime.bundles import WAN

pytestmark = pytest.mark.engine
prepare(BACKENDS["tensorrt-rtx"])

FLUX2 = """
import torch
from diffusers import Flux2Transformer2DModel

def build_model():
    torch.manual_seed(0)
    return Flux2Transformer2DModel(in_channels=16, num_layers=1, num_single_layers=1,
        attention_head_dim=16, num_attention_heads=4, joint_attention_dim=32,
        timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4))

def example_inputs(rows=6, columns=8, text=12):
    torch.manual_seed(1)
    many, zeros = torch.arange(rows * columns), torch.zeros(rows * columns)
    ids = torch.stack((zeros, many // columns, many % columns, zeros), -1)
    return {"hidden_states": torch.randn(1, len(many), 16),
        "encoder_hidden_states": torch.randn(1, text, 32), "timestep": torch.tensor([0.5]),
        "img_ids": ids, "txt_ids": torch.zeros(text, 4), "guidance": torch.tensor([3.5])}
"""
MODELS = {"flux2": FLUX2, "wan": WAN}
FORMATS = ("modelopt", "comfy", "bfl", "torchao")


def layers_of(module: nn.Module) -> list[str]:
    """Those of its blocks, but for modulation."""
    return [
        name
        for name, one in module.named_modules()
        if isinstance(one, nn.Linear) and "blocks." in name and "norm" not in name
    ]


def stored(of: str, module: nn.Module, folder: Path) -> Path:
    """The weights in one of the formats, under the names of the diffusers class."""
    layers = layers_of(module)
    if of == "modelopt":
        return write(folder / "weights", tensors_of(module, layers))
    named = {name: t.detach().bfloat16() for name, t in module.state_dict().items()}
    made: dict[str, Any] = {
        "comfy": lambda: quantized(named, layers, style="comfy_quant"),
        "bfl": lambda: (fp8r(named, layers), {}),
        "torchao": lambda: torchao(named, layers),
    }
    return write_file(folder / "weights.safetensors", *made[of]())


def cases() -> list[Any]:
    """Each model in one format; others repeat."""
    first = {("flux2", "comfy"), ("wan", "modelopt")}
    return [
        pytest.param(model, of, marks=() if (model, of) in first else pytest.mark.slow)
        for model in MODELS
        for of in FORMATS
    ]


@pytest.mark.parametrize(("model", "of"), cases())
def test_engines_multiply_fp8_for_both_gpus(model: str, of: str, tmp_path: Path) -> None:
    space: dict[str, Any] = {}
    exec(MODELS[model], space)
    module: nn.Module = space["build_model"]()
    weights = stored(of, module, tmp_path)
    manifest, plan = converted(
        tmp_path, MODELS[model], weights=weights, proof="network", layout="shared",
        compute_capabilities=("8.9", "12.0"),
    )  # fmt: skip
    assert manifest.runs_on.compute_capabilities == ["8.9", "12.0"]
    check_proof(manifest)
    assert manifest.quantization is not None
    assert manifest.quantization.linears is not None
    told = manifest.quantization.linears.layers
    assert sorted(one.module for one in told) == sorted(layers_of(module))
    assert {one.rows for one in told} == {of in ("bfl", "torchao")}
    products = Counter(plan.products())
    assert products["fp8_e4m3", "fp8_e4m3"] == len(told) > 8
    assert all(len(set(one)) == 1 for one in products)
    codes = [w for w in manifest.weights if w.dtype == "float8_e4m3fn"]
    assert len(codes) == len(told)
    assert all(Path(one.file).is_absolute() for one in codes)
