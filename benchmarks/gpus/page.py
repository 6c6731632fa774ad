"""What ``benchmarks.two_gpus`` and ``benchmarks.gpus.attention`` found, as docs/two-gpus.md."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .cases import CASES, GUIDED, IN_CODES, STRATEGIES

Line = dict[str, Any]
_ORDER = (
    "dense", f"{GUIDED}2", *STRATEGIES, f"ulysses{IN_CODES}", "diffusers ulysses", "diffusers ring",
)  # fmt: skip
_WAYS = ("", ", compiled", ", replayed")
"""Of running a program: operator by operator, and what else was measured."""


def page(runs: Sequence[Path], attention: Path | None = None) -> str:
    """The page.

    Args:
        runs: lines of ``benchmarks.two_gpus run``, a file a run; only these are held side by side.
        attention: lines of ``benchmarks.gpus.attention``.
    """
    told = [{(one["case"], one["what"]): one for one in _lines(run)} for run in runs]
    tables = "\n\n".join(
        "\n\n".join([f"### {case.name}", *(_table(case.name, run) for run in runs_of)])
        for case in CASES
        if (runs_of := [run for run in told if (case.name, "dense") in run])
    )
    ways = "" if attention is None else _ATTENTION.format(rows=_ways(_lines(attention)))
    return _PAGE.format(tables=tables, ways=ways)


def _lines(path: Path) -> list[Line]:
    """The lines of JSON; a log's others are passed over."""
    return [json.loads(x) for x in path.read_text().splitlines() if x.startswith("{")]


def _table(case: str, found: dict[tuple[str, str], Line]) -> str:
    rows = (
        _row(what, [found.get((case, what + way)) for way in _WAYS])
        for what in _ORDER
        if (case, what) in found
    )
    return "\n".join((
        "| program | ms | compiled | replayed | least to most | error | peak GB |",
        "|---|---|---|---|---|---|---|", *rows,
    ))  # fmt: skip


def _row(what: str, lines: Sequence[Line | None]) -> str:
    told = [one for one in lines if one is not None and "ms" in one]
    peak = max((one["peak_gb"] for one in told), default=None)
    last = told[-1] if told else None
    spread = "" if last is None else f"{last['least']:.1f} to {last['most']:.1f}"
    error = "" if last is None else f"{last['error']:.2e}"
    cells = [*map(_time, lines), spread, error, "" if peak is None else f"{peak:.1f}"]
    return " | ".join((f"| {what}", *cells)) + " |"


def _time(line: Line | None) -> str:
    if line is None:
        return ""
    return f"{line['ms']:.1f}" if "ms" in line else f"failed: {line['failed'].splitlines()[0][:60]}"


def _ways(lines: Iterable[Line]) -> str:
    by: dict[tuple[int, int], dict[str, Line]] = {}
    for one in (x for x in lines if "attention" in x):
        at = one["attention"]
        by.setdefault((at["tokens"], at["world"]), {})[at["way"]] = one
    return "\n".join(_way(*key, ways) for key, ways in sorted(by.items()))


def _way(tokens: int, world: int, ways: dict[str, Line]) -> str:
    names: Sequence[str] = ("one fused attention", "heads in turn", "fused, merged", "explicit")
    told = [f"{ways[n]['ms']:.2f} ({ways[n]['error']:.1e})" if n in ways else "" for n in names]
    return f"| {tokens} | {world} | " + " | ".join(told) + " |"


