"""The weights that a bundle was made with, read from their files and compared with its digests."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..bundle.manifest import Weight
from ..errors import DamagedBundle
from ..files import sha256
from ..ir.tensors import Location, bytes_of, tensor_at


class Numbers(Protocol):
    """Where the numbers of a bundle's weights come from."""

    def tensor(self, weight: Weight) -> Tensor:
        """Those of one weight, in its own type; they are not to be written into."""


class Base:
    """Weights on the CPU, mapped; each is read when it is asked for.

    Args:
        folder: the bundle's.
        verify: whether the bytes are compared with the manifest's SHA-256.
    """

    def __init__(self, folder: Path, *, verify: bool = True) -> None:
        self._folder, self._verify = folder, verify
        self._files: dict[Path, Tensor] = {}

    def tensor(self, weight: Weight) -> Tensor:
        """The numbers of ``weight``; they are not to be written into.

        Raises:
            DamagedBundle: the file is missing, shorter, or holds other numbers.
        """
        file = self._folder / weight.file
        if file not in self._files:
            if not file.is_file():
                raise DamagedBundle(
                    f"the weights {file} are missing.",
                    hint="the manifest names the safetensors files that the bundle was made with; "
                    "bring them back, or convert with --copy-weights.",
                )
            self._files[file] = bytes_of(file)
        if len(self._files[file]) < weight.offset + weight.bytes or (
            self._verify and sha256(file, weight.offset, weight.bytes) != weight.sha256
        ):
            raise DamagedBundle(
                f"{file} holds other numbers for {weight.name} than the bundle was made with.",
                hint="bring the file back, or convert again.",
            )
        dtype = getattr(torch, weight.dtype)
        at = Location(file, weight.offset, weight.bytes, dtype, shape=tuple(weight.shape))
        return tensor_at(at, self._files[file])
