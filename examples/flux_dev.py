"""FLUX.1-dev at its real width and 1024 px (4096 image and 512 text tokens), with fewer blocks.

The architecture is that of black-forest-labs/FLUX.1-dev's transformer/config.json (24 heads of
128, 19 joint and 38 single blocks). ``FLUX_DEV_BLOCKS`` sets how many joint and as many single
blocks are built; one of each has 0.55 B parameters. Weights are random unless ``--weights`` is
given.
"""

import os

import torch
from diffusers import FluxTransformer2DModel
from flux import image_ids, keep_float32

__all__ = ["build_model", "example_inputs", "keep_float32"]

BLOCKS = int(os.environ.get("FLUX_DEV_BLOCKS", "1"))


def build_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return FluxTransformer2DModel(num_layers=BLOCKS, num_single_layers=BLOCKS, guidance_embeds=True)


def example_inputs() -> dict[str, object]:
    torch.manual_seed(1)
    return {
        "hidden_states": torch.randn(1, 4096, 64),
        "encoder_hidden_states": torch.randn(1, 512, 4096),
        "pooled_projections": torch.randn(1, 768),
        "timestep": torch.tensor([0.5]),
        "img_ids": image_ids(64),
        "txt_ids": torch.zeros(512, 3),
        "guidance": torch.tensor([4.0]),  # times 1000 within: bf16 holds 4000, and not 3500
    }
