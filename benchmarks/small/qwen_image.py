"""A small Qwen-Image: one block, 64 tokens of an image and 32 of a text, of which 28 are real."""

from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from torch import nn

from cp_convert.model.instantiate import randomised


def build_model() -> nn.Module:
    """Random weights, the same ones every time."""
    return randomised(
        QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16,
            num_attention_heads=8, joint_attention_dim=32, axes_dims_rope=(4, 6, 6),
        )
    )  # fmt: skip


def example_inputs() -> dict[str, Any]:
    """Of one image."""
    torch.manual_seed(1)
    mask = torch.ones(1, 32, dtype=torch.bool)
    mask[:, 28:] = False
    return {
        "hidden_states": torch.randn(1, 64, 16), "encoder_hidden_states": torch.randn(1, 32, 32),
        "encoder_hidden_states_mask": mask, "timestep": torch.tensor([0.5]),
        "img_shapes": [(1, 8, 8)],
    }  # fmt: skip
