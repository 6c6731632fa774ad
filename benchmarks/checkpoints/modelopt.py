"""Checkpoints as ModelOpt 0.47 exports them, written without it (:mod:`.exported` is the real one).

They differ in what is calibrated: here scales are made up, and ModelOpt gives q, k and v of one
input the same ones in INT8 and NVFP4.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

FP8 = torch.float8_e4m3fn
FILE = "diffusion_pytorch_model.safetensors"


def tensors_of(module: nn.Module, layers: list[str], *, smooth: bool = False) -> dict[str, Tensor]:
    """The module's tensors in bfloat16, the weights of ``layers`` as codes with scales.

    ``smooth``: with factors of the input's columns, as AWQ gives them.
    """
    found = {name: t.detach().bfloat16().contiguous() for name, t in module.state_dict().items()}
    for number, layer in enumerate(layers):
        weight = module.state_dict()[f"{layer}.weight"].float()
        if smooth:
            found[f"{layer}.pre_quant_scale"] = _factors(weight)
            weight = weight / _factors(weight).float()
        scale = weight.abs().max() / 448
        found[f"{layer}.weight"] = (weight / scale).to(FP8)
        found[f"{layer}.weight_scale"] = scale.clone()
        found[f"{layer}.input_scale"] = torch.tensor(0.012 + 0.0001 * number)
    return found


def smoothed(module: nn.Module, layers: list[str]) -> dict[str, Tensor]:
    """The same in INT8 with SmoothQuant: scales of rows, and factors of the input's columns."""
    found = {name: t.detach().bfloat16().contiguous() for name, t in module.state_dict().items()}
    for number, layer in enumerate(layers):
        weight = module.state_dict()[f"{layer}.weight"].float()
        factors = _factors(weight)
        weight = weight / factors.float()
        scale = weight.abs().amax(1) / 127
        found[f"{layer}.weight"] = (weight / scale[:, None]).round().to(torch.int8)
        found[f"{layer}.weight_scale"] = scale
        found[f"{layer}.input_scale"] = torch.tensor(0.04 + 0.0001 * number)
        found[f"{layer}.pre_quant_scale"] = factors
    return found


def in_nvfp4(module: nn.Module, layers: list[str], rank: int = 0) -> dict[str, Tensor]:
    """The same in NVFP4: codes in pairs, scales of blocks; with factors and a low rank if asked."""
    torch.manual_seed(5)
    found = {name: t.detach().bfloat16().contiguous() for name, t in module.state_dict().items()}
    for number, layer in enumerate(layers):
        weight = module.state_dict()[f"{layer}.weight"].float()
        if rank:
            factors = _factors(weight)
            down = 0.05 * torch.randn(rank, weight.shape[1])
            up = 0.05 * torch.randn(weight.shape[0], rank)
            found[f"{layer}.pre_quant_scale"] = factors
            found[f"{layer}.svdquant_lora_a"] = down.bfloat16()
            found[f"{layer}.svdquant_lora_b"] = up.bfloat16()
            weight = weight / factors.float() - up.bfloat16().float() @ down.bfloat16().float()
        codes, blocks, whole = of_4_bits(weight)
        found[f"{layer}.weight"] = codes
        found[f"{layer}.weight_scale"] = blocks
        found[f"{layer}.weight_scale_2"] = whole
        found[f"{layer}.input_scale"] = torch.tensor(0.0018 + 0.00001 * number)
    return found


def _factors(weight: Tensor) -> Tensor:
    return torch.linspace(0.5, 1.5, weight.shape[1]).bfloat16()


def mixed(
    module: nn.Module, algorithms: Mapping[str, str], *, smooth: bool = False
) -> dict[str, Tensor]:
    """The same with each layer by the algorithm that stands at its name; ``smooth``: of FP8."""
    writers: dict[str, Callable[[list[str]], dict[str, Tensor]]] = {
        "FP8": lambda layers: tensors_of(module, layers, smooth=smooth),
        "W8A8_SQ_PER_CHANNEL": lambda layers: smoothed(module, layers),
        "NVFP4": lambda layers: in_nvfp4(module, layers),
        "NVFP4_SVD": lambda layers: in_nvfp4(module, layers, 8),
    }
    found = tensors_of(module, [])
    for algorithm in dict.fromkeys(algorithms.values()):
        layers = [layer for layer, own in algorithms.items() if own == algorithm]
        own = writers[algorithm](layers)
        found |= {name: own[name] for name in own if name.rpartition(".")[0] in layers}
    return found


def said(algorithms: Mapping[str, str]) -> dict[str, Any]:
    """What ``config.json`` says of these layers."""
    of_blocks = {"group_size": 16}
    smooth = {"has_zero_point": False, "pre_quant_scale": True}
    return {
        layer: {"quant_algo": own}
        | (of_blocks if own.startswith("NVFP4") else {})
        | (smooth if own.startswith("NVFP4_") else {})
        for layer, own in algorithms.items()
    }


def of_4_bits(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, the even column in the lower half; scales of blocks, and of all."""
    numbers = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    whole = weight.abs().max() / (6 * 448)
    rows = weight.unflatten(1, (-1, 16))
    blocks = (rows.abs().amax(-1) / 6 / whole).to(FP8)
    ratio = (rows / (blocks.float() * whole)[..., None]).flatten(1)
    codes = (ratio.abs()[..., None] - numbers).abs().argmin(-1) + 8 * (ratio < 0)
    return (codes[:, 0::2] + 16 * codes[:, 1::2]).to(torch.uint8), blocks, whole.clone()


def numbers_of(codes: Tensor, blocks: Tensor, whole: Tensor) -> Tensor:
    """What they stand for, float32."""
    numbers = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    both = torch.stack((codes % 16, codes // 16), -1).flatten(1).int()
    steps = (blocks.float() * whole).repeat_interleave(16, 1)
    return torch.cat((numbers, -numbers))[both] * steps


def write(
    folder: Path,
    tensors: dict[str, Tensor],
    algorithm: str = "FP8",
    layers: Mapping[str, Any] | None = None,
) -> Path:
    """The folder, with ``config.json`` and one file of weights; ``layers`` see :func:`said`."""
    folder.mkdir(parents=True, exist_ok=True)
    told = {
        "quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["proj_out"],
        "producer": {"name": "modelopt", "version": "0.47.0"},
    }  # fmt: skip
    if layers is not None:
        told |= {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers, "ignore": []}
    (folder / "config.json").write_text(json.dumps({"quantization_config": told}))
    save_file(tensors, folder / FILE)
    return folder


def written_twice(file: Path, name: str) -> None:
    """The header of ``file`` with the entry of ``name`` a second time."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, numbers = data[8 : 8 + size].rstrip(), data[8 + size :]
    entry = header[header.index(f'"{name}":'.encode()) :].split(b"}")[0] + b"}"
    header = header[:-1] + b"," + entry + b"}"
    header += b" " * (-len(header) % 8)
    file.write_bytes(len(header).to_bytes(8, "little") + header + numbers)


def with_attention(tensors: dict[str, Tensor], paths: list[str]) -> dict[str, Tensor]:
    """The same with the scales of quantized attention ("quantize_mha")."""
    scales = {}
    for number, path in enumerate(paths):
        for letter, largest in zip("qkv", (3.4, 3.6, 2.3), strict=True):
            name = f"{path}.{letter}_bmm_quantizer._amax"
            scales[name] = torch.tensor(largest + 0.1 * number).bfloat16()
        scales[f"{path}.bmm2_output_quantizer._amax"] = torch.tensor(2.5).bfloat16()
    return {**tensors, **scales}
