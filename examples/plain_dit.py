"""A small diffusion transformer in plain PyTorch, with a plan of its own; no diffusers.

Tokens are split where they enter the first block and gathered after the output projection. The
position table is added before the split, the timestep embedding is the same on every rank.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from cp_convert import ContextParallelInput, ContextParallelOutput

TOKENS, CHANNELS, WIDTH, HEADS, BLOCKS = 512, 16, 256, 8, 3

cp_plan = {
    "blocks.0": {"x": ContextParallelInput(split_dim=1, expected_dims=3)},
    "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
}


class Block(nn.Module):
    """Attention and MLP, modulated by the timestep (adaLN, Peebles and Xie, arXiv:2212.09748)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(approximate="tanh"), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """``[B, S, C]`` tokens and a ``[B, C]`` condition to ``[B, S, C]`` tokens."""
        parts = self.modulation(functional.silu(condition))[:, None].chunk(6, dim=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        x = x + gate1 * self.attend(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)

    def attend(self, x: Tensor) -> Tensor:
        """Self-attention over all tokens."""
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2))


class PlainDiT(nn.Module):
    """Tokens of a noisy latent and a timestep to predicted noise."""

    def __init__(self) -> None:
        super().__init__()
        self.proj_in = nn.Linear(CHANNELS, WIDTH)
        self.positions = nn.Parameter(torch.randn(1, TOKENS, WIDTH) * 0.1)
        self.time = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(WIDTH)
        self.proj_out = nn.Linear(WIDTH, CHANNELS)
        half = torch.arange(WIDTH // 2) / (WIDTH // 2)
        self.register_buffer("frequencies", torch.exp(-math.log(1e4) * half), persistent=False)

    def forward(self, tokens: Tensor, timestep: Tensor) -> dict[str, Tensor]:
        """``[B, S, C]`` latent tokens and ``[B]`` timesteps to ``noise`` of ``[B, S, C]``."""
        x = self.proj_in(tokens) + self.positions
        angles = timestep[:, None].float() * self.frequencies
        condition = self.time(torch.cat((angles.cos(), angles.sin()), dim=-1).to(x.dtype))
        for block in self.blocks:
            x = block(x, condition)
        return {"noise": self.proj_out(self.norm(x))}


def build_model() -> nn.Module:
    torch.manual_seed(0)
    return PlainDiT()


def example_inputs() -> dict[str, object]:
    torch.manual_seed(1)
    return {"tokens": torch.randn(1, TOKENS, CHANNELS), "timestep": torch.tensor([500])}
