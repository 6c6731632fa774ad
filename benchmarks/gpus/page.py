"""What ``benchmarks.two_gpus`` and ``benchmarks.gpus.attention`` found, as docs/two-gpus.md."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .cases import CASES, STRATEGIES

Line = dict[str, Any]
_ORDER = ("dense", *STRATEGIES, "diffusers ulysses", "diffusers ring")


def page(runs: Sequence[Path], attention: Path | None = None) -> str:
    """The page.

    Args:
        runs: lines of ``benchmarks.two_gpus run``, a file a run; only these are held side by side.
        attention: lines of ``benchmarks.gpus.attention``.
    """
    told = [{(one["case"], one["what"]): one for one in _lines(run)} for run in runs]
    tables = "\n\n".join(
        "\n\n".join(
            [
                f"### {case.name}",
                *(_table(case.name, run) for run in told if (case.name, "dense") in run),
            ]
        )
        for case in CASES
    )
    ways = "" if attention is None else _ATTENTION.format(rows=_ways(_lines(attention)))
    return _PAGE.format(tables=tables, ways=ways)


def _lines(path: Path) -> list[Line]:
    """The lines of JSON; a log's others are passed over."""
    return [json.loads(x) for x in path.read_text().splitlines() if x.startswith("{")]


def _table(case: str, found: dict[tuple[str, str], Line]) -> str:
    rows = (_row(what, found.get((case, what)), found.get((case, f"{what}, compiled")))
            for what in _ORDER if (case, what) in found)  # fmt: skip
    return "\n".join((
        "| program | ms | least to most | ms, compiled | least to most | error | peak GB |",
        "|---|---|---|---|---|---|---|", *rows,
    ))  # fmt: skip


def _row(what: str, eager: Line | None, compiled: Line | None) -> str:
    peak = max((x["peak_gb"] for x in (eager, compiled) if x and "peak_gb" in x), default=None)
    error = next((x["error"] for x in (compiled, eager) if x and "error" in x), None)
    told = ["" if error is None else f"{error:.2e}", "" if peak is None else f"{peak:.1f}"]
    return " | ".join((f"| {what}", *_times(eager), *_times(compiled), *told)) + " |"


def _times(line: Line | None) -> tuple[str, str]:
    if line is None:
        return "not run", ""
    if "ms" not in line:
        return f"failed: {line['failed'].splitlines()[0][:60]}", ""
    return f"{line['ms']:.1f}", f"{line['least']:.1f} to {line['most']:.1f}"


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

The rewritten programs, as bundles hold them, run by the torch executor's own code on two NVIDIA H100 (80 GB, one host) over NCCL,
beside the dense model on one of them and diffusers' own context parallelism: bfloat16 unless the name says otherwise, random weights
and inputs, torch's attention by cuDNN in all rows. Milliseconds of one forward, all ranks together: median of ten. Error: of the output
against the dense model in float32, root mean square; the first row's is that of the precision alone. Every table is one run, and has
the dense model beside; only rows of one table were measured side by side. `python -m benchmarks.two_gpus` prepares, runs and prints this page.

**TensorRT did not run here.** TensorRT-RTX does not take compute capability 9.0, which the H100 has, and was not installed there; that
`--executor tensorrt` refuses such a GPU is tested on a stand-in (`tests/runtime/test_tensorrt.py`). What these numbers tell is whether the programs are right over real collectives, and what each strategy moves and computes;
an engine's own speed they do not tell.

`flux-2-4` is FLUX.1-dev with 2 joint and 4 single blocks, at 1024x1024 (4,608 tokens) and 2048x2048 (16,896); `flux-whole` has all
57 (11.9 B parameters) at 1024x1024; `flux-1-1-fp32` one of each, in float32 with TF32 off. "not run": the machine's time was over.

{tables}

What is not good here: compiled, our programs take 6 (Ring) to 9 percent (Ulysses) longer than diffusers' at 2048x2048, Ring 7 percent
at 1024x1024 whole; in part at 1024x1024 half as long again and more, slower than one GPU. Copies between the layout that the model has and the one that a collective sends are most of it: torch.compile does not fuse
them (0.8 to 1.5 ms a kind in the profile). Where a forward is short, starting kernels from Python takes longer than running them, and
the exchanges of Ulysses and AllGather KV, which are more or larger, show it: least and most lie far apart.

Since these tables were measured, two causes of that were found and mended. TorchInductor has no lowering for the `_reshape_copy` that
decomposition leaves: every reshape was a copy of its own, views too. And `cp-convert run --cuda-graph`, `open(..., graph=True)` now replay torch's
forwards, collectives included, as a CUDA graph. Two GPUs could not be had again; what one H200 shows is in [forecast.md](forecast.md): a rank's
arithmetic of two, compiled and replayed, without its wires, fell from 41.0 ms (Ulysses), 41.2 (AllGather KV) and 39.3 (Ring) to 38.0, 37.3 and 37.4 at 16,896
tokens, and from 8.3, 8.6 and 8.1 to 7.6, 7.3 and 7.6 at 4,608, half of the dense model's 73.8 and 13.7. Two processes on that one GPU, over NCCL, got bit for bit
the same from replayed forwards as from others, all four strategies, inputs changing.

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
