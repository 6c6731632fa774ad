"""Single files of codes as ComfyUI writes them, in the authors' names, from their layout."""

import json
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.model.fp8_files import of_4_bits

FP8 = torch.float8_e4m3fn
STYLES = ("fp8_scaled", "comfy_quant", "metadata")


def original_flux(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a FLUX.1 with one block of each kind, named and joined as BFL does."""
    own = {name: t.detach().bfloat16() for name, t in module.state_dict().items()}
    named = {}
    for kind in ("weight", "bias"):

        def joined(*layers: str, k: str = kind) -> Tensor:
            return torch.cat([own[f"{layer}.{k}"] for layer in layers])

        double, single = "transformer_blocks.0", "single_transformer_blocks.0"
        scale, shift = own[f"norm_out.linear.{kind}"].chunk(2)
        found = {
            "img_in": joined("x_embedder"),
            "txt_in": joined("context_embedder"),
            "final_layer.linear": joined("proj_out"),
            "final_layer.adaLN_modulation.1": torch.cat([shift, scale]),
            "double_blocks.0.img_mod.lin": joined(f"{double}.norm1.linear"),
            "double_blocks.0.txt_mod.lin": joined(f"{double}.norm1_context.linear"),
            "double_blocks.0.img_attn.qkv": joined(*(f"{double}.attn.to_{x}" for x in "qkv")),
            "double_blocks.0.txt_attn.qkv": joined(*(f"{double}.attn.add_{x}_proj" for x in "qkv")),
            "double_blocks.0.img_attn.proj": joined(f"{double}.attn.to_out.0"),
            "double_blocks.0.txt_attn.proj": joined(f"{double}.attn.to_add_out"),
            "double_blocks.0.img_mlp.0": joined(f"{double}.ff.net.0.proj"),
            "double_blocks.0.img_mlp.2": joined(f"{double}.ff.net.2"),
            "double_blocks.0.txt_mlp.0": joined(f"{double}.ff_context.net.0.proj"),
            "double_blocks.0.txt_mlp.2": joined(f"{double}.ff_context.net.2"),
            "single_blocks.0.modulation.lin": joined(f"{single}.norm.linear"),
            "single_blocks.0.linear1": joined(
                *(f"{single}.attn.to_{x}" for x in "qkv"), f"{single}.proj_mlp"
            ),
            "single_blocks.0.linear2": joined(f"{single}.proj_out"),
        }
        for theirs, ours in (("time", "timestep"), ("vector", "text"), ("guidance", "guidance")):
            embedder = f"time_text_embed.{ours}_embedder"
            found[f"{theirs}_in.in_layer"] = joined(f"{embedder}.linear_1")
            found[f"{theirs}_in.out_layer"] = joined(f"{embedder}.linear_2")
        named |= {f"{layer}.{kind}": t for layer, t in found.items()}
    for theirs, ours in (
        ("double_blocks.0.img_attn", "transformer_blocks.0.attn.norm_"),
        ("double_blocks.0.txt_attn", "transformer_blocks.0.attn.norm_added_"),
        ("single_blocks.0", "single_transformer_blocks.0.attn.norm_"),
    ):
        named[f"{theirs}.norm.query_norm.scale"] = own[f"{ours}q.weight"]
        named[f"{theirs}.norm.key_norm.scale"] = own[f"{ours}k.weight"]
    return {name: t.contiguous() for name, t in named.items()}


_FLUX2 = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "single_transformer_blocks.0.attn.to_qkv_mlp_proj": "single_blocks.0.linear1",
    "single_transformer_blocks.0.attn.to_out": "single_blocks.0.linear2",
    "transformer_blocks.0.attn.to_out.0": "double_blocks.0.img_attn.proj",
    "transformer_blocks.0.attn.to_add_out": "double_blocks.0.txt_attn.proj",
    "transformer_blocks.0.ff.linear_in": "double_blocks.0.img_mlp.0",
    "transformer_blocks.0.ff.linear_out": "double_blocks.0.img_mlp.2",
    "transformer_blocks.0.ff_context.linear_in": "double_blocks.0.txt_mlp.0",
    "transformer_blocks.0.ff_context.linear_out": "double_blocks.0.txt_mlp.2",
    "proj_out": "final_layer.linear",
}
"""Layers of FLUX.2 that have another name, and nothing else."""


def original_flux2(module: nn.Module) -> dict[str, Tensor]:
    """The same of a FLUX.2, whose single blocks are joined in diffusers, too."""
    own = {name: t.detach().bfloat16() for name, t in module.state_dict().items()}
    named = {f"{theirs}.weight": own.pop(f"{ours}.weight") for ours, theirs in _FLUX2.items()}
    double = "transformer_blocks.0.attn"
    for theirs, layers in (
        ("double_blocks.0.img_attn", [f"{double}.to_{x}" for x in "qkv"]),
        ("double_blocks.0.txt_attn", [f"{double}.add_{x}_proj" for x in "qkv"]),
    ):
        named[f"{theirs}.qkv.weight"] = torch.cat([own.pop(f"{x}.weight") for x in layers])
    for theirs, ours in (
        ("double_blocks.0.img_attn", f"{double}.norm_"),
        ("double_blocks.0.txt_attn", f"{double}.norm_added_"),
        ("single_blocks.0", "single_transformer_blocks.0.attn.norm_"),
    ):
        named[f"{theirs}.norm.query_norm.scale"] = own.pop(f"{ours}q.weight")
        named[f"{theirs}.norm.key_norm.scale"] = own.pop(f"{ours}k.weight")
    halves = own.pop("norm_out.linear.weight").chunk(2)
    named["final_layer.adaLN_modulation.1.weight"] = torch.cat(halves[::-1])
    assert not own
    return {name: t.contiguous() for name, t in named.items()}


FLUX_LAYERS = [
    *(f"double_blocks.0.{x}_{y}" for x in ("img", "txt") for y in ("attn.qkv", "attn.proj")),
    *(f"double_blocks.0.{x}_mlp.{y}" for x in ("img", "txt") for y in (0, 2)),
    *(f"single_blocks.0.linear{x}" for x in (1, 2)),
]
"""Those of the blocks, but for modulation."""


def smaller_flux(patch: pytest.MonkeyPatch, inner: int) -> None:
    """Diffusers' mapping of FLUX.1 has its width written into it; here it has another."""
    from diffusers.loaders import single_file_model

    known = single_file_model.SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]
    own: Any = known["checkpoint_mapping_fn"]
    constants = tuple(inner if c == 3072 else c for c in own.__code__.co_consts)
    assert constants != own.__code__.co_consts
    code = own.__code__.replace(co_consts=constants)
    other = FunctionType(code, own.__globals__, own.__name__, own.__defaults__, own.__closure__)
    patch.setitem(known, "checkpoint_mapping_fn", other)


