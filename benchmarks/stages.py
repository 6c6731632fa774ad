"""Seconds per stage of whole conversions.

``python -m benchmarks.stages [MODEL.py] [--world 8] [--precision fp16] [--runs 1]`` converts with
every strategy, each in a process of its own and without a cache, and prints the medians of every
stage, of the wall-clock time and of the largest memory of the process and its workers together
(proportional set size) as a Markdown table. The bundle's size counts files once, weights included.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from cp_convert.strategies import STRATEGIES

from .large import watched

EXAMPLE = Path(__file__).parent.parent / "examples" / "flux_dev.py"


def main() -> None:
    """Parse, convert, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", type=Path, default=EXAMPLE)
    parser.add_argument("--world", default="8")
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--runs", type=int, default=1)
    args = parser.parse_args()
    options = ["-w", args.world, "-p", args.precision, "--no-cache", "-q"]
    stages = [
        "load",
        "measure",
        "trace",
        "decompose",
        "shard",
        "rewrite",
        "lower",
        "prove",
        "build",
    ]
    print(
        f"{args.model.name}, world {args.world}, {args.precision}, median of {args.runs}, seconds"
    )
    print(f"| strategy | {' | '.join(stages)} | whole | peak GB | bundle GB |")
    print("|---" * (len(stages) + 4) + "|", flush=True)
    for strategy in STRATEGIES:
        runs = [watched([str(args.model), "-s", strategy, *options]) for _ in range(args.runs)]
        cells = [statistics.median(r["timings"].get(stage, 0) for r in runs) for stage in stages]
        cells.append(statistics.median(r["wall"] for r in runs))
        cells.append(statistics.median(r["peak"][0] for r in runs) / 1e9)
        row = " | ".join(f"{cell:.1f}" for cell in [*cells, runs[0]["size"] / 1e9])
        print(f"| {strategy} | {row} |", flush=True)


if __name__ == "__main__":
    main()
