"""Seconds per stage of whole conversions.

``python -m benchmarks.stages [MODEL.py] [--world 8] [--precision fp16] [--runs 1]`` converts with
every strategy, each in a process of its own, and prints the median of every stage, the wall-clock
time and the peak memory as a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cp_convert.strategies import STRATEGIES

EXAMPLE = Path(__file__).parent.parent / "examples" / "flux_dev.py"


def convert(model: Path, strategy: str, options: list[str]) -> dict[str, Any]:
    """Convert once; the manifest, with the wall-clock seconds and peak memory of the process."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        command = [sys.executable, "-m", "cp_convert", str(model), "-s", strategy, *options]
        start = time.perf_counter()
        process = subprocess.Popen(
            [*command, "-o", f"{folder}/bundle", "--json"], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
    if status:
        sys.exit(f"{' '.join(command)} failed: {output.decode()}")
    manifest: dict[str, Any] = json.loads(output)["manifest"]
    return {**manifest, "wall": wall, "peak": usage.ru_maxrss / 1e6}


def main() -> None:
    """Parse, convert, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", type=Path, default=EXAMPLE)
    parser.add_argument("--world", default="8")
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--runs", type=int, default=1)
    args = parser.parse_args()
    options = ["-w", args.world, "-p", args.precision]
    stages = ["load", "trace", "decompose", "shard", "rewrite", "lower", "prove", "build", "replay"]
    print(
        f"{args.model.name}, world {args.world}, {args.precision}, median of {args.runs}, seconds"
    )
    print(f"| strategy | {' | '.join(stages)} | whole process | peak RSS, GB | engines, GB |")
    print("|---" * (len(stages) + 4) + "|", flush=True)
    for strategy in STRATEGIES:
        runs = [convert(args.model, strategy, options) for _ in range(args.runs)]
        cells = [statistics.median(r["timings"].get(stage, 0) for r in runs) for stage in stages]
        cells += [statistics.median(r[key] for r in runs) for key in ("wall", "peak")]
        size = sum(engine["bytes"] for engine in runs[0]["engines"]) / 1e9
        row = " | ".join(f"{cell:.1f}" for cell in [*cells, size])
        print(f"| {strategy} | {row} |", flush=True)


if __name__ == "__main__":
    main()