_PAGE = """# On two GPUs, by torch and NCCL

The rewritten programs, as bundles hold them, run by the torch executor's own code on two NVIDIA H200 (one host, NVLink) over NCCL, beside the dense model on one of them and diffusers' own
context parallelism: torch 2.11, bfloat16, random weights and inputs, torch's attention by cuDNN in all rows. Milliseconds of one forward, all ranks together, median of ten: operator by operator, by `torch.compile`, and that
replayed as a CUDA graph, collectives included (`cp-convert run --compile --cuda-graph`; diffusers' model was captured in the same way). Least to most, and the error, are the last of these. Error: of the output against the dense model in
float32, root mean square; the first row's is that of the precision alone. Every table is one run. `python -m benchmarks.two_gpus` prepares, runs and prints this page.
Since the last tables of 4,608 and of 16,896 tokens compiled programs of ours round to half precision where they do operator by operator, which torch's compiler leaves out otherwise: times and guidance, which models multiply by 1000, became
other numbers than those that were proven, and `run --compile` of a small FLUX was off by 0.34 of its output. It costs nothing that shows (40.6 ms beside 72.6, before 40.2 beside 72.2); errors are those of the first column's programs again.

**TensorRT did not run here.** TensorRT-RTX does not take compute capability 9.0, which these GPUs have, and was not installed there; that
`--executor tensorrt` refuses such a GPU is tested on a stand-in (`tests/runtime/test_tensorrt.py`). What these numbers tell is whether the programs are right over real collectives, and what each strategy moves and computes;
an engine's own speed they do not tell.

`flux-whole` is FLUX.1-dev, 11.9 billion parameters, at 1024x1024; `flux-2-4` has 2 joint and 4 single blocks of it, at 1024x1024 (4,608 tokens), 2048x2048 (16,896) and 4096x4096 (66,048). `wan-of-two-branches` is Wan 2.1 1.3B whole, 480p, 81 frames (32,760 tokens), with both guidance branches
in one batch: `cfg2` gives each GPU a branch (`--cfg 2`), the others split the tokens of both. `in fp8` multiplies FP8 in the blocks' linear layers (`--quantize fp8`, scales from the example inputs).

{tables}

What they say:

- At 4,608 tokens two GPUs are 1.60 (Ulysses) to 1.65 times (AllGather KV) one, where diffusers' are 1.58 and 1.59 and xDiT publishes 1.60 for the whole model on two H100; at 16,896 tokens 1.74 to 1.84, at 66,048 1.88 to 1.90.
- FLUX.1-dev whole: 1.60 (Ulysses) and 1.64 times (AllGather KV) one GPU, 1.60 by diffusers, and in FP8 2.05 times; FP8 on one GPU takes 95.5 ms ([quantized.md](quantized.md), another run).
- Replayed, ours take as much as diffusers' or up to 4.8 percent less in the six pairs that there are; least and most of a row lie further apart than that.
- Ring takes 1.01 to 1.03 times AllGather KV's time with two GPUs (it is one gather then), Stream KV 0.99 to 1.05.
- FP8 takes 0.83 times bfloat16's time on two GPUs at 16,896 tokens, 0.78 in the whole model at 4,608; weights and inputs are random, so its error is not a published model's. Attention is in bfloat16.
  Its memory has the numbers in bfloat16 beside the codes made of them, as this benchmark makes them there; ranks of a quantized bundle load codes.
- Wan: a branch a GPU is 1.77 times one GPU, splitting both branches' tokens 1.59 (ours) and 1.68 times (diffusers'), each as it is, not compiled. Why ours takes 5 percent longer than diffusers' there
  was not profiled. Two ranks of ours hold 4.2 GB each, diffusers' 4.7, the dense model 6.1.

What `cp-convert run` itself ran there, with the commands' own checks (two ranks, NCCL, small models of two or four blocks): all ranks agreed to the last bit, and were within the proof's bounds of the dense model, for text of 77 tokens (padding), a range of
sizes at 77, `--tp 2` (FLUX.2), `--cfg 2` (Wan), `--layout blocks` with ring, ring (LTX), `--split-after` with `--step-cache` (also as a CUDA graph); agreed, and had nothing to be compared with, as these were converted with `--no-proof`: `--exchange int8`, `--quantize fp8 --attention fp8`
and `nvfp4`. Two faults were found so and mended: padding's zeros stood on the CPU, and the roundings above.

Compiled without a graph a short forward waits for Python: 8.7 to 9.2 ms at 4,608 tokens, 8.2 to 8.5 replayed.

## Earlier, on two H100

Two NVIDIA H100 (80 GB, one host), before reshapes were views and forwards were replayed; the whole model in three runs, in which the dense one took 182.6 to 184.0 ms. These programs are slower than today's.

| case | program | ms | ms, compiled | error |
|---|---|---|---|---|
| one block of each, float32, TF32 off | dense | 59.4 | | 0 |
| | ulysses, allgather-kv, ring, stream-kv | 35.0, 35.7, 34.2, 36.1 | | 2.2e-06 |
| FLUX.1-dev whole (11.9 B parameters), 1024x1024 | dense | 182.6 | 132.3 | 1.04e-02 |
| | ulysses | 166.1 | 140.3 | 1.04e-02 |
| | allgather-kv | 157.8 | 112.4 | 1.04e-02 |
| | ring | 140.2 | 95.7 | 1.04e-02 |
| | diffusers ulysses | 177.3 | 90.9 | 1.04e-02 |
| | diffusers ring | 154.9 | 89.9 | 1.04e-02 |

{ways}"""
_ATTENTION = """## One rank's attention by itself

One H100: a rank's queries over all keys, 24 heads of 128 in bfloat16, compiled, milliseconds (error of two heads against float32).
"heads in turn" is stream-kv's, "fused, merged" what Ring does from three ranks on, "explicit" what it did in 0.1.0.

| tokens | world | one fused attention | heads in turn | fused, merged | explicit |
|---|---|---|---|---|---|
{rows}

Merging takes 1.5 to 1.9 times one attention's time where attention is long: a head of 136 numbers instead of 128 is 1.3 of it, additions
in float32 the rest. Where it is short (4,608 tokens on 8 GPUs), starting its kernels is most of the time; let Ulysses, stream-kv
or AllGather KV have these.
"""
