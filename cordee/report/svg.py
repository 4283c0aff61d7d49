"""A small static figure as SVG: lines, dots and a shaded band over a logarithmic x axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from cordee.report.charts import ChartSeries
from cordee.report.summary import format_number

WIDTH, HEIGHT = 900, 510
LEFT, RIGHT, TOP, BOTTOM = 76, 876, 84, 446
"""Edges of the plot in the picture."""
STYLE = (
    "text{font:14px system-ui,sans-serif;fill:#5a626b}.title{font-size:20px;fill:#1f2428}"
    ".grid{stroke:#e4e4df}.mark{stroke:#2e7d54;stroke-width:2}.band{fill:#2e7d54;opacity:.14}"
    "polyline{fill:none;stroke-width:2;stroke-linejoin:round}.faint{opacity:.4}"
)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Series over x > 0; `band` is shaded from and to an x, `mark` is an x with its label."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[ChartSeries]
    band: tuple[float, float] | None = None
    mark: tuple[str, float] | None = None


def ticks(low: float, high: float) -> list[float]:
    """About five round values (1, 2, 2.5 or 5 times a power of ten) in [low, high]."""
    power = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= (high - low) / 5 * 0.999)
    multiples = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return [i * step for i in multiples]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten in [low, high], with 2 and 5 or more between them where there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5), range(1, 10)):
        values = [float(f"{f}e{e}") for e in powers for f in factors]
        values = [v for v in values if low * 0.999 <= v <= high * 1.001]
        if len(values) > 2:
            return values[:: math.ceil(len(values) / 8)]
    return ticks(low, high)


def svg_text(figure: Figure) -> str:
    """The figure as the text of an SVG file; points that are not finite are left out."""
    lines = [
        [(x, y) for x, y in zip(s.x, s.y, strict=True) if y is not None and math.isfinite(y)]
        for s in figure.series
    ]
    points = [point for line in lines for point in line]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}">'
        f"<title>{escape(figure.title)}</title><style>{STYLE}</style>"
        f'<rect width="100%" height="100%" fill="#fff"/>{_text(24, 36, figure.title, "title")}'
    )
    if not points:
        return f"{head}{_text(LEFT, 240, 'nothing was measured')}</svg>\n"
    low_x, high_x = min(x for x, _ in points), max(x for x, _ in points)
    high_x = max(high_x, low_x * 1.01)
    low_y, high_y = min(y for _, y in points), max(y for _, y in points)
    margin = 0.06 * ((high_y - low_y) or abs(high_y) or 1.0)
    low_y, high_y = low_y - margin, high_y + margin

    def across(x: float) -> float:
        fraction = math.log(x / low_x) / math.log(high_x / low_x)
        return round(LEFT + (RIGHT - LEFT) * min(1.0, max(0.0, fraction)), 1)

    def down(y: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * (y - low_y) / (high_y - low_y), 1)

    parts = [head, _text((LEFT + RIGHT) / 2, HEIGHT - 16, figure.x_label, anchor="middle")]
    parts.append(_text(24, TOP - 12, figure.y_label))
    if figure.band is not None:
        left, right = map(across, figure.band)
        parts.append(f'<path class="band" d="M{left} {TOP}H{right}V{BOTTOM}H{left}z"/>')
    for x in log_ticks(low_x, high_x):
        parts.append(f'<path class="grid" d="M{across(x)} {TOP}V{BOTTOM}"/>')
        parts.append(_text(across(x), BOTTOM + 22, format_number(x), anchor="middle"))
    for y in ticks(low_y, high_y):
        parts.append(f'<path class="grid" d="M{LEFT} {down(y)}H{RIGHT}"/>')
        parts.append(_text(LEFT - 10, down(y) + 5, format_number(y), anchor="end"))
    if figure.mark is not None:
        label, x = figure.mark
        parts.append(f'<path class="mark" d="M{across(x)} {TOP}V{BOTTOM}"/>')
        parts.append(_text(across(x) + 8, TOP + 18, f"{label} {format_number(x)}"))
    for i, (series, line) in enumerate(zip(figure.series, lines, strict=True)):
        places = [(across(x), down(y)) for x, y in line]
        parts.append(_series_svg(series, places, LEFT + 120 + 150 * i))
    return "\n".join([*parts, "</svg>\n"])


def _series_svg(series: ChartSeries, places: Sequence[tuple[float, float]], key_x: int) -> str:
    """The series at its places in the picture, and its key above the plot."""
    label = _text(key_x, TOP - 12, series.label)
    if series.kind == "dots":
        circle = f'<circle cx="{{}}" cy="{{}}" r="5" fill="{series.colour}"/>'
        return "".join(circle.format(x, y) for x, y in [*places, (key_x - 11, TOP - 17)]) + label
    line = f'<polyline class="{series.kind}" stroke="{series.colour}" points="{{}}"/>'
    key = f"{key_x - 26},{TOP - 17} {key_x - 6},{TOP - 17}"
    return line.format(" ".join(f"{x},{y}" for x, y in places)) + line.format(key) + label


def _text(x: float, y: float, text: str, style: str = "", anchor: str = "start") -> str:
    place = f'x="{x:g}" y="{y:g}" text-anchor="{anchor}"'
    return f'<text class="{style}" {place}>{escape(text)}</text>'
