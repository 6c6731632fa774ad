"""The header of a safetensors file, read strictly; a file that is none is called what it is.

The library's reader keeps the last of two equal names and speaks of headers where a file is no
safetensors file at all. Format: https://github.com/huggingface/safetensors, *Format*.
"""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from ..errors import UsageError, WeightsError
from ..files import file_state
from ..ir.tensors import FLOAT8, SAFETENSORS, Location, mapped

AGAIN: Final = "the file is probably truncated; fetch it again."
_LARGEST: Final = 100_000_000
"""Bytes of the largest header that the format's own library reads."""
_BITS: Final = {
    **dict.fromkeys(("BOOL", "U8", "I8", *FLOAT8, "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
_PYTORCH: Final = ("PyTorch's pickle format", "cp-convert never unpickles; save it as safetensors.")
_PAGE: Final = ("a web page, not the file that it stands for", "fetch the file itself.")
_DISGUISES: Final = {
    b"version https://git-lfs": (
        "a git-lfs pointer, not the file that it stands for",
        "git lfs pull fetches the file itself.",
    ),
    b"<!doctype": _PAGE,
    b"<html": _PAGE,
    b"<?xml": _PAGE,
    b"pk\x03\x04": _PYTORCH,
    b"\x80\x02": _PYTORCH,
    b"gguf": ("a GGUF file (quantized)", "name the published safetensors file."),
}
"""How other files begin, in lower case: what such a file is, and what to do."""


class _Twice(Exception):
    """A name that stands twice in a JSON object."""


def parsed(text: bytes) -> Any:
    """JSON whose objects name everything once.

    Raises:
        ValueError: it is no JSON, or nested too deeply, or has a name twice.
    """
    try:
        return json.loads(text.decode(), object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except _Twice as error:
        raise ValueError(f"it names {error.args[0]} twice") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise _Twice(name)
        found[name] = value
    return found


def read_header(file: Path) -> dict[str, Location]:
    """Where every tensor of ``file`` lies, in the order of their numbers.

    Raises:
        WeightsError: the file is missing, another kind of file, incomplete, or its header says
            what cannot be.
    """
    try:
        state = file_state(file.resolve())
        size = file.stat().st_size
        with file.open("rb") as raw:
            head = raw.read(64)
            _check_kind(file, head, size)
            length = int.from_bytes(head[:8], "little")
            _check_length(file, length, size)
            raw.seek(8)
            text = raw.read(length)
    except FileNotFoundError as error:
        raise WeightsError(f"{file} is missing.", where=str(file)) from error
    except OSError as error:
        raise _bad(file, error.strerror or str(error), hint="check its path and rights.") from error
    entries = _entries(file, text)
    found = {n: _location(file, n, told, 8 + length, state) for n, told in entries.items()}
    ordered = dict(sorted(found.items(), key=lambda item: (item[1].offset, item[1].size)))
    _check_cover(file, ordered, 8 + length, size)
    return ordered


def given_tensors(file: Path, option: str) -> dict[str, Tensor]:
    """All tensors of a file of inputs; their numbers are read when they are used.

    Args:
        file: as it was named.
        option: by which.

    Raises:
        UsageError: see :func:`read_header`.
    """
    try:
        read_header(file)
        return mapped(file)
    except WeightsError as error:
        told = f"{option}: {error.message}"
        raise UsageError(told, where=error.where, hint=error.hint) from error


def _bad(file: Path, reason: str, hint: str = AGAIN) -> WeightsError:
    return WeightsError(
        f"{file.name} cannot be read as safetensors: {reason}.", where=str(file), hint=hint
    )


def _check_kind(file: Path, head: bytes, size: int) -> None:
    if not size:
        raise WeightsError(f"{file.name} is empty.", where=str(file), hint="fetch it again.")
    if head[8:9] == b"{":
        return
    if (found := disguised(head)) is not None:
        raise WeightsError(f"{file.name} is {found[0]}.", where=str(file), hint=found[1])


def disguised(head: bytes) -> tuple[str, str] | None:
    """What a file is that begins like this, and what to do about it; ``None``: not known."""
    start = head.lstrip().lower()
    return next((told for begin, told in _DISGUISES.items() if start.startswith(begin)), None)


def _check_length(file: Path, length: int, size: int) -> None:
    if size < 8:
        raise _bad(file, f"it ends after {size} bytes, before its header")
    if length > _LARGEST:
        raise _bad(file, f"its first eight bytes tell of a header of {length} bytes", hint=(
            "it is probably no safetensors file, whatever its name."
        ))  # fmt: skip
    if 8 + length > size:
        raise _bad(file, f"it ends after {size} bytes, within a header of {length}")


def _entries(file: Path, text: bytes) -> dict[str, Any]:
    try:
        header = parsed(text)
    except ValueError as error:
        twice = "twice" in str(error)
        hint = "whatever wrote it mixed two tensors up; fetch or save it again." if twice else AGAIN
        raise _bad(file, f"its header is wrong, {error}", hint=hint) from error
    if not isinstance(header, dict):
        raise _bad(file, f"its header is a {type(header).__name__} in JSON, not an object")
    header.pop("__metadata__", None)
    return header


def _location(file: Path, name: str, told: Any, start: int, state: tuple[object, ...]) -> Location:
    told = told if isinstance(told, dict) else {}
    kind, shape, offsets = told.get("dtype"), told.get("shape"), told.get("data_offsets")
    if not isinstance(kind, str) or kind not in _BITS:
        raise _bad(file, f"the type of {name} is {kind!r}, which the format does not know")
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise _bad(file, f"{name} has the shape {shape!r} at the offsets {offsets!r}")
    begin, end = offsets
    bits = prod(shape) * _BITS[kind]
    if 8 * (end - begin) != bits:
        raise _bad(
            file, f"{name}, {kind} {shape}, takes {bits / 8:g} bytes and is given {end - begin}"
        )
    dtype = SAFETENSORS.get(kind, FLOAT8.get(kind))
    return Location(file, start + begin, end - begin, dtype, kind, tuple(shape), state)


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _check_cover(file: Path, ordered: dict[str, Location], start: int, size: int) -> None:
    """The numbers lie one behind the other, and the file ends with the last."""
    end, before = start, "the header"
    for name, at in ordered.items():
        if at.offset < end:
            raise _bad(file, f"the numbers of {name} overlap those of {before}")
        if at.offset > end:
            raise _bad(file, f"{at.offset - end} bytes between {before} and {name} belong to none")
        end, before = at.offset + at.size, name
    if end > size:
        raise _bad(file, f"it ends after {size} bytes of {end}, within or before {before}")
    if end < size:
        raise _bad(file, f"{size - end} bytes behind {before} belong to no tensor")
