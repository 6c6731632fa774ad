"""One rank of a case: ``torchrun --nproc-per-node W -m benchmarks.gpus.rank CASE FOLDER OUT``.

Rank 0 appends a line of JSON to ``OUT`` for everything that was measured. The order: the dense
model on one GPU; its weights written to a file; every program, its weights read from that file; and
diffusers' own context parallelism. Times are wall-clock milliseconds of a forward, between two
points at which the GPU is idle: after three calls to warm up, the median of ten. What is compiled
is measured as a CUDA graph too (``replayed``).
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cp_convert.bundle.manifest import Weight
from cp_convert.bundle.program import stored_at
from cp_convert.capture.linear8 import choose
from cp_convert.capture.products8 import Measured, quantized
from cp_convert.engine.specialise import specialise
from cp_convert.ir.program import Lowered
from cp_convert.model.cast import DTYPES, cast_inputs
from cp_convert.model.checkpoint import locate
from cp_convert.model.instantiate import example_inputs, model_class
from cp_convert.model.preset import Preset, path_of, read
from cp_convert.prove.calibrate import largest_inputs
from cp_convert.runtime.called import AS_WRITTEN, on_device
from cp_convert.runtime.codes import by_torch
from cp_convert.runtime.collectives import groups_of, make_groups, over_the_wire
from cp_convert.runtime.replayed import Replayed
from cp_convert.runtime.weights import bound_weights

from .cases import CASES, IN_CODES, Case

WARM, RUNS = 3, 10
KERNELS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
Forward = Callable[[], Tensor]


class Rank:
    """What all measurements of one case share."""

    def __init__(self, case: Case, folder: Path, out: Path) -> None:
        self.case, self.folder, self.out = case, folder / case.name, out
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(self.device)
        path = path_of(case.preset)
        assert path is not None, case.preset
        self.preset: Preset = read(path)
        self.config = case.config(self.preset.config)
        self.dtype = DTYPES[case.precision]
        given = example_inputs(
            self.preset, self.config, case.resolution, tiny=False, batch=case.batch
        )
        keep = tuple(self.preset.keep_float32)
        moved = {name: _moved(value, self.device) for name, value in given.items()}
        self.inputs = cast_inputs(moved, self.dtype, keep=keep)
        self.wide = cast_inputs(moved, torch.float32, keep=keep)
        self.reference: Tensor | None = None

    def tell(self, **what: Any) -> None:
        """One line for rank 0's report."""
        if self.rank == 0:
            line = json.dumps({"case": self.case.name, "world": self.world, **what})
            print(line, flush=True)
            with self.out.open("a") as file:
                file.write(line + "\n")

    def model(self, dtype: torch.dtype) -> nn.Module:
        """The dense model; every rank makes the same numbers, rounded to the case's precision."""
        torch.manual_seed(0)
        with torch.device(self.device):
            module = model_class(self.preset)(**self.config).eval().requires_grad_(False)
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter.data = parameter + 0.2 * torch.randn_like(parameter)
            parameter.data = parameter.to(self.dtype).to(dtype)
        return module

    def error(self, out: Tensor) -> float:
        """Of one output against the dense model in float32, root mean square."""
        assert self.reference is not None
        truth = self.reference.to(self.device)
        return float((out.float() - truth).norm() / truth.norm())

    def measured(self, name: str, forward: Forward, **more: Any) -> None:
        """Time ``forward`` on all ranks, and hold what it returns against the reference."""
        torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        out = forward()
        torch.cuda.synchronize()
        first = time.perf_counter() - begun
        spent = timed(forward)
        self.tell(
            what=name,
            ms=statistics.median(spent),
            least=min(spent),
            most=max(spent),
            first_seconds=round(first, 2),
            error=self.error(out),
            peak_gb=round(torch.cuda.max_memory_allocated() / 1e9, 2),
            **more,
        )


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def replayed(rank: Rank, forward: Forward) -> Forward:
    """``forward`` as a CUDA graph, as the torch executor makes one."""
    graph = Replayed(lambda: (forward(),), rank.device)
    return lambda: graph((), ())[0]  # type: ignore[no-any-return]


