"""Single files of FP8 or NVFP4 codes with scales, as ComfyUI writes and BFL publishes them.

In: what the files hold by name. Out: the same without scales, and the scales by layer. Layouts
(ComfyUI, *The Comfy guide to Quantization*, and its loader for older files), of a layer ``x``::

    x.weight        F8_E4M3 [N, K]     codes
    x.weight_scale  F32 []             the weight is codes * weight_scale
    x.input_scale   F32 []             the input's codes are input / input_scale; may be missing
    x.comfy_quant   U8                 {"format": "float8_e4m3fn"} in JSON

and of NVFP4, in which the even column is the upper half of a byte, and scales of blocks lie as
cuBLAS reads them, in tiles of 128 rows and 4 columns that are padded with zeros::

    x.weight          U8 [N, K/2]
    x.weight_scale    F8_E4M3 [N, K/16]   each rounded up to whole tiles
    x.weight_scale_2  F32 []              the weight is codes * weight_scale * weight_scale_2
    x.input_scale     F32 []              of the scales of the input's blocks; may be missing
    x.comfy_quant     U8                  {"format": "nvfp4"} in JSON

A file may have layers of both. Instead of ``comfy_quant`` its ``_quantization_metadata`` may name
the layers. Older files ("fp8_scaled") have a tensor ``scaled_fp8``, ``scale_weight`` and
``scale_input``. An input scale of exactly 1 is none, and products "in full precision"
(``full_precision_matrix_mult``, or a ``scaled_fp8`` of two numbers) have none either: such a weight
alone is quantized.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from ..errors import WeightsError
from ..ir.nvfp4 import BLOCK, PAIRS
from ..ir.quantize import FP8
from ..ir.tensors import Location, bytes_of, tensor_at
from .coded import (
    KINDS,
    WEIGHT,
    Coded,
    blocks_at,
    metadata_of,
    missing,
    not_quantized,
    scale_at,
)
from .header import parsed
from .names import inside
from .quantized import UNQUANTIZED

_MARKER: Final = "scaled_fp8"
_QUANT: Final = ".comfy_quant"
_METADATA: Final = "_quantization_metadata"
_FORMATS: Final = {"float8_e4m3fn": FP8, "nvfp4": PAIRS}
"""What a layer says that it is, and the type of its codes."""
_FULL: Final = "full_precision_matrix_mult"
_KNOWN: Final = ("format", _FULL, "orig_dtype", "orig_shape")
_OLD: Final = (".scale_weight", ".scale_input")
_NEW: Final = (".weight_scale", ".input_scale")
_OF_ALL: Final = ".weight_scale_2"


@dataclass(frozen=True)
class _Layers:
    """What a file says of its layers.

    Attributes:
        full: by the layer's name, whether its products are to be in full precision.
        suffixes: of the weight's scale and the input's.
        used: names that say so, and are no tensors of the model.
        types: of the codes, by the layer's name.
    """

    full: Mapping[str, bool]
    suffixes: tuple[str, str]
    used: frozenset[str]
    types: Mapping[str, torch.dtype]

    def scales(self, layer: str) -> tuple[str, ...]:
        """What the names of a layer's scales end in."""
        return self.suffixes if self.types[layer] == FP8 else (*self.suffixes, _OF_ALL)


def without_scales(
    stored: Mapping[str, Location],
) -> tuple[dict[str, Location], dict[str, Coded]] | None:
    """The tensors that are the model's, and those among them that are codes.

    Returns:
        ``None`` for files that are not of these formats.

    Raises:
        WeightsError: a scale is missing, none, or belongs to no codes; or another format.
    """
    prefix, names = inside(stored)
    own = {name: stored[name] for name in names} | _markers(stored)
    layers = _told(own, prefix) or _old(own)
    if layers is None:
        return None
    scales = {name for name in own if name.endswith((*_OLD, *_NEW, _OF_ALL))}
    for name in sorted(scales):
        layer, _, kind = name.rpartition(".")
        if layer not in layers.full or f".{kind}" not in layers.scales(layer):
            raise _stray(name, layer, layers, stored)
    types = {*layers.types.values()} or {FP8}
    codes = sorted(n for n, at in own.items() if at.dtype in types and n.endswith(WEIGHT))
    for name in codes:
        if name.removesuffix(WEIGHT) not in layers.full:
            scale, dtype = name.removesuffix(WEIGHT) + layers.suffixes[0], stored[name].dtype
            raise missing(scale, name, stored[name], kind=KINDS[dtype or FP8])
    coded = {f"{name}.weight": _coded(name, layers, stored) for name in layers.full}
    return {n: at for n, at in stored.items() if n not in scales | layers.used}, coded


def _markers(stored: Mapping[str, Location]) -> dict[str, Location]:
    return {_MARKER: stored[_MARKER]} if _MARKER in stored else {}


def _stray(name: str, layer: str, layers: _Layers, stored: Mapping[str, Location]) -> WeightsError:
    at, types = stored.get(f"{layer}.weight"), [*layers.types.values(), FP8]
    of_layer = [layers.types[layer]] if layer in layers.types else types
    if at is None or at.dtype not in of_layer:
        return not_quantized(name, f"{layer}.weight", stored, KINDS[of_layer[0]])
    return WeightsError(
        f"{name} of {stored[name].file.name}: {layer} has scales of two formats, or the file does "
        "not say of it which one it is.",
        where=str(stored[name].file),
        hint="the checkpoint is mixed up; " + UNQUANTIZED,
    )


