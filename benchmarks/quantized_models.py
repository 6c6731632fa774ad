"""Every transformer class of diffusers with ``--quantize``: proven, refused, or failed.

    python -m benchmarks.quantized_models [--kinds fp8,int8] [CLASS ...]

The classes are those of :mod:`.zoo`, float32, the plan inferred, Ulysses, world 2. A class is
measured and traced once for all kinds. Proven is the program: all ranks in lockstep against the
dense model, without rounding and with it (docs/adr/0022); no engine is built. Results are kept by
class and kind, so that a run replaces its own cells only.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .classes import in_process
from .quantized_page import page

TIMEOUT = 900
KINDS = "fp8,int8"
_ONE_CLASS = "diffusers.models.transformers.transformer_flux"
"""Brings what all classes import."""


def main() -> None:
    """Run the classes and write the table."""
    from benchmarks.zoo import classes

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("classes", nargs="*")
    parser.add_argument("--kinds", default=KINDS, help="joined by commas")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/quantized_models.json"))
    parser.add_argument("--out", type=Path, default=Path("docs/quantized-models.md"))
    options = parser.parse_args()
    known = json.loads(options.results.read_text()) if options.results.exists() else {}
    for name in options.classes or classes():
        found = in_process(
            name, options.kinds.split(","), _begun, _proven, timeout=TIMEOUT, first=_ONE_CLASS
        )
        known.setdefault(name, {}).update(found)
        options.results.write_text(json.dumps(known, indent=1, sort_keys=True))
        for kind, result in found.items():
            print(name, kind, json.dumps(result)[:300], flush=True)
    options.out.write_text(page(known, len(classes())))


def _begun(name: str, kinds: Sequence[str]) -> Any:
    """Measured, traced and decomposed, and not quantized yet."""
    from benchmarks.models import Run, _loaded
    from cp_convert import stages
    from cp_convert.cache.store import Cache
    from cp_convert.progress import Clock, Progress

    loaded = _loaded(Run(name, "inferred", 2), "ulysses", Path())
    asked = replace(loaded, job=replace(loaded.job, proof="program"))
    return stages.begin(asked, None, Cache(None), Clock(Progress()))


def _proven(begun: Any, kind: str) -> dict[str, Any]:
    from cp_convert import stages
    from cp_convert.progress import Clock, Progress
    from cp_convert.quantizing import quantized

    clock = Clock(Progress())
    loaded = replace(begun.loaded, job=replace(begun.loaded.job, quantize=kind))
    captured = quantized(loaded, begun.captured, clock)
    ready = stages.prove_program(replace(begun, loaded=loaded, captured=captured), clock)
    proof, linears = ready.proof, captured.linears
    assert proof is not None and proof.codes is not None and linears is not None
    return {
        "layers": len(linears.layers),
        "kept": Counter(one.reason for one in linears.kept),
        "error": max(error.max for error in proof.algebra),
        "rounded": max(error.max for error in proof.codes.ranks),
        "bound": proof.codes.bound.max,
        "codes": proof.codes.codes,
        "flipped": proof.codes.flipped,
        "loss": proof.codes.loss.rms,
        "control": None if proof.control is None else proof.control.max,
    }


if __name__ == "__main__":
    main()
