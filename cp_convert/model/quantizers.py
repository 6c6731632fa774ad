"""What a quantizer of NVIDIA ModelOpt does, read from its attributes; ModelOpt is not needed.

In: a ``TensorQuantizer`` (ModelOpt 0.47). Out: what its codes stand for, or why it is refused.
``amax`` is the largest magnitude: a code of 1 stands for ``amax / 448`` in FP8, for ``amax / 127``
in INT8, and in NVFP4 for ``amax / (6 * 448)`` times the scale of its block.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn

from ..errors import ModelFileError
from ..ir.nvfp4 import BLOCK, LARGEST_NUMBER, PAIRS
from ..ir.quantize import FP8, INT8, SCALES, are_scales

SUFFIX: Final = "_quantizer"
_BITS: Final[dict[Any, torch.dtype]] = {(4, 3): FP8, 8: INT8, (2, 1): PAIRS}
"""The codes' type, by what ModelOpt calls ``num_bits``."""
_BLOCKS: Final = {-1: BLOCK, "type": "dynamic", "scale_bits": (4, 3)}
"""NVFP4's, as ModelOpt says it."""
_TAKES: Final = (
    "FP8 with one scale a tensor, INT8 with one a row of the weight and NVFP4 are taken, all with "
    "constant scales of the input; mtq.disable_quantizer leaves a layer as it is."
)


def quantizers_of(one: nn.Module) -> dict[str, nn.Module]:
    """Those that a module holds itself, by name."""
    return {
        name: child
        for name, child in one.named_children()
        if name.endswith(SUFFIX)
        and (hasattr(child, "num_bits") or isinstance(child, nn.Sequential))
    }


def is_on(quantizer: nn.Module) -> bool:
    """Whether it rounds."""
    if isinstance(quantizer, nn.Sequential):
        return any(is_on(one) for one in quantizer)
    return bool(getattr(quantizer, "is_enabled", False))


def acts(quantizer: nn.Module) -> bool:
    """Whether it changes what passes through it; some do when they are switched off."""
    if isinstance(quantizer, nn.Sequential):
        return any(acts(one) for one in quantizer)
    rotates = bool(getattr(quantizer, "rotate_is_enabled", False))
    has_factors = getattr(quantizer, "pre_quant_scale", None) is not None
    return is_on(quantizer) or rotates or has_factors or has_low_rank(quantizer)


def is_idle(quantizer: nn.Module) -> bool:
    """Whether nothing ever passed through it: it is on, and has no scale that it would need."""
    if isinstance(quantizer, nn.Sequential) or getattr(quantizer, "_dynamic", False):
        return False
    return is_on(quantizer) and getattr(quantizer, "amax", None) is None


def type_of(name: str, quantizer: nn.Module) -> torch.dtype:
    """Of the codes.

    Raises:
        ModelFileError: it has no constant scale of whole tensors or rows, nor is it NVFP4.
    """
    if isinstance(quantizer, nn.Sequential):
        raise refused(name, "quantizes twice")
    bits = getattr(quantizer, "num_bits", None)
    dtype = _BITS.get(tuple(bits) if isinstance(bits, list | tuple) else bits)
    if dtype is None:
        raise refused(name, f"has num_bits {bits}")
    _check_blocks(name, quantizer, dtype)
    for what, told in (
        ("_dynamic", "has dynamic scales"),
        ("unsigned", "has codes without a sign"),
        ("bias", "adds a bias before it rounds"),
        ("backend", "rounds by a backend of its own"),
        ("rotate_is_enabled", "rotates what it quantizes"),
        ("_if_calib", "is being calibrated still"),
    ):
        if getattr(quantizer, what, None) not in (None, False):
            raise refused(name, told)
    if getattr(quantizer, "_if_quant", True) is False:
        raise refused(name, "is being calibrated still")
    if not getattr(quantizer, "fake_quant", True):
        raise refused(name, "holds compressed weights", "export the model (docs/quantized.md).")
    return dtype


