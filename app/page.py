"""The pieces of a page: document, table, picture, loss curve. Plain HTML and inline SVG.

No script runs and nothing is fetched: a page is one file that a browser shows offline, in light or dark.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from PIL import Image

Point = tuple[float, float]

POLICY = "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
# Without it a browser asks the server for /favicon.ico.
ICON = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E"
    "%3Cpath d='M8 15V7M8 9C4 9 3 6 3 3c4 0 5 3 5 6zm0-2c0-3 2-4 5-4 0 3-2 5-5 5' "
    "fill='none' stroke='%231f7a54' stroke-width='1.6'/%3E%3C/svg%3E"
)


def document(title: str, body: str, refresh: int | None = None) -> str:
    """A whole page; `refresh` is the number of seconds after which the browser asks again."""
    style = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
    again = f'<meta http-equiv="refresh" content="{refresh}">' if refresh else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">{again}'
        f'<link rel="icon" href="{ICON}"><title>{escape(title)}</title><style>{style}</style></head>'
        f"<body><main>{body}</main></body></html>\n"
    )


def text(value: object) -> str:
    """A value as a reader wants it: four digits of a number, no quotes around a string."""
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "not finite"
    return "" if value is None else str(value)


def table(rows: Sequence[Mapping[str, object]], caption: str = "") -> str:
    """Rows as a table; the columns are the keys in the order in which they first appear."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    numeric = {key for key in columns if all(isinstance(row.get(key) or 0, int | float) for row in rows)}

    def cell(tag: str, key: str, value: object) -> str:
        return f"<{tag}{' class=number' if key in numeric else ''}>{escape(text(value))}</{tag}>"

    head = "".join(cell("th", key, key) for key in columns)
    body = "".join("<tr>" + "".join(cell("td", key, row.get(key)) for key in columns) + "</tr>" for row in rows)
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<div class="scroll"><table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def figures(values: Mapping[str, object]) -> str:
    """Single figures, each under its name."""
    items = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(text(value))}</dd></div>" for key, value in values.items())
    return f'<dl class="figures">{items}</dl>'


def status(word: str) -> str:
    """A run's status as a small coloured label."""
    return f'<span class="status {escape(word)}">{escape(word)}</span>'


def media_type(path: Path) -> str:
    """MIME type of a picture, from its content."""
    with Image.open(path) as image:
        return Image.MIME.get(image.format or "", "application/octet-stream")


def picture(caption: str, path: Path, url: str | None = None) -> str:
    """A figure; without a `url` the picture's bytes stand in the page. Small pictures keep their pixels sharp."""
    with Image.open(path) as image:
        width, height = image.size
    source = url or f"data:{media_type(path)};base64,{base64.b64encode(path.read_bytes()).decode()}"
    sharp = " small" if width <= 160 else ""
    tag = f'<img class="picture{sharp}" src="{source}" width="{width}" height="{height}" alt="{escape(caption)}">'
    caption_tag = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure class="{"wide" if width >= 400 else "tile"}">{tag}{caption_tag}</figure>'


def pictures(items: Iterable[tuple[str, Path]]) -> str:
    """Captions and paths as a grid; wide pictures take a whole line."""
    return f'<div class="grid">{"".join(picture(caption, path) for caption, path in items)}</div>'


def points(rows: Iterable[Mapping[str, object]], key: str) -> list[Point]:
    """(step, value) of every row that has a number under the key."""
    found = [(row["step"], row.get(key)) for row in rows]
    return [(float(x), float(y)) for x, y in found if isinstance(x, int | float) and isinstance(y, int | float)]


def bars(shares: Mapping[str, float]) -> str:
    """Classes with their probabilities, as bars."""
    rows = "".join(
        f"<div><dt>{escape(name)}</dt><dd><meter min=0 max=1 value={share:.4f}></meter>"
        f"<span class=number>{share:.0%}</span></dd></div>"
        for name, share in shares.items()
    )
    return f'<dl class="bars">{rows}</dl>'


def thin(points: Sequence[Point], most: int = 300) -> list[Point]:
    """At most `most` points, each the mean of its neighbours."""
    size = math.ceil(len(points) / most) or 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def smooth(points: Sequence[Point], window: float = 0.06) -> list[Point]:
    """Running mean over `window` of the points on both sides: a diffusion loss jumps with the drawn timestep."""
    half = int(len(points) * window / 2)
    around = [points[max(0, i - half) : i + half + 1] for i in range(len(points))]
    return [(x, sum(y for _, y in near) / len(near)) for (x, _), near in zip(points, around, strict=True)]


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers between `low` and `high`, about `count` of them."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def curve(series: Mapping[str, Sequence[Point]], width: int = 760, height: int = 250) -> str:
    """Lines over steps as inline SVG: measured values faint, their running mean strong, a legend below.

    Args:
        series: name -> (step, value) pairs; values that are not finite are left out.
        width: of the drawing, in SVG units; the page scales it.
        height: same.
    """
    lines = {name: thin([p for p in points if math.isfinite(p[1])]) for name, points in series.items()}
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return '<p class="soft">No values yet.</p>'
    x0, x1 = _span([x for points in lines.values() for x, _ in points])
    y0, y1 = _span([y for points in lines.values() for _, y in points])
    left, right, top, bottom = 60, width - 12, 12, height - 26

    def place(x: float, y: float) -> Point:
        return left + (x - x0) / (x1 - x0) * (right - left), bottom - (y - y0) / (y1 - y0) * (bottom - top)

    parts = []
    for value in ticks(y0, y1):
        y = place(x0, value)[1]
        parts.append(f'<line class="rule" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for value in ticks(x0, x1, 6):
        parts.append(f'<text x="{place(value, y0)[0]:.1f}" y="{height - 6}" text-anchor="middle">{value:g}</text>')
    for index, points in enumerate(lines.values()):
        colour = f"var(--c{index % 6})"
        for path, look in ((points, 'stroke-width="1" opacity=".28"'), (smooth(points), 'stroke-width="2"')):
            where = "L".join("{:.1f} {:.1f}".format(*place(*point)) for point in path)
            parts.append(f'<path d="M{where}" stroke="{colour}" {look}/>')
    legend = "".join(
        f'<span><i style="background:var(--c{index % 6})"></i>{escape(name)} {text(smooth(points)[-1][1])}</span>'
        for index, (name, points) in enumerate(lines.items())
    )
    label = escape("Curve of " + ", ".join(lines))
    drawing = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    return f'{drawing}<div class="row legend">{legend}</div>'


def _span(values: Sequence[float]) -> Point:
    """Lowest and highest value, never equal."""
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)
