"""What one rank does from its start to its report: join, open, run, check, measure."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from .. import bundle as bundles
from ..bundle.manifest import Manifest
from ..errors import UsageError
from ..ir.tensors import mapped
from .arguments import check_tensor, inputs_of
from .check import apart, check_alike, check_finite
from .executors import open_rank
from .torch_executor import device_of

Told = Callable[[str], None]


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank is to do.

    Attributes:
        bundle: its folder.
        executor: one of :data:`.executors.EXECUTORS`.
        devices: one for each local rank; none: a GPU where there is one.
        inputs: a safetensors file with the manifest's names; none: at random.
        seed: of random inputs.
        outputs: where rank 0 writes what it got.
        check: whether outputs must be finite and the same on all ranks.
        repeat: how many forwards are timed after the first.
        compiled: through ``torch.compile``.
        verify: whether weights are compared with the manifest's digests.
        profile: whether the share of collectives is measured.
        timeout: seconds for which a collective may wait.
        store: file by which ranks find each other; none: the launcher's environment.
    """

    bundle: str
    executor: str = "auto"
    devices: tuple[str, ...] = ()
    inputs: str | None = None
    seed: int = 0
    outputs: str | None = None
    check: bool = True
    repeat: int = 0
    compiled: bool = False
    verify: bool = True
    profile: bool = False
    timeout: float = 60.0
    store: str | None = None


class Report(msgspec.Struct, kw_only=True):
    """What a rank did; times are seconds, sizes bytes.

    Attributes:
        rank: which.
        executor: ``tensorrt`` or ``torch``.
        device: what it ran on, in words.
        load: from the start of joining to the first forward.
        first: of the first forward.
        forwards: of the others, in order.
        peak: memory, of the GPU where there is one, else of the process.
        apart: every rank's relative error against rank 0.
        collectives: share of a forward's time, where it was measured.
    """

    rank: int
    executor: str
    device: str
    load: float = 0.0
    first: float = 0.0
    forwards: list[float] = []
    peak: int = 0
    apart: list[float] = []
    collectives: float | None = None

    @property
    def median(self) -> float:
        """Of the forwards after the first, else the first."""
        return statistics.median(self.forwards or [self.first])


def run_rank(
    request: Request, rank: int, world: int, local: int, told: Told, *, gather: bool = False
) -> list[Report]:
    """Run the bundle as ``rank``; collective. Returns its report.

    Args:
        request: what to do.
        rank: this process's place in the world.
        world: how many ranks there are.
        local: the rank's place on this machine.
        told: is called with what is being done, often enough for a watcher.
        gather: return all ranks' reports instead, rank 0 first.

    Raises:
        ConvertError: see :mod:`cp_convert.errors`.
    """
    start = time.perf_counter()
    manifest, _ = bundles.read(Path(request.bundle))
    device = device_of(local, request.devices[local] if request.devices else None)
    inputs = given_inputs(manifest, request)
    told("joining the others")
    with joined(request, rank, world, device):
        told("opening the bundle")
        with open_rank(
            Path(request.bundle),
            rank,
            executor=request.executor,
            device=str(device),
            compiled=request.compiled,
            verify=request.verify,
            told=lambda what: told(f"loading {what}"),
        ) as executor:
            there = {name: tensor.to(device) for name, tensor in inputs.items()}
            report = Report(rank=rank, executor=executor.name, device=name_of(device))
            report.load = time.perf_counter() - start
            outputs = _measured(executor, there, request, report, device, told)
            if request.check:
                told("comparing the ranks' outputs")
                check_finite(outputs, rank)
                report.apart = apart(outputs, device)
                check_alike(report.apart)
            if request.profile:
                told("profiling")
                report.collectives = share_of_collectives(lambda: executor(**there), device)
            report.peak = peak_of(device)
            if request.outputs is not None and rank == 0:
                save_file({n: t.cpu().contiguous() for n, t in outputs.items()}, request.outputs)
            told("closing")
        return gathered(report, world) if gather else [report]


