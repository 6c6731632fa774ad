"""What a model of diffusers can be asked for, and engines cannot do: refused, naming the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NoReturn

from ..errors import UsageError

_LORA: Final = (
    "LoRA is part of the weights, and the weights are part of the bundle",
    (
        "load and fuse it into the model (load_lora_weights, fuse_lora), save that, and convert "
        "it; or `cp-convert lora`, for `cp-convert run` and runtime.open."
    ),
)
_PARALLEL: Final = (
    "the bundle has its parallelism built in",
    "convert with another --strategy or --world.",
)
_BUILT: Final = (
    "the engines are built and have no modules",
    "change the model before it is converted.",
)
_CACHE: Final = (
    "a step cache is chosen when the bundle is opened",
    "convert with --split-after, and load_transformer(..., step_cache=0.1).",
)
_MEMORY: Final = (
    "the engines and their weights stay where they were opened",
    "leave the transformer out of it; text encoders and the VAE may be moved one by one.",
)
REFUSED: Final = {
    **dict.fromkeys(
        (
            "load_lora_adapter", "save_lora_adapter", "add_adapter", "set_adapter", "set_adapters",
            "fuse_lora", "unfuse_lora", "enable_lora", "disable_lora", "enable_adapters",
            "disable_adapters", "delete_adapters", "enable_lora_hotswap",
        ),
        _LORA,
    ),
    **dict.fromkeys(("enable_parallelism",), _PARALLEL),
    **dict.fromkeys(("enable_cache",), _CACHE),
    **dict.fromkeys(
        (
            "set_attention_backend", "reset_attention_backend",
            "set_attn_processor", "fuse_qkv_projections", "unfuse_qkv_projections",
            "enable_gradient_checkpointing", "compile", "compile_repeated_blocks",
            "set_use_memory_efficient_attention_xformers", "save_pretrained", "dequantize",
        ),
        _BUILT,
    ),
    **dict.fromkeys(("enable_layerwise_casting", "enable_group_offload"), _MEMORY),
}  # fmt: skip
"""Methods of diffusers' models: why engines lack it, and what to do instead."""


def refusing(name: str) -> Callable[..., NoReturn]:
    """A method that refuses."""
    why, instead = REFUSED[name]

    def method(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise UsageError(f"{name}: {why}.", hint=instead)

    method.__name__ = name
    method.__doc__ = f"Raises UsageError: {why}."
    return method


class Refusing:
    """Every method of :data:`REFUSED`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in REFUSED:
            setattr(cls, name, refusing(name))
