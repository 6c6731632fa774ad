"""A forecast as one self-contained HTML page: charts drawn as SVG, no script, nothing fetched."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Final

from ..advise.forecast import Forecast, Option
from ..advise.hardware import Hardware
from ..version import __version__

_COLOURS = {
    "one GPU": "#8a8f98", "ulysses": "#2f7ed8", "allgather-kv": "#e08a1e", "ring": "#3a9d5d",
    "stream-kv": "#c0504d", "usp": "#9b59b6",
}  # fmt: skip
_WIDTH, _LEFT, _BAR, _LETTER = 760, 150, 22, 7


def page(found: Forecast) -> str:
    """The whole page."""
    possible = [o for o in found.options if o.refused is None]
    largest = [o for o in possible if o.world in (1, max(found.worlds))]
    refused = [o for o in found.options if o.refused]
    told = "".join(
        f"<li>{escape(o.title)} over {o.world} ranks: {escape(o.refused or '')}</li>"
        for o in refused
    )
    return _PAGE.format(
        style=STYLE,
        title=escape(f"{found.model}: meshes and strategies"),
        model=escape(found.model),
        facts=escape(_facts(found)),
        recommendation=escape(found.recommendation),
        times=_bars(
            largest,
            ("compute", "exposed communication"),
            [(o.compute * 1e3, o.exposed * 1e3) for o in largest],
            "ms",
            "Estimated time of a forward",
        ),
        speedups=_lines(found),
        memory=_bars(
            largest,
            ("weights", "activations"),
            [(o.weights / 1e9, o.activations / 1e9) for o in largest],
            "GB",
            f"Memory of one rank; a GPU has {found.hardware.memory_gb:g} GB",
            marks=["" if o.fits else " (too much)" for o in largest],
        ),
        sent=_bars(
            [o for o in largest if o.world > 1],
            ("sent",),
            [(o.bytes_sent / 1e9,) for o in largest if o.world > 1],
            "GB",
            "Sent by one rank in a forward",
        ),
        rows="".join(_row(o) for o in found.options),
        refused=f"<h2>Not possible</h2><ul>{told}</ul>" if told else "",
        source=escape(f"{found.hardware.title}. Rates: {found.hardware.source}."),
        assumed=escape(_assumed(found.hardware)),
        version=__version__,
    )


def _assumed(hardware: Hardware) -> str:
    """What of the times is neither published nor measured."""
    link = (
        f"{hardware.link_share:.0%} of the link and {hardware.collective_us:g} microseconds a "
        "collective besides its bytes"
    )
    how = (
        " Collectives run beside work that does not wait for them; what lies between products is "
        "taken as fused."
    )
    if hardware.measured is not None:
        wires = "" if hardware.measured.collectives else f" Assumed: {link}."
        return f"Times of single kernels: {hardware.measured.by}.{wires}{how}"
    return (
        f"Assumed: {hardware.matmul_share:.0%} of the peak in matrix products, "
        f"{hardware.attention_share:.0%} in attention, {hardware.memory_share:.0%} of the memory "
        f"bandwidth, {hardware.kernel_us:g} microseconds a kernel at least, {link}.{how}"
    )


def _facts(found: Forecast) -> str:
    return (
        f"{found.parameters / 1e9:.3g} billion parameters in {found.precision}, "
        f"{found.attentions} attentions over {found.tokens:,} tokens"
    )


def _name(option: Option) -> str:
    return "one GPU" if option.world == 1 else f"{option.title}, {option.world} GPUs"


def _colour(strategy: str) -> str:
    return _COLOURS.get(strategy, "#555")


def _bars(
    options: Sequence[Option],
    parts: Sequence[str],
    values: Sequence[Sequence[float]],
    unit: str,
    title: str,
    marks: Sequence[str] = (),
) -> str:
    """Stacked horizontal bars; the second part is paler; ``marks`` stand behind their numbers."""
    if not options:
        return ""
    top = max((sum(v) for v in values), default=0) or 1.0
    left = max(_LEFT, 16 + _LETTER * max(len(_name(one)) for one in options))
    scale = (_WIDTH - left - 90 - _LETTER * max(map(len, marks), default=0)) / top
    rows = []
    for i, (option, numbers) in enumerate(zip(options, values, strict=True)):
        y, x = 8 + i * (_BAR + 10), float(left)
        rows.append(f'<text x="{left - 8}" y="{y + 16}" text-anchor="end">{_name(option)}</text>')
        for part, (name, number) in enumerate(zip(parts, numbers, strict=True)):
            width = number * scale
            rows.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_BAR}" '
                f'fill="{_colour(option.strategy)}" opacity="{1 if part == 0 else 0.45}">'
                f"<title>{_name(option)}: {name} {_number(number)} {unit}</title></rect>"
            )
            x += width
        total = f"{_number(sum(numbers))} {unit}{marks[i] if marks else ''}"
        rows.append(f'<text x="{x + 6:.1f}" y="{y + 16}">{total}</text>')
    height = 16 + len(options) * (_BAR + 10)
    key = f" (solid: {parts[0]}, pale: {parts[1]})" if len(parts) > 1 else ""
    return (
        f"<figure><figcaption>{escape(title + key)}</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}">'
        f"{''.join(rows)}</svg></figure>"
    )


def _lines(found: Forecast) -> str:
    """Speed-up against world, one line a strategy, with the ideal for comparison."""
    worlds = found.worlds
    largest, height, bottom = max(worlds), 300, 270
    if largest == 1:
        return ""

    def x(world: float) -> float:
        return 60 + (world - 1) / (largest - 1) * (_WIDTH - 200)

    def y(speed: float) -> float:
        return bottom - speed / largest * (bottom - 15)

    marks = [
        f'<text x="{x(w):.1f}" y="{bottom + 20}" text-anchor="middle">{w}</text>'
        f'<line x1="{x(w):.1f}" x2="{x(w):.1f}" y1="{bottom}" y2="{bottom + 5}" class="axis"/>'
        f'<text x="50" y="{y(w) + 4:.1f}" text-anchor="end">{w}x</text>'
        for w in worlds
    ]
    marks.append(f'<line x1="60" x2="{x(largest):.1f}" y1="{bottom}" y2="{bottom}" class="axis"/>')
    marks.append(
        f'<line x1="{x(1):.1f}" y1="{y(1):.1f}" x2="{x(largest):.1f}" y2="{y(largest):.1f}" '
        'class="ideal"/>'
        f'<text x="{x(largest) + 8:.1f}" y="{y(largest) + 10:.1f}" class="pale">ideal</text>'
    )
    taken = [y(largest) + 10]
    for strategy in dict.fromkeys(o.strategy for o in found.options if o.world > 1):
        points = [(w, x(w), s, y(s)) for w, s in _fastest(found, strategy)]
        if not points:
            continue
        place = points[-1][3] + 4
        while any(abs(place - other) < 15 for other in taken):
            place += 5
        taken.append(place)
        marks.append(_line(strategy, points, place))
    return (
        "<figure><figcaption>Speed-up over one GPU, by number of GPUs</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="Speed-up by number of GPUs">'
        f"{''.join(marks)}</svg></figure>"
    )


def _line(strategy: str, points: Sequence[tuple[int, float, float, float]], place: float) -> str:
    """One strategy's line: by world and speed-up, each with where it is drawn; named at its end."""
    colour, path = _colour(strategy), " ".join(f"{x:.1f},{y:.1f}" for _, x, _, y in points)
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}">'
        f"<title>{strategy}, {world} GPUs: {speed:.2f}x</title></circle>"
        for world, x, speed, y in points
    )
    return (
        f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.5"/>{dots}'
        f'<text x="{points[-1][1] + 10:.1f}" y="{place:.1f}" fill="{colour}">{strategy}</text>'
    )


