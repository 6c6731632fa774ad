"""Files of codes with a scale for each row, written from the layouts of BFL and torchao."""

import json
from typing import Any

import torch
from torch import Tensor, nn

FP8 = torch.float8_e4m3fn
BY_TOKEN: dict[str, Any] = {
    "_type": "QuantizeTensorToFloat8Kwargs",
    "_data": {
        "float8_dtype": {"_type": "torch.dtype", "_data": "float8_e4m3fn"},
        "granularity": {"_type": "PerRow", "_data": {"dim": -1}},
        "mm_config": None,
        "hp_value_lb": None,
        "hp_value_ub": None,
        "kernel_preference": {"_type": "KernelPreference", "_data": "AUTO"},
    },
}


def coded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes ``[N, K]`` and the scales of rows ``[N]``."""
    scale = weight.float().abs().amax(1) / 448
    return (weight.float() / scale[:, None]).to(FP8), scale


def fp8r(named: dict[str, Tensor], layers: list[str]) -> dict[str, Tensor]:
    """BFL's: the scales beside the weights."""
    tensors = dict(named)
    for layer in layers:
        codes, scale = coded(named[f"{layer}.weight"])
        tensors |= {f"{layer}.weight": codes, f"{layer}.weight_scale": scale}
    return tensors


def torchao(
    named: dict[str, Tensor], layers: list[str], given: object = BY_TOKEN, *, old: bool = False
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """torchao's: the tensors, and what it says of them; ``old`` names as it had before."""
    tensors, told = {}, {}
    for name, tensor in named.items():
        layer = name.removesuffix(".weight")
        if name == layer or layer not in layers:
            tensors[name], told[name] = tensor, {"_type": "Tensor"}
            continue
        codes, scale = coded(tensor)
        pieces = (f"{name}:qdata", f"{name}:scale")
        if not old:
            pieces = (f"{layer}._weight_qdata", f"{layer}._weight_scale")
        tensors |= {pieces[0]: codes, pieces[1]: scale[:, None]}
        told[name] = {
            "_type": "Float8Tensor",
            "_data": {
                "block_size": [1, codes.shape[1]],
                "mm_config": None,
                "act_quant_kwargs": given,
                "kernel_preference": {"_type": "KernelPreference", "_data": "AUTO"},
                "dtype": {"_type": "torch.dtype", "_data": "bfloat16"},
            },
            "_tensor_data_names": ["qdata", "scale"],
        }
    metadata = {name: json.dumps(one) for name, one in told.items()}
    return tensors, {**metadata, "tensor_names": json.dumps(list(told))}


def qwen_layers(module: nn.Module) -> list[str]:
    """Of its blocks, but for modulation."""
    return [
        name
        for name, one in module.named_modules()
        if isinstance(one, nn.Linear) and ("attn" in name or "mlp" in name)
    ]
