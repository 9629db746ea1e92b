"""The drawing, an SVG that a browser and GitHub show as it is: no script, no font and no file beside it.

Each question has a panel of its own, because figures of different kinds cannot share an axis.  Lines show how a figure
grows with the number of clients.  Bars, with their values beside them, compare a few cases.  A series is a store, with
or without compression.  It has one colour in all panels.  The colours adapt to a light or a dark page.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

Row = dict[str, Any]
Series = tuple[str, str]
"""A store, and `on` or `off` for compression."""
STYLE: Final = """
text { font: 13px sans-serif; fill: #1f2328 } .title { font-weight: bold }
.paper { fill: #fff } .grid { stroke: #d1d9e0 }
.line0 { stroke: #0969da; fill: #0969da } .line1 { stroke: #bc4c00; fill: #bc4c00 } polyline { fill: none !important }
.line2 { stroke: #1a7f37; fill: #1a7f37 } .line3 { stroke: #8250df; fill: #8250df } .light { opacity: 0.45 }
@media (prefers-color-scheme: dark) { text { fill: #f0f6fc } .paper { fill: #0d1117 } .grid { stroke: #3d444d }
.line0 { stroke: #4493f8; fill: #4493f8 } .line1 { stroke: #f0883e; fill: #f0883e }
.line2 { stroke: #3fb950; fill: #3fb950 } .line3 { stroke: #ab7df8; fill: #ab7df8 } }"""
LEFTS: Final = (80, 560)
"""The left edges of the two columns of panels."""
WIDTH, PANEL = 960, 380
TOP, GAP = 44, 40
BAR: Final = 18
"""The height of a bar with its space."""
BARS: Final = 300
"""The length of the longest bar; its value stands beyond it."""


class Panel(NamedTuple):
    """A drawn panel."""

    height: int
    draw: Callable[[int, int], str]
    """Draws it at a place: left and top."""


def curves(title: str, lines: Sequence[tuple[int, Sequence[tuple[int, float]]]], *, log: bool) -> Panel:
    """Compose a chart of y against the number of clients, with a line for each series."""
    points = [point for _, line in lines for point in line]
    counts, most = sorted({x for x, _ in points}), max(y for _, y in points)
    if log:
        low = math.floor(math.log10(min(y for _, y in points)))
        ticks = [10.0**power for power in range(low, max(low + 1, math.ceil(math.log10(most))) + 1)]
    else:
        step = next(s for power in range(15) for s in (10**power, 2 * 10**power, 5 * 10**power) if most <= 6 * s)
        ticks = [float(step * place) for place in range(math.ceil(most / step) + 1)]

    def draw(left: int, top: int) -> str:
        def across(x: int) -> float:
            return left + 20 + 340 * math.log(x / counts[0]) / (math.log(counts[-1] / counts[0]) or 1)

        def down(y: float) -> float:
            part = math.log(y / ticks[0]) / math.log(ticks[-1] / ticks[0]) if log else y / ticks[-1]
            return top + 276 - 260 * part

        parts = [f'<text class="title" x="{left}" y="{top}">{title}</text>']
        for y in ticks:
            parts.append(f'<line class="grid" x1="{left}" x2="{left + PANEL}" y1="{down(y):.1f}" y2="{down(y):.1f}"/>')
            parts.append(f'<text x="{left - 6}" y="{down(y) + 4:.1f}" text-anchor="end">{y:,.10g}</text>')
        parts += [f'<text x="{across(x):.1f}" y="{top + 296}" text-anchor="middle">{x:,}</text>' for x in counts]
        parts.append(f'<text x="{left + PANEL // 2}" y="{top + 318}" text-anchor="middle">clients</text>')
        for place, line in lines:
            spots = [(f"{across(x):.1f}", f"{down(y):.1f}") for x, y in line]
            parts.append(f'<polyline class="line{place}" points="{" ".join(map(",".join, spots))}" stroke-width="2"/>')
            parts += [f'<circle class="line{place}" cx="{x}" cy="{y}" r="3.5"/>' for x, y in spots]
        return "\n".join(parts)

    return Panel(318, draw)


class Bar(NamedTuple):
    """A bar: its group, its series, its value in words and as a number, and a smaller value within it."""

    group: str
    place: int
    words: str
    value: float
    inner: float | None = None


def bars(title: str, all_bars: Sequence[Bar]) -> Panel:
    """Compose a chart of bars in groups.  The part of a bar beyond its inner value is light."""
    most = max(bar.value for bar in all_bars) or 1
    groups = list(dict.fromkeys(bar.group for bar in all_bars))

    def draw(left: int, top: int) -> str:
        parts = [f'<text class="title" x="{left}" y="{top}">{title}</text>']
        y = top + 8
        for group in groups:
            y += 18
            parts.append(f'<text x="{left}" y="{y}">{group}</text>')
            y += 6
            for bar in (bar for bar in all_bars if bar.group == group):
                for value, light in ((bar.value, " light"), (bar.inner, "")) if bar.inner else ((bar.value, ""),):
                    size = f'width="{BARS * (value or 0) / most:.1f}" height="{BAR - 5}"'
                    parts.append(f'<rect class="line{bar.place}{light}" x="{left}" y="{y}" {size} stroke-width="0"/>')
                parts.append(f'<text x="{left + BARS * bar.value / most + 6:.1f}" y="{y + 11}">{bar.words}</text>')
                y += BAR
        return "\n".join(parts)

    return Panel(8 + 24 * len(groups) + BAR * len(all_bars), draw)


def _where(row: Row) -> str:
    rooms = f", {row['rooms']:,} rooms" if row["rooms"] > 1 else ""
    return f"{row['clients']:,} clients{rooms}"


def panels(rows: Sequence[Row], series: Sequence[Series]) -> list[Panel]:
    """Compose the panels for which there are rows."""

    def place(row: Row) -> int:
        return series.index((row["store"], row["compress"]))

    drawn: list[Panel] = []
    single = [row for row in rows if row["mode"] not in ("rooms", "storm")]
    first = single[0]["mode"] if single else ""
    for title, mode, key in (
        (f"p99 latency in ms, {first}", first, "p99_ms"),
        ("deliveries per second of server CPU, saturated", "saturated", "work"),
    ):
        chosen = [row for row in single if row["mode"] == mode and row.get(key)]
        lines = [
            (number, sorted((row["clients"], row[key]) for row in chosen if place(row) == number))
            for number in range(len(series))
        ]
        if chosen:
            drawn.append(curves(title, [line for line in lines if line[1]], log=key == "p99_ms"))
    many = [row for row in rows if row["mode"] == "rooms" and row.get("work")]
    if many:
        works = [Bar(_where(row), place(row), f"{row['work']:,.0f}", row["work"]) for row in many]
        drawn.append(bars("deliveries per second of server CPU, many rooms", works))
    sizes = [row for row in rows if row.get("bytes_per_delivery") and row["mode"] in ("rooms", "saturated")]
    both = {_where(row) for row in sizes if row["compress"] == "on"} & {
        _where(row) for row in sizes if row["compress"] == "off"
    }
    if both:
        # The store makes no difference to the bytes.
        weights = [
            Bar(_where(row), place(row), f"{row['bytes_per_delivery']:.0f}", row["bytes_per_delivery"])
            for row in sizes
            if row["store"] == sizes[0]["store"] and _where(row) in both
        ]
        drawn.append(bars("bytes on the wire per delivery", weights))
    storms = [row for row in rows if row["mode"] == "storm" and row.get("p99_s")]
    if storms:
        waits = [
            Bar(_where(row), place(row), f"{row['p50_s']:.2f}, {row['p99_s']:.2f}", row["p99_s"], row["p50_s"])
            for row in storms
        ]
        drawn.append(bars("kill -9: seconds from restart to caught up, p50, p99", waits))
    return drawn


def plot(rows: Sequence[Row], about: str) -> str:
    """Compose the SVG; `about`, the conditions, stands at the bottom."""
    series = list(dict.fromkeys((row["store"], row["compress"]) for row in rows))
    both = len({compress for _, compress in series}) > 1
    drawn = panels(rows, series)
    parts: list[str] = []
    tops = [TOP for _ in LEFTS]
    for panel in drawn:  # each into the shorter column
        column = tops.index(min(tops))
        parts.append(panel.draw(LEFTS[column], tops[column]))
        tops[column] += panel.height + GAP
    top = max(tops) - GAP // 4
    x = LEFTS[0]
    for number, (store, compress) in enumerate(series):
        name = f"{store} compress {compress}" if both else store
        parts.append(f'<circle class="line{number}" cx="{x}" cy="{top - 4}" r="4"/>')
        parts.append(f'<text x="{x + 10}" y="{top}">{name}</text>')
        x += 190 if both else 100
    bottom = top + 26 if both else top
    parts.append(f'<text x="{WIDTH - 20}" y="{bottom}" text-anchor="end">{about}</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 18}" role="img">'
    paper = f'<style>{STYLE}</style><rect class="paper" width="{WIDTH}" height="{bottom + 18}"/>'
    return "\n".join((f"{head}<title>chatd under load</title>", paper, *parts, "</svg>\n"))
