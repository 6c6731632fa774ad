"""Checkpoints whose linear layers are stored as codes with scales, as NVIDIA ModelOpt exports.

In: what the files hold by name. Out: the same without scales, and the scales by layer. Layout
(``modelopt.torch.export.export_hf_checkpoint``, ``quant_algo`` ``FP8`` and
``W8A8_SQ_PER_CHANNEL``, which is INT8 with SmoothQuant), of a layer ``x``::

    x.weight           F8_E4M3 or I8 [N, K]   codes
    x.weight_scale     F32 [], INT8: [N]      the weight is codes * weight_scale
    x.input_scale      F32 []                 the input's codes are input / input_scale
    x.pre_quant_scale  BF16 [K]               INT8: the input is multiplied by it before; may lack

``config.json`` beside says so in ``quantization_config``; other algorithms are refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch

from ..errors import WeightsError
from ..ir.quantize import FP8, INT8
from ..ir.tensors import Location
from .coded import KINDS, WEIGHT, Coded, missing, not_quantized, scale_at, scales_at
from .quantized import UNQUANTIZED

WEIGHT_SCALE: Final = ".weight_scale"
INPUT_SCALE: Final = ".input_scale"
_CONFIG: Final = "config.json"
_SMOOTH: Final = ".pre_quant_scale"
_TYPES: Final = {"FP8": FP8, "W8A8_SQ_PER_CHANNEL": INT8}
"""Of codes, by ``quant_algo``."""


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
    dtype = _type(folder)
    of_layers = (WEIGHT_SCALE, INPUT_SCALE, *((_SMOOTH,) if dtype == INT8 else ()))
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
    for name, at in stored.items():
        if name.endswith("_quantizer._amax"):
            raise WeightsError(
                f"{name} of {at.file.name} quantizes attention, which is not done yet.",
                where=str(at.file),
                hint="export the checkpoint without quantized attention (--quantize-mha).",
            )
    coded = {name: _coded(name, stored) for name in sorted(codes)}
    return {name: at for name, at in stored.items() if name not in scales}, coded


def is_said(folder: Path) -> bool:
    """Whether ``config.json`` beside the weights says that ModelOpt has quantized them."""
    return any(told.get("quant_method") == "modelopt" for _, told in _configs(folder))


def _coded(name: str, stored: Mapping[str, Location]) -> Coded:
    layer, at = name.removesuffix(WEIGHT), stored[name]
    of_weight, of_input, smooth = (layer + one for one in (WEIGHT_SCALE, INPUT_SCALE, _SMOOTH))
    for scale in (of_weight, of_input):
        if scale not in stored:
            half = "; with a quantized weight alone TensorRT computes in half precision"
            hint = "export it with quantized activations (ModelOpt's FP8 or INT8); "
            why = half if scale == of_input else ""
            raise missing(scale, name, at, why, hint, KINDS[at.dtype or FP8])
    step = scale_at(of_input, stored[of_input])
    if at.dtype == FP8:
        return Coded(scale_at(of_weight, stored[of_weight]), step)
    count, width = at.shape if len(at.shape) == 2 else (0, 0)
    rows = scales_at(of_weight, stored[of_weight], count, "rows")
    of_columns = None
    if smooth in stored:
        of_columns = scales_at(smooth, stored[smooth], width, "columns")
    return Coded(rows, step, smooth=of_columns, dtype=INT8)


def _type(folder: Path) -> torch.dtype:
    """Of the codes.

    Raises:
        WeightsError: the checkpoint says that it is of another kind.
    """
    for name, told in _configs(folder):
        algorithm = str(told.get("quant_algo"))
        if told.get("quant_method") == "modelopt" and algorithm not in _TYPES:
            raise WeightsError(
                f"the checkpoint is quantized by ModelOpt to {algorithm}, of which cp-convert "
                f"takes {' and '.join(_TYPES)}.",
                where=str(name),
                hint="export it as FP8; " + UNQUANTIZED,
            )
        return _TYPES.get(algorithm, FP8)
    return FP8


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
