"""Everything a person sees: tables, progress and errors. The only place that knows rich."""

from __future__ import annotations

import json
import re
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as Bars
from rich.table import Table

from ..advise.forecast import Forecast, Option, told
from ..bundle.folder import Check
from ..bundle.manifest import Attention, Manifest, Proof
from ..cache.store import Held
from ..errors import ConvertError
from ..model.preset import TINY, Preset
from ..progress import Progress


class Screen:
    """Where things are shown: results on stdout, errors and progress on stderr.

    Args:
        as_json: print one JSON document on stdout and everything else on stderr.
        verbosity: -1 quiet, 0 normal, 1 and 2 more.
    """

    def __init__(self, *, as_json: bool = False, verbosity: int = 0) -> None:
        self.as_json = as_json
        self.verbosity = verbosity
        self.out = Console(highlight=False)
        self.err = Console(stderr=True, highlight=False)

    def document(self, value: object) -> None:
        """Print ``value`` as the one JSON document."""
        print(json.dumps(value, indent=2))  # noqa: T201

    def error(self, error: ConvertError) -> None:
        """Show an error: what, where, why, what to try; its traceback with ``-vv``."""
        if self.as_json:
            self.document(
                {"status": "error", "exit_code": error.exit_code, "error": error.as_dict()}
            )
        if self.verbosity >= 2:
            self.err.print(escape("".join(traceback.format_exception(error))))
        self.err.print(f"[bold red]{error.title}[/]: {escape(error.message)}", soft_wrap=True)
        if error.where:
            self.err.print(f"  [bold]where[/]  {escape(error.where)}", soft_wrap=True)
        if error.hint:
            self.err.print(f"  [bold]try[/]    {escape(error.hint)}", soft_wrap=True)

    def note(self, text: str) -> None:
        """A line for a person, unless quiet."""
        if self.verbosity >= 0:
            (self.err if self.as_json else self.out).print(escape(text), soft_wrap=True)

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """Progress bars on stderr; plain lines where that is no terminal, and with ``-v``."""
        if self.verbosity < 0:
            yield Progress()
        elif self.verbosity > 0 or not self.err.is_terminal:
            yield _Lines(self.err)
        else:
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description:10}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[items]}", markup=False),
            )
            with Bars(*columns, console=self.err, transient=True) as bars:
                yield _Bars(bars)

    def converted(self, manifest: Manifest, out: Path) -> None:
        """The end of a conversion."""
        if self.as_json:
            self.document(
                {"status": "ok", "bundle": str(out), "manifest": msgspec.to_builtins(manifest)}
            )
        if self.verbosity < 0:
            return
        console = self.err if self.as_json else self.out
        # Equal engines are one file under several names.
        total = sum({engine.sha256: engine.bytes for engine in manifest.engines}.values())
        console.print(
            f"[bold green]{_plural(len(manifest.engines), 'engine')}[/] of "
            f"{escape(manifest.model.name)} "
            f"({_count(manifest.model.parameters)} parameters, {manifest.precision}, "
            f"{manifest.strategy} over {_plural(manifest.world, 'rank')}), {_size(total)} in "
            f"[bold]{escape(str(out))}[/]",
            soft_wrap=True,
        )
        for row in (
            ("proof", _proof_line(manifest.proof)),
            ("weights", _weights_line(manifest)),
            ("attention", _attention_line(manifest.attention)),
            ("collectives", _collectives_line(manifest)),
            ("built by", _backend_line(manifest)),
            ("seconds", "  ".join(f"{k} {v:.1f}" for k, v in manifest.timings.items())),
        ):
            console.print(f"  {row[0]:12} {escape(row[1])}", soft_wrap=True)

    def inspected(self, manifest: Manifest, folder: Path) -> None:
        """A manifest as tables."""
        if self.as_json:
            self.document(msgspec.to_builtins(manifest))
            return
        print_ = self.out.print
        print_(f"[bold]{escape(str(folder))}[/]")
        print_(_facts(manifest))
        print_(_engines_table(manifest))
        if manifest.collectives:
            print_(_collectives_table(manifest))
        if manifest.attention:
            print_(_attention_table(manifest.attention))
        print_(_io_table(manifest))
        if manifest.plan:
            print_(_plan_table(manifest))
        if manifest.sharding:
            print_(_sharding_table(manifest))

    def cache(self, folder: Path, held: Sequence[Held]) -> None:
        """What a cache holds."""
        if self.as_json:
            kinds = {h.kind: {"entries": h.entries, "bytes": h.bytes} for h in held}
            self.document({"folder": str(folder), "kinds": kinds})
            return
        self.out.print(f"[bold]{escape(str(folder))}[/]", soft_wrap=True)
        for one in held:
            self.out.print(f"  {one.kind:8} {one.entries:5}  {_size(one.bytes)}")

    def cleared(self, folder: Path, freed: int) -> None:
        """What was removed from a cache."""
        if self.as_json:
            self.document({"folder": str(folder), "bytes": freed})
        else:
            self.note(f"{_size(freed)} removed from {folder}.")

    def presets(self, presets: Mapping[str, Preset]) -> None:
        """All presets as a table."""
        if self.as_json:
            self.document({name: msgspec.to_builtins(one) for name, one in presets.items()})
            return
        table = _table(
            "", "preset", "parameters", "resolution", "tokens", "strategy", "world",
            right=("parameters", "tokens", "world"),
        )  # fmt: skip
        for name, one in presets.items():
            facts = (name, _count(one.parameters), one.strategy, str(one.world))
            for resolution in (r for r in one.resolutions if r != TINY):
                title, parameters, strategy, world = facts
                tokens = f"{one.numbers(resolution, one.config)['tokens']:,}"
                table.add_row(title, parameters, resolution, tokens, strategy, world)
                facts = ("", "", "", "")
        self.out.print(table)

    def preset(self, preset: Preset, text: str) -> None:
        """One preset, as its file says it."""
        if self.as_json:
            self.document(msgspec.to_builtins(preset))
        else:
            self.out.print(text, end="", markup=False, soft_wrap=True)

    def planned(self, found: Forecast) -> None:
        """All options as a table, and the recommendation."""
        if self.as_json:
            self.document({**msgspec.to_builtins(found), "status": "ok"})
            return
        self.out.print(
            f"[bold]{escape(found.model)}[/], {_count(found.parameters)} parameters in "
            f"{found.precision}, {_plural(found.attentions, 'sharded attention')}, "
            f"{found.tokens:,} tokens; {escape(found.hardware.title)}",
            soft_wrap=True,
        )
        table = _table(
            "", "world", "strategy", "coll.", "sent", "memory", "compute", "comm.", "forward",
            "speed-up",
            right=("world", "coll.", "sent", "memory", "compute", "comm.", "forward", "speed-up"),
        )  # fmt: skip
        table.columns[1].no_wrap = True
        table.box, table.padding, table.collapse_padding = None, (0, 1), True
        for option in found.options:
            table.add_row(*_option_row(option))
        self.out.print(table)
        for line in dict.fromkeys(
            f"{o.title} over {o.world} ranks: {o.refused}" for o in found.options if o.refused
        ):
            self.out.print(f"  {escape(line)}", soft_wrap=True)
        self.out.print(
            "Collectives, bytes sent and memory (weights and activations) are one rank's; times "
            "and activations are estimated; beside the speed-up stands its share of the ideal.",
            soft_wrap=True,
        )
        self.out.print(f"[bold]{escape(found.recommendation)}[/]", soft_wrap=True)

    def verified(self, checks: Sequence[Check]) -> None:
        """What ``verify`` looked at."""
        damaged = [check for check in checks if check.problem]
        if self.as_json:
            self.document(
                {
                    "status": "damaged" if damaged else "ok",
                    "checks": [{"subject": c.subject, "problem": c.problem} for c in checks],
                }
            )
            return
        for check in checks:
            mark = f"[red]{escape(check.problem)}[/]" if check.problem else "[green]ok[/]"
            if check.problem or self.verbosity >= 0:
                self.out.print(f"  {check.subject:16} {mark}", soft_wrap=True)


