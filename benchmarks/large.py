"""Whole conversions of large models with external weights: ``python -m benchmarks.large``.

For every preset, safetensors shards of random weights are written first (``--weights FOLDER`` keeps
them for the next run; ``--format modelopt-fp8`` or ``modelopt-nvfp4`` writes a quantized checkpoint
as ModelOpt exports it, with holes for the codes and true scales), then it is converted, each time
in a process of its own. Printed are the seconds of every stage and of the whole process, the
largest memory that it and its children held together (proportional set size, sampled twice a
second: pages of mapped files that several processes share count once; and without file pages, which
the system takes back when it needs them), and the size of the bundle beside the weights.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file

from cp_convert.model.instantiate import build
from cp_convert.model.meta import unallocated
from cp_convert.model.preset import path_of, read

SHARD = 4 << 30
ALGORITHMS = {"modelopt-fp8": "FP8", "modelopt-nvfp4": "NVFP4"}
"""Formats of quantized checkpoints, by what they are called here."""


def write_weights(preset: str, folder: Path, *, sparse: bool = False) -> None:
    """Shards of at most 4 GiB of random bfloat16 numbers, named as the model names them.

    ``sparse``: the numbers are holes in the files, read as zeros, which need no room on the disk.
    """
    told = read(path_of(preset) or Path(preset))
    with unallocated():
        module = build(told, told.config, tiny=False, random=False, bytes_each=0)
    folder.mkdir(parents=True, exist_ok=True)
    block = torch.randn(1 << 22).bfloat16() * 0.02
    shard: dict[str, torch.Tensor] = {}
    places: dict[str, str] = {}
    size = count = 0

    def flush() -> None:
        nonlocal shard, size, count
        name = f"diffusion_pytorch_model-{count:05}.safetensors"
        (save_holes if sparse else save_file)(shard, folder / name)
        places.update(dict.fromkeys(shard, name))
        shard, size, count = {}, 0, count + 1

    for name, tensor in module.state_dict().items():
        repeats = -(-tensor.numel() // block.numel())
        # One block over and over: what the numbers are does not matter here, only how many.
        if sparse:
            shard[name] = torch.empty((), dtype=torch.bfloat16).expand(tensor.shape)
            size += 2 * tensor.numel()
            if size >= SHARD:
                flush()
            continue
        values = block.repeat(repeats)[: tensor.numel()] if repeats > 1 else block[: tensor.numel()]
        shard[name] = values.reshape(tensor.shape).clone()
        size += shard[name].nbytes
        if size >= SHARD:
            flush()
    if shard:
        flush()
    index = {"metadata": {}, "weight_map": places}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def write_quantized(preset: str, folder: Path, algorithm: str = "FP8") -> None:
    """The blocks' linear layers in FP8 or NVFP4, as ModelOpt exports a diffusers model.

    Codes are holes in the file, all scales are there.
    """
    told = read(path_of(preset) or Path(preset))
    with unallocated():
        module = build(told, told.config, tiny=False, random=False, bytes_each=0)
    folder.mkdir(parents=True, exist_ok=True)
    of_blocks = {
        f"{name}.weight"
        for name, one in module.named_modules()
        if isinstance(one, torch.nn.Linear) and any(part.isdigit() for part in name.split("."))
    }
    scales = torch.randint(0x30, 0x7E, (1 << 22,), dtype=torch.uint8).view(torch.float8_e4m3fn)
    found: dict[str, torch.Tensor] = {}
    for number, (name, tensor) in enumerate(module.state_dict().items()):
        if name not in of_blocks:
            found[name] = torch.empty((), dtype=torch.bfloat16).expand(tensor.shape)
            continue
        layer, (rows, columns) = name.removesuffix(".weight"), tensor.shape
        if algorithm == "FP8":
            found[name] = torch.empty((), dtype=torch.float8_e4m3fn).expand(rows, columns)
            found[f"{layer}.weight_scale"] = torch.tensor(2e-4 + 1e-7 * number)
        else:
            count = rows * columns // 16
            found[name] = torch.empty((), dtype=torch.uint8).expand(rows, columns // 2)
            found[f"{layer}.weight_scale"] = scales[number : number + count].view(rows, -1)
            found[f"{layer}.weight_scale_2"] = torch.tensor(3e-5 + 1e-8 * number)
        found[f"{layer}.input_scale"] = torch.tensor(0.03 + 1e-5 * number)
    save_holes(found, folder / "diffusion_pytorch_model.safetensors")
    quantized = {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["proj_out"]}
    config = {**told.config, "_class_name": told.kind, "quantization_config": quantized}
    (folder / "config.json").write_text(json.dumps(config))


KINDS = {
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float32: "F32",
    torch.uint8: "U8",
}
"""The format's names of types."""


