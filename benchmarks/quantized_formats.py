"""Small models in every quantized format, by strategy and world: proven, refused, or failed.

    python -m benchmarks.quantized_formats [--models Wan,FLUX.1] [--formats modelopt-fp8]
        [--strategies ring] [--worlds 2] [--missing] [--ran]

A cell is a whole conversion in bfloat16 with external weights: one engine of all targets of the
format (:mod:`.formats`), proven to its network, and the types of operands read out of it. Where
bfloat16 itself loses so much that nothing can be proven, it is float16. A model
in a format is loaded, measured and traced once. Formats that a target does not multiply must be
refused for it. With ``--ran`` the bundle is run, too (:mod:`.ran`). Results are kept by cell, so
that a run replaces its own only; ``--missing`` leaves those alone that are proven or refused, and
have run where ``--ran`` is given. What ends in something else than an error of ours is a defect,
and ends the run.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from .formats_page import STRATEGIES, WORLDS, page

Cell = dict[str, Any]
TYPES = {"fp8": "fp8_e4m3", "int8": "int8", "nvfp4": "fp4_e2m1"}
"""What the engine's text calls codes."""
OLD = "8.9"
"""A target that lacks NVFP4."""
NOTHING = "nothing can be proven in this precision"
"""What is said where the dense model itself is too far off in it."""


def main() -> None:
    """Run the cells and write the table."""
    from .formats import FORMATS, MODELS

    parser = argparse.ArgumentParser(description=__doc__)
    for name, known in (("models", MODELS), ("formats", FORMATS), ("strategies", STRATEGIES),
                        ("worlds", WORLDS)):  # fmt: skip
        joined = ",".join(map(str, known))
        parser.add_argument(f"--{name}", default=joined, help=f"of {joined}")
    parser.add_argument("--missing", action="store_true", help="only what is not known yet")
    parser.add_argument("--ran", action="store_true", help="run the bundles, too")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/quantized_formats.json"))
    parser.add_argument("--out", type=Path, default=Path("docs/quantized-formats.md"))
    options = parser.parse_args()
    known = json.loads(options.results.read_text()) if options.results.exists() else {}
    asked = list(product(options.strategies.split(","), map(int, options.worlds.split(","))))
    with tempfile.TemporaryDirectory() as folder:
        for model, kind in product(options.models.split(","), options.formats.split(",")):
            own = known.setdefault(model, {}).setdefault(kind, {})
            done = partial(_is_done, own, ran=options.ran)
            cells = [one for one in asked if not (options.missing and done(*one))]
            for key, cell in _run(model, kind, cells, Path(folder), options.ran) if cells else ():
                own[key] = cell
                options.results.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
                print(model, kind, key, json.dumps(cell)[:400], flush=True)
    options.out.write_text(page(known, {name: one.told for name, one in FORMATS.items()}))


def _is_done(own: dict[str, Cell], strategy: str, world: int, *, ran: bool) -> bool:
    cell = own.get(f"{strategy} {world}", {})
    has_run = "failed" not in cell.get("ran", {"failed": ""})
    return "refused" in cell or ("proven" in cell and (has_run or not ran))


def _run(
    model: str, kind: str, cells: Sequence[tuple[str, int]], run: Path, ran: bool
) -> Iterator[tuple[str, Cell]]:
    """The cells of a model in a format, by strategy and world.

    In the folder ``run`` is what formats of a model have in common, by cp-convert's cache.
    """
    import torch

    from .formats import FORMATS, small

    torch.set_num_threads(1)
    one = FORMATS[kind]
    with tempfile.TemporaryDirectory(dir=run) as name:
        folder = Path(name)
        model_file, weights = one.model(made := small(model), folder), None
        if one.write is not None:
            weights = one.write(made, folder)
        given = {"model": model_file, "weights": weights, "cache": run / "cache", **one.options}
        given |= {"program": "yes" if ran else "no"}
        refused = {} if OLD in one.targets else {OLD: _refusal(given, folder, *cells[0])}
        jobs = [_job(given, s, w, folder / f"{s}-{w}", one.targets) for s, w in cells]
        for ended in _ended(jobs):
            cell, own = _told(ended, refused), ended
            if NOTHING in cell.get("failed", ""):
                (own,) = _ended([replace(ended.job, precision="fp16")])
                cell = _told(own, refused) | {"bf16": cell["failed"]}
            yield f"{own.job.strategy} {own.job.world}", cell | _ran(own, cell, ran, made.inputs)
            shutil.rmtree(own.job.out, ignore_errors=True)


def _ended(jobs: Sequence[Any]) -> Iterator[Any]:
    """What becomes of jobs of the same targets."""
    from cp_convert.backends import select
    from cp_convert.matrix import convert_all
    from cp_convert.progress import Progress

    backend = select("auto", jobs[0].compute_capabilities)
    yield from convert_all([(job, backend) for job in jobs], lambda *_: nullcontext(Progress()))


