"""Every transformer class of diffusers in a small configuration, with inputs and random weights.

Two or three blocks, four heads, a few dozen tokens: the structure of the model, at a size that is
traced, built and proven in seconds. Weights are random everywhere, also where the class starts
with zeros (output layers, gates), because zeros hide what attention computes.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cp_convert.model.instantiate import randomised

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One class: how to make it small, and what to call it with.

    Attributes:
        config: keyword arguments of the class.
        inputs: makes the keyword arguments of its forward.
        freeze: arguments that decide shapes by their values.
    """

    config: dict[str, Any]
    inputs: Callable[[], Inputs]
    freeze: tuple[str, ...] = field(default=())


def rand(*shape: int) -> Tensor:
    """Standard normal numbers, the same ones for the same sequence of calls."""
    return torch.randn(*shape)


def ints(high: int, *shape: int) -> Tensor:
    """Random integers below ``high``."""
    return torch.randint(high, shape)


def ones(*shape: int) -> Tensor:
    """A mask of ones: int64, as tokenizers give it."""
    return torch.ones(shape, dtype=torch.int64)


def padded_mask(batch: int, length: int, real: int) -> Tensor:
    """A tokenizer's mask whose last tokens are padding."""
    mask = ones(batch, length)
    mask[:, real:] = 0
    return mask


def grid(frames: int, height: int, width: int, columns: int = 3) -> Tensor:
    """Positions of a token grid, ``[frames * height * width, columns]``."""
    axes = torch.meshgrid(
        torch.arange(frames), torch.arange(height), torch.arange(width), indexing="ij"
    )
    ids = torch.stack(axes, -1).reshape(-1, 3).float()
    extra = torch.zeros(ids.shape[0], columns - 3)
    return torch.cat([ids, extra], -1) if columns > 3 else ids


T = torch.tensor([500.0])


def _flux_like(width: int, text: int, **more: Any) -> Inputs:
    return {
        "hidden_states": rand(1, 64, width),
        "encoder_hidden_states": rand(1, 16, text),
        "timestep": torch.tensor([0.5]),
        "img_ids": grid(1, 8, 8),
        "txt_ids": torch.zeros(16, 3),
        **more,
    }


_FLUX = {
    "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
    "num_attention_heads": 4, "joint_attention_dim": 32,
}  # fmt: skip

_WAN = {
    "num_attention_heads": 4, "attention_head_dim": 32, "in_channels": 16, "out_channels": 16,
    "text_dim": 32, "freq_dim": 64, "ffn_dim": 128, "num_layers": 2,
}  # fmt: skip


def _wan(**more: Any) -> Inputs:
    return {
        "hidden_states": rand(1, 16, 2, 8, 8),
        "timestep": T,
        "encoder_hidden_states": rand(1, 12, 32),
        **more,
    }


def _wan_animate_2() -> Inputs:
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    cache = WanAnimate2KVCache(2)
    for layer in cache.layer_caches:
        layer.store(rand(1, 32, 4, 16), rand(1, 32, 4, 16))
    return {
        "hidden_states": [rand(4, 2, 8, 8)], "condition_latents": [rand(8, 2, 8, 8)],
        "timestep": T, "encoder_hidden_states": [rand(9, 32)], "seq_len": 32,
        "kv_cache": cache, "kv_cache_mode": "cached", "origin_len": 5, "origin_area": [64, 64],
        "reference_grid_sizes": torch.tensor([[2, 4, 4]]),
    }  # fmt: skip


def _hunyuan(**more: Any) -> Inputs:
    return {
        "hidden_states": rand(1, 4, 2, 8, 8),
        "timestep": T,
        "encoder_hidden_states": rand(1, 12, 32),
        "encoder_attention_mask": padded_mask(1, 12, 9),
        "pooled_projections": rand(1, 16),
        **more,
    }


_HUNYUAN = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 4, "attention_head_dim": 32,
    "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": 32,
    "pooled_projection_dim": 16, "rope_axes_dim": (8, 12, 12),
}  # fmt: skip

_PIXART = {
    "num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8,
    "num_layers": 2, "cross_attention_dim": 64, "sample_size": 16, "caption_channels": 32,
    "use_additional_conditions": False,
}  # fmt: skip

_COGVIDEO = {
    "num_attention_heads": 4, "attention_head_dim": 32, "in_channels": 4, "out_channels": 4,
    "time_embed_dim": 16, "text_embed_dim": 32, "num_layers": 2, "sample_width": 16,
    "sample_height": 16, "sample_frames": 9, "max_text_seq_length": 12,
}  # fmt: skip


def _cogvideo(**more: Any) -> Inputs:
    return {
        "hidden_states": rand(1, 3, 4, 16, 16),
        "encoder_hidden_states": rand(1, 12, 32),
        "timestep": torch.tensor([500]),
        **more,
    }


_LTX2 = {
    "in_channels": 16, "out_channels": 16, "num_attention_heads": 4, "attention_head_dim": 16,
    "cross_attention_dim": 64, "audio_in_channels": 16, "audio_out_channels": 16,
    "audio_num_attention_heads": 4, "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 32, "num_layers": 2, "caption_channels": 32,
}  # fmt: skip

