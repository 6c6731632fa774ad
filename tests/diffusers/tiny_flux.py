"""A whole FLUX in a folder as it is published, its parts small and random; made without network."""

import string
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from tests.diffusers.pipelines import CASES

LETTERS = string.ascii_lowercase


def tiny_flux() -> FluxPipeline:
    """Takes prompts of small letters; 12 tokens for the T5, 8 for CLIP."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4), norm_num_groups=2, latent_channels=4, shift_factor=0.1,
        use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    clip = CLIPTextConfig(
        vocab_size=54, num_attention_heads=2, max_position_embeddings=8, projection_dim=16,
        bos_token_id=0, eos_token_id=1, pad_token_id=1, **sizes,
    )  # fmt: skip
    t5 = T5Config(vocab_size=55, d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return FluxPipeline(
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae,
        CLIPTextModel(clip).eval(), _clip_tokenizer(), T5EncoderModel(t5).eval(),
        _t5_tokenizer(), CASES["flux"].model(),
    )  # fmt: skip


def _clip_tokenizer() -> CLIPTokenizer:
    words = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{c}</w>" for c in LETTERS)]
    return CLIPTokenizer(
        vocab={word: n for n, word in enumerate(words)}, merges=[], model_max_length=8
    )


def _t5_tokenizer() -> T5TokenizerFast:
    words = ["<pad>", "</s>", "<unk>", *(f"▁{c}" for c in LETTERS), *LETTERS]
    return T5TokenizerFast(vocab=[(w, -2.0) for w in words], extra_ids=0, model_max_length=12)


def saved(folder: Path) -> Path:
    """The pipeline in ``folder``."""
    tiny_flux().save_pretrained(folder)
    return folder
