"""One model on three roads: ``python -m benchmarks.peers --blocks 1,2 --runs 3``.

FLUX.1 at its real width (``examples/flux_dev.py``: 4096 image and 512 text tokens, fp16), world 8:

- ``cp-convert``: the command line as a user runs it, Ulysses, without a proof (peers make none).
- ``onnx``: ``torch.onnx.export``, ``polygraphy multi-device shard --one-shot --gpus 8``, TensorRT's
  parser and builder. Where the parser refuses the sharded model, its time ends there, and the
  seconds to build the unsharded one are told in brackets, as what a build would have cost.
- ``torch-tensorrt``: ``torch.export``, Torch-TensorRT's decompositions, lowering and interpreter,
  and TensorRT's builder, of one rank; the model itself is left dense, because Torch-TensorRT wants
  it distributed already. Every one of eight ranks pays this.

Every run is a process of its own; printed are medians of its wall-clock seconds, of its stages, and
of the largest memory that it and its children held together (proportional set size). The ONNX road
needs ``pip install polygraphy onnx-graphsurgeon onnxscript``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from .large import memory

WORLD = 8
EXAMPLE = Path(__file__).parent.parent / "examples" / "flux_dev.py"
Seconds = dict[str, float]


def cp_convert(folder: Path, seconds: Seconds) -> str:
    """This project; its stages are in the manifest."""
    command = [sys.executable, "-m", "cp_convert", str(EXAMPLE), "-s", "ulysses", "-w", str(WORLD)]
    command += ["--no-proof", "--no-cache", "-q", "--json", "-o", str(folder / "bundle")]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    manifest: dict[str, Any] = json.loads(done.stdout)["manifest"]
    seconds.update(manifest["timings"])
    return f"{WORLD} engines, {manifest['weights_mode']} weights, layout {manifest['layout']}"


def onnx(folder: Path, seconds: Seconds) -> str:
    """The ONNX road."""
    import torch

    module, inputs = _model()
    with _timed(seconds, "export"), torch.no_grad():
        torch.onnx.export(
            module, (), kwargs=inputs, f=folder / "dense.onnx", dynamo=True, external_data=True
        )
    tool = shutil.which("polygraphy") or sys.exit("polygraphy is not installed")
    command = [sys.executable, tool, "multi-device", "shard", str(folder / "dense.onnx")]
    command += ["--one-shot", "--gpus", str(WORLD), "-o", str(folder / "sharded.onnx")]
    command += ["--save-external-data", "sharded.data"]
    with _timed(seconds, "shard"):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    with _timed(seconds, "parse"):
        refusal = _built(folder / "sharded.onnx", WORLD)
    if refusal is None:
        return "one engine"
    start = time.perf_counter()
    dense = _built(folder / "dense.onnx", 1)
    spent = time.perf_counter() - start
    seconds["(unsharded build)"] = spent
    return f"refused: {refusal}; unsharded: {dense or 'built'}"


def torch_tensorrt(folder: Path, seconds: Seconds) -> str:
    """Torch-TensorRT alone, one dense rank; by those of its entry points that need no GPU."""
    import torch

    from cp_convert.ir.program import hold, state_of
    from cp_convert.trt.libraries import Input, TRTInterpreter, decompositions, settings
    from cp_convert.trt.libraries import post_lowering as lower

    module, inputs = _model()
    with _timed(seconds, "export"), torch.no_grad():
        exported = torch.export.export(module, (), inputs)
    with _timed(seconds, "decompose"):
        exported = exported.run_decompositions(decompositions())
    with _timed(seconds, "lower"):
        graph_module, state = exported.graph_module, state_of(exported)
        for node in list(graph_module.graph.find_nodes(op="placeholder")):
            if node.name in state:
                hold(graph_module, node, state[node.name])
        graph_module.recompile()
        graph_module = lower(graph_module, settings())
    with _timed(seconds, "network"):
        specs = []
        for node in graph_module.graph.find_nodes(op="placeholder"):
            value = node.meta["val"]
            sample = torch.zeros((), dtype=value.dtype).expand(value.shape)
            spec = Input(shape=tuple(value.shape), dtype=value.dtype, torch_tensor=sample)
            specs.append(spec)
        interpreter = TRTInterpreter(graph_module, specs, compilation_settings=settings())
        interpreter._construct_trt_network_def()
    with _timed(seconds, "build"):
        config = interpreter._populate_trt_builder_config()
        plan = interpreter.builder.build_serialized_network(interpreter.ctx.net, config)
        (folder / "engine").write_bytes(plan)
    return f"1 engine of {WORLD}, dense"


ROADS = {"cp-convert": cp_convert, "onnx": onnx, "torch-tensorrt": torch_tensorrt}


def _model() -> tuple[Any, dict[str, Any]]:
    import torch

    sys.path.insert(0, str(EXAMPLE.parent))
    import flux_dev

    torch.set_default_dtype(torch.float16)
    module = flux_dev.build_model().eval()
    inputs: dict[str, Any] = flux_dev.example_inputs()
    torch.set_default_dtype(torch.float32)
    return module, inputs


def _built(path: Path, world: int) -> str | None:
    """Parse and build; what TensorRT answered where it refused."""
    import tensorrt_rtx as trt

    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.INTERNAL_ERROR))
    if not parser.parse_from_file(str(path)):
        return str(parser.get_error(0).desc()).strip().splitlines()[-1]
    plan = builder.build_serialized_network(network, builder.create_builder_config())
    return "the builder refused it" if plan is None else None


@contextmanager
def _timed(seconds: Seconds, stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start


def measured(road: str, blocks: int) -> dict[str, Any]:
    """One run in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.peers", "--road", road, "--folder", folder]
        environment = {**os.environ, "FLUX_DEV_BLOCKS": str(blocks)}
        start, peak = time.perf_counter(), 0
        with (Path(folder) / "out.json").open("w") as out:
            process = subprocess.Popen(command, stdout=out, env=environment)
            while process.poll() is None:
                try:
                    peak = max(peak, memory(psutil.Process(process.pid))[0])
                except psutil.NoSuchProcess:
                    break
                time.sleep(0.5)
        if process.wait():
            sys.exit(f"{' '.join(command)} failed")
        wall = time.perf_counter() - start
        told: dict[str, Any] = json.loads((Path(folder) / "out.json").read_text().splitlines()[-1])
        size = sum(p.stat().st_size for p in Path(folder).rglob("*") if "engine" in p.name)
    wall -= told["seconds"].get("(unsharded build)", 0)
    return {**told, "wall": wall, "peak": peak, "size": size}


def main() -> None:
    """One run, or all of them as a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", default="1,2")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--roads", default=",".join(ROADS))
    parser.add_argument("--road", choices=ROADS)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if args.road:
        seconds: Seconds = {}
        result = ROADS[args.road](args.folder, seconds)
        print(json.dumps({"seconds": seconds, "result": result}))
        return
    print("| blocks | road | seconds | of which | peak GB | result |")
    print("|---|---|---|---|---|---|", flush=True)
    for blocks in (int(n) for n in args.blocks.split(",")):
        for road in args.roads.split(","):
            runs = [measured(road, blocks) for _ in range(args.runs)]
            stages = {
                k: statistics.median(r["seconds"][k] for r in runs) for k in runs[0]["seconds"]
            }
            told = " ".join(f"{k} {v:.1f}" for k, v in stages.items() if v >= 0.1)
            wall = statistics.median(r["wall"] for r in runs)
            peak = statistics.median(r["peak"] for r in runs) / 1e9
            print(
                f"| {blocks}+{blocks} | {road} | {wall:.1f} | {told} | {peak:.1f} | "
                f"{runs[0]['result']} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
