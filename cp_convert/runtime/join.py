"""Ranks come together: each on a device of its own, in one process group, with the same work."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from ..bundle import manifest as manifests
from ..bundle.manifest import Manifest
from ..bundle.variants import all_variants
from ..errors import BackendMissing, RunFailed
from ..ir.tensors import numbers
from .groups import everyone
from .watch import abort

_PATIENCE: Final = 2.0
"""Times the time-out, for which torch lets a collective wait: the rank's own watch comes first."""


def own_device(local: int, local_world: int, *, alone: bool) -> torch.device:
    """The device of a rank for which none was named: its GPU where there are any, else the CPU.

    Args:
        local: the rank's place on this machine.
        local_world: how many ranks are here.
        alone: whether we started them; another launcher may show each rank one GPU.

    Raises:
        BackendMissing: there are fewer GPUs than ranks.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        return torch.device("cpu")
    if count < local_world and (alone or count > 1):
        raise BackendMissing(
            f"{local_world} ranks are to run here, one a GPU, and torch sees {count} GPUs.",
            hint="--devices cpu runs slowly without; several machines: see docs/deployment.md.",
        )
    return torch.device("cuda", local % count)


@contextmanager
def joined(
    rank: int, world: int, device: torch.device, *, store: str | None, timeout: float
) -> Iterator[None]:
    """The process group of all ranks, for the duration of the block.

    Args:
        rank: this process's.
        world: how many there are.
        device: this rank's; GPUs communicate by NCCL, CPUs by gloo.
        store: file by which ranks of one machine find each other; ``None``: the environment says.
        timeout: seconds for which a rank may be silent.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world == 1:
        yield
        return
    backend = "gloo"
    if device.type == "cuda":
        backend = "cpu:gloo,cuda:nccl"
        # Ours aborts, see watch.py; torch's own would end the process without a word.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    if store is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are on this machine
    dist.init_process_group(
        backend,
        init_method="env://" if store is None else f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=_PATIENCE * timeout),
        device_id=device if device.type == "cuda" else None,
    )
    try:
        yield
    except BaseException:
        abort()  # destroying would wait for what others never send
        raise
    dist.destroy_process_group()


def together() -> None:
    """Wait for the others."""
    if dist.is_initialized():
        dist.barrier()


def agree(
    manifest: Manifest,
    inputs: Mapping[str, Tensor],
    device: torch.device,
    communicator: Any = None,
    *,
    variant: str | None = None,
) -> None:
    """Refuse ranks that do not belong together; collective, before anything could hang.

    Raises:
        RunFailed: ranks read other bundles, run other variants, were given other inputs, or share
            a GPU.
    """
    own = _bundle(manifest), variant, digest_of_inputs(inputs), _identity(device)
    told = everyone(own, communicator)
    for which, what in enumerate(("another bundle", "another variant", "other inputs")):
        odd = [rank for rank, one in enumerate(told) if one[which] != told[0][which]]
        if odd:
            raise RunFailed(
                f"rank {', '.join(map(str, odd))} has {what} than rank 0.",
                hint="every machine needs the same files, the same --variant, --inputs and --seed.",
            )
    _check_own_gpus([one[3] for one in told])


def _check_own_gpus(devices: list[str | None]) -> None:
    for rank, one in enumerate(devices):
        if one is not None and devices.index(one) < rank:
            raise RunFailed(
                f"ranks {devices.index(one)} and {rank} are on one GPU ({one}).",
                hint="NCCL wants one GPU for each rank: --devices, or the launcher's own option.",
            )


def _bundle(manifest: Manifest) -> str:
    files: list[str] = []
    for one in all_variants(manifest):
        program = one.program
        files += [engine.sha256 for engine in one.engines]
        files += [] if program is None else [program.document.sha256, program.tensors.sha256]
    told = manifests.encode(manifest) if not files else "\n".join(files).encode()
    return hashlib.sha256(told).hexdigest()


def digest_of_inputs(inputs: Mapping[str, Tensor]) -> str:
    """SHA-256 of names and numbers."""
    found = hashlib.sha256()
    for name in sorted(inputs):
        found.update(name.encode())
        found.update(numbers(inputs[name].cpu()))
    return found.hexdigest()


def _identity(device: torch.device) -> str | None:
    if device.type != "cuda":
        return None
    return f"{socket.gethostname()}, {torch.cuda.get_device_properties(device).uuid}"
