"""One GPU: one rank's program without its wires; ``python -m benchmarks.gpus.alone``.

In: the programs that ``benchmarks.two_gpus prepare`` wrote. Out: a line of JSON for the dense model
and for every strategy's rank 0, compiled and replayed as a CUDA graph. A collective returns at
once, with random numbers: what is left is the arithmetic of a rank, with the copies before and
after collectives. The numbers that come out mean nothing.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from cp_convert.bundle.program import stored_at
from cp_convert.engine.specialise import specialise
from cp_convert.ir import ops
from cp_convert.ir.program import Lowered, copied, module_of, tensor_of
from cp_convert.runtime.called import AS_WRITTEN, on_device
from cp_convert.runtime.collectives import views_again
from cp_convert.runtime.weights import bound_weights

from .cases import CASES, FORECAST, STRATEGIES, Case
from .rank import KERNELS, Rank, dense, listed, profile, replayed, told


@cache
def _arrived(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random numbers: a GPU is faster on zeros, and NaN spread."""
    return torch.randn(shape, dtype=dtype, device=device)


@torch.library.custom_op("benchmark::silent", mutates_args=())
def silent(x: Tensor, shape: list[int]) -> Tensor:
    """Something in the place of what a collective returns."""
    return _arrived(tuple(shape), x.dtype, x.device)


@silent.register_fake
def _(x: Tensor, shape: list[int]) -> Tensor:
    return x.new_empty(shape)


def without_wires(program: Lowered) -> Lowered:
    """The program of one rank, its collectives silent."""
    graph = copied(program.graph_module.graph)
    aten = torch.ops.aten
    for node in list(graph.nodes):
        given: Any = node.args
        with graph.inserting_before(node):
            if node.op == "call_function" and node.target in ops.COLLECTIVES:
                whole = graph.call_function(aten.contiguous.default, (given[0],))
                shape = list(tensor_of(node).shape)
                new = graph.call_function(torch.ops.benchmark.silent.default, (whole, shape))
            elif node.target is ops.ATTENTION:
                new = graph.call_function(
                    aten.scaled_dot_product_attention.default, given, dict(node.kwargs)
                )
            elif node.target is torch.ops.cp.result.default:
                new = graph.call_function(aten.clone.default, given)
            else:
                continue
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    views_again(graph)
    return Lowered(
        module_of(program.graph_module, graph), program.state, program.inputs, program.outputs,
        program.own,
    )  # fmt: skip


def program(rank: Rank, strategy: str, weights: Path, world: int) -> None:
    """Rank 0's program of ``strategy``."""
    stored = stored_at(rank.folder.parent / f"world-{world}" / rank.case.name / strategy)
    here = on_device(without_wires(specialise(stored.program, 0)), rank.device, stored.names)
    wanted = set(stored.names.values())
    bound = bound_weights(listed(weights, wanted), Path("/"), rank.device, verify=False)
    state = {**here.state} | {node: bound[name] for node, name in stored.names.items()}
    given = {b.node: rank.inputs[b.name] for b in here.inputs}
    held = [n.name for n in here.graph_module.graph.find_nodes(op="placeholder")]
    values = [state[n] if n in state else given[n] for n in held]
    call = torch.fx.GraphModule(here.graph_module, here.graph_module.graph)
    fast = torch.compile(call, dynamic=False, options=AS_WRITTEN)
    rank.measured(strategy, replayed(rank, lambda: fast(*values)[0]), ranks=world)
    if os.environ.get("PROFILE"):
        profile(rank, f"{strategy} of {world}", lambda: fast(*values)[0])


def measure(
    case: Case, folder: Path, out: Path, worlds: Sequence[int], only: Sequence[str]
) -> None:
    """The dense model, then every strategy at every world."""
    rank = Rank(case, folder, out)
    with tempfile.TemporaryDirectory() as scratch, sdpa_kernel(KERNELS, set_priority=True):
        weights = Path(scratch, "weights.safetensors")
        with told(rank, "dense"):
            dense(rank, weights)
        for world in worlds:
            for strategy in (one for one in STRATEGIES if one in only):
                with told(rank, strategy):
                    program(rank, strategy, weights, world)


def main() -> None:
    """``FOLDER OUT WORLDS [CASES [STRATEGIES]]``."""
    folder, out, worlds, *rest = sys.argv[1:]
    os.environ |= {"LOCAL_RANK": "0"}
    names = rest[0].split(",") if rest else FORECAST
    only = rest[1].split(",") if rest[1:] else STRATEGIES
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        dist.init_process_group("nccl", init_method=f"file://{scratch}/store", rank=0, world_size=1)
        try:
            chosen = [int(one) for one in worlds.split(",")]
            for case in (one for one in CASES if one.name in names):
                measure(case, Path(folder), Path(out), chosen, only)
        finally:  # a group that is left open keeps the process from ending
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