def timed(forward: Forward) -> list[float]:
    """Milliseconds of :data:`RUNS` calls, all ranks together."""
    for _ in range(WARM):
        forward()
    torch.cuda.synchronize()
    dist.barrier()
    spent = []
    for _ in range(RUNS):
        begun = time.perf_counter()
        forward()
        torch.cuda.synchronize()
        spent.append(1e3 * (time.perf_counter() - begun))
    return spent


def dense(rank: Rank, weights: Path) -> None:
    """The whole model on every GPU for itself; its weights go into a file for the programs."""
    module = rank.model(torch.float32)
    torch.backends.cuda.matmul.allow_tf32 = rank.case.tf32
    rank.reference = module(**rank.wide, return_dict=False)[0].float().cpu()
    torch.backends.cuda.matmul.allow_tf32 = False
    for parameter in module.parameters():
        parameter.data = parameter.to(rank.dtype)
    module = module.to(rank.dtype) if rank.dtype != torch.float32 else module
    _released()
    rank.measured("dense", lambda: module(**rank.inputs, return_dict=False)[0])
    if rank.case.compiled:
        fast = torch.compile(module, dynamic=False)
        forward = lambda: fast(**rank.inputs, return_dict=False)[0]  # noqa: E731
        rank.measured("dense, compiled", forward)
        rank.measured("dense, replayed", replayed(rank, forward))
    if rank.rank == 0:
        save_file({n: p.contiguous() for n, p in module.state_dict().items()}, weights)
    dist.barrier()


def program(rank: Rank, strategy: str, weights: Path) -> None:
    """A program of ours; its weights come from the file, as a bundle's do."""
    stored = stored_at(rank.folder / strategy.removesuffix(IN_CODES))
    names = make_groups(groups_of(stored.program), rank.rank, dist.group.WORLD)
    wired = over_the_wire(specialise(stored.program, rank.rank), rank.rank, names)
    here = on_device(wired, rank.device, stored.names)
    begun = time.perf_counter()
    bound = bound_weights(
        listed(weights, set(stored.names.values())), Path("/"), rank.device, verify=False
    )
    seconds, size = time.perf_counter() - begun, sum(t.nbytes for t in bound.values())
    holders = here.graph_module.graph.find_nodes(op="placeholder")
    types = {n.name: n.meta["val"].dtype for n in holders}  # Wan's program has float32 ones too
    state = {**here.state} | {n: bound[name].to(types[n]) for n, name in stored.names.items()}
    if strategy.endswith(IN_CODES):
        here = by_torch(in_codes(rank, replace(here, state=state)), products=True)
        state = {name: tensor.to(rank.device) for name, tensor in here.state.items()}
    given = {b.node: rank.inputs[b.name] for b in here.inputs}
    held = [n.name for n in here.graph_module.graph.find_nodes(op="placeholder")]
    values = [state[n] if n in state else given[n] for n in held]
    call = torch.fx.GraphModule(here.graph_module, here.graph_module.graph)
    rank.measured(
        strategy, lambda: call(*values)[0], load_seconds=round(seconds, 2), load_gb=size / 1e9
    )
    if rank.case.compiled:
        fast = torch.compile(call, dynamic=False, options=AS_WRITTEN)
        rank.measured(f"{strategy}, compiled", lambda: fast(*values)[0])
        rank.measured(f"{strategy}, replayed", replayed(rank, lambda: fast(*values)[0]))
        if os.environ.get("PROFILE"):
            profile(rank, strategy, lambda: fast(*values)[0])