def _check_blocks(name: str, quantizer: nn.Module, dtype: torch.dtype) -> None:
    sizes = getattr(quantizer, "block_sizes", None)
    if dtype != PAIRS:
        if sizes is not None:
            raise refused(name, "has scales of blocks")
        return
    given = {key: own for key, own in dict(sizes or {}).items() if own is not None}
    told = {k: tuple(own) if isinstance(own, list) else own for k, own in given.items()}
    if told != _BLOCKS:
        raise refused(name, f"has scales of blocks as {given}, and NVFP4's are {_BLOCKS}")
    for own in ("global_amax", "_global_amax"):
        if getattr(quantizer, own, None) is not None:
            raise refused(name, "has scales of blocks that were searched for")


def scales(name: str, quantizer: nn.Module, dtype: torch.dtype, rows: int | None) -> Tensor:
    """What a code of 1 stands for, float32: ``[]``, or ``[rows]``.

    Args:
        name: of the quantizer, for messages.
        quantizer: whose ``amax`` is read.
        dtype: of its codes.
        rows: how many scales there may be; ``None``: one.

    Raises:
        ModelFileError: there is none, or it is none.
    """
    largest = getattr(quantizer, "amax", None)
    if not isinstance(largest, Tensor):
        raise refused(name, "has no amax, as nothing was calibrated")
    largest = largest.detach().float().flatten()
    if largest.numel() not in (1, rows):
        raise refused(name, f"has {largest.numel()} scales, and {rows or 1} are taken")
    found = largest / LARGEST_NUMBER[dtype]
    is_less = (found >= 0) & (found < SCALES[0])
    # A row of zeros has no scale, nor one of what float32 hardly tells from them; any will do.
    found = torch.where(is_less, found.max(), found) if rows is not None else found
    if (bad := largest[~are_scales(found)]).numel():
        raise refused(name, f"has an amax of {float(bad[0])}")
    return found[0] if rows is None else found.expand(rows).contiguous()


def factors_of(name: str, quantizer: nn.Module | None, columns: int) -> Tensor | None:
    """What columns of the input are multiplied with before, float32 ``[columns]``.

    Raises:
        ModelFileError: they are none.
    """
    factors = getattr(quantizer, "pre_quant_scale", None)
    if not isinstance(factors, Tensor):
        return None
    factors = factors.detach().float().flatten()
    if factors.numel() != columns or not bool(are_scales(factors).all()):
        raise refused(name, "has a pre_quant_scale that is none")
    return factors


def has_low_rank(quantizer: nn.Module | None) -> bool:
    """Whether the layer adds a product of two factors, which its weight lacks (SVDQuant)."""
    return getattr(quantizer, "svdquant_lora_a", None) is not None


def low_rank_of(
    name: str, quantizer: nn.Module | None, weight: Tensor
) -> tuple[Tensor, Tensor] | None:
    """These factors, ``[R, K]`` and ``[N, R]``; ``None`` where there are none.

    Raises:
        ModelFileError: they are of another shape, or not finite.
    """
    if not has_low_rank(quantizer):
        return None
    down = getattr(quantizer, "svdquant_lora_a", None)
    up = getattr(quantizer, "svdquant_lora_b", None)
    if not isinstance(down, Tensor) or not isinstance(up, Tensor):
        raise refused(name, "has one factor of a low rank and not the other")
    fits = down.dim() == up.dim() == 2 and up.shape[1] == down.shape[0]
    fits = fits and (up.shape[0], down.shape[1]) == tuple(weight.shape)
    if not fits or not bool(up.isfinite().all()) or not bool(down.isfinite().all()):
        raise refused(name, "has factors of a low rank of another shape, or not finite")
    return down.detach().clone(), up.detach().clone()


def without_quantizers(one: nn.Module) -> None:
    """Take them off, and give back the class that ModelOpt has put its own in front of.

    Some of its calibrations leave that class's ``forward`` on the module itself.
    """
    for name in quantizers_of(one):
        del one._modules[name]
    held = vars(one).get("forward")
    if _is_theirs(getattr(held, "__module__", None)):
        del one.forward
    own = next(c for c in type(one).__mro__ if not _is_theirs(c.__module__))
    object.__setattr__(one, "__class__", own)


def _is_theirs(module: str | None) -> bool:
    return module is not None and module.startswith("modelopt.")


def refused(name: str, what: str, hint: str = _TAKES) -> ModelFileError:
    """The complaint about a quantizer."""
    return ModelFileError(f"{name} {what}: it was quantized by ModelOpt.", hint=hint)