class _Lines(Progress):
    """One plain line a stage."""

    def __init__(self, console: Console) -> None:
        self.console = console

        self.begun: dict[str, float] = {}

    def start(self, stage: str, total: int) -> None:
        self.console.print(f"{stage} ...", soft_wrap=True)

    def begin(self, stage: str, item: str) -> None:
        self.begun[item] = time.monotonic()
        self.console.print(f"{stage} {item} ...", soft_wrap=True)

    def end(self, stage: str, item: str) -> None:
        seconds = time.monotonic() - self.begun.pop(item)
        self.console.print(f"{stage} {item} done in {seconds:.1f} s", soft_wrap=True)

    def finish(self, stage: str, seconds: float) -> None:
        self.console.print(f"{stage} done in {seconds:.1f} s")


class _Bars(Progress):
    """One bar a stage."""

    def __init__(self, bars: Bars) -> None:
        self.bars = bars
        self.tasks: dict[str, Any] = {}
        self.items: list[str] = []

    def start(self, stage: str, total: int) -> None:
        self.tasks[stage] = self.bars.add_task(stage, total=total, items="")

    def begin(self, stage: str, item: str) -> None:
        self._tell(stage, [*self.items, item])

    def end(self, stage: str, item: str) -> None:
        self._tell(stage, [one for one in self.items if one != item])

    def _tell(self, stage: str, items: list[str]) -> None:
        self.items = items
        self.bars.update(self.tasks[stage], items=", ".join(items))

    def step(self, stage: str) -> None:
        self.bars.advance(self.tasks[stage])

    def finish(self, stage: str, seconds: float) -> None:
        task = self.bars.tasks[self.tasks[stage]]
        self.bars.update(self.tasks[stage], completed=task.total)
        self.bars.stop_task(self.tasks[stage])


