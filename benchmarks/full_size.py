"""FLUX.1-dev at full size, all ranks in lockstep on one GPU: ``python -m benchmarks.full_size``.

Random weights in bfloat16; the traced and rewritten program (no TensorRT is needed), float32
reference, dense bfloat16 model and every rank, as in the proof of a conversion. Prints the largest
relative errors, with bfloat16 and with float32 arithmetic, the seconds of one bfloat16 run of all
ranks and of the dense model, and the peak memory of all ranks together.
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

from cp_convert.decompose import decompose
from cp_convert.mesh import Mesh
from cp_convert.program import Lowered
from cp_convert.prove.lockstep import run
from cp_convert.prove.program import flat_inputs, worst
from cp_convert.rewrite import rewrite
from cp_convert.shard import shard
from cp_convert.strategies import CONTROL, STRATEGIES
from cp_convert.trace import trace

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
    with torch.no_grad():
        twin = copy.deepcopy(module).float()
        reference = [x.clone() for x in twin(**wide_inputs)]
        del twin
        torch.cuda.empty_cache()
        dense, dense_seconds = timed(lambda: module(**inputs))
    loss = worst(list(dense), reference)
    axis = Mesh.line(world).whole
    table = core_aten_decompositions()
    traced, _ = trace(module, inputs, module._cp_plan)
    sharded = shard(decompose(traced, table), axis)
    flat = flat_inputs(sharded.program, inputs)
    local, _ = rewrite(sharded, CONTROL, "control", axis, table)
    billions = sum(p.numel() for p in module.parameters()) / 1e9
    shown = f"{joint}+{single} ({billions:.1f} B) | {tokens}+{TEXT} | {world}"
    print(f"| {shown} | dense bf16 | {loss.max:.1e} | | {dense_seconds:.2f} | |", flush=True)

    def errors(program: Lowered) -> str:
        half, wide = (
            max(worst(outputs, reference).max for outputs in run(program, flat, world, widen=w))
            for w in (False, True)
        )
        torch.cuda.empty_cache()
        return f"{half:.1e} | {wide:.1e}"

    print(f"| {shown} | no communication | {errors(local)} | | |", flush=True)
    for name, strategy in STRATEGIES.items():
        rewritten, _ = rewrite(sharded, strategy, name, axis, table)
        torch.cuda.reset_peak_memory_stats()
        _, seconds = timed(lambda p=rewritten: run(p, flat, world), 2)  # type: ignore[misc]
        peak = torch.cuda.max_memory_allocated() / 1e9
        row = f"{name} | {errors(rewritten)} | {seconds:.2f} | {peak:.1f}"
        print(f"| {shown} | {row} |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", type=int, default=8)
    parser.add_argument("--cases", default="19,38,4096 2,2,16384")
    args = parser.parse_args()
    # The reference is to be float32, not TF32.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print("| blocks | tokens | world | program | bf16 | float32 | s, all ranks | peak GB |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for text in args.cases.split():
        joint, single, tokens = (int(n) for n in text.split(","))
        case(joint, single, tokens, args.world)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
