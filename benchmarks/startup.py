"""How fast the commands answer that must not import torch: ``python -m benchmarks.startup``.

Prints the median wall-clock and user+sys seconds of whole processes.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUNS = 21


def measure(args: list[str]) -> tuple[float, float]:
    """Wall-clock and processor seconds of one run."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "cp_convert", *args], check=True, capture_output=True)
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    """Convert the smallest example once, then time the commands."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = str(Path(folder) / "bundle")
        example = str(Path(__file__).parent.parent / "examples" / "plain_dit.py")
        options = ["-s", "ring", "-w", "2", "-o", bundle, "-q"]
        subprocess.run([sys.executable, "-m", "cp_convert", example, *options], check=True)
        print(f"| command | wall, s | user+sys, s | (medians of {RUNS}) |\n|---|---|---|---|")
        for args in (["--help"], ["convert", "--help"], ["inspect", bundle], ["verify", bundle]):
            runs = [measure(args) for _ in range(RUNS)]
            wall, used = (statistics.median(column) for column in zip(*runs, strict=True))
            shown = " ".join(args).replace(bundle, "BUNDLE")
            print(f"| `cp-convert {shown}` | {wall:.2f} | {used:.2f} | |")


if __name__ == "__main__":
    main()
