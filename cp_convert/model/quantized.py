"""Stored types that are not numbers of the model: quantized weights, and what their scales are."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Final

from torch import Tensor

from ..errors import WeightsError
from ..ir.tensors import FLOAT8, Location

FLOATS: Final = ("F64", "F32", "F16", "BF16")
_SCALES: Final = re.compile(r"scale|absmax|zero|quant_map|quant_state|comfy_quant|scb$", re.I)
_SHOWN: Final = 3
UNQUANTIZED: Final = (
    "cp-convert computes in floating-point types; name the checkpoint that is not quantized."
)


_MAKERS: Final = (
    (r"\.quant_state\.bitsandbytes__|\.absmax$|\.SCB$", "bitsandbytes", "it is for weights alone"),
    (
        r"\.wscales$|\.smooth_factor(_orig)?$",
        "Nunchaku (SVDQuant)",
        "its codes are packed in its way",
    ),
    (r"\.qzeros$", "AWQ or GPTQ", "it is for weights alone"),
    (r"\.weight\._(data|scale|shift)$", "quanto", "it is for weights alone"),
)
"""Names that one quantizer alone gives its tensors, who that is, and why it is not taken."""


def check_maker(stored: Mapping[str, Location]) -> None:
    """Who has quantized a checkpoint is told by name, where its tensors tell it.

    Raises:
        WeightsError: it was done in a format that is not taken.
    """
    for name, at in stored.items():
        kind = "MXFP8" if at.kind == "F8_E8M0" else None
        made = next(((who, why) for form, who, why in _MAKERS if re.search(form, name)), None)
        if kind is None and made is None:
            continue
        who, why = made or (kind, "TensorRT multiplies it in half precision")
        raise WeightsError(
            f"{name} of {at.file.name} is quantized by {who}, of which cp-convert takes nothing: "
            f"{why}.",
            where=str(at.file),
            hint="take an FP8, INT8 or NVFP4 checkpoint with the scales "
            "(docs/quantized.md), or the one that is not quantized and --quantize.",
        )


def check_types(
    matched: Mapping[str, str],
    stored: Mapping[str, Location],
    wanted: Mapping[str, Tensor],
    allowed: Collection[str],
) -> None:
    """Every tensor is stored in a type whose numbers are the model's.

    Args:
        matched: the stored name of every name of the model.
        stored: where the files hold them.
        wanted: the model's tensors.
        allowed: casts that the user asked for; ``float8`` is one.

    Raises:
        WeightsError: one is not.
    """
    for name, own in matched.items():
        at, like = stored[own], wanted[name]
        if like.is_floating_point() and at.kind in FLOATS:
            continue
        if like.is_floating_point():
            check_floating(own, stored, allowed)
        elif at.dtype != like.dtype:
            raise WeightsError(
                f"{own} of {at.file.name} is stored as {at.kind}, and the model's is "
                f"{str(like.dtype).removeprefix('torch.')}.",
                where=str(at.file),
                hint="check that the file belongs to this model.",
            )


def check_floating(
    name: str, stored: Mapping[str, Location], allowed: Collection[str] = ()
) -> None:
    """A floating parameter is stored in a floating type.

    Raises:
        WeightsError: it is quantized, or no such number at all.
    """
    at = stored[name]
    if at.kind in FLOATS:
        return
    scales = _scales(name, stored)
    is_plain = at.kind in FLOAT8 and not scales
    if is_plain and "float8" in allowed:
        return
    beside = f"; its scales are {', '.join(scales)}" if scales else ", without scales beside it"
    packed = " (packed)" if at.kind in ("U8", "I32", "F4") else ""
    raise WeightsError(
        f"{name} of {at.file.name} is quantized: stored as {at.kind}{packed}{beside}.",
        where=str(at.file),
        hint="if these numbers were cast to float8 and nothing else was done, --allow-cast float8 "
        "takes them as they are; else name the checkpoint that is not quantized."
        if is_plain
        else UNQUANTIZED,
    )


def check_unmatched(stored: Mapping[str, Location], allowed: Collection[str]) -> None:
    """Names that are not the model's may be those of a quantizer; that is then the better reason.

    Raises:
        WeightsError: a tensor is stored in a small type, with scales beside it.
    """
    for name, at in stored.items():
        is_small = at.kind not in FLOATS and at.kind not in ("BOOL", "I64", "U64", "C64")
        if is_small and not _SCALES.search(name) and (at.kind in FLOAT8 or _scales(name, stored)):
            check_floating(name, stored, allowed)


def _scales(name: str, stored: Mapping[str, Location]) -> list[str]:
    """Names of the same layer that speak of scales; of the whole file where it has one marker."""
    layer = name.rpartition(".")[0]
    found = [
        other
        for other in stored
        if other != name and other.startswith(f"{layer}.") and _SCALES.search(other[len(layer) :])
    ]
    found += [marker for marker in ("scaled_fp8",) if marker in stored]
    return found[:_SHOWN]
