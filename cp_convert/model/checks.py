"""What a module must not be when it is converted, whether or not it is proven."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from torch import Tensor, nn

from ..errors import ModelFileError

_SWITCHES: Final = ("is_cache_enabled", "_is_cache_enabled", "_is_cached", "enable_teacache")
"""Attributes by which diffusers' CacheMixin, ParaAttention, cache-dit and TeaCache say it."""
_REGISTRY: Final = "_diffusers_hook"
_OF_A_CACHE: Final = (
    "fbc_",
    "mag_cache",
    "faster_cache",
    "pyramid_attention_broadcast",
    "sea_cache",
    "taylorseer",
    "text_kv_cache",
)
"""How the names of diffusers' hooks begin that keep something from step to step."""


def check_no_step_cache(module: nn.Module, name: str) -> None:
    """Refuse a model that reuses what it computed in an earlier denoising step.

    Which branch its forward takes depends on the step before; one call, traced, would be one of
    these branches for ever.

    Args:
        module: the model, with all that is inside.
        name: the file that built it.

    Raises:
        ModelFileError: a step cache is on.
    """
    for path, one in module.named_modules():
        how = next(_step_caches(one), None)
        if how is not None:
            raise ModelFileError(
                f"{path or type(one).__name__} has a step cache that is on ({how}): what its "
                "forward computes depends on the step before, and an engine is one forward.",
                where=name,
                hint="switch it off in build_model(), with disable_cache() where diffusers' "
                "enable_cache() switched it on; --split-after makes engines that a step cache of "
                "the bundle's may skip.",
            )


def check_plain_tensors(module: nn.Module, name: str) -> None:
    """Refuse parameters and buffers that are tensors of a library's own kind.

    What is computed with them the library decides (quantized weights, parts on other ranks); it
    would be lost, or an error somewhere within.

    Args:
        module: the model, with all that is inside.
        name: the file that built it.

    Raises:
        ModelFileError: one is such a tensor.
    """
    for path, one in (*module.named_parameters(), *module.named_buffers()):
        kind = type(one)
        if nn.parameter.is_lazy(one):
            continue  # has no numbers, which others tell
        if kind.__torch_function__ in _PLAIN_CALLS and kind.__torch_dispatch__ in _PLAIN_KERNELS:
            continue
        library = kind.__module__.partition(".")[0]
        raise ModelFileError(
            f"{path} is a {kind.__name__} of {library}, and no plain tensor: what it computes with "
            "cannot be read off it.",
            where=name,
            hint=_HINTS.get(library, _HINTS[""]),
        )


_PLAIN_CALLS: Final = (Tensor.__torch_function__, nn.Parameter.__torch_function__)
_PLAIN_KERNELS: Final = (Tensor.__torch_dispatch__, nn.Parameter.__torch_dispatch__)
_HINTS: Final = {
    "torchao": "save its safetensors and name them by --weights (FP8: docs/quantized.md), or "
    "return the model before it is quantized, with --quantize.",
    "torch": "return the whole model in build_model(); how it is split among ranks is decided by "
    "cp-convert.",
    "": "return the model before its weights are changed into these; --quantize is there for FP8, "
    "INT8 and NVFP4.",
}
"""By the library, what to do."""


def _step_caches(module: nn.Module) -> Iterator[str]:
    config = getattr(module, "_cache_config", None)
    for switch in _SWITCHES:
        if getattr(module, switch, False) is True:
            yield switch if config is None else type(config).__name__
    registry: Any = getattr(module, _REGISTRY, None)
    for hook in getattr(registry, "hooks", {}):
        if str(hook).startswith(_OF_A_CACHE):
            yield f"the hook {hook}"
