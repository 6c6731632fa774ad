"""FLUX.1-dev at full size, all ranks in lockstep on one GPU: ``python -m benchmarks.full_size``.

Random weights in bfloat16; the traced and rewritten program (no TensorRT is needed), float32
reference, dense bfloat16 model and every rank, as in the proof of a conversion. Prints the largest
relative errors, with bfloat16 and with float32 arithmetic; for one bfloat16 run the seconds and the
peak of activations, divided by the ranks, beside the dense model's; and how many chunks of keys and
values were alive when another arrived.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch._decomp import core_aten_decompositions
from torch.multiprocessing.reductions import StorageWeakRef

from cp_convert.capture.decompose import decompose
from cp_convert.capture.trace import trace
from cp_convert.ir.program import Lowered
from cp_convert.ir.sharded import Sharded
from cp_convert.mesh import Axis, Mesh
from cp_convert.prove.errors import worst
from cp_convert.prove.lockstep import PerRank, run
from cp_convert.prove.measure import Truth, flat_inputs, measure
from cp_convert.prove.program import Stages, prove
from cp_convert.sharding.shard import shard
from cp_convert.strategies import CONTROL, STRATEGIES, Strategy, Usp
from cp_convert.strategies.rewrite import rewrite

TEXT = 512


def timed(function: Callable[[], Any], repeats: int = 3) -> tuple[Any, float]:
    """The last result and the shortest time; the first call warms up."""
    seconds = []
    result = None
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = function()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return result, min(seconds)


def inputs_of(tokens: int) -> dict[str, Any]:
    """FLUX inputs of ``tokens`` image tokens, in bfloat16 but for the position ids."""
    side = int(tokens**0.5)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    ids = torch.stack((torch.zeros_like(rows), rows, columns), dim=-1).reshape(-1, 3)
    half: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
    return {
        "hidden_states": torch.randn(1, tokens, 64, **half),
        "encoder_hidden_states": torch.randn(1, TEXT, 4096, **half),
        "pooled_projections": torch.randn(1, 768, **half),
        "timestep": torch.tensor([0.5], **half),
        "img_ids": ids.float().cuda(),
        "txt_ids": torch.zeros(TEXT, 3, device="cuda"),
        "guidance": torch.tensor([3.5], **half),
        "return_dict": False,
    }


def case(joint: int, single: int, tokens: int, world: int) -> None:
    """One model, one length: a row for every strategy."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        module = FluxTransformer2DModel(
            num_layers=joint, num_single_layers=single, guidance_embeds=True
        )
    module = module.eval().requires_grad_(False).to(torch.bfloat16)
    inputs = inputs_of(tokens)
    wide_inputs = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    weights = torch.cuda.memory_allocated()
    with torch.no_grad():
        twin = copy.deepcopy(module).float()
        reference = [x.clone() for x in twin(**wide_inputs)]
        del twin
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        dense, dense_seconds = timed(lambda: module(**inputs))
        dense_peak = (torch.cuda.max_memory_allocated() - weights) / 1e9
    loss = worst(list(dense), reference)
    axis = Mesh.line(world).whole
    table = core_aten_decompositions()
    traced, _ = trace(module, inputs, module._cp_plan)
    sharded = shard(decompose(traced, table), axis)
    flat = flat_inputs(sharded.program, inputs)
    local, _ = rewrite(sharded, CONTROL, "control", axis, table)
    billions = sum(p.numel() for p in module.parameters()) / 1e9
    shown = f"{joint}+{single} ({billions:.1f} B) | {tokens}+{TEXT} | {world}"
    print(
        f"| {shown} | dense bf16 | {loss.max:.1e} | | {dense_seconds:.3f} | {dense_peak:.2f} | |",
        flush=True,
    )

    def errors(program: Lowered) -> str:
        half, wide = (
            max(worst(outputs, reference).max for outputs in run(program, flat, world, widen=w))
            for w in (False, True)
        )
        torch.cuda.empty_cache()
        return f"{half:.1e} | {wide:.1e}"

    print(f"| {shown} | no communication | {errors(local)} | | | |", flush=True)
    strategies = dict(STRATEGIES)
    if world % 2 == 0 and world > 2:
        strategies[f"usp {world // 2}x2"] = Usp(world // 2)
    truth = measure(module, inputs, torch.device("cuda"))
    for name, strategy in strategies.items():
        proved = proven(truth, inputs, sharded, name, strategy, axis)
        print(f"| {shown} | {name}, proven | {proved} | | | |", flush=True)
        rewritten, _ = rewrite(sharded, strategy, name, axis, table)
        torch.cuda.reset_peak_memory_stats()
        _, seconds = timed(lambda p=rewritten: run(p, flat, world), 2)  # type: ignore[misc]
        peak = (torch.cuda.max_memory_allocated() - weights) / 1e9
        alive = chunks_alive(rewritten, flat, world)
        own = f"{seconds / world:.3f} | {peak / world:.2f} | {alive}"
        row = f"{name} | {errors(rewritten)} | {own}"
        print(f"| {shown} | {row} |", flush=True)


def proven(
    truth: Truth,
    inputs: dict[str, Any],
    sharded: Sharded,
    name: str,
    strategy: Strategy,
    axis: Axis,
) -> str:
    """The proof of a conversion with ``--proof-device cuda``, down to the rewritten program."""
    table = core_aten_decompositions()
    control, _ = rewrite(sharded, CONTROL, "control", axis, table)
    done, outcomes = rewrite(sharded, strategy, name, axis, table)
    sites = [(outcome.site, outcome.node) for outcome in outcomes]
    stages = Stages(sharded.program, control, done, done, sites, axis)
    proof = prove(truth, inputs, stages, device=torch.device("cuda"))
    half, wide = (max(e.max for e in errors) for errors in (proof.ranks, proof.algebra))
    assert proof.control is not None
    torch.cuda.empty_cache()
    return (
        f"{half:.1e} of {proof.bound.max:.1e} | {wide:.1e}, control {proof.control.max:.1e}, "
        f"{proof.seconds:.0f} s"
    )


def chunks_alive(program: Lowered, flat: dict[str, torch.Tensor], world: int) -> str:
    """The most chunks of keys and values that were alive, the one arriving included."""
    chunks: list[StorageWeakRef] = []
    most = 0

    def watch(node: torch.fx.Node, values: PerRank) -> None:
        nonlocal most
        if any(user.target is torch.ops.aten.unbind.int for user in node.users):
            # What was gathered, as K and V of all ranks.
            chunks.append(StorageWeakRef(values[0].untyped_storage()))
            most = max(most, sum(not chunk.expired() for chunk in chunks))

    run(program, flat, world, watch=watch)
    return f"{most} + own" if chunks else ""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worlds", default="8")
    parser.add_argument("--cases", default="19,38,4096 2,2,16384 1,1,65536")
    args = parser.parse_args()
    # The reference is to be float32, not TF32.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print("| blocks | tokens | world | program | bf16 | float32 | s/rank | GB/rank | chunks |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for text in args.cases.split():
        joint, single, tokens = (int(n) for n in text.split(","))
        for world in (int(n) for n in args.worlds.split(",")):
            case(joint, single, tokens, world)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