def _coded(layer: str, layers: _Layers, stored: Mapping[str, Location]) -> Coded:
    weight = f"{layer}.weight"
    of_weight, of_input = (layer + suffix for suffix in layers.suffixes)
    dtype = layers.types[layer]
    kind = KINDS[dtype]
    if weight not in stored or stored[weight].dtype != dtype:
        raise not_quantized(of_weight, weight, stored, kind)
    for scale in (of_weight, *(layer + one for one in layers.scales(layer)[2:])):
        if scale not in stored:
            raise missing(scale, weight, stored[weight], kind=kind)
    step = scale_at(of_input, stored[of_input]) if of_input in stored else 1.0
    of_inputs = None if layers.full[layer] or step == 1.0 else step
    if dtype == FP8:
        return Coded(scale_at(of_weight, stored[of_weight]), of_inputs)
    return Coded(
        scale_at(layer + _OF_ALL, stored[layer + _OF_ALL]),
        of_inputs,
        dtype=PAIRS,
        blocks=_untiled(of_weight, stored[of_weight], weight, stored[weight]),
        is_swapped=True,
    )


def _untiled(name: str, at: Location, weight: str, codes: Location) -> Tensor:
    """The scale of each block, E4M3 ``[N, K/16]``, out of the tiles that cuBLAS reads.

    Source: cuBLAS documentation, *1D Block Scaling Factors Layout*.
    """
    if len(codes.shape) != 2:
        raise _unknown(weight, f"{codes.kind}{list(codes.shape)}", codes)
    rows, columns = codes.shape[0], 2 * codes.shape[1] // BLOCK
    down, across = -(-rows // 128), -(-columns // 4)
    stored = blocks_at(name, at, (128 * down, 4 * across), (rows, 2 * codes.shape[1]))
    tiles = stored.view(torch.uint8).reshape(down, across, 32, 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(128 * down, 4 * across)[:rows, :columns].contiguous().view(FP8)


def _old(own: Mapping[str, Location]) -> _Layers | None:
    """Of a file with ``scale_weight``."""
    marker = next((n for n in own if n.rpartition(".")[2] == _MARKER), None)
    scaled = [name.rpartition(".")[0] for name in own if name.endswith(_OLD)]
    codes = {n.removesuffix(WEIGHT) for n, at in own.items() if at.dtype == FP8}
    if marker is None and not codes.intersection(scaled):
        return None
    if marker is not None and own[marker].kind not in ("F8_E4M3", "F32"):
        raise _unknown(marker, own[marker].kind, own[marker])
    full = marker is not None and own[marker].shape == (2,)
    used = frozenset() if marker is None else frozenset({marker})
    return _Layers(dict.fromkeys(scaled, full), _OLD, used, dict.fromkeys(scaled, FP8))


def _told(own: Mapping[str, Location], prefix: str) -> _Layers | None:
    """Of a file that describes its layers in JSON."""
    full, types = dict[str, bool](), dict[str, torch.dtype]()
    described = [*_in_tensors(own), *_in_metadata(own, prefix)]
    for layer, told, at in described:
        what = told.get("format") if isinstance(told, Mapping) else told
        if not isinstance(told, Mapping) or not isinstance(what, str) or what not in _FORMATS:
            raise _unknown(layer, what, at)
        if odd := [key for key in told if key not in _KNOWN]:
            raise _unknown(layer, f"{what} with {', '.join(map(str, odd))}", at)
        if types.setdefault(layer, _FORMATS[what]) != _FORMATS[what]:
            raise _unknown(layer, f"{what}, and otherwise", at)
        if not isinstance(own_full := told.get(_FULL, False), bool):
            raise _unknown(layer, f"{what} with {_FULL} {own_full!r}", at)
        full[layer] = own_full or full.get(layer, False)
    used = frozenset(n for n in own if n.endswith(_QUANT) or n.rpartition(".")[2] == _MARKER)
    return _Layers(full, _NEW, used, types) if described else None


def _in_tensors(own: Mapping[str, Location]) -> Iterator[tuple[str, Any, Location]]:
    for name, at in own.items():
        if not name.endswith(_QUANT):
            continue
        if at.kind != "U8":
            raise _unknown(name, at.kind, at)
        at.check_unchanged()
        text = tensor_at(at, bytes_of(at.file)).numpy().tobytes()
        yield name.removesuffix(_QUANT), _json(text, name, at), at


def _in_metadata(own: Mapping[str, Location], prefix: str) -> Iterator[tuple[str, Any, Location]]:
    """Layers may be named with the prefix, or without."""
    found = metadata_of(own)
    for text, at in [found[_METADATA]] if _METADATA in found else []:
        told = _json(text.encode(), _METADATA, at)
        layers = told.get("layers") if isinstance(told, dict) else None
        if not isinstance(layers, dict):
            raise _unknown(_METADATA, "something without layers", at)
        for layer, one in layers.items():
            is_whole = layer.startswith(prefix) or f"{prefix}{layer}.weight" not in own
            yield (layer if is_whole else prefix + layer), one, at


def _json(text: bytes, name: str, at: Location) -> Any:
    try:
        return parsed(text)
    except ValueError as error:
        raise _unknown(name, f"no JSON that can be read ({error})", at) from error


def _unknown(name: str, what: object, at: Location) -> WeightsError:
    return WeightsError(
        f"{name} of {at.file.name} is quantized as {what}, of which cp-convert takes "
        f"{' and '.join(_FORMATS)}.",
        where=str(at.file),
        hint="take the file in FP8 (E4M3); " + UNQUANTIZED,
    )
