"""Checkpoints whose linear layers are stored as codes with scales, as NVIDIA ModelOpt exports.

In: what the files hold by name. Out: the same without scales, and the scales by layer. Layout
(``modelopt.torch.export.export_hf_checkpoint``, ``quant_algo`` ``FP8``, ``NVFP4``, ``NVFP4_SVD``
and ``W8A8_SQ_PER_CHANNEL``, which is INT8 with SmoothQuant), of a layer ``x``::

    x.weight           F8_E4M3 or I8 [N, K]   codes
    x.weight_scale     F32 [], INT8: [N]      the weight is codes * weight_scale
    x.input_scale      F32 []                 the input's codes are input / input_scale
    x.pre_quant_scale  BF16 [K]               INT8: the input is multiplied by it before; may lack

of NVFP4, whose codes lie in pairs, the even column in the lower half of the byte::

    x.weight           U8 [N, K/2]
    x.weight_scale     F8_E4M3 [N, K/16]      of each block of 16
    x.weight_scale_2   F32 []                 the weight is codes * weight_scale * weight_scale_2
    x.input_scale      F32 []                 of the scales of the input's blocks, the same
    x.svdquant_lora_a  BF16 [R, K]            NVFP4_SVD, besides pre_quant_scale: (x a^T) b^T is
    x.svdquant_lora_b  BF16 [N, R]            added to the product of codes

``config.json`` beside says so in ``quantization_config``; other algorithms are refused by name.
Scales of attention are taken off before (:mod:`.attended`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from ..errors import WeightsError
from ..ir.nvfp4 import BLOCK, PAIRS
from ..ir.quantize import FP8, INT8
from ..ir.tensors import Location
from .coded import (
    KINDS,
    WEIGHT,
    Coded,
    blocks_at,
    missing,
    not_quantized,
    numbers_at,
    scale_at,
    scales_at,
)
from .quantized import UNQUANTIZED

WEIGHT_SCALE: Final = ".weight_scale"
INPUT_SCALE: Final = ".input_scale"
_CONFIG: Final = "config.json"
_SMOOTH: Final = ".pre_quant_scale"
_OF_ALL: Final = ".weight_scale_2"
_LOW_RANK: Final = (".svdquant_lora_a", ".svdquant_lora_b")
_TYPES: Final = {"FP8": FP8, "W8A8_SQ_PER_CHANNEL": INT8, "NVFP4": PAIRS, "NVFP4_SVD": PAIRS}
"""Of codes, by ``quant_algo``."""
_MORE: Final = {FP8: (), INT8: (_SMOOTH,), PAIRS: (_OF_ALL, _SMOOTH, *_LOW_RANK)}
"""What a layer may have besides the two scales."""


def without_scales(
    stored: Mapping[str, Location], folder: Path
) -> tuple[dict[str, Location], dict[str, Coded]]:
    """The tensors that are the model's, and those among them that are codes.

    Args:
        stored: what the files hold, by name.
        folder: where they are, ``config.json`` beside.

    Raises:
        WeightsError: a scale is missing, none, or belongs to no codes; or another algorithm.
    """
    dtype = _type(folder, stored)
    of_layers = (WEIGHT_SCALE, INPUT_SCALE, *_MORE[dtype])
    scales = {name for name in stored if name.endswith(of_layers)}
    codes = {name for name, at in stored.items() if at.dtype == dtype and name.endswith(WEIGHT)}
    if not scales:
        return dict(stored), {}
    if not codes:  # some other quantizer's: told by who finds the types that are not understood
        return dict(stored), {}
    for name in sorted(scales):
        layer = name.rpartition(".")[0]
        if f"{layer}.weight" not in codes:
            raise not_quantized(name, f"{layer}.weight", stored, KINDS[dtype])
    _check_alike(codes, stored)
    coded = {name: _coded(name, stored) for name in sorted(codes)}
    return {name: at for name, at in stored.items() if name not in scales}, coded


def _check_alike(codes: set[str], stored: Mapping[str, Location]) -> None:
    """Refuse a layer without factors that others have: a scheme gives them to all, or to none.

    Its codes are those of a weight that was divided by them, and would be taken as they are.
    """
    given = {one for name in codes for one in _MORE[stored[name].dtype or FP8]}
    for what in (one for one in (_SMOOTH, _LOW_RANK[0]) if one in given):
        named = {name: name.removesuffix(WEIGHT) + what for name in sorted(codes)}
        lacking = [name for name, factor in named.items() if factor not in stored]
        if lacking and len(lacking) < len(codes):
            name, has = lacking[0], len(codes) - len(lacking)
            why = f", which {has} of {len(codes)} layers have"
            kind = KINDS[stored[name].dtype or FP8]
            raise missing(named[name], name, stored[name], why, "fetch or export it again; ", kind)


def is_said(folder: Path) -> bool:
    """Whether ``config.json`` beside the weights says that ModelOpt has quantized them."""
    return any(told.get("quant_method") == "modelopt" for _, told in _configs(folder))


def _coded(name: str, stored: Mapping[str, Location]) -> Coded:
    layer, at = name.removesuffix(WEIGHT), stored[name]
    of_weight, of_input, smooth = (layer + one for one in (WEIGHT_SCALE, INPUT_SCALE, _SMOOTH))
    of_all = () if at.dtype != PAIRS else (layer + _OF_ALL,)
    for scale in (of_weight, *of_all, of_input):
        if scale not in stored:
            half = "; with a quantized weight alone TensorRT computes in half precision"
            hint = "export it with quantized activations (ModelOpt's FP8, NVFP4 or INT8); "
            why = half if scale == of_input else ""
            raise missing(scale, name, at, why, hint, KINDS[at.dtype or FP8])
    step = scale_at(of_input, stored[of_input])
    if at.dtype == FP8:
        return Coded(scale_at(of_weight, stored[of_weight]), step)
    if at.dtype == PAIRS:
        return _of_4_bits(layer, at, step, stored)
    count, width = at.shape if len(at.shape) == 2 else (0, 0)
    rows = scales_at(of_weight, stored[of_weight], count, "rows")
    of_columns = None
    if smooth in stored:
        of_columns = scales_at(smooth, stored[smooth], width, "columns")
    return Coded(rows, step, smooth=of_columns, dtype=INT8)


def _of_4_bits(layer: str, at: Location, step: float, stored: Mapping[str, Location]) -> Coded:
    of_blocks, of_all, smooth = (layer + one for one in (WEIGHT_SCALE, _OF_ALL, _SMOOTH))
    rows, pairs = at.shape if len(at.shape) == 2 else (0, 0)
    shape = rows, 2 * pairs
    blocks = blocks_at(of_blocks, stored[of_blocks], (rows, 2 * pairs // BLOCK), shape)
    of_columns = None
    if smooth in stored:
        of_columns = scales_at(smooth, stored[smooth], 2 * pairs, "columns")
    return Coded(
        scale_at(of_all, stored[of_all]),
        step,
        smooth=of_columns,
        dtype=PAIRS,
        blocks=blocks,
        blocks_at=stored[of_blocks],
        low_rank=_low_rank(layer, at, shape, stored),
    )


def _low_rank(
    layer: str, at: Location, shape: tuple[int, int], stored: Mapping[str, Location]
) -> tuple[Tensor, Tensor] | None:
    """What is added to a weight of this shape, in two factors."""
    names = [layer + one for one in _LOW_RANK]
    found = [name for name in names if name in stored]
    if not found:
        return None
    for name in names:
        if name not in stored:
            raise missing(name, layer + WEIGHT, at, f", and {found[0]} is there", "", "NVFP4_SVD")
    (down, columns), (rows, up) = (
        stored[name].shape if len(stored[name].shape) == 2 else (0, 0) for name in names
    )
    for name in names:
        if stored[name].dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise WeightsError(
                f"{name} of {at.file.name} is {stored[name].kind}; a low rank is in BF16 or wider.",
                where=str(at.file),
                hint="the checkpoint is broken; fetch or export it again.",
            )
    values = [numbers_at(stored[name]) for name in names]
    if (rows, columns) != shape or down != up or not all(bool(v.isfinite().all()) for v in values):
        raise WeightsError(
            f"{names[0]} and {names[1]} of {at.file.name} are {list(stored[names[0]].shape)} and "
            f"{list(stored[names[1]].shape)}, or not finite; their product is to be {list(shape)}.",
            where=str(at.file),
            hint="the checkpoint is broken; fetch or export it again.",
        )
    first, second = (v.to(stored[n].dtype) for n, v in zip(names, values, strict=True))
    return first, second


def _type(folder: Path, stored: Mapping[str, Location]) -> torch.dtype:
    """Of the codes; where nothing tells the algorithm, the names do.

    Raises:
        WeightsError: the checkpoint says that it is of another kind.
    """
    for name, told in _configs(folder):
        algorithm = str(told.get("quant_algo"))
        if told.get("quant_method") == "modelopt" and algorithm not in _TYPES:
            raise WeightsError(
                f"the checkpoint is quantized by ModelOpt to {algorithm}, of which cp-convert "
                f"takes {', '.join(_TYPES)}.",
                where=str(name),
                hint="export it as FP8; " + UNQUANTIZED,
            )
        if algorithm in _TYPES:
            return _TYPES[algorithm]
    return PAIRS if any(name.endswith((_OF_ALL, *_LOW_RANK)) for name in stored) else FP8


def _configs(folder: Path) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """What ``config.json`` beside the weights says of quantization, where it can be read."""
    path = (folder if folder.is_dir() else folder.parent) / _CONFIG
    try:
        told = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return
    own = told.get("quantization_config") if isinstance(told, dict) else None
    if isinstance(own, dict):
        yield path, own
