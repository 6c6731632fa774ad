"""Checkpoints whose linear layers are stored as codes with scales, as NVIDIA ModelOpt exports.

In: what the files hold by name. Out: the same without scales, and the scales by layer. Layout
(``modelopt.torch.export.export_hf_checkpoint``, ``quant_algo`` ``FP8``, ``NVFP4``, ``NVFP4_AWQ``,
``NVFP4_SVD`` and ``W8A8_SQ_PER_CHANNEL``, which is INT8 with SmoothQuant), of a layer ``x``::

    x.weight           F8_E4M3 or I8 [N, K]   codes
    x.weight_scale     F32 [], INT8: [N]      the weight is codes * weight_scale
    x.input_scale      F32 []                 the input's codes are input / input_scale
    x.pre_quant_scale  BF16 [K]               the input is multiplied by it before; may lack

of NVFP4, whose codes lie in pairs, the even column in the lower half of the byte::

    x.weight           U8 [N, K/2]
    x.weight_scale     F8_E4M3 [N, K/16]      of each block of 16
    x.weight_scale_2   F32 []                 the weight is codes * weight_scale * weight_scale_2
    x.input_scale      F32 []                 of the scales of the input's blocks, the same
    x.svdquant_lora_a  BF16 [R, K]            NVFP4_SVD, besides pre_quant_scale: (x a^T) b^T is
    x.svdquant_lora_b  BF16 [N, R]            added to the product of codes

``config.json`` beside says so in ``quantization_config``; other algorithms are refused by name.
Layers may be of several (``MIXED_PRECISION``, :mod:`.mixed`). Scales of attention are taken off
before (:mod:`.attended`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from ..errors import WeightsError
from ..ir.nvfp4 import BLOCK, PAIRS
from ..ir.quantize import FP8
from ..ir.tensors import Location
from . import mixed
from .coded import (
    KINDS,
    WEIGHT,
    Coded,
    blocks_at,
    metadata_of,
    missing,
    not_quantized,
    numbers_at,
    scale_at,
    scales_at,
)
from .header import parsed
from .quantized import UNQUANTIZED
from .schemes import INPUT_SCALE, LOW_RANK, NEEDED, OF_ALL, SMOOTH, TYPES, WEIGHT_SCALE, suffixes

_CONFIG: Final = "config.json"
_IN_HEADER: Final = "quantization_config"


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
    layers, of_layers = _algorithms(folder, stored)
    if not layers:  # some other quantizer's: told by who finds the types that are not understood
        return dict(stored), {}
    scales = {name for name in stored if name.endswith(of_layers)}
    for name in sorted(scales):
        layer, _, own = name.rpartition(".")
        if layer not in layers or f".{own}" not in suffixes(layers[layer]):
            kinds = _kinds(f".{own}", layers.values()) or _kinds(f".{own}", TYPES)
            raise not_quantized(name, layer + WEIGHT, stored, kinds)
    _check_alike(layers, stored)
    coded = {layer + WEIGHT: _coded(layer + WEIGHT, stored) for layer in sorted(layers)}
    return {name: at for name, at in stored.items() if name not in scales}, coded


def _algorithms(
    folder: Path, stored: Mapping[str, Location]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """``quant_algo`` by layer, and what the names of their scales end in; none: no such scales."""
    path, told, algorithm = _said(folder, stored)
    if algorithm == mixed.MIXED:
        layers = mixed.algorithms(told, path, stored)
        # All that there are: what no layer here has is then of none, and told by its name.
        return layers, tuple({suffix for one in TYPES for suffix in suffixes(one)})
    dtype, of_layers = TYPES[algorithm], suffixes(algorithm)
    codes = [name for name, at in stored.items() if at.dtype == dtype and name.endswith(WEIGHT)]
    if not any(name.endswith(of_layers) for name in stored):
        return {}, ()
    return dict.fromkeys((name.removesuffix(WEIGHT) for name in codes), algorithm), of_layers


def _kinds(suffix: str, algorithms: Iterable[str]) -> str:
    """Of those that have such a scale."""
    found = {KINDS[TYPES[one]] for one in algorithms if suffix in suffixes(one)}
    return " or ".join(sorted(found))


def _check_alike(layers: Mapping[str, str], stored: Mapping[str, Location]) -> None:
    """Refuse a layer without factors that others have: a scheme gives them to all, or to none.

    Its codes are those of a weight that was divided by them, and would be taken as they are.
    """
    for algorithm in sorted({*layers.values()}):
        alike = [layer for layer in sorted(layers) if layers[layer] == algorithm]
        for what in (one for one in (SMOOTH, LOW_RANK[0]) if one in suffixes(algorithm)):
            lacking = [layer for layer in alike if layer + what not in stored]
            is_needed, has = what in NEEDED.get(algorithm, ()), len(alike) - len(lacking)
            if lacking and (has or is_needed):
                own = "" if len({*layers.values()}) == 1 else f" {algorithm}"
                why = f", which {has} of {len(alike)}{own} layers have"
                why = why if has else f", and {algorithm} has it"
                name, kind = lacking[0] + WEIGHT, KINDS[TYPES[algorithm]]
                hint = "fetch or export it again; "
                raise missing(lacking[0] + what, name, stored[name], why, hint, kind)


def check_order(stored: Mapping[str, Location]) -> None:
    """Refuse NVFP4 that ModelOpt has put into other programs' order, or may have.

    Its options for single files (``enable_swizzle_layout``, ...) leave ``quantization_config`` in
    the header, and neither names nor, of many layers, shapes tell whether scales are in tiles.

    Raises:
        WeightsError: they were used.
    """
    if not any(name.endswith(OF_ALL) for name in stored):
        return
    text, at = metadata_of(stored).get(_IN_HEADER, ("", None))
    if at is not None and "modelopt" in text:
        raise WeightsError(
            f"{at.file.name} was written by ModelOpt with options for other programs, as its "
            f"header has {_IN_HEADER}: the order of NVFP4's codes and scales is not told.",
            where=str(at.file),
            hint="export it without enable_swizzle_layout, padding_strategy, "
            "enable_layerwise_quant_metadata and merged_base_safetensor_path.",
        )


def is_said(folder: Path) -> bool:
    """Whether ``config.json`` beside the weights says that ModelOpt has quantized them."""
    return any(told.get("quant_method") == "modelopt" for _, told in _configs(folder))


def _coded(name: str, stored: Mapping[str, Location]) -> Coded:
    layer, at = name.removesuffix(WEIGHT), stored[name]
    of_weight, of_input, smooth = (layer + one for one in (WEIGHT_SCALE, INPUT_SCALE, SMOOTH))
    of_all = () if at.dtype != PAIRS else (layer + OF_ALL,)
    for scale in (of_weight, *of_all, of_input):
        if scale not in stored:
            half = "; with a quantized weight alone TensorRT computes in half precision"
            hint = "export it with quantized activations (ModelOpt's FP8, NVFP4 or INT8); "
            why = half if scale == of_input else ""
            raise missing(scale, name, at, why, hint, KINDS[at.dtype or FP8])
    step = scale_at(of_input, stored[of_input])
    if at.dtype == PAIRS:
        return _of_4_bits(layer, at, step, stored)
    rows, columns = at.shape if len(at.shape) == 2 else (0, 0)
    own = stored[of_weight]
    scale = scale_at(of_weight, own) if at.dtype == FP8 else scales_at(of_weight, own, rows, "rows")
    of_columns = None
    if smooth in stored:
        of_columns = scales_at(smooth, stored[smooth], columns, "columns")
    return Coded(scale, step, smooth=of_columns, dtype=at.dtype or FP8)


def _of_4_bits(layer: str, at: Location, step: float, stored: Mapping[str, Location]) -> Coded:
    of_blocks, of_all, smooth = (layer + one for one in (WEIGHT_SCALE, OF_ALL, SMOOTH))
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
    names = [layer + one for one in LOW_RANK]
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


def _said(folder: Path, stored: Mapping[str, Location]) -> tuple[Path, Mapping[str, Any], str]:
    """The file that tells the algorithm, what it tells, and the algorithm.

    Where nothing tells it, the names do.

    Raises:
        WeightsError: the checkpoint says that it is of another kind.
    """
    for path, told in _configs(folder):
        algorithm = str(told.get("quant_algo"))
        if algorithm in (*TYPES, mixed.MIXED):
            return path, told, algorithm
        if told.get("quant_method") == "modelopt":
            raise WeightsError(
                f"the checkpoint is quantized by ModelOpt to {algorithm}, of which cp-convert "
                f"takes {', '.join(TYPES)} and {mixed.MIXED} of these.",
                where=str(path),
                hint="export it as FP8; " + UNQUANTIZED,
            )
    is_paired = any(name.endswith((OF_ALL, *LOW_RANK)) for name in stored)
    return folder, {}, "NVFP4" if is_paired else "FP8"


def _configs(folder: Path) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """What ``config.json`` beside the weights says of quantization, where it can be read.

    Raises:
        WeightsError: it tells the layers apart, and cannot be read.
    """
    path = (folder if folder.is_dir() else folder.parent) / _CONFIG
    try:
        text = path.read_bytes()
    except OSError:
        return
    try:
        told = parsed(text)
    except ValueError as error:
        if mixed.LAYERS.encode() not in text:
            return
        raise WeightsError(
            f"{mixed.LAYERS} of {_CONFIG} cannot be read: {error}.",
            where=str(path),
            hint="the checkpoint is broken; fetch or export it again.",
        ) from error
    own = told.get(_IN_HEADER) if isinstance(told, dict) else None
    if isinstance(own, dict):
        yield path, own