def _ran(ended: Any, cell: Cell, asked: bool, inputs: Mapping[str, Any]) -> Cell:
    from .ran import ran

    return {"ran": ran(ended.job.out, inputs)} if asked and "proven" in cell else {}


def _job(
    given: dict[str, Any], strategy: str, world: int, out: Path, targets: Sequence[str]
) -> Any:
    from cp_convert.job import Job

    return Job(
        **given, strategy=strategy, world=world, out=out, precision="bf16",
        weights_mode="external", proof="network", jobs=1, compute_capabilities=tuple(targets),
    )  # fmt: skip


def _refusal(given: dict[str, Any], folder: Path, strategy: str, world: int) -> str:
    """What is said where the format is asked for on a target that does not multiply it."""
    from cp_convert.errors import UsageError
    from cp_convert.model.load import load, surroundings

    try:
        job = _job(given, strategy, world, folder / "old", [OLD])
        with surroundings(job):
            load(job)
    except UsageError as error:
        return _words(error, folder)
    return ""


def _told(ended: Any, refused: dict[str, str]) -> Cell:
    """What became of a cell; an engine that multiplies something else has failed."""
    from cp_convert.errors import CannotConvert, UsageError

    seconds = {"seconds": round(ended.seconds, 1)}
    if ended.manifest is None:
        kind = "refused" if isinstance(ended.error, CannotConvert | UsageError) else "failed"
        return {kind: _words(ended.error, ended.job.out.parent)}
    if not all(refused.values()):
        return {"failed": f"it is not refused for {', '.join(refused)}"}
    found = _proven(ended.manifest, ended.job.out)
    wrong = _wrong(found)
    if wrong:
        return {"failed": wrong}
    return {"proven": {k: _short(one) for k, one in found.items()} | seconds, "without": refused}


def _short(value: Any) -> Any:
    """Three digits of a number are kept."""
    return float(f"{value:.2e}") if isinstance(value, float) else value


def _words(error: Any, folder: Path) -> str:
    """What is said, where, and what to try; without places of this machine."""
    where, hint = (f" [{error.where}]" if error.where else ""), error.hint or ""
    text = re.sub(rf"{folder}/|/\S*site-packages/", "", f"{error}{where} Hint: {hint}")
    return " ".join(text.split())[:600]


def _proven(manifest: Any, out: Path) -> dict[str, Any]:
    """Errors are the largest of all ranks and of both proofs, of the program and the networks.

    Types are read out of rank 0's engine; that is everybody's where the layout is ``shared``.
    """
    from .plans import read_plan

    proof, told = manifest.proof, manifest.quantization
    plan = read_plan(out / manifest.engines[0].file)
    found = {
        "error": max(e.max for e in (*proof.algebra, *proof.network.algebra)),
        "half": max(e.rms for e in (*proof.ranks, *proof.network.ranks)),
        "half_bound": proof.bound.rms,
        "control": proof.control.max,
        "targets": manifest.runs_on.compute_capabilities,
        "layout": manifest.layout,
        "products": _types(one[:2] for one in plan.products()),
        "attentions": _types(map(_three, plan.attentions())),
    }
    if told is None:
        return found
    if told.codes is not None:
        found["rounded"] = max(e.max for e in (*told.codes.ranks, *told.codes.networks))
        found["rounded_bound"] = told.codes.bound.max
        found["codes"], found["flipped"] = told.codes.codes, told.codes.flipped
    if told.loss is not None:
        found["loss"] = told.loss.rms
    if told.linears is not None:
        found["linears"] = told.linears.products
    if told.attentions is not None:
        found["attending"] = told.attentions.products
    return found


def _three(types: Sequence[str]) -> Sequence[str]:
    """The type of queries, keys and values, among which a mask stands; all where none is thrice."""
    return [one for one, count in Counter(types).items() if count >= 3] or types


def _types(all_types: Any) -> dict[str, int]:
    """How many by the type of their operands; those of two types by both."""
    return dict(Counter("+".join(sorted(set(types))) for types in all_types))


def _wrong(found: dict[str, Any]) -> str:
    """Where the engine does not multiply what the manifest says; nothing where it does."""
    products, attentions = found["products"], found["attentions"]
    if mixed := [types for types in (*products, *attentions) if "+" in types]:
        return f"the engine multiplies {', '.join(mixed)}"
    for kind, name in TYPES.items():
        layers = found.get("linears", {}).get(kind, 0)
        if products.get(name, 0) != layers:
            return f"the engine multiplies {products.get(name, 0)} times {name}, not {layers}"
    coded = found.get("attending", {}).get("fp8", 0)
    if (coded > 0) != (attentions.get(TYPES["fp8"], 0) >= max(coded, 1)):
        return f"the engine's attentions read {attentions}, and {coded} are said to read codes"
    return ""


if __name__ == "__main__":
    main()
