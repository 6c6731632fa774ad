"""One GPU: rank 0's program of bundles, without its wires; ``python -m benchmarks.gpus.bundles``.

In: folders of bundles; of each only ``manifest.json`` and what it says of programs are read, so
that weights and engines need not travel. Out: a line of JSON for every variant, or for every size
that is named of a range, compiled and replayed as a CUDA graph. Weights and inputs are random, and
so is what a collective returns (:mod:`.alone`): the numbers that come out mean nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from cp_convert.bundle.folder import read
from cp_convert.bundle.program import Stored, stored_at
from cp_convert.bundle.variants import all_variants
from cp_convert.engine.specialise import specialise
from cp_convert.runtime.called import AS_WRITTEN, on_device
from cp_convert.runtime.replayed import Replayed

from .alone import without_wires
from .rank import KERNELS, RUNS, WARM

DEVICE = torch.device("cuda")


def programs(folder: Path, sizes: list[int]) -> Iterator[tuple[str, Stored]]:
    """What a bundle holds, by variant or by size."""
    manifest, _ = read(folder)
    for one in all_variants(manifest):
        assert one.program is not None, f"{folder} keeps no program"
        name, document = one.request.variant or "whole", folder / one.program.document.file
        stored = stored_at(document.parent.parent)
        if stored.lifted is None:
            yield name, stored
        for size in sizes if stored.lifted is not None else []:
            yield f"size {size}", stored.at(size)


def called(stored: Stored) -> Callable[[], Any]:
    """Rank 0's program with random tensors, compiled and replayed."""
    here = on_device(without_wires(specialise(stored.program, 0)), DEVICE, stored.names)
    held = here.graph_module.graph.find_nodes(op="placeholder")
    values = [
        here.state[node.name] if node.name in here.state else _numbers(node.meta["val"])
        for node in held
    ]
    module = torch.fx.GraphModule(here.graph_module, here.graph_module.graph)
    graph = Replayed(torch.compile(module, dynamic=False, options=AS_WRITTEN), DEVICE)
    given = [False] * len(values)
    return lambda: graph(values, given)


def _numbers(like: Tensor) -> Tensor:
    if not like.is_floating_point():
        return torch.zeros(like.shape, dtype=like.dtype, device=DEVICE)
    return (0.02 * torch.randn(like.shape, device=DEVICE)).to(like.dtype)


def milliseconds(forward: Callable[[], Any]) -> list[float]:
    """Wall-clock, between two points at which the GPU is idle."""
    spent = []
    for _ in range(WARM + RUNS):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        forward()
        torch.cuda.synchronize()
        spent.append(1e3 * (time.perf_counter() - begun))
    return spent[WARM:]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpus.bundles", description=__doc__)
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--sizes", default="", help="of a range, such as 77,512")
    told = parser.parse_args()
    sizes = [int(one) for one in told.sizes.split(",") if one]
    with torch.no_grad(), sdpa_kernel(KERNELS, set_priority=True):
        for folder in told.bundles:
            for name, stored in programs(folder, sizes):
                torch.cuda.reset_peak_memory_stats()
                spent = milliseconds(called(stored))
                what = {"bundle": folder.name, "what": name, "ms": statistics.median(spent)}
                what |= {"least": min(spent), "most": max(spent)}
                what["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
                print(json.dumps(what), flush=True)


if __name__ == "__main__":
    main()
