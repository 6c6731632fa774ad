"""Wan 2.1's transformer (diffusers' WanTransformer3DModel), small: real structure, random weights.

The sequence is split inside the model, after patching, by the plan that diffusers ships; the
cross-attention sees the whole text on every rank and is left alone.
"""

import torch
from diffusers import WanTransformer3DModel


def build_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=8,
        attention_head_dim=32,
        in_channels=16,
        out_channels=16,
        text_dim=64,
        freq_dim=64,
        ffn_dim=512,
        num_layers=2,
        rope_max_seq_len=64,
    )


def example_inputs() -> dict[str, object]:
    torch.manual_seed(1)
    return {
        "hidden_states": torch.randn(1, 16, 3, 32, 32),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 77, 64),
    }