def _fastest(found: Forecast, strategy: str) -> list[tuple[int, float]]:
    """The strategy's best speed-up at every world where it is possible; one GPU to begin with."""
    points = [(1, 1.0)]
    for world in (w for w in found.worlds if w > 1):
        speeds = [
            o.speedup
            for o in found.options
            if o.world == world and o.strategy == strategy and o.refused is None
        ]
        if speeds:
            points.append((world, max(speeds)))
    return points if len(points) > 1 else []


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _row(option: Option) -> str:
    head = f"<td>{option.world}</td><td>{option.mesh.replace(',', ' ')}</td>"
    head += f"<th scope='row'>{escape(option.sharing)}</th>"
    if option.refused is not None:
        return f"<tr>{head}<td colspan='9' class='pale'>not possible</td></tr>"
    cells = (
        str(option.collectives) if option.world > 1 else "",
        f"{option.bytes_sent / 1e6:,.0f} MB" if option.world > 1 else "",
        f"{option.memory / 1e9:.2f} GB" + ("" if option.fits else " <b>too much</b>"),
        f"{option.key_values / 1e6:,.1f} MB" if option.key_values else "",
        f"{_number(option.compute * 1e3)} ms",
        f"{_number(option.communication * 1e3)} ms" if option.world > 1 else "",
        f"{_number(option.exposed * 1e3)} ms" if option.world > 1 else "",
        f"{_number(option.seconds * 1e3)} ms",
        f"{option.speedup:.2f}x ({option.efficiency:.0%})",
    )
    return f"<tr>{head}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


STYLE: Final = """:root { color-scheme: light dark;
  --ink: #1d2430; --pale: #6b7380; --back: #fff; --card: #f5f7fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ee; --pale: #9aa3af; --back: #14181f; --card: #1d232c; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back);
  max-width: 820px; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } .pale { color: var(--pale); fill: var(--pale); }
.answer { font-size: 1.15rem; background: var(--card); border-left: 5px solid #2f7ed8;
  padding: .8rem 1rem; border-radius: 4px; }
figure { margin: 1.6rem 0; padding: 1rem; background: var(--card); border-radius: 6px; }
figcaption { font-weight: 600; margin-bottom: .4rem; }
svg { width: 100%; height: auto; } svg text { font-size: 13px; }
svg text:not([fill]) { fill: var(--ink); } svg text.pale { fill: var(--pale); }
.axis { stroke: var(--pale); } .ideal { stroke: var(--pale); stroke-dasharray: 5 5; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #8884;
  white-space: nowrap; } th { text-align: left; }"""
"""What both pages look like."""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
{style}
</style></head><body>
<h1>{model}</h1>
<p class="pale">{facts}</p>
<p class="answer">{recommendation}</p>
{times}
{speedups}
{sent}
{memory}
<h2>All options</h2>
<div class="wide"><table><thead><tr><th>GPUs</th><th>mesh</th><th>strategy</th><th>collectives</th>
<th>sent</th><th>memory</th><th>K, V</th><th>compute</th><th>communication</th><th>exposed</th>
<th>forward</th><th>speed-up</th>
</tr></thead><tbody>{rows}</tbody></table></div>
{refused}
<h2>Where the numbers come from</h2>
<p>Collectives, bytes sent and K, V are those of the programs that would be built. Times and
activations are estimates; nothing was executed. {source} {assumed}</p>
<p class="pale">cp-convert {version}</p>
</body></html>
"""
