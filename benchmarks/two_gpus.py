"""Our programs over NCCL beside diffusers and one GPU: ``python -m benchmarks.two_gpus``.

FLUX.1-dev whole (11.9 B parameters, random numbers) and in part, every strategy by torch, eager and
compiled, against the dense model on one GPU and against diffusers' own context parallelism, all in
one run. Three commands, as programs are made where Torch-TensorRT is, and GPUs may be elsewhere:

- ``prepare FOLDER``: the programs, as bundles hold them; no GPU.
- ``run FOLDER``: on GPUs, with torch, diffusers and this project, but without TensorRT; appends
  to ``FOLDER/results.jsonl``.
- ``page FOLDER``: prints ``docs/two-gpus.md`` of all ``results*.jsonl``; with
  ``attention.jsonl``, what ``benchmarks.gpus.attention`` printed, where it is there.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from .gpus.cases import CASES, chosen


def run(names: str | None, only: str, folder: Path, world: int, limit: float) -> int:
    """Every case in processes of its own; how many failed."""
    failed = 0
    for case in chosen(names):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={world}", "-m", "benchmarks.gpus.rank"]
        command += [case.name, str(folder), str(folder / "results.jsonl"), only]
        try:
            failed += subprocess.run(command, timeout=limit).returncode != 0
        except subprocess.TimeoutExpired:
            print(f"{case.name}: stopped after {limit:.0f} s", file=sys.stderr)
            failed += 1
    return failed


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.two_gpus", description=__doc__)
    parser.add_argument("command", choices=("prepare", "run", "page"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--cases", help=f"of {', '.join(case.name for case in CASES)}")
    parser.add_argument("--only", default="", help='such as "ring,diffusers ring"')
    parser.add_argument("--limit", type=float, default=600, help="seconds a case")
    told = parser.parse_args()
    if told.command == "run":
        return run(told.cases, told.only, told.folder, told.world, told.limit)
    if told.command == "page":
        from .gpus.page import page

        attention = told.folder / "attention.jsonl"
        print(
            page(
                sorted(told.folder.glob("results*.jsonl")),
                attention if attention.exists() else None,
            ),
            end="",
        )
        return 0
    from .gpus.prepare import prepare

    for case in chosen(told.cases):
        prepare(case, told.folder, told.world)
    return 0


if __name__ == "__main__":
    sys.exit(main())
