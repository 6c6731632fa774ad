"""Real pipelines of diffusers around small random models: no text encoder, no VAE, no download."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from torch import Tensor, nn

STEPS = 3


@dataclass(frozen=True)
class Case:
    """A pipeline and how it is called.

    Attributes:
        model: makes the model.
        pipeline: puts a model, or a bundle, into the pipeline.
        call: what the pipeline is called with, besides seed and steps.
        result: the field of the pipeline's output.
        freeze: arguments that decide shapes.
    """

    model: Callable[[], nn.Module]
    pipeline: Callable[[Any], Any]
    call: Callable[[], dict[str, Any]]
    result: str
    freeze: tuple[str, ...] = ()

    def latents(self, transformer: nn.Module, seed: int = 0, **changed: Any) -> Tensor:
        """What the pipeline makes of random latents in a few steps."""
        pipeline = self.pipeline(transformer)
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(seed)
        call = {**self.call(), "output_type": "latent", "num_inference_steps": STEPS, **changed}
        latents: Tensor = getattr(pipeline(**call, generator=generator), self.result)
        return latents

    def recorded(self) -> tuple[Tensor, dict[str, Any]]:
        """What the plain pipeline makes, and what it gives the model in its first step."""
        seen: list[Mapping[str, Any]] = []
        module = self.model()
        module.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True
        )
        latents = self.latents(module)
        return latents, {name: value for name, value in seen[0].items() if name != "return_dict"}


def _random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _flux_model() -> nn.Module:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=4, joint_attention_dim=32, pooled_projection_dim=16,
        guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    ).eval()  # fmt: skip


def _flux(transformer: Any) -> Any:
    return FluxPipeline(
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), None, None, None, None, None,
        transformer,
    )  # fmt: skip


CASES = {
    "flux": Case(
        _flux_model,
        _flux,
        lambda: {
            "prompt_embeds": _random(1, 12, 32), "pooled_prompt_embeds": _random(1, 16),
            "negative_prompt_embeds": _random(1, 12, 32, seed=2),
            "negative_pooled_prompt_embeds": _random(1, 16, seed=2),
            "true_cfg_scale": 2.0, "height": 64, "width": 96,
        },
        "images",
    ),
}  # fmt: skip
