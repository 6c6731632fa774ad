"""What one rank does from its start to its report: join, open, run, check, measure."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import torch
from safetensors.torch import save_file
from torch import Tensor

from .. import bundle as bundles
from ..bundle.manifest import Manifest
from .check import against_torch, apart, check_alike, check_finite
from .executors import Executor, open_rank
from .given import asked_variant, given_inputs
from .groups import everyone
from .join import agree, joined, own_device, together
from .measures import Memory, name_of, share_of_collectives
from .torch_executor import checked_device

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
        variant: which is run; ``None``: that of the shapes of ``inputs``, else the first.
        lora: LoRA sets by name, each with its strength; ``None``: the one it was added with.
        graph: whether forwards are replayed as a CUDA graph.
        step_cache: below which distance a forward skips pieces, see :mod:`.step_cache`.
        timeout: seconds for which a rank may say nothing.
        store: file by which ranks find each other; none: the launcher's environment.
        local_world: how many ranks are on this machine.
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
    variant: str | None = None
    lora: dict[str, float | None] = {}
    graph: bool = False
    step_cache: float | None = None
    timeout: float = 60.0
    store: str | None = None
    local_world: int = 1


class Report(msgspec.Struct, kw_only=True):
    """What a rank did; times are seconds, sizes bytes.

    Attributes:
        rank: which.
        executor: ``tensorrt`` or ``torch``.
        device: what it ran on, in words.
        load: from the start of joining to the first forward.
        first: of the first forward.
        forwards: of those that were timed, in order; see :func:`warm_up`.
        peak: memory, of the GPU where there is one, else of the process.
        apart: every rank's relative error against rank 0.
        torch: TensorRT's relative error against the stored program run by torch, where it is.
        collectives: share of a forward's time, where it was measured.
        skipped: of all forwards, timed or not, how many skipped pieces; with a step cache.
    """

    rank: int
    executor: str
    device: str
    load: float = 0.0
    first: float = 0.0
    forwards: list[float] = []
    peak: int = 0
    apart: list[float] = []
    torch: float | None = None
    collectives: float | None = None
    skipped: int | None = None


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
    whole, _ = bundles.read(Path(request.bundle))
    if request.devices:
        device = checked_device(request.devices[local], local)
    else:
        device = own_device(local, request.local_world, alone=request.store is not None)
    manifest = asked_variant(whole, request.variant, request.inputs)
    inputs = given_inputs(manifest, request.inputs, request.seed)
    told("joining the others")
    with joined(rank, world, device, store=request.store, timeout=request.timeout):
        agree(whole, inputs, device, variant=manifest.request.variant)
        work = _Work(request, manifest, rank, device, told)
        report = work.done(inputs, start)
        told("closing")
        reports = everyone(msgspec.to_builtins(report)) if gather else [report]
    return [msgspec.convert(one, Report) if gather else one for one in reports]


def warm_up(request: Request) -> int:
    """How many forwards are not timed, so that all others are alike.

    The second with a step cache is the first that skips pieces: it gives the last piece what no
    piece has written, for which torch.compile compiles that once more. Another one makes the CUDA
    graphs that the others replay.
    """
    if not request.repeat:
        return 1
    return 1 + (request.step_cache is not None) + request.graph


class _Work:
    """One rank's, within the process group."""

    def __init__(
        self, request: Request, manifest: Manifest, rank: int, device: torch.device, told: Told
    ) -> None:
        self.request, self.manifest, self.rank = request, manifest, rank
        self.device, self.told = device, told
        self.memory = Memory(device)

    def done(self, inputs: Mapping[str, Tensor], start: float) -> Report:
        """Everything that was asked for; ``start`` is when the rank was started."""
        there = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        request, told = self.request, self.told
        with self.opened(request.executor, request.step_cache) as executor:
            report = Report(rank=self.rank, executor=executor.name, device=name_of(self.device))
            report.load = time.perf_counter() - start
            outputs = self.timed(executor, there, report)
            if executor.steps is not None:
                report.skipped = executor.steps.skipped
            if request.check:
                told("comparing the ranks' outputs")
                check_finite(outputs, self.rank)
                report.apart = apart(outputs, self.device)
                check_alike(report.apart)
            if request.profile:
                told("profiling")
                together()
                report.collectives = share_of_collectives(lambda: executor(**there), self.device)
            report.peak = self.memory.peak()
            outputs = {name: tensor.clone() for name, tensor in outputs.items()}
        if request.check and report.executor == "tensorrt" and self.manifest.program is not None:
            with self.opened("torch") as executor:
                told("comparing with torch")
                report.torch = against_torch(outputs, executor(**there), self.manifest)
        if request.outputs is not None and self.rank == 0:
            save_file({n: t.cpu().contiguous() for n, t in outputs.items()}, request.outputs)
        return report

    def opened(self, name: str, step_cache: float | None = None) -> Executor:
        """An executor of this rank; collective."""
        self.told("opening the bundle")
        return open_rank(
            Path(self.request.bundle),
            self.rank,
            executor=name,
            device=str(self.device),
            compiled=self.request.compiled,
            graph=self.request.graph,
            verify=self.request.verify,
            lora=self.request.lora,
            variant=self.manifest.request.variant,
            step_cache=step_cache,
            told=lambda what: self.told(f"loading {what}"),
        )

    def timed(
        self, executor: Executor, inputs: Mapping[str, Tensor], report: Report
    ) -> dict[str, Tensor]:
        """The last forward's outputs; each is begun together, and its seconds are reported."""
        outputs: dict[str, Tensor] = {}
        untimed = warm_up(self.request)
        count = untimed + self.request.repeat
        for forward in range(count):
            self.told(f"running forward {forward + 1} of {count}")
            together()
            begun = time.perf_counter()
            outputs = executor(**inputs)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            seconds = time.perf_counter() - begun
            if forward == 0:
                report.first = seconds
            elif forward >= untimed:
                report.forwards.append(seconds)
        return outputs