CASES: dict[str, Case] = {
    "AceStepTransformer1DModel": Case(
        {
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "in_channels": 24,
            "audio_acoustic_hidden_dim": 8, "sliding_window": 16,
        },
        lambda: {
            "hidden_states": rand(1, 64, 8), "timestep": torch.tensor([0.5]),
            "timestep_r": torch.tensor([0.3]), "encoder_hidden_states": rand(1, 12, 64),
            "context_latents": rand(1, 64, 16),
        },
    ),
    "AuraFlowTransformer2DModel": Case(
        {
            "sample_size": 16, "patch_size": 2, "in_channels": 4, "num_mmdit_layers": 1,
            "num_single_dit_layers": 1, "attention_head_dim": 16, "num_attention_heads": 4,
            "joint_attention_dim": 32, "caption_projection_dim": 64, "pos_embed_max_size": 64,
        },
        lambda: {
            "hidden_states": rand(1, 4, 16, 16), "encoder_hidden_states": rand(1, 12, 32),
            "timestep": torch.tensor([0.5]),
        },
    ),
    "CogVideoXTransformer3DModel": Case(
        _COGVIDEO | {"use_rotary_positional_embeddings": True},
        lambda: _cogvideo(image_rotary_emb=(rand(192, 32).cos(), rand(192, 32).sin())),
    ),
    "ConsisIDTransformer3DModel": Case(
        _COGVIDEO | {
            "is_train_face": True, "is_kps": False, "cross_attn_interval": 1,
            "cross_attn_dim_head": 16, "cross_attn_num_heads": 4, "LFE_id_dim": 16,
            "LFE_vit_dim": 16, "LFE_depth": 5, "LFE_dim_head": 8, "LFE_num_heads": 2,
            "LFE_num_id_token": 2, "LFE_num_querie": 4, "LFE_output_dim": 85, "LFE_ff_mult": 2,
            "LFE_num_scale": 1,
        },
        lambda: _cogvideo(id_cond=rand(1, 16), id_vit_hidden=[rand(1, 10, 16)]),
    ),
    "DiTTransformer2DModel": Case(
        {
            "num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 4,
            "out_channels": 8, "num_layers": 2, "sample_size": 16, "num_embeds_ada_norm": 10,
        },
        lambda: {
            "hidden_states": rand(1, 4, 16, 16), "timestep": torch.tensor([5]),
            "class_labels": torch.tensor([3]),
        },
    ),
    "HunyuanDiT2DModel": Case(
        {
            "sample_size": 16, "patch_size": 2, "in_channels": 4, "num_layers": 4,
            "attention_head_dim": 16, "num_attention_heads": 4, "hidden_size": 64,
            "cross_attention_dim": 32, "cross_attention_dim_t5": 32, "pooled_projection_dim": 16,
            "text_len": 8, "text_len_t5": 8,
        },
        lambda: {
            "hidden_states": rand(1, 4, 16, 16), "timestep": T,
            "encoder_hidden_states": rand(1, 8, 32), "text_embedding_mask": padded_mask(1, 8, 6),
            "encoder_hidden_states_t5": rand(1, 8, 32),
            "text_embedding_mask_t5": padded_mask(1, 8, 5),
            "image_meta_size": rand(1, 6).abs() * 100, "style": torch.tensor([0]),
            "image_rotary_emb": [rand(64, 16).cos(), rand(64, 16).sin()],
        },
    ),
    "LatteTransformer3DModel": Case(
        {
            "num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 4,
            "out_channels": 8, "num_layers": 2, "cross_attention_dim": 64, "sample_size": 16,
            "patch_size": 2, "caption_channels": 32, "video_length": 4,
            "attention_bias": True, "num_embeds_ada_norm": 1000, "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False, "activation_fn": "gelu-approximate",
        },
        lambda: {
            "hidden_states": rand(1, 4, 4, 16, 16), "timestep": torch.tensor([5]),
            "encoder_hidden_states": rand(1, 12, 32),
        },
    ),
    "LuminaNextDiT2DModel": Case(
        {
            "sample_size": 16, "patch_size": 2, "in_channels": 4, "hidden_size": 64,
            "num_layers": 2, "num_attention_heads": 4, "num_kv_heads": 2, "multiple_of": 16,
            "cross_attention_dim": 32,
        },
        lambda: {
            "hidden_states": rand(1, 4, 16, 16), "timestep": torch.tensor([0.5]),
            "encoder_hidden_states": rand(1, 12, 32), "encoder_mask": padded_mask(1, 12, 9),
            "image_rotary_emb": torch.polar(torch.ones(8, 8, 8), rand(8, 8, 8)),
            "cross_attention_kwargs": {},
        },
        freeze=("image_rotary_emb",),
    ),
    "MiniMaxMusic3RVQDepthDecoder": Case(
        {
            "hidden_size": 64, "num_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
            "audio_vocab_size": 32, "num_codebooks": 8, "max_position_embeddings": 16,
        },
        lambda: {"inputs_embeds": rand(1, 8, 64)},
    ),
    "PixArtTransformer2DModel": Case(
        _PIXART,
        lambda: {
            "hidden_states": rand(1, 4, 16, 16), "encoder_hidden_states": rand(1, 12, 32),
            "timestep": torch.tensor([500]), "encoder_attention_mask": padded_mask(1, 12, 9),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
    ),
    "PriorTransformer": Case(
        {
            "num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2,
            "embedding_dim": 32, "num_embeddings": 13, "additional_embeddings": 4,
        },
        lambda: {
            "hidden_states": rand(1, 32), "timestep": torch.tensor([5]),
            "proj_embedding": rand(1, 32), "encoder_hidden_states": rand(1, 13, 32),
        },
    ),
    "SanaTransformer2DModel": Case(
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 4,
            "attention_head_dim": 16, "num_layers": 2, "num_cross_attention_heads": 4,
            "cross_attention_head_dim": 16, "cross_attention_dim": 64, "caption_channels": 32,
            "sample_size": 8,
        },
        lambda: {
            "hidden_states": rand(1, 4, 8, 8), "encoder_hidden_states": rand(1, 12, 32),
            "timestep": T, "encoder_attention_mask": padded_mask(1, 12, 9),
        },
    ),
    "StableAudioDiTModel": Case(
        {
            "sample_size": 64, "in_channels": 8, "num_layers": 2, "attention_head_dim": 16,
            "num_attention_heads": 4, "num_key_value_attention_heads": 2, "out_channels": 8,
            "cross_attention_dim": 32, "time_proj_dim": 16, "global_states_input_dim": 32,
            "cross_attention_input_dim": 32,
        },
        lambda: {
            "hidden_states": rand(1, 8, 63), "timestep": torch.tensor([0.5]),
            "encoder_hidden_states": rand(1, 12, 32), "global_hidden_states": rand(1, 1, 32),
            "rotary_embedding": (rand(64, 8).cos(), rand(64, 8).sin()),
        },
    ),
    "T5FilmDecoder": Case(
        {
            "input_dims": 16, "targets_length": 32, "d_model": 64, "num_layers": 2,
            "num_heads": 4, "d_kv": 16, "d_ff": 128,
        },
        lambda: {
            "encodings_and_masks": [(rand(1, 12, 64), padded_mask(1, 12, 9))],
            "decoder_input_tokens": rand(1, 32, 16),
            "decoder_noise_time": torch.tensor([0.5]),
        },
    ),
    "Transformer2DModel": Case(
        {
            "num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 32,
            "num_layers": 2, "cross_attention_dim": 32, "norm_num_groups": 8,
        },
        lambda: {"hidden_states": rand(1, 32, 8, 8), "encoder_hidden_states": rand(1, 12, 32)},
    ),
    "DreamLiteTransformer2DModel": Case(
        {
            "num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 32,
            "num_layers": 2, "cross_attention_dim": 32, "norm_num_groups": 8,
            "use_linear_projection": True,
        },
        lambda: {"hidden_states": rand(1, 32, 8, 8), "encoder_hidden_states": rand(1, 12, 32)},
    ),
    "AllegroTransformer3DModel": Case(
        {
            "num_attention_heads": 4, "attention_head_dim": 24, "in_channels": 4,
            "out_channels": 4, "num_layers": 2, "cross_attention_dim": 96, "sample_height": 8,
            "sample_width": 8, "sample_frames": 4, "caption_channels": 32,
        },
        lambda: {
            "hidden_states": rand(1, 4, 4, 8, 8), "encoder_hidden_states": rand(1, 12, 32),
            "timestep": torch.tensor([500]),
            "attention_mask": torch.ones(1, 4, 8, 8),
            "encoder_attention_mask": padded_mask(1, 12, 9),
            "image_rotary_emb": (
                (
                    (rand(4, 8).cos(), rand(4, 8).sin()),
                    (rand(4, 8).cos(), rand(4, 8).sin()),
                    (rand(4, 8).cos(), rand(4, 8).sin()),
                ),
                (
                    grid(4, 4, 4)[:, 0].long().unsqueeze(0),
                    grid(4, 4, 4)[:, 1].long().unsqueeze(0),
                    grid(4, 4, 4)[:, 2].long().unsqueeze(0),
                ),
            ),
        },
    ),
    "AnyFlowTransformer3DModel": Case(
        _WAN,
        lambda: _wan(
            hidden_states=rand(1, 2, 16, 8, 8), timestep=torch.full((1, 2), 500.0),
            r_timestep=torch.full((1, 2), 250.0),
        ),
    ),
    "AnyFlowFARTransformer3DModel": Case(
        _WAN | {"chunk_partition": (1, 1)},
        lambda: _wan(
            hidden_states=rand(1, 2, 16, 8, 8), timestep=torch.full((1, 2), 500.0),
            r_timestep=torch.full((1, 2), 250.0), chunk_partition=(1, 1),
        ),
    ),
    "BriaTransformer2DModel": Case(
        _FLUX | {"axes_dims_rope": [4, 6, 6]},
        lambda: _flux_like(16, 32),
    ),
    "BriaFiboTransformer2DModel": Case(
        {
            "in_channels": 16, "num_layers": 1, "num_single_layers": 1,
            "attention_head_dim": 16, "num_attention_heads": 4, "joint_attention_dim": 64,
            "axes_dims_rope": [4, 6, 6], "text_encoder_dim": 32,
        },
        lambda: _flux_like(16, 64, text_encoder_layers=[rand(1, 16, 32), rand(1, 16, 32)]),
    ),
    "BriaFibo2Transformer2DModel": Case(
        {
            "in_channels": 8, "dim": 64, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 4,
            "cap_feat_dim": 48, "injection_layer_ids": (1,), "perceiver_num_layers": 1,
            "min_num_gist_tokens": 8, "max_num_gist_tokens": 16, "gist_step": 4,
            "gist_min_text_len": 8, "gist_max_text_len": 64, "axes_dims": (4, 6, 6),
            "axes_lens": (64, 32, 32),
        },
        lambda: {
            "hidden_states": rand(1, 8, 16, 16), "timestep": torch.tensor([0.5]),
            "encoder_hidden_states": rand(1, 2, 16, 48),
        },
    ),
    "ChromaTransformer2DModel": Case(
        _FLUX | {
            "axes_dims_rope": (4, 4, 8), "approximator_num_channels": 8,
            "approximator_hidden_dim": 16, "approximator_layers": 1,
        },
        lambda: _flux_like(16, 32, attention_mask=torch.ones(1, 80, dtype=torch.bool)),
    ),
    "ChronoEditTransformer3DModel": Case(_WAN, _wan),
    "CogView3PlusTransformer2DModel": Case(
        {
            "in_channels": 4, "num_layers": 2, "attention_head_dim": 16,
            "num_attention_heads": 4, "out_channels": 4, "text_embed_dim": 32,
            "time_embed_dim": 16, "condition_dim": 8, "pos_embed_max_size": 16, "sample_size": 16,
        },
        lambda: {
            "hidden_states": rand(1, 4, 16, 16), "encoder_hidden_states": rand(1, 12, 32),
            "timestep": torch.tensor([500]), "original_size": torch.tensor([[16.0, 16.0]]),
            "target_size": torch.tensor([[16.0, 16.0]]), "crop_coords": torch.tensor([[0.0, 0.0]]),
        },
    ),
    "CogView4Transformer2DModel": Case(
        {
            "in_channels": 4, "num_layers": 2, "attention_head_dim": 16,
            "num_attention_heads": 4, "out_channels": 4, "text_embed_dim": 32,
            "time_embed_dim": 16, "condition_dim": 8, "rope_axes_dim": (8, 8),
        },
        lambda: {
            "hidden_states": rand(1, 4, 16, 16), "encoder_hidden_states": rand(1, 12, 32),
            "timestep": torch.tensor([500]), "original_size": torch.tensor([[16.0, 16.0]]),
            "target_size": torch.tensor([[16.0, 16.0]]), "crop_coords": torch.tensor([[0.0, 0.0]]),
        },
    ),
    "CosmosTransformer3DModel": Case(
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 4,
            "attention_head_dim": 16, "num_layers": 2, "text_embed_dim": 32,
            "adaln_lora_dim": 8, "max_size": (4, 32, 32),
        },
        lambda: {
            "hidden_states": rand(1, 4, 2, 16, 16), "timestep": torch.tensor([0.5]),
            "encoder_hidden_states": rand(1, 12, 32), "fps": 30,
            "padding_mask": torch.zeros(1, 1, 16, 16),
        },
    ),
    "Cosmos3OmniTransformer": Case(
        {
            "head_dim": 16, "hidden_size": 64, "intermediate_size": 128, "latent_channel": 4,
            "patch_latent_dim": 16, "num_attention_heads": 4, "num_hidden_layers": 2,
            "num_key_value_heads": 2, "vocab_size": 64, "rope_axes_dim": (4, 2, 2),
        },
        lambda: {
            "input_ids": ints(64, 12), "text_indexes": torch.arange(12),
            "position_ids": torch.cat(
                [torch.arange(12).expand(3, 12), 12 + grid(4, 4, 4).long().T], 1
            ).contiguous(),
            "und_len": 12, "sequence_length": 76, "vision_tokens": [rand(1, 4, 4, 8, 8)],
            "vision_token_shapes": [(4, 4, 4)],
            "vision_sequence_indexes": torch.arange(12, 76),
            "vision_mse_loss_indexes": torch.arange(12, 76),
            "vision_timesteps": torch.full((64,), 500.0),
            "vision_noisy_frame_indexes": [torch.arange(4)],
        },
        freeze=(
            "text_indexes", "vision_sequence_indexes", "vision_mse_loss_indexes",
            "vision_noisy_frame_indexes",
        ),
    ),
    "EasyAnimateTransformer3DModel": Case(
        {
            "num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 4,
            "out_channels": 4, "patch_size": 2, "sample_width": 8, "sample_height": 8,
            "num_layers": 2, "mmdit_layers": 2, "time_embed_dim": 16, "text_embed_dim": 32,
        },
        lambda: {
            "hidden_states": rand(1, 4, 2, 16, 16), "timestep": torch.tensor([500]),
            "encoder_hidden_states": rand(1, 12, 32),
        },
    ),
    "ErnieImageTransformer2DModel": Case(
        {
            "hidden_size": 64, "num_attention_heads": 4, "num_layers": 2, "ffn_hidden_size": 128,
            "in_channels": 8, "out_channels": 8, "text_in_dim": 32, "rope_axes_dim": (4, 6, 6),
        },
        lambda: {
            "hidden_states": rand(1, 8, 8, 8), "timestep": T, "text_bth": rand(1, 12, 32),
            "text_lens": torch.tensor([12]),
        },
    ),
    "FluxTransformer2DModel": Case(
        _FLUX | {"pooled_projection_dim": 32, "guidance_embeds": True, "axes_dims_rope": (4, 4, 8)},
        lambda: _flux_like(16, 32, pooled_projections=rand(1, 32), guidance=torch.tensor([4.0])),
    ),
    "Flux2Transformer2DModel": Case(
        _FLUX | {"timestep_guidance_channels": 32, "axes_dims_rope": (4, 4, 4, 4)},
        lambda: _flux_like(
            16, 32, img_ids=grid(1, 8, 8, 4), txt_ids=torch.zeros(16, 4),
            guidance=torch.tensor([4.0]),
        ),
    ),
    "Flux3Transformer2DModel": Case(
        {
            "in_channels": 16, "cond_in_channels": 16, "num_layers": 1, "num_single_layers": 1,
            "attention_head_dim": 16, "num_attention_heads": 4, "joint_attention_dim": 32,
            "timestep_channels": 32, "axes_dims_rope": (4, 4, 4, 4),
        },
        lambda: _flux_like(16, 32, img_ids=grid(1, 8, 8, 4), txt_ids=torch.zeros(16, 4)),
    ),
    "GlmImageTransformer2DModel": Case(
        {
            "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16,
            "num_attention_heads": 4, "text_embed_dim": 32, "time_embed_dim": 16,
            "condition_dim": 8, "prior_vq_quantizer_codebook_size": 64,
        },
        lambda: {
            "hidden_states": rand(1, 4, 16, 16), "encoder_hidden_states": rand(1, 12, 32),
            "prior_token_id": ints(64, 1, 64), "prior_token_drop": torch.zeros(1, 64).bool(),
            "timestep": torch.tensor([500]), "target_size": torch.tensor([[16.0, 16.0]]),
            "crop_coords": torch.tensor([[0.0, 0.0]]),
        },
        freeze=("prior_token_drop",),
    ),
    "HeliosTransformer3DModel": Case(
        _WAN | {"rope_dim": (12, 10, 10)},
        lambda: _wan(
            indices_hidden_states=torch.arange(2, 4).unsqueeze(0),
            indices_latents_history_short=torch.tensor([[1]]),
            indices_latents_history_mid=torch.tensor([[0, 1]]),
            indices_latents_history_long=torch.tensor([[0, 1, 2, 3]]),
            latents_history_short=rand(1, 16, 1, 8, 8),
            latents_history_mid=rand(1, 16, 2, 8, 8),
            latents_history_long=rand(1, 16, 4, 8, 8),
        ),
    ),
    "HiDreamImageTransformer2DModel": Case(
        {
            "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 1,
            "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 4,
            "caption_channels": [32, 16], "text_emb_dim": 64, "num_routed_experts": 4,
            "num_activated_experts": 2, "axes_dims_rope": (4, 6, 6), "max_resolution": (16, 16),
            "llama_layers": (0, 1), "force_inference_output": True,
        },
        lambda: {
            "hidden_states": rand(1, 4, 16, 16), "timesteps": T,
            "encoder_hidden_states_t5": rand(1, 8, 32),
            "encoder_hidden_states_llama3": rand(2, 1, 8, 16), "pooled_embeds": rand(1, 64),
        },
    ),
    "HunyuanVideoTransformer3DModel": Case(
        _HUNYUAN, lambda: _hunyuan(guidance=torch.tensor([6000.0]))
    ),
    "HunyuanVideo15Transformer3DModel": Case(
        {
            "in_channels": 9, "out_channels": 4, "num_attention_heads": 4,
            "attention_head_dim": 16, "num_layers": 2, "num_refiner_layers": 1,
            "text_embed_dim": 32, "text_embed_2_dim": 24, "image_embed_dim": 16,
            "rope_axes_dim": (4, 6, 6), "target_size": 16, "task_type": "t2v",
        },
        lambda: {
            "hidden_states": rand(1, 9, 2, 8, 8), "timestep": T,
            "encoder_hidden_states": rand(1, 12, 32),
            "encoder_attention_mask": padded_mask(1, 12, 9),
            "encoder_hidden_states_2": rand(1, 6, 24),
            "encoder_attention_mask_2": padded_mask(1, 6, 4),
            "image_embeds": torch.zeros(1, 4, 16),
        },
        freeze=("encoder_attention_mask", "encoder_attention_mask_2", "image_embeds"),
    ),
    "HunyuanVideoFramepackTransformer3DModel": Case(
        _HUNYUAN | {"has_image_proj": True, "image_proj_dim": 16, "has_clean_x_embedder": True},
        lambda: _hunyuan(
            guidance=torch.tensor([6000.0]), image_embeds=rand(1, 4, 16),
            indices_latents=torch.tensor([2, 3]), latents_clean=rand(1, 4, 1, 8, 8),
            indices_latents_clean=torch.tensor([0]), latents_history_2x=rand(1, 4, 2, 8, 8),
            indices_latents_history_2x=torch.tensor([0, 1]),
            latents_history_4x=rand(1, 4, 4, 8, 8),
            indices_latents_history_4x=torch.tensor([0, 1, 2, 3]),
        ),
        freeze=("encoder_attention_mask",),
    ),
    "HunyuanImageTransformer2DModel": Case(
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 4,
            "attention_head_dim": 16, "num_layers": 1, "num_single_layers": 1,
            "num_refiner_layers": 1, "text_embed_dim": 32, "rope_axes_dim": (8, 8),
            "text_embed_2_dim": 24,
        },
        lambda: {
            "hidden_states": rand(1, 4, 8, 8), "timestep": T,
            "encoder_hidden_states": rand(1, 12, 32),
            "encoder_attention_mask": padded_mask(1, 12, 9),
            "encoder_hidden_states_2": rand(1, 6, 24),
            "encoder_attention_mask_2": padded_mask(1, 6, 4),
        },
        freeze=("encoder_attention_mask", "encoder_attention_mask_2"),
    ),
    "Ideogram4Transformer2DModel": Case(
        {
            "in_channels": 8, "num_layers": 2, "attention_head_dim": 16,
            "num_attention_heads": 4, "intermediate_size": 128, "adaln_dim": 16,
            "llm_features_dim": 32, "mrope_section": (4, 2, 2),
        },
        lambda: {
            "hidden_states": rand(1, 80, 8), "timestep": torch.tensor([0.5]),
            "encoder_hidden_states": rand(1, 80, 32),
            "position_ids": torch.arange(80).view(1, 80, 1).expand(1, 80, 3).contiguous(),
            "segment_ids": torch.zeros(1, 80, dtype=torch.int64),
            "indicator": torch.cat([torch.full((1, 16), 3), torch.full((1, 64), 2)], 1),
        },
    ),
    "JoyImageEditTransformer3DModel": Case(
        {
            "in_channels": 4, "hidden_size": 64, "num_attention_heads": 4, "text_dim": 32,
            "num_layers": 2, "rope_dim_list": [4, 6, 6],
        },
        lambda: {
            "hidden_states": rand(1, 4, 2, 8, 8), "timestep": T,
            "encoder_hidden_states": rand(1, 12, 32),
        },
    ),
    "JoyImageEditPlusTransformer3DModel": Case(
        {
            "in_channels": 4, "hidden_size": 64, "num_attention_heads": 4, "text_dim": 32,
            "num_layers": 2, "rope_dim_list": [4, 6, 6],
        },
        lambda: {
            "hidden_states": rand(1, 32, 4, 1, 2, 2), "timestep": T,
            "encoder_hidden_states": rand(1, 12, 32),
            "encoder_hidden_states_mask": padded_mask(1, 12, 9),
            "shape_list": [[(1, 4, 4), (1, 4, 4)]],
        },
    ),
    "Kandinsky5Transformer3DModel": Case(
        {
            "in_visual_dim": 4, "in_text_dim": 32, "in_text_dim2": 16, "time_dim": 16,
            "out_visual_dim": 4, "model_dim": 64, "ff_dim": 128, "num_text_blocks": 1,
            "num_visual_blocks": 2, "axes_dims": (4, 6, 6),
        },
        lambda: {
            "hidden_states": rand(1, 2, 8, 8, 4), "encoder_hidden_states": rand(1, 12, 32),
            "timestep": T, "pooled_projections": rand(1, 16),
            "visual_rope_pos": [torch.arange(2), torch.arange(4), torch.arange(4)],
            "text_rope_pos": torch.arange(12),
        },
    ),
    "Kandinsky6Transformer3DModel": Case(
        {
            "in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 32, "in_text_dim2": 16,
            "time_dim": 16, "model_dim": 64, "ff_dim": 128, "num_text_blocks": 1,
            "num_visual_blocks": 2, "axes_dims": (4, 6, 6), "visual_cond": False,
            "in_audio_dim": 8, "out_audio_dim": 8,
        },
        lambda: {
            "hidden_states": rand(1, 2, 8, 8, 4), "encoder_hidden_states": rand(1, 12, 32),
            "pooled_projections": rand(1, 16), "timestep": T,
        },
    ),
    "Kandinsky6SRTransformer3DModel": Case(
        {
            "in_visual_dim": 4, "out_visual_dim": 4, "time_dim": 16, "model_dim": 64,
            "ff_dim": 128, "num_visual_blocks": 2, "axes_dims": (4, 6, 6),
        },
        lambda: {"hidden_states": rand(1, 2, 16, 16, 9), "timestep": T},
    ),
    "Krea2Transformer2DModel": Case(
        {
            "in_channels": 8, "num_layers": 2, "attention_head_dim": 16,
            "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128,
            "timestep_embed_dim": 16, "text_hidden_dim": 32, "num_text_layers": 2,
            "text_num_attention_heads": 4, "text_num_key_value_heads": 2,
            "text_intermediate_size": 64, "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1, "axes_dims_rope": (4, 6, 6),
        },
        lambda: {
            "hidden_states": rand(1, 64, 8), "encoder_hidden_states": rand(1, 12, 2, 32),
            "timestep": torch.tensor([0.5]),
            "position_ids": torch.cat([torch.zeros(12, 3), grid(1, 8, 8)]),
            "encoder_attention_mask": padded_mask(1, 12, 9).bool(),
        },
    ),
    "LongCatAudioDiTTransformer": Case(
        {
            "dit_dim": 64, "dit_depth": 2, "dit_heads": 4, "dit_text_dim": 32, "latent_dim": 8,
        },
        lambda: {
            "hidden_states": rand(1, 64, 8), "encoder_hidden_states": rand(1, 12, 32),
            "encoder_attention_mask": torch.ones(1, 12).bool(), "timestep": torch.tensor([0.5]),
            "attention_mask": torch.ones(1, 64).bool(), "latent_cond": rand(1, 64, 8),
        },
    ),
    "LongCatImageTransformer2DModel": Case(
        _FLUX | {"axes_dims_rope": [4, 4, 8]},
        lambda: _flux_like(16, 32),
    ),
    "LTXVideoTransformer3DModel": Case(
        {
            "in_channels": 16, "out_channels": 16, "num_attention_heads": 4,
            "attention_head_dim": 16, "cross_attention_dim": 64, "num_layers": 2,
            "caption_channels": 32,
        },
        lambda: {
            "hidden_states": rand(1, 64, 16), "encoder_hidden_states": rand(1, 12, 32),
            "timestep": T, "encoder_attention_mask": padded_mask(1, 12, 9), "num_frames": 4,
            "height": 4, "width": 4,
        },
    ),
    "LTX2VideoTransformer3DModel": Case(
        _LTX2,
        lambda: {
            "hidden_states": rand(1, 64, 16), "audio_hidden_states": rand(1, 16, 16),
            "encoder_hidden_states": rand(1, 12, 32),
            "audio_encoder_hidden_states": rand(1, 12, 32), "timestep": torch.full((1, 1), 500.0),
            "encoder_attention_mask": padded_mask(1, 12, 9),
            "audio_encoder_attention_mask": padded_mask(1, 12, 9), "num_frames": 4, "height": 4,
            "width": 4, "fps": 24.0, "audio_num_frames": 16,
        },
    ),
    "Lumina2Transformer2DModel": Case(
        {
            "sample_size": 16, "in_channels": 4, "hidden_size": 64, "num_layers": 2,
            "num_refiner_layers": 1, "num_attention_heads": 4, "num_kv_heads": 2,
            "multiple_of": 16, "axes_dim_rope": (4, 6, 6), "axes_lens": (64, 32, 32),
            "cap_feat_dim": 32,
        },
        lambda: {
            "hidden_states": rand(1, 4, 16, 16), "timestep": torch.tensor([0.5]),
            "encoder_hidden_states": rand(1, 12, 32),
            "encoder_attention_mask": torch.ones(1, 12, dtype=torch.bool),
        },
        freeze=("encoder_attention_mask",),
    ),
    "MiniMaxH3Transformer3DModel": Case(
        {
            "num_attention_heads": 4, "attention_head_dim": 16, "hidden_size": 64,
            "num_layers": 2, "num_refiner_layers": 1, "ffn_dim": 128, "in_channels": 4,
            "audio_in_channels": 8, "text_dim": 32, "freq_dim": 16, "time_embed_hidden_dim": 64,
            "time_embed_dim": 32, "rope_freq_dim": 2,
        },
        lambda: {
            "hidden_states": rand(1, 64, 16), "audio_hidden_states": rand(1, 16, 8),
            "encoder_hidden_states": rand(1, 16, 32), "timestep": torch.tensor([0.5]),
            "timestep_indices": torch.zeros(96, dtype=torch.int64),
            "token_tags": torch.cat(
                [torch.zeros(16).long(), torch.ones(64).long(), torch.full((16,), 2)]
            ),
            "position_ids": torch.arange(96).view(96, 1).expand(96, 3).contiguous(),
            "video_indices": torch.arange(16, 80), "audio_indices": torch.arange(80, 96),
            "text_indices": torch.arange(16),
        },
    ),
    "MiniMaxMusic3Transformer1DModel": Case(
        {
            "in_channels": 8, "condition_dim": 32, "num_layers": 2, "num_attention_heads": 4,
            "attention_head_dim": 16, "ff_inner_dim": 128, "rotary_dim": 8,
            "fourier_embedding_dim": 16,
        },
        lambda: {
            "hidden_states": rand(1, 8, 64), "timestep": torch.tensor([0.5]),
            "encoder_hidden_states": rand(1, 64, 32),
        },
    ),
    "MochiTransformer3DModel": Case(
        {
            "num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2,
            "pooled_projection_dim": 16, "in_channels": 4, "text_embed_dim": 32,
            "time_embed_dim": 16, "max_sequence_length": 12,
        },
        lambda: {
            "hidden_states": rand(1, 4, 2, 16, 16), "encoder_hidden_states": rand(1, 12, 32),
            "timestep": T, "encoder_attention_mask": padded_mask(1, 12, 9).bool(),
        },
        freeze=("encoder_attention_mask",),
    ),
    "MotifVideoTransformer3DModel": Case(
        {
            "in_channels": 9, "out_channels": 4, "num_attention_heads": 4,
            "attention_head_dim": 16, "num_layers": 1, "num_single_layers": 1,
            "text_embed_dim": 32, "rope_axes_dim": (4, 6, 6),
        },
        lambda: {
            "hidden_states": rand(1, 9, 2, 16, 16), "timestep": torch.tensor([500]),
            "encoder_hidden_states": rand(1, 12, 32),
            "encoder_attention_mask": padded_mask(1, 12, 9),
        },
    ),
    "NucleusMoEImageTransformer2DModel": Case(
        {
            "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16,
            "num_attention_heads": 4, "joint_attention_dim": 32, "axes_dims_rope": (4, 6, 6),
            "num_experts": 4, "moe_intermediate_dim": 32, "num_key_value_heads": 2,
            "dense_moe_strategy": "leave_first_block_dense", "capacity_factors": [2.0, 2.0],
        },
        lambda: {
            "hidden_states": rand(1, 64, 16), "img_shapes": [(1, 8, 8)],
            "encoder_hidden_states": rand(1, 12, 32), "timestep": torch.tensor([0.5]),
        },
    ),
    "OmniGenTransformer2DModel": Case(
        {
            "in_channels": 4, "hidden_size": 64, "num_attention_heads": 4,
            "num_key_value_heads": 4, "intermediate_size": 128, "num_layers": 2,
            "pad_token_id": 0, "vocab_size": 64, "max_position_embeddings": 128,
            "original_max_position_embeddings": 128, "pos_embed_max_size": 32,
            "time_step_dim": 16, "rope_scaling": {
                "long_factor": list(range(1, 9)), "short_factor": list(range(1, 9)),
            },
        },
        lambda: {
            "hidden_states": rand(1, 4, 16, 16), "timestep": torch.tensor([0.5]),
            "input_ids": ints(64, 1, 12), "input_img_latents": [], "input_image_sizes": {},
            "attention_mask": torch.ones(1, 77, 77, dtype=torch.int64),
            "position_ids": torch.arange(77).unsqueeze(0),
        },
        freeze=("position_ids",),
    ),
    "OvisImageTransformer2DModel": Case(
        {
            "in_channels": 16, "out_channels": 16, "num_layers": 1, "num_single_layers": 1,
            "attention_head_dim": 16, "num_attention_heads": 4, "joint_attention_dim": 32,
            "axes_dims_rope": (4, 6, 6),
        },
        lambda: _flux_like(16, 32),
    ),
    "PRXTransformer2DModel": Case(
        {
            "in_channels": 4, "context_in_dim": 32, "hidden_size": 64, "num_heads": 4,
            "depth": 2, "axes_dim": [8, 8],
        },
        lambda: {
            "hidden_states": rand(1, 4, 16, 16), "timestep": torch.tensor([0.5]),
            "encoder_hidden_states": rand(1, 12, 32), "attention_mask": padded_mask(1, 12, 9),
        },
    ),
    "QwenImageTransformer2DModel": Case(
        {
            "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16,
            "num_attention_heads": 4, "joint_attention_dim": 32, "axes_dims_rope": (4, 6, 6),
        },
        lambda: {
            "hidden_states": rand(1, 64, 16), "encoder_hidden_states": rand(1, 16, 32),
            "timestep": torch.tensor([0.5]), "img_shapes": [(1, 8, 8)],
            "encoder_hidden_states_mask": padded_mask(1, 16, 12),
        },
    ),
    "QwenImage21Transformer2DModel": Case(
        {
            "in_channels": 16, "out_channels": 16, "num_layers": 2, "attention_head_dim": 16,
            "num_attention_heads": 4, "context_in_dim": 32, "axes_dims_rope": (4, 6, 6),
        },
        lambda: {
            "hidden_states": rand(1, 64, 16), "encoder_hidden_states": rand(1, 16, 32),
            "timestep": torch.tensor([0.5]), "img_shapes": [[(1, 8, 8)]],
            "img_mask": torch.cat([torch.zeros(1, 16), torch.ones(1, 16)], 1).bool(),
        },
        freeze=("img_mask",),
    ),
    "SanaVideoTransformer3DModel": Case(
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 4,
            "attention_head_dim": 16, "num_layers": 2, "num_cross_attention_heads": 4,
            "cross_attention_head_dim": 16, "cross_attention_dim": 64, "caption_channels": 32,
            "sample_size": 8,
        },
        lambda: {
            "hidden_states": rand(1, 4, 2, 8, 8), "encoder_hidden_states": rand(1, 12, 32),
            "timestep": T, "encoder_attention_mask": padded_mask(1, 12, 9),
        },
    ),
    "RFD4ProteinaTransformer": Case(
        {
            "nlayers": 2, "token_dim": 64, "nheads": 4, "dim_cond": 32, "pair_repr_dim": 32,
            "latent_dim": 8, "t_emb_dim": 32, "tri_mult_c": 16, "token_type_emb_dim": 8,
            "feats_seq": ("xt_bb_ca", "xt_local_latents", "token_type"),
            "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents"),
            "feats_pair_repr": ("xt_bb_ca_pair_dists", "molecule_idx_pair"),
        },
        lambda: {
            "bb_ca": rand(1, 24, 3), "local_latents": rand(1, 24, 8),
            "bb_ca_time": torch.tensor([0.5]), "local_latents_time": torch.tensor([0.4]),
            "padding_mask": torch.ones(1, 24).bool(), "token_type": ints(7, 1, 24),
            "conditioning": {
                "is_in_context_conditioning": torch.zeros(1, 24).bool(),
                "supports_local_latent": torch.ones(1, 24).bool(),
                "molecule_iid": ints(3, 1, 24),
            },
        },
    ),
    "SanaWMTransformer3DModel": Case(
        {
            "in_channels": 4, "num_layers": 4, "hidden_size": 64, "num_attention_heads": 4,
            "linear_head_dim": 16, "caption_channels": 32, "image_size": 16,
            "chunk_plucker_post_attn_blocks": 4,
        },
        lambda: {
            "hidden_states": rand(1, 4, 4, 4, 4), "timestep": torch.full((1, 1, 4), 500.0),
            "encoder_hidden_states": rand(1, 1, 12, 32),
            "encoder_attention_mask": padded_mask(1, 12, 9),
        },
    ),
    "SanaWMLTX2RefinerTransformer3DModel": Case(
        _LTX2,
        lambda: {
            "hidden_states": rand(1, 64, 16), "encoder_hidden_states": rand(1, 12, 32),
            "timestep": torch.full((1, 1), 500.0),
            "video_rotary_emb": (rand(1, 64, 64).cos(), rand(1, 64, 64).sin()),
            "encoder_attention_mask": padded_mask(1, 12, 9),
        },
    ),
    "SD3Transformer2DModel": Case(
        {
            "sample_size": 16, "in_channels": 4, "num_layers": 2, "attention_head_dim": 16,
            "num_attention_heads": 4, "joint_attention_dim": 32, "caption_projection_dim": 64,
            "pooled_projection_dim": 16, "out_channels": 4, "pos_embed_max_size": 16,
            "dual_attention_layers": (0,), "qk_norm": "rms_norm",
        },
        lambda: {
            "hidden_states": rand(1, 4, 16, 16), "encoder_hidden_states": rand(1, 12, 32),
            "pooled_projections": rand(1, 16), "timestep": T,
        },
    ),
    "SkyReelsV2Transformer3DModel": Case(_WAN, _wan),
    "StableAudio3DiTModel": Case(
        {
            "io_channels": 8, "embed_dim": 64, "depth": 2, "num_heads": 4, "cond_token_dim": 32,
            "global_cond_dim": 32, "local_add_cond_dim": 5, "timestep_features_dim": 16,
            "num_memory_tokens": 4,
        },
        lambda: {
            "hidden_states": rand(1, 8, 60), "timestep": torch.tensor([0.5]),
            "encoder_hidden_states": rand(1, 12, 32), "global_hidden_states": rand(1, 32),
            "local_add_cond": rand(1, 5, 60),
        },
    ),
    "TransformerTemporalModel": Case(
        {
            "num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 32,
            "num_layers": 2, "norm_num_groups": 8,
        },
        lambda: {"hidden_states": rand(8, 32, 4, 4), "num_frames": 8},
    ),
    "WanTransformer3DModel": Case(_WAN, _wan),
    "WanAnimateTransformer3DModel": Case(
        _WAN | {
            "in_channels": 36, "latent_channels": 16, "image_dim": 16,
            "motion_encoder_size": 16, "motion_style_dim": 8, "motion_dim": 4,
            "motion_encoder_dim": 16, "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2, "inject_face_latents_blocks": 2,
            "motion_encoder_batch_size": 5, "rope_max_seq_len": 32,
            "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
        },
        lambda: _wan(
            hidden_states=rand(1, 36, 3, 8, 8), encoder_hidden_states_image=rand(1, 5, 16),
            pose_hidden_states=rand(1, 16, 2, 8, 8), face_pixel_values=rand(1, 3, 5, 16, 16),
        ),
    ),
    "WanAnimate2Transformer3DModel": Case(
        {
            "text_len": 12, "in_dim": 12, "dim": 64, "ffn_dim": 128, "freq_dim": 64,
            "text_dim": 32, "out_dim": 4, "num_heads": 4, "num_layers": 2, "use_img_emb": False,
            "refer_offset_w": 0,
        },
        _wan_animate_2,
    ),
    "WanVACETransformer3DModel": Case(
        _WAN | {"vace_layers": [0, 1], "vace_in_channels": 24},
        lambda: _wan(
            control_hidden_states=rand(1, 24, 2, 8, 8),
            control_hidden_states_scale=torch.ones(2),
        ),
    ),
    "ZImageTransformer2DModel": Case(
        {
            "in_channels": 4, "dim": 64, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 4,
            "n_kv_heads": 4, "cap_feat_dim": 32, "axes_dims": [4, 6, 6],
            "axes_lens": [128, 32, 32],
        },
        lambda: {
            "x": [rand(4, 1, 16, 16)], "t": torch.tensor([0.5]), "cap_feats": [rand(20, 32)],
        },
    ),
}  # fmt: skip


def classes() -> dict[str, type[nn.Module]]:
    """Every model class of diffusers' ``models/transformers``, by name."""
    from diffusers.models import transformers
    from diffusers.models.modeling_utils import ModelMixin

    found = {}
    for info in pkgutil.iter_modules(transformers.__path__):
        module = importlib.import_module(f"{transformers.__name__}.{info.name}")
        for name, kind in vars(module).items():
            own = inspect.isclass(kind) and kind.__module__ == module.__name__
            if own and issubclass(kind, ModelMixin):
                found[name] = kind
    return dict(sorted(found.items()))


def build(name: str) -> nn.Module:
    """The small model with random weights, in eval mode."""
    torch.manual_seed(0)
    return randomised(classes()[name](**CASES[name].config)).eval().requires_grad_(False)


def example_inputs(name: str) -> Inputs:
    """What to call it with."""
    torch.manual_seed(1)
    return CASES[name].inputs()
