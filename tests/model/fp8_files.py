"""FP8 and INT8 checkpoints as ModelOpt exports them, written from their documented layout."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

FP8 = torch.float8_e4m3fn
FILE = "diffusion_pytorch_model.safetensors"


def tensors_of(module: nn.Module, layers: list[str]) -> dict[str, Tensor]:
    """The module's tensors in bfloat16, the weights of ``layers`` as codes with scales."""
    found = {name: t.detach().bfloat16().contiguous() for name, t in module.state_dict().items()}
    for number, layer in enumerate(layers):
        weight = module.state_dict()[f"{layer}.weight"].float()
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
        factors = torch.linspace(0.5, 1.5, weight.shape[1]).bfloat16()
        weight = weight / factors.float()
        scale = weight.abs().amax(1) / 127
        found[f"{layer}.weight"] = (weight / scale[:, None]).round().to(torch.int8)
        found[f"{layer}.weight_scale"] = scale
        found[f"{layer}.input_scale"] = torch.tensor(0.04 + 0.0001 * number)
        found[f"{layer}.pre_quant_scale"] = factors
    return found


def write(folder: Path, tensors: dict[str, Tensor], algorithm: str = "FP8") -> Path:
    """The folder, with ``config.json`` and one file of weights."""
    folder.mkdir(parents=True, exist_ok=True)
    told = {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["proj_out"]}
    (folder / "config.json").write_text(json.dumps({"quantization_config": told}))
    save_file(tensors, folder / FILE)
    return folder
