"""A bundle as a model of diffusers."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .. import bundle as bundles
from .. import runtime
from ..bundle.manifest import Manifest
from ..errors import BackendMissing, UsageError
from ..runtime.groups import group_of
from ..runtime.join import agree, joined, own_device
from ..runtime.places import local_rank, place_of
from ..runtime.torch_executor import checked_device, device_of
from .channel import Channel
from .module import Transformer
from .pairs import PAIRS, of_one_branch
from .ranks import Ranks


def load_transformer(
    bundle: str | Path,
    *,
    executor: str = "auto",
    device: str | None = None,
    communicator: Any = None,
    compiled: bool = False,
    graph: bool = False,
    verify: bool = True,
    check: bool = True,
    config: Mapping[str, Any] | None = None,
    timeout: float | None = None,
    guidance: str | None = None,
    variant: str | None = None,
    step_cache: float | None = None,
) -> Transformer:
    """Open this process's rank of a bundle as a model of diffusers; collective.

    Under torchrun, srun or mpirun a process takes its rank and GPU from there, and joins a process
    group where none is initialised; it leaves that at :meth:`.Transformer.close`.

    Args:
        bundle: its folder.
        executor: ``auto``, ``tensorrt`` or ``torch``, as of :func:`cp_convert.runtime.open`.
        device: such as ``cuda:1``; ``None``: this rank's GPU where there is one, else the CPU.
        communicator: a process group of the bundle's ranks, where there are more.
        compiled: torch's program through ``torch.compile``.
        graph: forwards as a CUDA graph.
        verify: whether files are compared with the manifest's SHA-256.
        check: whether ranks that all run the pipeline compare, at every call, what they are given.
        config: what pipelines read of the model's configuration, besides what the bundle keeps.
        timeout: seconds to wait for rank 0, or a forward; ``None``: 60, and 600 with ``compiled``.
        guidance: ``pairs`` where a pipeline calls once a branch (see :mod:`.pairs`).
        variant: the only one to open; ``None``: all, of which a call takes its own by shapes.
        step_cache: threshold of a step cache, for a bundle in pieces (docs/step-cache.md).

    Raises:
        ConvertError: it cannot be opened here, or ranks do not belong together.
    """
    kind, manifest = model_class(), bundles.read(Path(bundle))[0]
    pairs, seconds = _is_pairs(executor, guidance, manifest), _patience(timeout, compiled)
    with ExitStack() as stack:
        where = _met(manifest, device, communicator, seconds, stack, variant)
        opened = stack.enter_context(runtime.open(
            bundle, executor=executor, device=str(where), communicator=communicator,
            compiled=compiled, graph=graph, verify=verify, variant=variant, step_cache=step_cache,
        ))  # fmt: skip
        ranks, ends = _ranks(opened, communicator, seconds, check=check), stack.pop_all()
        module = kind(opened, where, config=config or {}, ranks=ranks, ends=ends, pairs=pairs)
        return _ended(module, ranks)


def _patience(timeout: float | None, compiled: bool) -> float:
    """Seconds; what is compiled is compiled in the first forward."""
    return timeout or (600.0 if compiled else 60.0)


def _ranks(opened: runtime.Opened, communicator: Any, timeout: float, *, check: bool) -> Ranks:
    channel = None
    if opened.manifest.world > 1:
        channel = Channel(group_of(communicator), timeout)
    return Ranks(channel, check=check, several=len(opened.manifests) > 1)


def _ended(module: Transformer, ranks: Ranks) -> Transformer:
    """Ranks that follow end when rank 0's script does, or drops the module, without close()."""
    weakref.finalize(module, ranks.close, quick=True)
    return module


def _check_executor(name: str) -> None:
    if name not in runtime.EXECUTORS:
        raise UsageError(
            f"executor {name!r}: there is none.", hint=f"one of {', '.join(runtime.EXECUTORS)}."
        )


def _is_pairs(executor: str, guidance: str | None, manifest: Manifest) -> bool:
    """Whether a call has one branch; what cannot be is refused before ranks wait for others."""
    _check_executor(executor)
    if guidance not in (None, PAIRS):
        raise UsageError(f"guidance {guidance!r}: there is none.", hint=f"{PAIRS!r}, or None.")
    return guidance == PAIRS and bool(of_one_branch(manifest))


def _met(
    manifest: Manifest,
    device: str | None,
    communicator: Any,
    timeout: float,
    stack: ExitStack,
    variant: str | None,
) -> torch.device:
    """This rank's device, after all ranks have agreed that they open the same."""
    where = _joined(manifest, device, communicator, timeout, stack)
    if manifest.world > 1:
        agree(manifest, {}, where, communicator, variant=variant)
    return where


def _joined(
    manifest: Manifest, device: str | None, communicator: Any, timeout: float, stack: ExitStack
) -> torch.device:
    """This rank's device; with a process group, left with ``stack`` where it is made here."""
    local = local_rank()
    if communicator is not None or dist.is_initialized() or manifest.world == 1:
        group = group_of(communicator)
        place = local if local is not None else 0 if group is None else group.rank()
        return _used(device_of(place, device))
    at = place_of(manifest.world)
    if at is None:
        raise UsageError(
            f"the bundle is for {manifest.world} ranks, and this process was started alone.",
            hint=f"torchrun --nproc-per-node {manifest.world} script.py",
        )
    if device is None:
        where = own_device(at.local, at.local_world, alone=False)
    else:
        where = checked_device(device, at.rank)
    stack.enter_context(joined(at.rank, at.world, where, store=None, timeout=timeout))
    return _used(where)


def _used(device: torch.device) -> torch.device:
    """The device, made CUDA's current one: a pipeline's ``to("cuda")`` means that."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def model_class() -> type[Transformer]:
    """A model of diffusers by class: ``from_pretrained(transformer=...)`` takes no other.

    Raises:
        BackendMissing: diffusers is not installed.
    """
    try:
        from diffusers import ModelMixin  # late: not part of the base install
    except ImportError as error:
        raise BackendMissing(
            "diffusers is not installed.", hint="pip install 'cp-convert[models]'"
        ) from error
    return type("BundleTransformer", (Transformer, ModelMixin), {"__module__": __name__})