def in_codes(rank: Rank, program: Lowered, *, apart: bool = False) -> Lowered:
    """A rank's program with linear layers in FP8, by the example inputs on all ranks together.

    Args:
        rank: whose it is.
        program: its own.
        apart: whether scales are parameters, as in ``--layout blocks``.
    """
    begun = time.perf_counter()
    chosen, kept = choose(program)
    given = {b.name: rank.inputs[b.name] for b in program.inputs}
    largest = largest_inputs(program, chosen, [given], rank.device)
    names = sorted(largest)
    found = torch.tensor([largest[name] for name in names], device=rank.device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    everywhere = dict(zip(names, found.tolist(), strict=True))
    made = quantized(program, chosen, Measured(everywhere), apart=apart).program
    seconds = round(time.perf_counter() - begun, 1)
    why = dict(Counter(one.reason for one in kept))
    rank.tell(what="quantized", layers=len(chosen), kept=why, seconds=seconds)
    return made


def listed(file: Path, wanted: set[str]) -> Iterator[Weight]:
    """Where a file holds the weights of these names."""
    for name, at in locate(file).items():
        if name in wanted:
            dtype = str(at.dtype).removeprefix("torch.")
            yield Weight(name, dtype, list(at.shape), str(at.file), at.offset, at.size, "0" * 64)


def profile(rank: Rank, name: str, forward: Forward) -> None:
    """Milliseconds of a forward by kind of kernel, and by operator and shapes, on rank 0."""
    kinds = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds, record_shapes=True) as seen:
        for _ in range(RUNS):
            forward()
        torch.cuda.synchronize()
    kernels: dict[str, float] = {}
    operators: dict[str, float] = {}
    for one in seen.key_averages(group_by_input_shape=True):
        spent = one.self_device_time_total / 1e3 / RUNS
        if str(one.device_type).endswith("CUDA"):
            kernels[one.key[:90]] = kernels.get(one.key[:90], 0.0) + spent
        elif spent:
            operators[f"{one.key} {one.input_shapes} x{one.count / RUNS:g}"[:200]] = spent
    rank.tell(what=f"profile of {name}", kernels=_largest(kernels), operators=_largest(operators))


def _largest(spent: dict[str, float]) -> dict[str, float]:
    ranked = sorted(spent.items(), key=lambda item: -item[1])[:40]
    return {key: round(ms, 3) for key, ms in ranked}


def peer(rank: Rank, kind: str) -> None:
    """Diffusers' own context parallelism, with the same kernels of attention."""
    from diffusers import ContextParallelConfig

    module: Any = rank.model(rank.dtype)
    module.set_attention_backend("_native_cudnn")
    module.enable_parallelism(config=ContextParallelConfig(**{f"{kind}_degree": rank.world}))
    name = f"diffusers {kind}"
    rank.measured(name, lambda: module(**rank.inputs, return_dict=False)[0])
    if rank.case.compiled:
        fast = torch.compile(module)
        forward = lambda: fast(**rank.inputs, return_dict=False)[0]  # noqa: E731
        rank.measured(f"{name}, compiled", forward)
        rank.measured(f"{name}, replayed", replayed(rank, forward))


@contextmanager
def told(rank: Rank, what: str) -> Iterator[None]:
    """A measurement that fails is a line of the report, and the next one goes on."""
    try:
        yield
    except (RuntimeError, ValueError, ImportError, NotImplementedError, TypeError) as error:
        rank.tell(what=what, failed=f"{type(error).__name__}: {str(error)[:600]}")
    torch._dynamo.reset()
    _released()
    dist.barrier()


def _released() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def measure(case: Case, folder: Path, out: Path, only: Sequence[str]) -> None:
    """The measurements of one case, all or those named; the dense model is always there."""
    rank = Rank(case, folder, out)
    with tempfile.TemporaryDirectory() as scratch, sdpa_kernel(KERNELS, set_priority=True):
        shared = [scratch]
        dist.broadcast_object_list(shared)
        weights = Path(str(shared[0]), "weights.safetensors")
        with told(rank, "dense"):
            dense(rank, weights)
        for strategy in (one for one in case.strategies if not only or one in only):
            with told(rank, strategy):
                program(rank, strategy, weights)
        for kind in (one for one in case.peers if not only or f"diffusers {one}" in only):
            with told(rank, f"diffusers {kind}"):
                peer(rank, kind)


def main(arguments: Mapping[int, str]) -> None:
    """A rank's process."""
    case = next(one for one in CASES if one.name == arguments[1])
    torch.backends.cuda.matmul.allow_tf32 = False
    dist.init_process_group("nccl")
    with torch.no_grad():
        measure(
            case,
            Path(arguments[2]),
            Path(arguments[3]),
            list(filter(None, arguments[4].split(","))),
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main(dict(enumerate(sys.argv)))