def _measured(
    executor: Any,
    inputs: Mapping[str, Tensor],
    request: Request,
    report: Report,
    device: torch.device,
    told: Told,
) -> dict[str, Tensor]:
    outputs: dict[str, Tensor] = {}
    for forward in range(1 + request.repeat):
        told(f"running forward {forward + 1} of {1 + request.repeat}")
        _together()
        begun = time.perf_counter()
        outputs = executor(**inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - begun
        if forward == 0:
            report.first = seconds
        else:
            report.forwards.append(seconds)
    return outputs


def gathered(report: Report, world: int) -> list[Report]:
    """All ranks' reports; collective."""
    if world == 1:
        return [report]
    told: list[Any] = [None] * world
    dist.all_gather_object(told, msgspec.to_builtins(report))
    return [msgspec.convert(one, Report) for one in told]


def _together() -> None:
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def joined(request: Request, rank: int, world: int, device: torch.device) -> Iterator[None]:
    """The process group of all ranks, for the duration of the block."""
    if world == 1:
        yield
        return
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    elif "GLOO_SOCKET_IFNAME" not in os.environ and request.store is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # all ranks are on this machine
    method = "env://" if request.store is None else f"file://{request.store}"
    dist.init_process_group(
        backend,
        init_method=method,
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=request.timeout),
        device_id=device if device.type == "cuda" else None,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def given_inputs(manifest: Manifest, request: Request) -> dict[str, Tensor]:
    """The inputs by binding name: from the request's file, or random by its seed, alike on all.

    Raises:
        UsageError: the file lacks an input, has one too many, or of another shape or type.
        WeightsError: it is no safetensors file.
    """
    wanted = inputs_of(manifest)
    if request.inputs is None:
        return random_inputs(manifest, request.seed)
    found = mapped(Path(request.inputs))
    other = sorted(set(found) ^ set(wanted))
    if other:
        what = "lacks" if other[0] in wanted else "has, besides what the bundle takes,"
        raise UsageError(
            f"{request.inputs} {what} {', '.join(other)}.",
            hint=f"the bundle takes {', '.join(wanted)}.",
        )
    for name, tensor in found.items():
        check_tensor(name, tensor, wanted[name])
    return found


def random_inputs(manifest: Manifest, seed: int) -> dict[str, Tensor]:
    """Standard normal numbers, and zeros and ones where the engines take integers."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    for name, io in inputs_of(manifest).items():
        dtype = getattr(torch, io.dtype)
        if dtype.is_floating_point:
            found[name] = torch.randn(io.shape, generator=generator).to(dtype)
        else:
            found[name] = torch.randint(0, 2, io.shape, generator=generator).to(dtype)
    return found


def share_of_collectives(forward: Callable[[], Any], device: torch.device) -> float:
    """How much of a forward's time this rank spends in collectives, waiting included.

    On a GPU: time of NCCL's kernels over the time from the first kernel to the last; they may
    overlap with others.
    """
    activity = torch.profiler.ProfilerActivity
    on_gpu = device.type == "cuda"
    _together()
    begun = time.perf_counter()
    with torch.profiler.profile(activities=[activity.CUDA if on_gpu else activity.CPU]) as profile:
        forward()
        if on_gpu:
            torch.cuda.synchronize(device)
    whole = time.perf_counter() - begun
    spent = 0.0
    for event in profile.key_averages():
        if on_gpu and "nccl" in event.key.lower():
            spent += event.self_device_time_total
        elif not on_gpu and event.key.startswith("_c10d_functional::wait_tensor"):
            spent += event.cpu_time_total
    return min(1.0, spent * 1e-6 / whole)


def name_of(device: torch.device) -> str:
    """The device in words."""
    if device.type != "cuda":
        return "CPU"
    return f"{torch.cuda.get_device_name(device)} ({device})"


def peak_of(device: torch.device) -> int:
    """The most memory in bytes that was held: by torch on the GPU, else by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