def _table(title: str, *columns: str, right: Iterable[str] = ()) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column in columns:
        is_number = column in right
        justify: Any = "right" if is_number else "left"
        table.add_column(column, justify=justify, overflow="fold", no_wrap=is_number)
    return table


def _facts(manifest: Manifest) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    model = manifest.model
    for name, value in (
        ("model", f"{model.name}, {_count(model.parameters)} parameters ({model.source})"),
        (
            "strategy",
            f"{manifest.strategy} over {_plural(manifest.world, 'rank')}, {manifest.precision}",
        ),
        ("weights", _weights_line(manifest)),
        ("backend", _backend_line(manifest)),
        ("proof", _proof_line(manifest.proof)),
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
    total = sum(weight.bytes for weight in manifest.weights)
    return f"{_plural(len(manifest.weights), 'engine input')}, {_size(total)}, from {where}{shared}"


def _engines_table(manifest: Manifest) -> Table:
    table = _table(
        "Engines",
        "rank",
        "file",
        "size",
        "activations",
        "sha256",
        right=("rank", "size", "activations"),
    )
    for engine in manifest.engines:
        table.add_row(
            str(engine.rank),
            escape(engine.file),
            _size(engine.bytes),
            "" if engine.activation_bytes is None else _size(engine.activation_bytes),
            engine.sha256[:16] + "...",
        )
    return table


def _collectives_table(manifest: Manifest) -> Table:
    table = _table(
        "Collectives of one rank, per forward",
        "kind", "TensorRT layer", "count", "sent",
        right=("count", "sent"),
    )  # fmt: skip
    for one in manifest.collectives:
        table.add_row(one.kind, one.layer, str(one.count), _size(one.bytes_sent))
    return table


def _attention_table(sites: Sequence[Attention]) -> Table:
    numbers = ("count", "heads x dim", "queries", "keys")
    table = _table("Attention", "module", *numbers, "", right=numbers)
    rows = Counter(
        (
            _starred(s.module),
            f"{s.heads} x {s.head_dim}" + ("" if s.heads == s.kv_heads else f" ({s.kv_heads} kv)"),
            _local_of(s.local_query, s.global_query),
            _local_of(s.local_key, s.global_key),
            _done(s),
        )
        for s in sites
    )
    for (module, shape, queries, keys, what), count in rows.items():
        table.add_row(escape(module), str(count), shape, queries, keys, escape(what))
    return table


def _option_row(option: Option) -> list[str]:
    if option.refused is not None:
        return [str(option.world), option.title, "not possible"]
    memory = option.weights + option.activations
    is_one = option.world == 1
    return [
        str(option.world),
        option.title,
        "" if is_one else str(option.collectives),
        "" if is_one else _size(option.bytes_sent),
        _size(memory) + ("" if option.fits else " !"),
        _short(option.compute),
        "" if is_one else _short(option.communication),
        _short(option.seconds),
        f"{option.speedup:.2f} {option.efficiency:4.0%}",
    ]


def _short(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms" if seconds < 1e-3 else told(seconds)


def _done(site: Attention) -> str:
    """What became of an attention, in words."""
    notes = ["causal"] if site.causal else []
    notes += ["masked"] if site.mask else []
    notes += [f"{site.padding_percent:.1f} % padding"] if site.padding_percent else []
    what = "rewritten" if site.rewritten else f"left alone: {site.reason}"
    return ", ".join([what, *notes])


def _io_table(manifest: Manifest) -> Table:
    table = _table("Bindings of every engine", "mode", "name", "dtype", "shape")
    for io in manifest.io:
        table.add_row(
            io.mode, escape(io.name), io.dtype, " x ".join(map(str, io.shape)) or "scalar"
        )
    return table


def _plan_table(manifest: Manifest) -> Table:
    table = _table("The model's plan", "kind", "module", "tensor", "dim", "length", right=("dim",))
    for entry in manifest.plan:
        length = str(entry.global_size) if entry.applied else f"not applied: {entry.reason}"
        module = escape(entry.module or "(model)")
        table.add_row(entry.kind, module, escape(entry.tensor), str(entry.dim), escape(length))
    return table


def _sharding_table(manifest: Manifest) -> Table:
    numbers = ("count", "dim", "tokens", "padded")
    found = "found" if manifest.plan_source == "inferred" else "after the model's plan"
    table = _table(f"Sharding, {found}", "kind", "what", "module", *numbers, right=numbers)
    rows = Counter(
        (
            entry.kind,
            entry.operator,
            _starred(entry.module),
            str(entry.dim),
            f"{entry.local} of {' + '.join(map(str, entry.segments))}",
            f"{entry.padding_percent:.1f} %" if entry.padding else "",
        )
        for entry in manifest.sharding
    )
    for (kind, what, module, *rest), count in rows.items():
        table.add_row(kind, escape(what), escape(module), str(count), *rest)
    return table


def _starred(module: str) -> str:
    """``blocks.7.attn`` as ``blocks.*.attn``, so that equal blocks share a row."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", module)


def _local_of(local: int, whole: int) -> str:
    return str(whole) if local == whole else f"{local} of {whole}"


_LEVELS = {"program": "program", "network": "program and networks", "none": "nothing"}


def _proof_line(proof: Proof) -> str:
    if proof.status == "skipped":
        return "skipped (--no-proof): nothing is known about these engines' numbers"
    assert proof.bound is not None
    line = (
        f"passed ({_LEVELS[proof.level]}): relative error "
        f"{max(e.max for e in proof.ranks):.1e} (bound {proof.bound.max:.1e}), "
        f"in float32 arithmetic {max(e.max for e in proof.algebra):.1e}"
    )
    if proof.network is not None:
        line += f", of the networks {max(e.max for e in proof.network.algebra):.1e}"
    if proof.control is not None:
        line += f"; without communication {proof.control.max:.1e}"
    return line + ("; proven when this same job was run before" if proof.recalled else "")


def _attention_line(sites: Sequence[Attention]) -> str:
    done = sum(site.rewritten for site in sites)
    kept = Counter(site.reason for site in sites if not site.rewritten)
    return f"{done} rewritten" + "".join(f", {n} left alone ({why})" for why, n in kept.items())


def _collectives_line(manifest: Manifest) -> str:
    parts = [f"{c.count} {c.kind}, {_size(c.bytes_sent)} sent" for c in manifest.collectives]
    return ("; ".join(parts) + " by each rank per forward") if parts else "none"


def _backend_line(manifest: Manifest) -> str:
    backend = manifest.backend
    targets = ", ".join(backend.compute_capabilities) or "this machine's GPU"
    return f"{backend.name} {backend.version} for compute capability {targets}"


def _count(number: float) -> str:
    for unit, factor in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number:.0f}"


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _size(number: float) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number:.0f} B"
