"""``torch_tensorrt`` on a machine without an NVIDIA driver.

Importing it asks the driver for the current device and its compute capability, although building
for TensorRT-RTX needs neither: the targets are named in the builder's configuration. Without a
driver the two questions are answered here, for the duration of a ``with`` block only.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch

from ..backends import Backend
from ..errors import BackendMissing

_CAPABILITY: Final = (8, 9)


def has_driver() -> bool:
    """Whether this machine has a usable NVIDIA GPU."""
    return torch.cuda.is_available()


def capability() -> tuple[int, int]:
    """Compute capability of this machine's GPU; there must be one."""
    major, minor = torch.cuda.get_device_capability()
    return major, minor


def check_gpu(backend: Backend, *, fused: bool) -> None:
    """Refuse, before TensorRT is imported, what this machine's GPU, or its absence, rules out.

    Args:
        backend: which TensorRT is to build.
        fused: whether its multi-device attention is to be used.

    Raises:
        BackendMissing: the backend needs a GPU and there is none, or another one.
    """
    if fused and not backend.needs_gpu:
        raise BackendMissing(
            f"--strategy fused: {backend.name} has no multi-device attention; TensorRT documents "
            "it for compute capability 10.0 (Blackwell) and later.",
            hint="build with --backend tensorrt on such a GPU, or take --strategy ulysses.",
        )
    if backend.needs_gpu and not has_driver():
        raise BackendMissing(
            f"the {backend.name} backend builds for the GPU it runs on, and there is none here.",
            hint="run on a machine with the target GPU, or use --backend tensorrt-rtx.",
        )
    if fused and capability() < (10, 0):
        raise BackendMissing(
            "--strategy fused: TensorRT's multi-device attention needs compute capability 10.0 "
            f"(Blackwell) or later, and this GPU has {'.'.join(map(str, capability()))}.",
            hint="build on such a GPU, or take --strategy ulysses.",
        )


@contextmanager
def driverless() -> Iterator[None]:
    """Answer for the missing driver: device 0, of compute capability 8.9."""
    if has_driver():
        yield
        return
    answers: dict[str, Any] = {
        "current_device": lambda: 0,
        "get_device_capability": lambda device=None: _CAPABILITY,
    }
    asked = {name: getattr(torch.cuda, name) for name in answers}
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    try:
        with _hushed():
            yield
    finally:
        for name, original in asked.items():
            setattr(torch.cuda, name, original)


@contextmanager
def _hushed() -> Iterator[None]:
    """Drop what native code writes to stderr: that there is no driver is known."""
    sys.stderr.flush()
    kept = os.dup(2)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
