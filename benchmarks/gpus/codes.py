"""One GPU: a model whose linear layers multiply FP8; ``python -m benchmarks.gpus.codes``.

In: the programs that ``benchmarks.two_gpus prepare FOLDER --world 1`` wrote. Out: a line of JSON
for the dense model and its program in the model's precision, and for the program in FP8: its
products by dequantized numbers, and by ``torch._scaled_mm`` as the torch executor has them;
compiled, and replayed as a CUDA graph. Errors are of the output, against the dense model in
float32. Weights and inputs are random: the errors are not those of a published model.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from cp_convert.bundle.program import stored_at
from cp_convert.engine.specialise import specialise
from cp_convert.ir.program import Lowered
from cp_convert.runtime.called import AS_WRITTEN, on_device
from cp_convert.runtime.codes import by_torch
from cp_convert.runtime.collectives import over_the_wire
from cp_convert.runtime.weights import bound_weights

from .cases import CASES, Case
from .rank import KERNELS, Rank, dense, in_codes, listed, profile, replayed, told


def bound(rank: Rank, weights: Path) -> Lowered:
    """The program of a world of one with the weights of the dense model, on the GPU."""
    stored = stored_at(rank.folder / "ulysses")
    wired = over_the_wire(specialise(stored.program, 0), 0, {})
    program = on_device(wired, rank.device, stored.names)
    values = bound_weights(
        listed(weights, set(stored.names.values())), Path("/"), rank.device, verify=False
    )
    state = {**program.state} | {node: values[name] for node, name in stored.names.items()}
    return replace(program, state=state)


def accumulated_fast(codes: Lowered) -> Lowered:
    """Sums of products are kept in the tensor cores' own precision, below float32's."""
    program = by_torch(codes, products=True)
    graph = program.graph_module.graph
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten._scaled_mm.default):
        node.args = (*node.args, True)
    program.graph_module.recompile()
    return program


def measured(rank: Rank, name: str, program: Lowered) -> None:
    """A program as it is, compiled, and replayed."""
    given = {b.node: rank.inputs[b.name] for b in program.inputs}
    held = [n.name for n in program.graph_module.graph.find_nodes(op="placeholder")]
    state: Mapping[str, Tensor] = {n: t.to(rank.device) for n, t in program.state.items()}
    values = [state[n] if n in state else given[n] for n in held]
    size = sum(state[n].nbytes for n in held if n in state)
    call = torch.fx.GraphModule(program.graph_module, program.graph_module.graph)
    rank.measured(name, lambda: call(*values)[0], weights_gb=round(size / 1e9, 2))
    fast = torch.compile(call, dynamic=False, options=AS_WRITTEN)
    rank.measured(f"{name}, compiled", lambda: fast(*values)[0])
    rank.measured(f"{name}, replayed", replayed(rank, lambda: fast(*values)[0]))
    if os.environ.get("PROFILE"):
        profile(rank, name, lambda: fast(*values)[0])


def measure(case: Case, folder: Path, out: Path, only: Collection[str]) -> None:
    """The dense model, its program, and its program in FP8."""
    rank = Rank(case, folder, out)
    with tempfile.TemporaryDirectory() as scratch, sdpa_kernel(KERNELS, set_priority=True):
        weights = Path(scratch, "weights.safetensors")
        with told(rank, "dense"):
            dense(rank, weights)
        program = bound(rank, weights)
        codes = in_codes(rank, program)
        made: dict[str, Callable[[], Lowered]] = {
            "program": lambda: program,
            "fp8, dequantized": lambda: by_torch(codes, products=False),
            "fp8": lambda: by_torch(codes, products=True),
            "fp8, scales apart": lambda: by_torch(
                in_codes(rank, program, apart=True), products=True
            ),
            "fp8, accumulated fast": lambda: accumulated_fast(codes),
        }
        for name in (one for one in made if not only or one in only):
            with told(rank, name):
                measured(rank, name, made[name]())


def main() -> None:
    """``FOLDER OUT [CASES [PROGRAMS]]``: ``a,b`` and ``a;b``; with programs no compiled model."""
    folder, out, *rest = sys.argv[1:]
    os.environ |= {"LOCAL_RANK": "0"}
    only = rest[1].split(";") if rest[1:] else []
    names = rest[0].split(",") if rest else ["flux-2-4-at-1024", "flux-2-4-at-2048", "flux-whole"]
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        dist.init_process_group(
            "nccl", store=dist.FileStore(f"{scratch}/store", 1), rank=0, world_size=1
        )
        for case in (one for one in CASES if one.name in names):
            measure(replace(case, compiled=not only), Path(folder), Path(out), only)
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
