"""A bundle: the end of a conversion, what it holds, whether it is whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
from rich.markup import escape
from rich.table import Table

from ..bundle.folder import Check
from ..bundle.manifest import Attention, Manifest, Proof, of_rank
from ..bundle.variants import all_variants
from ..mesh import SEQUENCE
from .dynamic import range_rows, shape_of
from .lora import sets_table
from .mesh import axes_rows, guidance_line, ranks_of, tensor_line
from .pieces import engines_table, pieces_line, pieces_table, steps_line
from .quantized import quantized_rows
from .screen import Screen
from .variants import engine_bytes, variants_table
from .words import count, local_of, plural, size, starred, table_of


def converted(screen: Screen, manifest: Manifest, out: Path) -> None:
    """The end of a conversion."""
    if screen.as_json:
        screen.document(
            {"status": "ok", "bundle": str(out), "manifest": msgspec.to_builtins(manifest)}
        )
    if screen.verbosity < 0:
        return
    for text in _notes(manifest):
        screen.err.print(f"[bold yellow]note[/] {escape(text)}", soft_wrap=True)
    console = screen.err if screen.as_json else screen.out
    views = all_variants(manifest)
    total = sum(map(engine_bytes, views))
    console.print(
        f"[bold green]{plural(len(views) * len(manifest.engines), 'engine')}[/] of "
        f"{escape(manifest.model.name)} "
        f"({count(manifest.model.parameters)} parameters, {_precision(manifest)}, "
        f"{manifest.strategy} over {ranks_of(manifest)}), {size(total)} in "
        f"[bold]{escape(str(out))}[/]",
        soft_wrap=True,
    )
    for row in (
        ("proof", _proof_line(manifest.proof)),
        *range_rows(manifest),
        *quantized_rows(manifest),
        ("weights", _weights_line(manifest)),
        *(("guidance", line) for line in [guidance_line(manifest)] if line is not None),
        *(("shared", line) for line in [tensor_line(manifest)] if line is not None),
        *(("pieces", line) for line in [pieces_line(manifest)] if line is not None),
        ("attention", _attention_line(manifest.attention)),
        ("collectives", _collectives_line(manifest)),
        ("built by", _backend_line(manifest)),
        ("runs on", runs_on_line(manifest)),
        ("seconds", "  ".join(f"{k} {v:.1f}" for k, v in manifest.timings.items())),
    ):
        console.print(f"  {row[0]:12} {escape(row[1])}", soft_wrap=True)
    if manifest.variants:
        console.print(variants_table(manifest))


def _notes(manifest: Manifest) -> Iterator[str]:
    """What a person may not have meant: nothing is wrong with it, and nothing else tells it."""
    numbers = [f"{one.name} = {one.value}" for one in manifest.frozen if _is_number(one.value)]
    if numbers:
        yield (
            f"{', '.join(numbers)}: Python numbers among the inputs are part of the engines; give "
            "a tensor for what changes from call to call."
        )
    lost = manifest.proof.dense
    if manifest.proof.against == "rounded" and lost is not None:
        yield (
            f"in {manifest.precision} the dense model itself loses {lost.max:.1e} of its output "
            "with these example inputs and weights, so the ranks were compared with what it "
            "returns in that precision. Often one number is lost: bf16 has 3504 for FLUX's "
            "guidance of 3.5 * 1000, and 4000 for 4.0 * 1000. Example inputs that the precision "
            "holds show more."
        )
    rows = Counter(
        (one.kind, one.tensor, starred(one.module) or "the model", one.reason)
        for one in manifest.plan
        if not one.applied and one.reason != "not passed"
    )
    for kind, tensor, module, reason in rows:
        yield f"the plan's {kind} of {tensor} of {module} has no effect: it {reason}."


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def inspected(screen: Screen, manifest: Manifest, folder: Path) -> None:
    """A manifest as tables."""
    if screen.as_json:
        screen.document(msgspec.to_builtins(manifest))
        return
    print_ = screen.out.print
    print_(f"[bold]{escape(str(folder))}[/]")
    print_(_facts(manifest))
    if manifest.variants:
        print_(variants_table(manifest))
        print_(f"What follows is of {manifest.request.variant}; --variant NAME shows another.")
    print_(engines_table(manifest))
    if manifest.pieces:
        print_(pieces_table(manifest))
        print_(steps_line(manifest))
    if manifest.lora:
        print_(sets_table(manifest.lora))
    if manifest.collectives:
        print_(_collectives_table(manifest))
    if manifest.attention:
        print_(_attention_table(manifest.attention))
    print_(_io_table(manifest))
    if manifest.plan:
        print_(_plan_table(manifest))
    if manifest.sharding:
        print_(_sharding_table(manifest))


def verified(screen: Screen, checks: Sequence[Check]) -> None:
    """What ``verify`` looked at."""
    damaged = [check for check in checks if check.problem]
    if screen.as_json:
        screen.document(
            {
                "status": "damaged" if damaged else "ok",
                "checks": [{"subject": c.subject, "problem": c.problem} for c in checks],
            }
        )
        return
    for check in checks:
        mark = f"[red]{escape(check.problem)}[/]" if check.problem else "[green]ok[/]"
        if check.problem or screen.verbosity >= 0:
            screen.out.print(f"  {check.subject:16} {mark}", soft_wrap=True)


def _facts(manifest: Manifest) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    model = manifest.model
    for name, value in (
        ("model", f"{model.name}, {count(model.parameters)} parameters ({model.source})"),
        (
            "strategy",
            f"{manifest.strategy} over {ranks_of(manifest)}, {_precision(manifest)}",
        ),
        *((f"axis {name}", groups) for name, groups in axes_rows(manifest)),
        *(("guidance", line) for line in [guidance_line(manifest)] if line is not None),
        *(("shared", line) for line in [tensor_line(manifest)] if line is not None),
        ("weights", _weights_line(manifest)),
        ("backend", _backend_line(manifest)),
        ("runs on", runs_on_line(manifest)),
        ("proof", _proof_line(manifest.proof)),
        *range_rows(manifest),
        *quantized_rows(manifest),
        (
            "created",
            (
                f"{manifest.created} by {manifest.tool.name} {manifest.tool.version}, "
                f"torch {manifest.torch}, Torch-TensorRT {manifest.torch_tensorrt}"
            ),
        ),
        ("seconds", "  ".join(f"{k} {v:.1f}" for k, v in manifest.timings.items())),
        ("command", manifest.command),
    ):
        table.add_row(name, escape(value))
    for text in manifest.backend.workarounds:
        table.add_row("workaround", escape(text))
    for frozen in manifest.frozen:
        table.add_row("frozen", escape(f"{frozen.name} = {frozen.value}"))
    return table


def _weights_line(manifest: Manifest) -> str:
    shared = "; one engine for all ranks" if manifest.layout == "shared" else ""
    if manifest.weights_mode == "embedded":
        return f"in every engine{shared}"
    files = sorted({weight.file for weight in manifest.weights})
    where = ", ".join(files) if len(files) < 3 else f"{len(files)} files such as {files[0]}"
    own = of_rank(manifest.weights, 0)
    total = size(sum(weight.bytes for weight in own))
    each = " of every rank" if len(own) < len(manifest.weights) else ""
    return f"{plural(len(own), 'engine input')}, {total}{each}, from {where}{shared}"


def _collectives_table(manifest: Manifest) -> Table:
    table = table_of(
        "Collectives of one rank, per forward",
        "kind", "TensorRT layer", "count", "sent",
        right=("count", "sent"),
    )  # fmt: skip
    for one in manifest.collectives:
        table.add_row(one.kind, one.layer, str(one.count), size(one.bytes_sent))
    return table


def _attention_table(sites: Sequence[Attention]) -> Table:
    numbers = ("count", "heads x dim", "queries", "keys")
    table = table_of("Attention", "module", *numbers, "", right=numbers)
    rows = Counter(
        (
            starred(s.module),
            f"{s.heads} x {s.head_dim}" + ("" if s.heads == s.kv_heads else f" ({s.kv_heads} kv)"),
            local_of(s.local_query, s.global_query),
            local_of(s.local_key, s.global_key),
            _done(s),
        )
        for s in sites
    )
    for (module, shape, queries, keys, what), times in rows.items():
        table.add_row(escape(module), str(times), shape, queries, keys, escape(what))
    return table


def _done(site: Attention) -> str:
    """What became of an attention, in words."""
    notes = ["over FP8 codes"] if site.codes == "fp8" else []
    notes += ["causal"] if site.causal else []
    notes += ["masked"] if site.mask else []
    notes += [f"{site.padding_percent:.1f} % padding"] if site.padding_percent else []
    what = "rewritten" if site.rewritten else f"left alone: {site.reason}"
    return ", ".join([what, *notes])


def _io_table(manifest: Manifest) -> Table:
    whole = "the whole" if manifest.pieces else "every engine"
    table = table_of(f"Bindings of {whole}", "mode", "name", "dtype", "shape")
    for io in manifest.io:
        table.add_row(io.mode, escape(io.name), io.dtype, shape_of(io, manifest.dynamic))
    return table


def _plan_table(manifest: Manifest) -> Table:
    table = table_of(
        "The model's plan", "kind", "module", "tensor", "dim", "length", right=("dim",)
    )
    for entry in manifest.plan:
        length = str(entry.global_size) if entry.applied else f"not applied: {entry.reason}"
        module = escape(entry.module or "(model)")
        table.add_row(entry.kind, module, escape(entry.tensor), str(entry.dim), escape(length))
    return table


def _sharding_table(manifest: Manifest) -> Table:
    numbers = ("count", "dim", "tokens", "padded")
    found = "found" if manifest.plan_source == "inferred" else "after the model's plan"
    table = table_of(f"Sharding, {found}", "kind", "what", "module", *numbers, right=numbers)
    rows = Counter(
        (
            entry.kind if entry.axis == SEQUENCE else f"{entry.kind} ({entry.axis})",
            entry.operator,
            starred(entry.module),
            str(entry.dim),
            f"{entry.local} of {' + '.join(map(str, entry.segments))}",
            f"{entry.padding_percent:.1f} %" if entry.padding else "",
        )
        for entry in manifest.sharding
    )
    for (kind, what, module, *rest), times in rows.items():
        table.add_row(kind, escape(what), escape(module), str(times), *rest)
    return table


_LEVELS = {"program": "program", "network": "program and networks", "none": "nothing"}


def _precision(manifest: Manifest) -> str:
    wide = f" with {', '.join(manifest.float32)} in float32" if manifest.float32 else ""
    return manifest.precision + wide


def _proof_line(proof: Proof) -> str:
    if proof.status == "skipped":
        return "skipped (--no-proof): nothing is known about these engines' numbers"
    assert proof.bound is not None
    line = (
        f"passed ({_LEVELS[proof.level]}): relative error "
        f"{max(e.max for e in proof.ranks):.1e}{_of(proof)} (bound {proof.bound.max:.1e}), "
        f"in float32 arithmetic {max(e.max for e in proof.algebra):.1e}"
    )
    if proof.network is not None:
        line += f", of the networks {max(e.max for e in proof.network.algebra):.1e}"
    if proof.control is not None:
        line += f"; without communication {proof.control.max:.1e}"
    line += "".join(f"; without that along {n} {e.max:.1e}" for n, e in proof.controls.items())
    return line + ("; proven when this same job was run before" if proof.recalled else "")


def _of(proof: Proof) -> str:
    """What the relative error is relative to, where that is not the reference."""
    if proof.against == "reference" or proof.dense is None:
        return ""
    return f" of the dense model's own output in this precision, which loses {proof.dense.max:.1e}"


def _attention_line(sites: Sequence[Attention]) -> str:
    done = sum(site.rewritten for site in sites)
    kept = Counter(site.reason for site in sites if not site.rewritten)
    eight = sum(site.codes is not None for site in sites)
    what = f"{done} rewritten" + "".join(f", {n} left alone ({why})" for why, n in kept.items())
    return f"{what}, {eight} over FP8 codes" if eight else what


def _collectives_line(manifest: Manifest) -> str:
    parts = [f"{c.count} {c.kind}, {size(c.bytes_sent)} sent" for c in manifest.collectives]
    return ("; ".join(parts) + " by each rank per forward") if parts else "none"


def runs_on_line(manifest: Manifest) -> str:
    """Which release, NCCL and GPUs the engines need."""
    needed = manifest.runs_on
    if needed.doubt is not None:
        return f"may not run: {needed.doubt}"
    release = "" if needed.release is None else f" {needed.release} or later"
    nccl = "" if needed.nccl is None else f", NCCL {needed.nccl} or later"
    gpus = ", ".join(needed.compute_capabilities) or "that of this machine's GPU"
    return f"{manifest.backend.name}{release}{nccl}, compute capability {gpus}"


def _backend_line(manifest: Manifest) -> str:
    backend = manifest.backend
    targets = ", ".join(backend.compute_capabilities) or "this machine's GPU"
    return f"{backend.name} {backend.version} for compute capability {targets}"
