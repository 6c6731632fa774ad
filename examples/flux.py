"""FLUX.1's transformer (diffusers' FluxTransformer2DModel), small: real structure, random weights.

Eight heads of 64, two joint and two single blocks, 1024 image tokens (512 px) and 128 text
tokens. ``flux_dev.py`` beside it has FLUX.1-dev's real width.
"""

import torch
from diffusers import FluxTransformer2DModel

# Position ids beyond 256 are not exact in bfloat16; the model computes its tables in float anyway.
keep_float32 = ("img_ids", "txt_ids")

GRID = 32
TEXT_TOKENS = 128


def build_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=64,
        num_attention_heads=8,
        joint_attention_dim=256,
        pooled_projection_dim=128,
        guidance_embeds=True,
        axes_dims_rope=(8, 28, 28),
    )


def example_inputs() -> dict[str, object]:
    torch.manual_seed(1)
    return {
        "hidden_states": torch.randn(1, GRID * GRID, 64),
        "encoder_hidden_states": torch.randn(1, TEXT_TOKENS, 256),
        "pooled_projections": torch.randn(1, 128),
        "timestep": torch.tensor([0.5]),
        "img_ids": image_ids(GRID),
        "txt_ids": torch.zeros(TEXT_TOKENS, 3),
        "guidance": torch.tensor([4.0]),  # times 1000 within: bf16 holds 4000, and not 3500
    }


def image_ids(grid: int) -> torch.Tensor:
    """FLUX's position ids of a square latent: ``[grid * grid, 3]`` with row and column."""
    rows, columns = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    return torch.stack((torch.zeros_like(rows), rows, columns), dim=-1).reshape(-1, 3).float()
