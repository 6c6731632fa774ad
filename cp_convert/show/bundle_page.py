"""A bundle as one self-contained HTML page: what ``inspect`` tells; no script, nothing fetched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape

from ..bundle.manifest import Manifest, Proof, of_rank
from ..bundle.variants import all_variants
from ..version import __version__
from .dynamic import range_rows, shape_of
from .mesh import axes_of, guidance_line, place_of, ranks_of
from .page import STYLE
from .pieces import COLUMNS as PIECES
from .pieces import piece_rows
from .variants import COLUMNS, variant_rows
from .words import count, local_of, size, starred

_WIDTH, _LEFT, _ROW = 760, 190, 32


def bundle_page(manifest: Manifest) -> str:
    """The whole page; everything that stands in the manifest is escaped."""
    views = all_variants(manifest)
    parts = (
        _mesh(manifest),
        _table("Variants", COLUMNS, variant_rows(manifest)),
        *(_of_variant(one, several=len(views) > 1) for one in views),
        _table("LoRA sets", ("name", "kind", "scale", "weights", "size"), (
            (one.name, ", ".join(one.kinds), f"{one.scale:g}", str(len(one.weights)),
             size(one.file.bytes)) for one in manifest.lora
        )),
    )  # fmt: skip
    model = manifest.model
    facts = (
        f"{model.kind}, {count(model.parameters)} parameters in {manifest.precision}, weights "
        f"{manifest.weights_mode}; {manifest.backend.name} {manifest.backend.version}, "
        f"{manifest.created}"
    )
    return _PAGE.format(
        title=escape(model.name), style=STYLE, facts=escape(facts), verdict=_verdict(manifest),
        parts="\n".join(parts), command=escape(manifest.command), version=escape(__version__),
    )  # fmt: skip


def _of_variant(manifest: Manifest, *, several: bool) -> str:
    """What one variant has to itself; several can be unfolded one by one."""
    parts = (
        _table("Where the sequence, or the batch, is split", _MOVES, _moves(manifest)),
        _table("Attention", _SITES, _sites(manifest)),
        _bars("Sent by one rank in a forward", [
            (f"{c.count} {c.kind}", c.bytes_sent) for c in manifest.collectives
        ]),
        _bars("Memory of one rank, at most", _memory(manifest)),
        _table("Proof", ("what", "largest relative error"), _proof(manifest.proof)),
        _table("Sizes", ("what", ""), range_rows(manifest)),
        _table("Pieces", PIECES, piece_rows(manifest)),
        _table("Bindings", ("mode", "name", "dtype", "shape"), (
            (io.mode, io.name, io.dtype, shape_of(io, manifest.dynamic)) for io in manifest.io
        )),
    )  # fmt: skip
    if not several:
        return "\n".join(parts)
    name = escape(str(manifest.request.variant))
    return f"<details><summary>Variant {name}</summary>\n" + "\n".join(parts) + "</details>"


def _verdict(manifest: Manifest) -> str:
    proof = manifest.proof
    if proof.status == "skipped":
        return "Not proven: nothing is known about these engines' numbers."
    shapes = f", in all {len(manifest.variants) + 1} variants" if manifest.variants else ""
    return escape(
        f"Proven ({proof.level}): {manifest.strategy} over {ranks_of(manifest)} "
        f"returns what the dense model returns{shapes}."
    )


def _mesh(manifest: Manifest) -> str:
    """Ranks in the order of the axes, the last of which counts fastest: one row a turn of it."""
    across = list(manifest.axes.values())[-1] if manifest.axes else 1
    boxes = []
    for rank in range(manifest.world):
        x, y = 8 + rank % across * 78, 8 + rank // across * 44
        boxes.append(
            f'<rect x="{x}" y="{y}" width="70" height="34" rx="5" fill="#2f7ed8" opacity="0.25"/>'
            f'<text x="{x + 35}" y="{y + 22}" text-anchor="middle">rank {rank}'
            f"<title>{escape(place_of(manifest, rank))}</title></text>"
        )
    rows = -(-manifest.world // across)
    view = f"0 0 {max(_WIDTH, 16 + across * 78)} {12 + rows * 44}"
    groups = "".join(
        f"<p>The model's own group {escape(name)}: {escape(str(ranks))}</p>"
        for name, ranks in manifest.groups.items()
    )
    return (
        f"<figure><figcaption>Mesh: {escape(axes_of(manifest))}</figcaption>"
        f'<svg viewBox="{view}" role="img" aria-label="Mesh">{"".join(boxes)}</svg>'
        f"{groups}{_guidance(manifest)}</figure>"
    )


def _guidance(manifest: Manifest) -> str:
    line = guidance_line(manifest)
    return "" if line is None else f"<p>Guidance: {escape(line)}</p>"


_MOVES = ("kind", "what", "module", "axis", "count", "dimension", "slots of one rank", "padding")
_SITES = ("module", "count", "heads x dim", "queries", "keys", "", "padding")


def _moves(manifest: Manifest) -> Iterable[Sequence[str]]:
    rows = Counter(
        (
            (s.kind, s.operator, starred(s.module), s.axis),
            (
                str(s.dim),
                f"{s.local} of {' + '.join(map(str, s.segments))}",
                f"{s.padding_percent:.1f} %",
            ),
        )
        for s in manifest.sharding
    )
    return ((*head, str(times), *rest) for (head, rest), times in rows.items())


def _sites(manifest: Manifest) -> Iterable[Sequence[str]]:
    rows = Counter(
        (
            starred(s.module),
            (
                f"{s.heads} x {s.head_dim}",
                local_of(s.local_query, s.global_query),
                local_of(s.local_key, s.global_key),
                "rewritten" if s.rewritten else f"left alone: {s.reason}",
                f"{s.padding_percent:.1f} %",
            ),
        )
        for s in manifest.attention
    )
    return ((module, str(times), *rest) for (module, rest), times in rows.items())


def _memory(manifest: Manifest) -> list[tuple[str, int]]:
    own = {(w.file, w.offset): w.bytes for w in of_rank(manifest.weights, 0)}
    needs = [e.activation_bytes for e in manifest.engines if e.activation_bytes is not None]
    return [
        ("engine", max((e.bytes for e in manifest.engines), default=0)),
        ("weights outside it", sum(own.values())),
        *([("activations", max(needs))] if needs else []),
    ]


def _proof(proof: Proof) -> Iterable[Sequence[str]]:
    network = proof.network
    found = (
        ("ranks, in float32 arithmetic", proof.algebra),
        ("ranks, in the bundle's precision", proof.ranks),
        ("networks, in float32 arithmetic", network.algebra if network else []),
        ("networks, in the bundle's precision", network.ranks if network else []),
        ("the dense model in that precision", [proof.dense] if proof.dense else []),
        ("what the ranks may lose", [proof.bound] if proof.bound else []),
        ("without communication (must be large)", [proof.control] if proof.control else []),
        *((f"without that along {axis}", [error]) for axis, error in proof.controls.items()),
    )
    return ((name, f"{max(e.max for e in own):.1e}") for name, own in found if own)


def _bars(title: str, rows: Sequence[tuple[str, int]]) -> str:
    if not rows:
        return ""
    top = max(number for _, number in rows) or 1
    drawn = []
    for i, (name, number) in enumerate(rows):
        y, width = 8 + i * _ROW, number / top * (_WIDTH - _LEFT - 110)
        drawn.append(
            f'<text x="{_LEFT - 8}" y="{y + 16}" text-anchor="end">{escape(name)}</text>'
            f'<rect x="{_LEFT}" y="{y}" width="{width:.1f}" height="22" fill="#2f7ed8"/>'
            f'<text x="{_LEFT + width + 6:.1f}" y="{y + 16}">{size(number)}</text>'
        )
    view = f"0 0 {_WIDTH} {16 + len(rows) * _ROW}"
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg viewBox="{view}" role="img" aria-label="{escape(title)}">{"".join(drawn)}</svg>'
        "</figure>"
    )


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    body = "".join(f"<tr>{''.join(f'<td>{escape(c)}</td>' for c in row)}</tr>" for row in rows)
    if not body:
        return ""
    head = "".join(f"<th>{escape(one)}</th>" for one in columns)
    return (
        f'<h2>{escape(title)}</h2><div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
{style}
</style></head><body>
<h1>{title}</h1>
<p class="pale">{facts}</p>
<p class="answer">{verdict}</p>
{parts}
<h2>Made by</h2>
<p><code>{command}</code></p>
<p class="pale">cp-convert {version}</p>
</body></html>
"""