def save_holes(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """A safetensors file of tensors like these, with a hole where the numbers would be.

    Those that have numbers of their own, which are scales, are written.
    """
    header, end = {}, 0
    places: dict[int, torch.Tensor] = {}
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.itemsize * tensor.numel()
        told = {"dtype": KINDS[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = {**told, "data_offsets": [begin, end]}
        if 0 not in tensor.stride():
            places[begin] = tensor
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # numbers that do not lie at their size's multiples are copied
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        for begin, one in places.items():
            file.seek(8 + len(text) + begin)
            file.write(one.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def memory(process: psutil.Process) -> tuple[int, int]:
    """Bytes that a process and its children hold: with pages of mapped files, and without."""
    whole = own = 0
    for one in [process, *process.children(recursive=True)]:
        try:  # the system's own sums: adding up the maps took as much time as a conversion
            lines = Path(f"/proc/{one.pid}/smaps_rollup").read_text().splitlines()[1:]
        except OSError:
            continue
        told = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines}
        whole += told["Pss"]
        own += told["Anonymous"]
    return whole, own


def convert(
    model: str, weights: Path, options: list[str], cache: Path | None = None
) -> dict[str, Any]:
    """Convert once; the manifest with wall-clock seconds, memory and size."""
    options = [*options, *(["--no-cache"] if cache is None else ["--cache", str(cache)])]
    return watched([model, "--weights", str(weights), *options, "--proof", "none"])


def watched(arguments: list[str]) -> dict[str, Any]:
    """A whole conversion in a process of its own; the manifest with seconds, memory and size."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "cp_convert", *arguments]
        command += ["-o", f"{folder}/bundle", "--json"]
        start, peak = time.perf_counter(), (0, 0)
        with (Path(folder) / "out.json").open("w") as out:
            process = subprocess.Popen(command, stdout=out)
            while process.poll() is None:
                begun = time.perf_counter()
                now = memory(psutil.Process(process.pid)) if process.poll() is None else (0, 0)
                peak = (max(peak[0], now[0]), max(peak[1], now[1]))
                # Counting 20 GB of mapped pages takes half a second and holds up the process.
                time.sleep(max(0.5, 20 * (time.perf_counter() - begun)))
        wall = time.perf_counter() - start
        if process.returncode:
            sys.exit(f"{' '.join(command)} failed")
        manifest: dict[str, Any] = json.loads((Path(folder) / "out.json").read_text())["manifest"]
        files = {p.stat().st_ino: p.stat().st_size for p in Path(f"{folder}/bundle").rglob("*.*")}
    return {**manifest, "wall": wall, "peak": peak, "size": sum(files.values())}


def main() -> None:
    """Parse, write weights, convert, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("presets", nargs="*", default=["flux.1-dev"])
    parser.add_argument("--worlds", default="8")
    parser.add_argument("--layouts", default="shared")
    parser.add_argument("--strategy", default="ulysses")
    parser.add_argument("--tp", default="1", help="ranks that share weights")
    parser.add_argument("--weights", type=Path, help="a folder to keep the weights in")
    parser.add_argument("--sparse", action="store_true", help="weights that are holes in files")
    parser.add_argument("--format", choices=["bf16", *ALGORITHMS], default="bf16")
    parser.add_argument("--runs", type=int, default=1, help="each row is the median run of so many")
    parser.add_argument("--again", action="store_true", help="twice each, with an empty cache")
    args = parser.parse_args()
    print("| model | world | layout | cache | seconds | of which | peak GB | without files", end="")
    print(" | bundle MB |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for preset in args.presets:
            weights = (args.weights or Path(scratch)) / Path(preset).name.removesuffix(".toml")
            if not weights.is_dir() and args.format in ALGORITHMS:
                write_quantized(preset, weights, ALGORITHMS[args.format])
            elif not weights.is_dir():
                write_weights(preset, weights, sparse=args.sparse)
            for world in args.worlds.split(","):
                for layout in args.layouts.split(","):
                    options = ["-s", args.strategy, "-w", world, "--layout", layout]
                    options += ["--tp", args.tp] if args.tp != "1" else []
                    cache = Path(scratch) / "cache" if args.again else None
                    for what in ("first", "again") if args.again else ("no cache",):
                        runs = [
                            convert(preset, weights, options, cache)
                            for _ in range(1 if args.again else args.runs)
                        ]
                        runs.sort(key=lambda run: float(run["wall"]))
                        row(preset, world, layout, what, runs[len(runs) // 2])


def row(preset: str, world: str, layout: str, what: str, run: dict[str, Any]) -> None:
    """Print one line of the table."""
    stages = " ".join(f"{k} {v:.1f}" for k, v in run["timings"].items() if v > 0.3)
    whole, own = (n / 1e9 for n in run["peak"])
    print(
        f"| {preset} | {world} | {layout} | {what} | {run['wall']:.1f} | {stages} | {whole:.1f} | "
        f"{own:.1f} | {run['size'] / 1e6:.0f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
