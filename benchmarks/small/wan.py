"""A small Wan 2.1: one block, 64 tokens of a video and 40 of a text."""

from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from cp_convert.model.instantiate import randomised


def build_model() -> nn.Module:
    """Random weights, the same ones every time."""
    return randomised(
        WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=8, attention_head_dim=16, in_channels=4,
            out_channels=4, text_dim=32, freq_dim=32, ffn_dim=128, num_layers=1,
            rope_max_seq_len=16,
        )
    )  # fmt: skip


def example_inputs() -> dict[str, Any]:
    """Of one video."""
    torch.manual_seed(1)
    return {
        "hidden_states": torch.randn(1, 4, 4, 8, 8), "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 40, 32),
    }  # fmt: skip
