"""Weights of a bundle, mapped from the files where the manifest says that they are."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from mmap import ACCESS_COPY, mmap
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from ..bundle.manifest import Weight
from ..errors import DamagedBundle

Told = Callable[[str], None]
_STAGE: Final = 1 << 28
"""Bytes of page-locked memory through which weights go to a GPU."""


def bound_weights(
    weights: Iterable[Weight],
    folder: Path,
    device: torch.device,
    *,
    verify: bool,
    told: Told = lambda _: None,
) -> dict[str, Tensor]:
    """Every weight by name, on ``device``; on the CPU the files are mapped and not read.

    Args:
        weights: what the manifest lists.
        folder: the bundle's; relative file names lie in it.
        device: where they are wanted. A GPU's copy is made in one pass, in the order in which the
            files hold them, through page-locked memory.
        verify: whether the bytes are compared with the manifest's SHA-256.
        told: is called with every weight's name when it is there, so that a watcher sees progress.

    Raises:
        DamagedBundle: a file is missing, shorter, or holds other numbers.
    """
    found: dict[str, Tensor] = {}
    places: dict[tuple[Path, int], Tensor] = {}
    by_file: dict[Path, list[Weight]] = {}
    for weight in weights:
        by_file.setdefault(folder / weight.file, []).append(weight)
    stage = _Stage(device)
    for file, own in sorted(by_file.items()):
        pages = _pages(file)
        for weight in sorted(own, key=lambda w: w.offset):
            place = file, weight.offset
            if place not in places:  # tied weights are one tensor
                places[place] = stage.moved(_mapped(pages, file, weight, verify=verify))
            found[weight.name] = places[place]
            told(weight.name)
    stage.finish()
    return found


def _pages(file: Path) -> mmap:
    try:
        with file.open("rb") as opened:
            return mmap(opened.fileno(), 0, access=ACCESS_COPY)
    except (OSError, ValueError) as error:
        raise DamagedBundle(
            f"the weights {file} cannot be read: {getattr(error, 'strerror', None) or error}.",
            hint="the manifest names the safetensors files that the bundle was made with; bring "
            "them back, or convert with --copy-weights.",
        ) from error


def _mapped(pages: mmap, file: Path, weight: Weight, *, verify: bool) -> Tensor:
    end = weight.offset + weight.bytes
    if end > len(pages):
        raise DamagedBundle(
            f"{file} ends before {weight.name}: it has {len(pages)} bytes, and the weight's last "
            f"is at {end}.",
            hint="the file is another one, or truncated; fetch it again.",
        )
    dtype = getattr(torch, weight.dtype)
    if verify:
        with memoryview(pages) as whole, whole[weight.offset : end] as own:
            if hashlib.sha256(own).hexdigest() != weight.sha256:
                raise DamagedBundle(
                    f"{file} holds other numbers for {weight.name} than the bundle was made with.",
                    hint="bring the file back, or convert again; --no-verify runs it as it is.",
                )
    count = weight.bytes // dtype.itemsize
    if weight.offset % dtype.itemsize:  # safetensors allows it, torch's views do not
        data = bytearray(pages[weight.offset : end])
        return torch.frombuffer(data, dtype=dtype).reshape(weight.shape)
    flat = torch.frombuffer(pages, dtype=dtype, count=count, offset=weight.offset)
    return flat.reshape(weight.shape)


class _Stage:
    """Copies to a GPU through two page-locked buffers in turn; on the CPU nothing is copied."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: list[Tensor] = []
        self._events: list[torch.cuda.Event] = []
        self._turn = 0
        if device.type == "cuda":
            for _ in range(2):
                self._buffers.append(torch.empty(_STAGE, dtype=torch.uint8, pin_memory=True))
                self._events.append(torch.cuda.Event())

    def moved(self, tensor: Tensor) -> Tensor:
        """``tensor`` on the device."""
        if not self._buffers:
            return tensor
        there = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
        source, target = (x.reshape(-1).view(torch.uint8) for x in (tensor, there))
        for start in range(0, source.numel(), _STAGE):
            piece = source[start : start + _STAGE]
            self._events[self._turn].synchronize()  # the copy before last is done
            stage = self._buffers[self._turn][: piece.numel()]
            stage.copy_(piece)
            target[start : start + piece.numel()].copy_(stage, non_blocking=True)
            self._events[self._turn].record()
            self._turn = 1 - self._turn
        return there

    def finish(self) -> None:
        """Wait for the last copies."""
        if self._buffers:
            torch.cuda.synchronize(self.device)