def quantized(
    named: dict[str, Tensor], layers: list[str], style: str = STYLES[0], *, inputs: bool = True
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The same with the weights of ``layers`` as codes, and the file's metadata."""
    tensors, metadata = dict(named), {}
    weight_scale, input_scale = ("scale_weight", "scale_input")
    if style != STYLES[0]:
        weight_scale, input_scale = ("weight_scale", "input_scale")
    for number, layer in enumerate(layers):
        weight = named[f"{layer}.weight"].float()
        scale = weight.abs().max() / 448
        tensors[f"{layer}.weight"] = (weight / scale).to(FP8)
        tensors[f"{layer}.{weight_scale}"] = scale.clone()
        if inputs:
            tensors[f"{layer}.{input_scale}"] = torch.tensor(0.012 + 0.0001 * number)
    told = {"format": "float8_e4m3fn"}
    if style == "fp8_scaled":
        tensors["scaled_fp8"] = torch.zeros(0).to(FP8)
    elif style == "comfy_quant":
        for layer in layers:
            tensors[f"{layer}.comfy_quant"] = as_json(told)
    else:
        described = {"format_version": "1.0", "layers": dict.fromkeys(layers, told)}
        metadata = {"_quantization_metadata": json.dumps(described)}
    return tensors, metadata


def in_nvfp4(
    named: dict[str, Tensor], layers: list[str], *, inputs: bool = True
) -> dict[str, Tensor]:
    """The weights of ``layers`` in NVFP4, the even column above, scales of blocks in tiles."""
    tensors = dict(named)
    for number, layer in enumerate(layers):
        codes, blocks, whole = of_4_bits(named[f"{layer}.weight"].float())
        tensors[f"{layer}.weight"] = codes % 16 * 16 + codes // 16
        tensors[f"{layer}.weight_scale"] = tiled(blocks)
        tensors[f"{layer}.weight_scale_2"] = whole
        if inputs:
            tensors[f"{layer}.input_scale"] = torch.tensor(0.0018 + 0.00001 * number)
        tensors[f"{layer}.comfy_quant"] = as_json({"format": "nvfp4"})
    return tensors


def tiled(blocks: Tensor) -> Tensor:
    """Tiles of 128 rows and 4 columns, one after the other; of a tile, row r, column c is the byte
    ``16 * (r % 32) + 4 * (r // 32) + c`` (cuBLAS)."""
    rows, columns = blocks.shape
    down, across = -(-rows // 128), -(-columns // 4)
    r, c = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    tile = r // 128 * across + c // 4
    found = torch.zeros(down * across * 512, dtype=torch.uint8)
    found[512 * tile + 16 * (r % 32) + 4 * (r % 128 // 32) + c % 4] = blocks.view(torch.uint8)
    return found.reshape(128 * down, 4 * across).view(FP8)


def as_json(told: object) -> Tensor:
    return torch.tensor(list(json.dumps(told).encode()), dtype=torch.uint8)


def write(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], prefix: str = ""
) -> Path:
    """One file."""
    save_file({prefix + name: t for name, t in tensors.items()}, path, metadata)
    return path
