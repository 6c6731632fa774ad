"""Single files of codes as ComfyUI writes them, from their layout."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .modelopt import of_4_bits

FP8 = torch.float8_e4m3fn
STYLES = ("fp8_scaled", "comfy_quant", "metadata")


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
    """Tiles of 128 rows and 4 columns, one after the other, as cuBLAS reads them.

    Of a tile, row r, column c is the byte ``16 * (r % 32) + 4 * (r // 32) + c``.
    """
    rows, columns = blocks.shape
    down, across = -(-rows // 128), -(-columns // 4)
    r, c = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    tile = r // 128 * across + c // 4
    found = torch.zeros(down * across * 512, dtype=torch.uint8)
    found[512 * tile + 16 * (r % 32) + 4 * (r % 128 // 32) + c % 4] = blocks.view(torch.uint8)
    return found.reshape(128 * down, 4 * across).view(FP8)


def as_json(told: object) -> Tensor:
    """Bytes of JSON, as ``comfy_quant`` has them."""
    return torch.tensor(list(json.dumps(told).encode()), dtype=torch.uint8)


def write(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], prefix: str = ""
) -> Path:
    """One file."""
    save_file({prefix + name: t for name, t in tensors.items()}, path, metadata)
    return path
