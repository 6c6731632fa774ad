"""Checkpoints whose linear layers are stored as FP8 codes with scales, as NVIDIA ModelOpt exports.

In: what the files hold by name. Out: the same without scales, and the scales by layer. Layout
(``modelopt.torch.export.export_hf_checkpoint``, ``quant_algo`` ``FP8``), of a layer ``x``::

    x.weight        F8_E4M3 [N, K]     codes
    x.weight_scale  F32 []             the weight is codes * weight_scale
    x.input_scale   F32 []             the input's codes are input / input_scale

``config.json`` beside says so in ``quantization_config``; other algorithms are refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from ..errors import WeightsError
from ..ir.quantize import FP8
from ..ir.tensors import Location
from .coded import WEIGHT, Coded, missing, not_quantized, scale_at
from .quantized import UNQUANTIZED

WEIGHT_SCALE: Final = ".weight_scale"
INPUT_SCALE: Final = ".input_scale"
_CONFIG: Final = "config.json"
_ALGORITHM: Final = "FP8"


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
    _check_algorithm(folder)
    scales = {name for name in stored if name.endswith((WEIGHT_SCALE, INPUT_SCALE))}
    codes = {name for name, at in stored.items() if at.dtype == FP8 and name.endswith(WEIGHT)}
    if not scales:
        return dict(stored), {}
    if not codes:  # some other quantizer's: told by who finds the types that are not understood
        return dict(stored), {}
    for name in sorted(scales):
        layer = name.rpartition(".")[0]
        if f"{layer}.weight" not in codes:
            raise not_quantized(name, f"{layer}.weight", stored)
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
    layer = name.removesuffix(WEIGHT)
    return Coded(
        weight_scale=_scale(layer + WEIGHT_SCALE, name, stored),
        input_scale=_scale(layer + INPUT_SCALE, name, stored),
    )


def _scale(name: str, weight: str, stored: Mapping[str, Location]) -> float:
    if name not in stored:
        half = "; with a quantized weight alone TensorRT computes in half precision"
        why = half if name.endswith(INPUT_SCALE) else ""
        hint = "export it with quantized activations (ModelOpt's FP8); "
        raise missing(name, weight, stored[weight], why, hint)
    return scale_at(name, stored[name])


def _check_algorithm(folder: Path) -> None:
    for name, told in _configs(folder):
        algorithm = str(told.get("quant_algo"))
        if told.get("quant_method") == "modelopt" and algorithm != _ALGORITHM:
            raise WeightsError(
                f"the checkpoint is quantized by ModelOpt to {algorithm}, of which cp-convert "
                f"takes {_ALGORITHM}.",
                where=str(name),
                hint="export it as FP8; " + UNQUANTIZED,
            )


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
