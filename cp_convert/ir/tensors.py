"""Tensors in safetensors files: where one lies, and files mapped and written in one pass.

Format: https://github.com/huggingface/safetensors, *Format*.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, BinaryIO, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import WeightsError
from ..files import file_state

_CHUNK: Final = 1 << 24
_LEAST: Final = 1 << 12
"""Bytes of a hole: file systems have none that are smaller."""


SAFETENSORS: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The format's names of the types that models are computed in."""


FLOAT8: Final = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
"""The format's names of floating types of 8 bits, in which weights are only ever stored."""


@dataclass(frozen=True)
class Location:
    """Where a file holds a tensor's numbers.

    Attributes:
        file: the safetensors file.
        offset: of the first byte.
        size: in bytes.
        dtype: as stored; ``None`` for one that torch has not.
        kind: the type by the format's own name.
        shape: as stored.
        state: of the file when its header was read, see :func:`cp_convert.files.file_state`.
    """

    file: Path
    offset: int
    size: int
    dtype: torch.dtype | None
    kind: str = ""
    shape: tuple[int, ...] = ()
    state: tuple[object, ...] = ()

    def check_unchanged(self) -> None:
        """Raises WeightsError: the file is not the one any more whose header was read."""
        try:
            unchanged = file_state(self.file.resolve()) == self.state
        except OSError:
            unchanged = False
        if not unchanged:
            raise WeightsError(
                f"{self.file.name} was changed, replaced or removed while it was converted.",
                where=str(self.file),
                hint="start again when the file is complete and nothing writes to it.",
            )


def bytes_of(file: Path) -> Tensor:
    """All bytes of a file as ``uint8 [size]``, mapped: they are read when they are used.

    What is written into the tensor does not reach the file.
    """
    size = file.stat().st_size
    storage: Any = torch.UntypedStorage.from_file(str(file), shared=False, nbytes=size)
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def tensor_at(at: Location, file: Tensor) -> Tensor:
    """The tensor that ``at`` names, in the memory of ``file`` (:func:`bytes_of`).

    One that does not begin at a multiple of its numbers' size is a copy.
    """
    assert at.dtype is not None
    piece = file[at.offset : at.offset + at.size]
    if at.offset % at.dtype.itemsize or not at.size:
        piece = piece.clone()
    return piece.view(at.dtype).reshape(at.shape)


def is_finite(tensor: Tensor) -> bool:
    """Whether it holds neither NaN nor infinity; one pass, no memory. Integers always are."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.dtype in FLOAT8.values():
        return _are_numbers(tensor)
    # Both ends of the range keep a NaN; ``isfinite`` takes forty times as long in half precision.
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor))


def _are_numbers(codes: Tensor) -> bool:
    """The same of numbers of 8 bits, by the codes that are none: casting them takes a minute a GB.

    They are the last ones of either sign; ``FNUZ`` types have one, in the place of minus zero.
    """
    signed, unsigned = codes.view(torch.int8), codes.view(torch.uint8)
    if codes.dtype in (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz):
        return int(signed.amin()) > -128
    first = 0x7F if codes.dtype == torch.float8_e4m3fn else 0x7C
    return int(signed.amax()) < first and int(unsigned.amax()) < 0x80 + first


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """The file, for reading; what is wrong with it becomes a :class:`WeightsError`."""
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except FileNotFoundError as error:
        raise WeightsError(f"{file} is missing.", where=str(file)) from error
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{file.name} cannot be read as safetensors: {error}.",
            where=str(file),
            hint="the file is probably truncated; fetch it again.",
        ) from error


def save(
    tensors: Mapping[str, Tensor],
    path: Path,
    stop: Event | None = None,
    *,
    made: Callable[[str], Iterable[Tensor]] | None = None,
) -> dict[str, tuple[int, str]]:
    """Write one safetensors file, tensor by tensor: the library would hold all of them in memory.

    Zeros by the megabyte are holes in it, which are read as zeros and take no room on the disk.

    Format: https://github.com/huggingface/safetensors, *Format*: the header's length in 8 bytes,
    little-endian; the header in JSON; the numbers.

    Args:
        tensors: by name.
        path: of the file.
        stop: ends it early.
        made: makes the numbers of a name when its turn comes, piece by piece in row-major order;
            ``tensors`` only describes them then.

    Returns:
        Offset in the file and SHA-256 of every tensor; fewer of them when ``stop`` was set.
    """
    written = {}
    with path.open("wb") as file:
        file.write(_header(tensors))
        for name, tensor in tensors.items():
            if stop is not None and stop.is_set():
                break
            offset, digest = file.tell(), hashlib.sha256()
            for piece in (tensor,) if made is None else made(name):
                for some in as_bytes(piece.detach().contiguous()).split(_CHUNK):
                    digest.update(some.numpy())
                    _put(file, some)
            written[name] = (offset, digest.hexdigest())
        file.truncate()
    return written


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    """Where each will be, and the header's length in front of that."""
    header, begin = {}, 0
    for name, tensor in tensors.items():
        end = begin + tensor.nbytes
        known = {**SAFETENSORS, **FLOAT8}
        dtype = next(n for n, d in known.items() if d == tensor.dtype)
        header[name] = {
            "dtype": dtype,
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _put(file: BinaryIO, some: Tensor) -> None:
    """Write bytes, or leave a hole of their size where all of them are zero."""
    if len(some) < _LEAST or bool(some[:_LEAST].any()) or bool(some.any()):
        file.write(some.numpy().data)
    else:
        file.seek(len(some), os.SEEK_CUR)


def numbers(tensor: Tensor) -> memoryview:
    """A tensor's numbers as bytes, in row-major order."""
    return as_bytes(tensor.detach().contiguous()).numpy().data


def as_bytes(tensor: Tensor) -> Tensor:
    """The same memory as bytes; ``tensor`` is contiguous.

    One element that was expanded counts as contiguous with a stride of 0, which no view takes.
    """
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def mapped(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; their numbers are read when they are used.

    Raises:
        WeightsError: the file is missing or damaged.
    """
    with opened(path) as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118


@dataclass(frozen=True)
class Weight:
    """One weight that is an input of every engine.

    Attributes:
        name: of the binding, and of the model's parameter; ``constants.*`` follow from parameters.
        dtype, shape: of the tensor.
        file: where its numbers are; a bare file name lies in the bundle.
        offset: of the first byte in that file.
        size: in bytes.
        sha256: of these bytes.
        ranks: whose it is, where ranks hold different parts; empty: all ranks'.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    size: int
    sha256: str
    ranks: tuple[int, ...] = ()


def is_held(weight: Weight, tensor: Tensor) -> bool:
    """Whether the weight's numbers are those of ``tensor``."""
    like = weight_of(weight.name, tensor, weight.file, weight.offset, weight.sha256)
    return like == weight and hashlib.sha256(numbers(tensor)).hexdigest() == weight.sha256


def weight_of(name: str, tensor: Tensor, file: str, offset: int, sha256: str) -> Weight:
    """A weight whose numbers begin at ``offset`` of ``file``."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Weight(name, dtype, tuple(tensor.shape), file, offset, tensor.nbytes, sha256)
