"""Real pipelines of diffusers around small random models: no text encoder, no VAE, no download."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    Cosmos3OmniPipeline,
    Cosmos3OmniTransformer,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
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


def _wan_model() -> nn.Module:
    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=24, in_channels=4,
        out_channels=4, text_dim=16, freq_dim=16, ffn_dim=64, num_layers=1, rope_max_seq_len=16,
    ).eval()  # fmt: skip


def unipc() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )


def _wan(transformer: Any) -> Any:
    return WanPipeline(None, None, None, unipc(), transformer)


def _qwen_model() -> nn.Module:
    torch.manual_seed(0)
    return QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16,
        num_attention_heads=4, joint_attention_dim=32, axes_dims_rope=(4, 6, 6),
    ).eval()  # fmt: skip


def _qwen(transformer: Any) -> Any:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return QwenImagePipeline(scheduler, None, None, None, transformer)


def _first(tokens: int, count: int) -> Tensor:
    """A mask for so many tokens of a text."""
    return (torch.arange(tokens) < count)[None].long()


def _cosmos_model() -> nn.Module:
    torch.manual_seed(0)
    return Cosmos3OmniTransformer(
        head_dim=16, hidden_size=64, intermediate_size=128, latent_channel=4, patch_latent_dim=16,
        num_attention_heads=4, num_hidden_layers=2, num_key_value_heads=2, vocab_size=64,
        rope_axes_dim=[4, 2, 2],
    ).eval()  # fmt: skip


class Tokenizer:
    """Texts of eight tokens; engines take one length, so both prompts have it."""

    eos_token_id = 1

    def convert_tokens_to_ids(self, token: str) -> int:
        return 2

    def apply_chat_template(self, talk: list[dict[str, str]], **_: Any) -> SimpleNamespace:
        text = talk[-1]["content"]
        return SimpleNamespace(input_ids=[3 + ord(text[i % len(text)]) % 61 for i in range(8)])


def _cosmos(transformer: Any) -> Any:
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True, True], latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    return Cosmos3OmniPipeline(transformer, Tokenizer(), vae, unipc(), enable_safety_checker=False)


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
    "wan": Case(
        _wan_model,
        _wan,
        lambda: {
            "prompt_embeds": _random(1, 7, 16), "negative_prompt_embeds": _random(1, 7, 16, seed=2),
            "guidance_scale": 5.0, "height": 64, "width": 64, "num_frames": 9,
        },
        "frames",
    ),
    "qwen": Case(
        _qwen_model,
        _qwen,
        # The mask of the whole prompt is dropped by the pipeline, the other one is not.
        lambda: {
            "prompt_embeds": _random(1, 12, 32), "prompt_embeds_mask": _first(12, 10),
            "negative_prompt_embeds": _random(1, 12, 32, seed=2),
            "negative_prompt_embeds_mask": _first(12, 12),
            "true_cfg_scale": 2.0, "height": 96, "width": 128,
        },
        "images",
    ),
    "cosmos3": Case(
        _cosmos_model,
        _cosmos,
        lambda: {
            "prompt": "a cat", "negative_prompt": "no cat", "guidance_scale": 3.0,
            "num_frames": 9, "height": 64, "width": 64,
        },
        "video",
        ("text_indexes", "vision_sequence_indexes", "vision_mse_loss_indexes",
         "vision_noisy_frame_indexes"),
    ),
}  # fmt: skip
