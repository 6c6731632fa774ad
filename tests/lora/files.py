"""LoRA files with random factors, and what they should make of a model's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

RANK = 2
Factors = Mapping[str, tuple[Tensor, Tensor]]
"""By module: down ``[r, in]`` and up ``[out, r]``."""


def linears(module: nn.Module, wanted: Callable[[str], bool]) -> dict[str, nn.Linear]:
    """The linear layers whose names are wanted."""
    found = dict(module.named_modules())
    return {n: m for n, m in found.items() if isinstance(m, nn.Linear) and wanted(n)}


def factors(layers: Mapping[str, nn.Linear], seed: int, rank: int = RANK) -> Factors:
    """Random factors, large enough to matter."""
    made = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.randn(rank, layer.in_features, generator=made),
            torch.randn(layer.out_features, rank, generator=made) * layer.in_features**-0.5,
        )
        for name, layer in layers.items()
    }


def diffusers_names(given: Factors, file: Path) -> Path:
    """``transformer.X.lora_A.weight``; alpha is the rank."""
    save_file(
        {
            f"transformer.{name}.lora_{letter}.weight": factor
            for name, pair in given.items()
            for letter, factor in zip("AB", pair, strict=True)
        },
        file,
    )
    return file


def kohya_names(given: Factors, file: Path, alpha: float, name: str = "lora_unet_") -> Path:
    """``lora_unet_X.lora_down.weight``, with an alpha."""
    tensors: dict[str, Tensor] = {}
    for module, (down, up) in given.items():
        flat = name + module.replace(".", "_")
        tensors |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
        tensors[f"{flat}.alpha"] = torch.tensor(alpha)
    save_file(tensors, file)
    return file


def fused(module: nn.Module, sets: Iterable[tuple[Factors, float]]) -> nn.Module:
    """Add ``strength * up @ down`` to the model's weights, in place, in float64."""
    with torch.no_grad():
        for given, strength in sets:
            for name, (down, up) in given.items():
                weight = module.get_submodule(name).weight
                assert isinstance(weight, Tensor)
                weight += (strength * up.double() @ down.double()).to(weight.dtype)
    return module
