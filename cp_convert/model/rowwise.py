"""Checkpoints whose weights are codes with a scale for each row, and none for the input.

In: what the files hold by name. Out: the same without scales, and the scales by layer. Layouts, of
a layer ``x``; each token of the input is coded by its own largest number (BFL's "fp8r" and
torchao's ``Float8Tensor``, ``PerRow``)::

    x.weight          F8_E4M3 [N, K]     codes              x._weight_qdata, or x.weight:qdata
    x.weight_scale    F32 [N] or [N, 1]  of each row        x._weight_scale, or x.weight:scale

torchao says in the file's metadata what each tensor is, ``tensor_names`` among them; without
``act_quant_kwargs`` the weight alone is quantized, and a block of the whole weight has one scale.
Its ``PerTensor`` divides the whole input by its own largest number, which would be that of all
ranks; a constant scale has to be put in the place of that (``by_whole``, in :mod:`.coded`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from ..errors import WeightsError
from ..ir.quantize import FP8
from ..ir.tensors import Location
from .coded import (
    WEIGHT,
    Coded,
    metadata_by_file,
    missing,
    not_quantized,
    scale_at,
    scales_at,
)
from .header import parsed
from .quantized import UNQUANTIZED

_SCALE: Final = ".weight_scale"
_NAMES: Final = "tensor_names"
_TENSOR: Final = "Tensor"
_PIECES: Final = ["qdata", "scale"]
_BY_TOKEN, _BY_WHOLE = "PerRow", "PerTensor"
"""Granularities of the input's scales."""


def of_bfl(
    stored: Mapping[str, Location],
) -> tuple[dict[str, Location], dict[str, Coded]] | None:
    """The tensors that are the model's, and those among them that are codes by rows ("fp8r").

    Returns:
        ``None`` where no scale is one of rows, or one is of inputs.

    Raises:
        WeightsError: a scale is missing, none, or belongs to no codes.
    """
    scales = [name for name in stored if name.endswith(_SCALE)]
    codes = [
        n
        for n, at in stored.items()
        if at.dtype == FP8 and len(at.shape) == 2 and n.endswith(WEIGHT)
    ]
    by_rows = [name for name in scales if len(stored[name].shape) and stored[name].shape[0] > 1]
    if not codes or not by_rows or any(name.endswith(".input_scale") for name in stored):
        return None
    for name in scales:
        if (weight := name.removesuffix("_scale")) not in codes:
            raise not_quantized(name, weight, stored)
    coded = {}
    for name in codes:
        if f"{name}_scale" not in stored:
            raise missing(f"{name}_scale", name, stored[name])
        rows = stored[name].shape[0]
        of_rows = scales_at(f"{name}_scale", stored[f"{name}_scale"], rows, "rows")
        coded[name] = Coded(of_rows, None, by_token=True)
    return {name: at for name, at in stored.items() if name not in scales}, coded


@dataclass(frozen=True)
class _Told:
    """What torchao's metadata says of one tensor.

    Attributes:
        name: of the model's tensor.
        data: how it is quantized.
        at: a tensor of the file that says so.
    """

    name: str
    data: Mapping[str, Any]
    at: Location


def of_torchao(
    stored: Mapping[str, Location],
) -> tuple[dict[str, Location], dict[str, Coded]] | None:
    """The same of files that torchao's tensors were saved in.

    Returns:
        ``None`` for other files.

    Raises:
        WeightsError: a piece is missing, or none that is described; or another kind of tensor.
    """
    described = _described(stored)
    if not described:
        return None
    rest, coded = dict(stored), dict[str, Coded]()
    for name, (text, at) in described.items():
        told = _json(name, text, at)
        kind, data, pieces = (_at(told, key) for key in ("_type", "_data", "_tensor_data_names"))
        if kind == _TENSOR:
            continue
        if kind != "Float8Tensor" or not isinstance(data, dict):
            raise _refused(name, str(kind), at)
        if pieces is not None and (not isinstance(pieces, list) or sorted(pieces) != _PIECES):
            raise _refused(name, f"FP8 of {pieces}", at)
        if name in stored:
            raise _refused(name, "codes, and stored as numbers too", at)
        one = _Told(name, data, at)
        codes, scale = _pieces(one, rest)
        coded[name] = _coded(one, codes, scale)
        rest[name] = codes[1]
        del rest[codes[0]], rest[scale[0]]
    return rest, coded


