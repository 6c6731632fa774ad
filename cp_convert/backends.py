"""The TensorRT backends: which are installed, what they can target. No torch, no tensorrt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Final

from .errors import BackendMissing, UsageError


@dataclass(frozen=True)
class Backend:
    """One TensorRT, and the Torch-TensorRT that goes with it.

    Attributes:
        name: as given to ``--backend``.
        distribution: the Torch-TensorRT distribution; both provide ``torch_tensorrt``, so only
            one can be installed.
        tensorrt: distributions of TensorRT; the first that is installed tells the version.
        needs_gpu: whether building needs a GPU.
        targets: compute capabilities that can be named; empty when it builds for the GPU it
            finds.
        default_targets: what is built when none is named.
        install: how to install it.
    """

    name: str
    distribution: str
    tensorrt: tuple[str, ...]
    needs_gpu: bool
    targets: tuple[str, ...]
    default_targets: tuple[str, ...]
    install: str

    @property
    def is_installed(self) -> bool:
        """Whether its Torch-TensorRT is."""
        return _version(self.distribution) is not None

    @property
    def version(self) -> str:
        """TensorRT's version."""
        found = (_version(name) for name in self.tensorrt)
        return next((version for version in found if version), "0")

    @property
    def torch_tensorrt_version(self) -> str:
        """Torch-TensorRT's version."""
        return _version(self.distribution) or "unknown"


BACKENDS: Final = {
    backend.name: backend
    for backend in (
        Backend(
            name="tensorrt-rtx",
            distribution="torch-tensorrt-rtx",
            tensorrt=("tensorrt_rtx",),
            needs_gpu=False,
            targets=("7.5", "8.0", "8.6", "8.9", "12.0", "12.1"),
            default_targets=("8.0", "8.6", "8.9", "12.0+"),
            install="pip install 'cp-convert[rtx]'",
        ),
        Backend(
            name="tensorrt",
            distribution="torch-tensorrt",
            tensorrt=("tensorrt-cu13", "tensorrt"),
            needs_gpu=True,
            targets=(),
            default_targets=(),
            install="pip install 'cp-convert[tensorrt]' on a machine with the GPU to build for",
        ),
    )
}


def select(name: str, compute_capabilities: Sequence[str] = ()) -> Backend:
    """The backend called ``name``; ``auto`` takes the installed one.

    Raises:
        BackendMissing: it is not installed.
        UsageError: a compute capability that it cannot target.
    """
    candidates = BACKENDS.values() if name == "auto" else [BACKENDS[name]]
    backend = next((b for b in candidates if b.is_installed), None)
    if backend is None:
        known = " or ".join(b.install for b in candidates)
        what = "no TensorRT backend" if name == "auto" else f"no {name} backend"
        others = [b.name for b in BACKENDS.values() if b.is_installed]
        raise BackendMissing(
            f"{what} is installed here.",
            hint=f"{known}."
            + (f" Installed is {others[0]}; the two exclude each other." if others else ""),
        )
    _check_targets(backend, compute_capabilities)
    return backend


def _check_targets(backend: Backend, wanted: Sequence[str]) -> None:
    for capability in wanted:
        if not backend.targets:
            raise UsageError(
                f"--compute-capability {capability}: the {backend.name} backend builds for the "
                "GPU it runs on.",
                hint="leave the option out, or use --backend tensorrt-rtx.",
            )
        if capability not in backend.targets:
            raise UsageError(
                f"--compute-capability {capability}: {backend.name} can target "
                f"{', '.join(backend.targets)}.",
                hint="Hopper (9.0) and data-centre Blackwell (10.0) need --backend tensorrt."
                if capability in ("9.0", "10.0", "10.3")
                else None,
            )


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
