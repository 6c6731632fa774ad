"""A small FLUX.1: one block of each kind, 64 tokens of an image and 32 of a text."""

from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from benchmarks.zoo import grid
from cp_convert.model.instantiate import randomised


def build_model() -> nn.Module:
    """Random weights, the same ones every time."""
    return randomised(
        FluxTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=8, joint_attention_dim=32, pooled_projection_dim=32,
            guidance_embeds=True, axes_dims_rope=(4, 6, 6),
        )
    )  # fmt: skip


def example_inputs() -> dict[str, Any]:
    """Of one image."""
    torch.manual_seed(1)
    return {
        "hidden_states": torch.randn(1, 64, 16), "encoder_hidden_states": torch.randn(1, 32, 32),
        "pooled_projections": torch.randn(1, 32), "timestep": torch.tensor([0.5]),
        "img_ids": grid(1, 8, 8), "txt_ids": torch.zeros(32, 3), "guidance": torch.tensor([4.0]),
    }  # fmt: skip