def _described(stored: Mapping[str, Location]) -> dict[str, tuple[str, Location]]:
    """What the files say of each tensor, with a tensor of the file that says so.

    Of several files each may tell of all tensors, as diffusers has it, or of its own.
    """
    found: dict[str, tuple[str, Location]] = {}
    for at, told in metadata_by_file(stored):
        if _NAMES not in told:
            continue
        names = _json(_NAMES, told[_NAMES], at)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise _refused(_NAMES, "no list of names", at)
        for name in names:
            if name not in told:
                raise _refused(name, "not described", at)
            if names.count(name) > 1:
                raise _refused(name, "two tensors", at)
            text, other = found.setdefault(name, (told[name], at))
            if text != told[name]:
                raise _refused(name, f"something else in {other.file.name}", at)
    return found


Piece = tuple[str, Location]


def _pieces(told: _Told, stored: Mapping[str, Location]) -> tuple[Piece, Piece]:
    """Where the codes and the scales are."""
    module, _, leaf = told.name.rpartition(".")
    found = []
    for piece in _PIECES:
        names = (f"{module}._{leaf}_{piece}", f"{told.name}:{piece}")
        name = next((name for name in names if name in stored), None)
        if name is None:
            what = f"FP8 codes, and its {names[0]} is missing"
            raise _refused(told.name, what, told.at)
        found.append((name, stored[name]))
    return found[0], found[1]


def _coded(told: _Told, codes: Piece, scale: Piece) -> Coded:
    at, data = codes[1], told.data
    if at.dtype != FP8 or len(at.shape) != 2:
        raise _refused(codes[0], f"{at.kind}{list(at.shape)}", at)
    rows, columns = at.shape
    block, granularity = data.get("block_size"), _of_inputs(told)
    by_token, by_whole = granularity == _BY_TOKEN, granularity == _BY_WHOLE
    if block == [rows, columns]:
        if by_token:
            raise _refused(told.name, "FP8 by one scale, and its input by tokens", told.at)
        return Coded(scale_at(*scale), None, by_whole=by_whole)
    if block != [1, columns]:
        raise _refused(told.name, f"FP8 in blocks of {block}", told.at)
    of_rows = scales_at(*scale, rows, "rows")
    return Coded(of_rows, None, by_token=by_token, by_whole=by_whole)


def _of_inputs(told: _Told) -> str | None:
    """How the input becomes codes, by its granularity; ``None``: it stays as it is."""
    given = told.data.get("act_quant_kwargs")
    if given is None:
        return None
    own, dtype = _at(given, "_data"), _at(given, "_data", "float8_dtype", "_data")
    kind, more = (_at(own, "granularity", key) for key in ("_type", "_data"))
    is_known = kind in (_BY_TOKEN, _BY_WHOLE) and more in (None, {}, {"dim": -1})
    bounds = [_at(own, f"hp_value_{end}") for end in ("lb", "ub")]
    if not is_known or dtype != "float8_e4m3fn" or bounds != [None, None]:
        what = f"FP8 with an input quantized {kind}, {dtype}, within {bounds}"
        raise _refused(told.name, what, told.at)
    return str(kind)


def _at(told: object, *keys: str) -> Any:
    """What stands within, level by level; ``None`` where nothing does."""
    for key in keys:
        told = told.get(key) if isinstance(told, dict) else None
    return told


def _json(name: object, text: str, at: Location) -> Any:
    try:
        return parsed(text.encode())
    except ValueError as error:
        raise _refused(str(name), f"no JSON that can be read ({error})", at) from error


def _refused(name: str, what: str, at: Location) -> WeightsError:
    return WeightsError(
        f"{name} of {at.file.name} is said to be {what}, of which cp-convert takes torchao's "
        "Float8Tensor by rows.",
        where=str(at.file),
        hint="quantize it with PerRow granularity; " + UNQUANTIZED,
    )
