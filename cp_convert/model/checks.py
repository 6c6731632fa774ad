"""What a module must not be when it is converted, whether or not it is proven."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from torch import nn

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


def _step_caches(module: nn.Module) -> Iterator[str]:
    config = getattr(module, "_cache_config", None)
    for switch in _SWITCHES:
        if getattr(module, switch, False) is True:
            yield switch if config is None else type(config).__name__
    registry: Any = getattr(module, _REGISTRY, None)
    for hook in getattr(registry, "hooks", {}):
        if str(hook).startswith(_OF_A_CACHE):
            yield f"the hook {hook}"
