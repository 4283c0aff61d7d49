"""Line charts as inline SVG: numbers in, one string of HTML out, light and dark by the page's CSS.

PAPER: no torch, no numpy, no file, nothing fetched. A figure stretches to any width because lines
live in a stretched inner SVG (strokes do not scale) while text is placed in per cent. Not here:
what is drawn, style and script (`page.py`), PNGs (`png.py`). Traded away: zoom; each figure has its
linear and its logarithmic form drawn in advance, so that the script stays small.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate, pairwise
from typing import Literal

Values = Sequence[float | None]
Scale = Literal["linear", "log"]

RAISED = str.maketrans(
    "-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079"
)
MOST_KEYS = 12
"""Labels that a legend shows; of more lines it shows every second, third, ..., and the last."""
SIDE = 1000
"""Units of the stretched inner SVG in both directions; finer than a pixel."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A series. `faint` is drawn behind and thin, `dots` are single points, `area` is stacked."""

    label: str
    x: Sequence[float]
    y: Values
    colour: str = "var(--c0)"
    kind: Literal["line", "faint", "dots", "area"] = "line"


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A figure: series over steps, level lines (label, value), marked steps (label, step)."""

    title: str
    unit: str = ""
    lines: Sequence[Line] = ()
    levels: Sequence[tuple[str, float]] = ()
    marks: Sequence[tuple[str, float]] = ()
    scale: Scale = "linear"
    both: bool = True
    """Whether the reader may switch between linear and logarithmic."""
    from_zero: bool = False
    robust: bool = False
    """Leave single peaks outside, so that they do not flatten the rest."""
    tall: bool = False
    span: tuple[float, float] | None = None
    """First and last step of the axis; None takes them from the lines."""


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round values (1, 2, 2.5 or 5 times a power of ten) in [low, high]."""
    if not high > low:
        return [low]
    rough = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    found = [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]
    return [0.0 if abs(t) < step * 1e-9 else t for t in found]


def log_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Powers of ten in [low, high], every few where there are many, with 2 and 5 where few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    decades = [10.0**e for e in range(first, last + 1)]
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 4, 5, 6, 7, 8, 9)):
        found = [d * f for d in decades for f in factors if low * 0.999 <= d * f <= high * 1.001]
        if len(found) >= 3:
            break
    if len(found) < 2:
        return ticks(low, high, 4)
    every = math.ceil(len(found) / count)
    return found[:: max(1, every)]


def number(value: float) -> str:
    """A number for a person: four significant digits, thousands parted, powers where needed."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    if not 1e-3 <= abs(value) < 1e7:
        mantissa, _, power = f"{value:.3g}".partition("e")
        return f"{mantissa}e{int(power)}" if power else mantissa
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def tick_labels(at: Sequence[float]) -> list[str]:
    """Labels of one axis, with as many decimals as its steps need and no more."""
    steps = [abs(b - a) for a, b in pairwise(at)]
    even = bool(steps) and max(steps) - min(steps) < 1e-6 * max(steps)
    if not even or not 1e-4 <= min(steps) < 1e7:
        return [number(t) for t in at]
    whole = (n for n in range(5) if abs(steps[0] * 10**n - round(steps[0] * 10**n)) < 1e-6)
    places = next(whole, 5)
    return [f"{t:,.{places}f}" for t in at]


def log_labels(at: Sequence[float]) -> list[str]:
    """Labels of a logarithmic axis: powers of ten as powers where plain numbers would be long."""
    powers = [round(math.log10(t)) for t in at]
    if all(abs(10.0**p / t - 1) < 1e-9 for p, t in zip(powers, at, strict=True)) and (
        min(powers) < -3 or max(powers) > 4
    ):
        return [f"10{str(p).translate(RAISED)}" if p else "1" for p in powers]
    return [number(t) for t in at]


def extremes(x: Sequence[float], y: Values, points: int) -> tuple[list[float], list[float | None]]:
    """At most about `points` points: lowest and highest of each bucket, in their order, so that no
    spike is lost. A bucket without values leaves a gap."""
    if len(x) <= points:
        return list(x), list(y)
    buckets = max(1, points // 2)
    out_x: list[float] = []
    out_y: list[float | None] = []
    for i in range(buckets):
        start, end = i * len(x) // buckets, (i + 1) * len(x) // buckets
        seen = [(v, j) for j in range(start, end) if (v := y[j]) is not None]
        chosen = sorted({min(seen)[1], max(seen)[1]}) if seen else [start]
        out_x += [x[j] for j in chosen]
        out_y += [y[j] for j in chosen]
    return out_x, out_y


def means(x: Sequence[float], y: Values, points: int) -> tuple[list[float], list[float | None]]:
    """At most `points` points: the mean of each bucket at its middle, for areas."""
    if len(x) <= points:
        return list(x), list(y)
    out_x: list[float] = []
    out_y: list[float | None] = []
    for i in range(points):
        start, end = i * len(x) // points, (i + 1) * len(x) // points
        seen = [v for v in y[start:end] if v is not None]
        out_x.append(x[(start + end) // 2])
        out_y.append(sum(seen) / len(seen) if seen else None)
    return out_x, out_y


def smooth(
    x: Sequence[float], y: Values, points: int, *, widest: int, log: bool = False
) -> tuple[list[float], list[float | None]]:
    """Centred mean (geometric if `log`) at about `points` places, over a window that grows with the
    step up to `widest` on each side: the early fall is left alone, and nothing lags."""
    if log:
        y = [math.log(v) if v is not None and v > 0 else None for v in y]
    sums = list(accumulate((v or 0.0 for v in y), initial=0.0))
    counts = list(accumulate((v is not None for v in y), initial=0))
    places = sorted({round(i * (len(x) - 1) / (points - 1)) for i in range(points)}) if x else []
    out: list[float | None] = []
    for i in places:
        reach = min(widest, i // 6)
        start, end = i - reach, min(len(y), i + reach + 1)
        seen = counts[end] - counts[start]
        mean = (sums[end] - sums[start]) / seen if seen else None
        out.append(math.exp(mean) if log and mean is not None else mean)
    return [x[i] for i in places], out


def figure(chart: Chart) -> str:
    """The chart as an HTML figure with its legend, its SVG and the data for the cursor."""
    lines = _stacked(chart.lines)
    xs = [x for line in chart.lines for x in line.x] or [0]
    first, last = chart.span or (min(xs), max(xs))
    span = (first, max(last, first + 1))
    forms: dict[Scale, tuple[float, float]] = {}
    for scale in ("linear", "log") if chart.both else (chart.scale,):
        limits = _limits(chart, lines, scale)
        if limits:
            forms[scale] = limits
    if not forms:
        return ""
    shown: Scale = chart.scale if chart.scale in forms else next(iter(forms))
    toggle = '<button type="button" class="toggle"></button>' if len(forms) > 1 else ""
    unit = f" <small>{escape(chart.unit)}</small>" if chart.unit else ""
    drawn = "".join(_form(chart, lines, scale, span, lim) for scale, lim in forms.items())
    data = {
        "x": span,
        "y": forms,
        "lines": [
            {"x": list(map(_short, line.x)), "y": list(map(_short, line.y)),
             "top": list(map(_short, top)) if line.kind == "area" else None, "colour": line.colour}
            for line, (_, top) in zip(chart.lines, lines, strict=True)
        ],
    }  # fmt: skip
    x_at = ticks(*span, 6)
    x_texts = "".join(
        f'<text x="{_percent(x, span)}" y="100%" dy="19" text-anchor="middle">{label}</text>'
        for x, label in zip(x_at, tick_labels(x_at), strict=True)
    )
    return (
        f'<figure class="{"tall" if chart.tall else ""}" data-scale="{shown}">'
        f"<figcaption><h3>{escape(chart.title)}{unit}</h3>{toggle}</figcaption>"
        f'<p class="legend">{_legend(chart)}</p>'
        f'<svg class="plot" role="img" aria-label="{escape(chart.title)} over steps">{drawn}'
        f'<g class="axis">{x_texts}<text x="0" dx="-9" y="100%" dy="19" text-anchor="end">step'
        '</text></g><g class="cursor"></g><rect class="catch" width="100%" height="100%"/></svg>'
        f'<script type="application/json">{json.dumps(data, separators=(",", ":"))}</script>'
        "</figure>\n"
    )


def _stacked(lines: Sequence[Line]) -> list[tuple[list[float | None], list[float | None]]]:
    """Bottom and top of each line; areas stand on those before them, other lines on nothing."""
    stacked = []
    under: list[float | None] = []
    for line in lines:
        top: list[float | None] = list(line.y)
        if line.kind == "area":
            under = under or [0.0] * len(top)
            top = [(a or 0.0) + (b or 0.0) for a, b in zip(under, top, strict=True)]
        stacked.append((under, top))
        under = top if line.kind == "area" else under
    return stacked


def _limits(
    chart: Chart, lines: Sequence[tuple[Values, Values]], scale: Scale
) -> tuple[float, float] | None:
    values = [v for _, top in lines for v in top if v is not None and (scale == "linear" or v > 0)]
    if not values:
        return None
    values.sort()
    low, high = values[0], values[-1]
    if chart.robust and scale == "linear":
        high = min(high, 1.25 * values[int(0.97 * (len(values) - 1))])
    # A level far away is left out: the measured values are what the figure is for.
    near = [v for _, v in chart.levels if v < 1.6 * high and (scale == "linear" or v > low / 10)]
    low, high = min([low, *near]), max([high, *near])
    if scale == "log":
        high = max(high, low * 1.5)
        margin = (high / low) ** 0.04
        return low / margin, high * margin
    if chart.from_zero or (low >= 0 and low < 0.2 * high):
        low = 0.0
    margin = 0.05 * ((high - low) or abs(high) or 1.0)
    return (low if low == 0 else low - margin), high + margin


def _form(
    chart: Chart,
    lines: Sequence[tuple[Values, Values]],
    scale: Scale,
    span: tuple[float, float],
    limits: tuple[float, float],
) -> str:
    """Grid, levels, marks and lines in one of the two scales."""

    def place(value: float) -> float:
        a, b = limits
        if scale == "log":
            return math.log(max(value, 1e-300) / a) / math.log(b / a)
        return (value - a) / (b - a)

    at = log_ticks(*limits) if scale == "log" else ticks(*limits, 6 if chart.tall else 4)
    parts, dots = [f'<g class="{scale}"><g class="axis">'], list[str]()
    labels = log_labels(at) if scale == "log" else tick_labels(at)
    for value, label in zip(at, labels, strict=True):
        y = f"{100 - 100 * place(value):.2f}%"
        parts.append(f'<line x2="100%" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="0" dx="-9" y="{y}" dy="4" text-anchor="end">{label}</text>')
    parts.append("</g>")
    for label, step in chart.marks:
        x = _percent(step, span)
        name = f"<title>{escape(label)}</title>"
        parts.append(f'<line class="mark" x1="{x}" x2="{x}" y2="100%">{name}</line>')
    parts.append(
        f'<svg width="100%" height="100%" viewBox="0 0 {SIDE} {SIDE}" preserveAspectRatio="none">'
    )
    for line, (under, top) in zip(chart.lines, lines, strict=True):
        spots = [
            None if v is None or (scale == "log" and v <= 0)
            else (round(SIDE * (x - span[0]) / (span[1] - span[0])), round(SIDE * (1 - place(v))))
            for x, v in zip(line.x, top, strict=True)
        ]  # fmt: skip
        if line.kind == "dots":
            dots += [f'<circle style="--c:{line.colour}" cx="{x / SIDE:.2%}" cy="{y / SIDE:.2%}"/>'
                     for x, y in filter(None, spots)]  # fmt: skip
            continue
        path = _path(spots)
        if line.kind == "area":
            floor = [(spot[0], round(SIDE * (1 - place(v or 0.0))))
                     for spot, v in zip(spots, under, strict=True) if spot]  # fmt: skip
            path += "L" + " ".join(f"{x} {y}" for x, y in reversed(floor)) + "Z" if floor else ""
        parts.append(f'<path class="{line.kind}" style="--c:{line.colour}" d="{path}"/>')
    parts.append("</svg>")
    for _, value in chart.levels:
        if -0.001 <= place(value) <= 1.001:
            y = f"{1 - place(value):.2%}"
            parts.append(f'<line class="level" x2="100%" y1="{y}" y2="{y}"/>')
    return "".join([*parts, *dots, "</g>"])


def _path(spots: Sequence[tuple[int, int] | None]) -> str:
    """An SVG path with gaps."""
    parts: list[str] = []
    pen = False
    last = None
    for spot in spots:
        if spot is None:
            pen = False
        elif spot != last or not pen:
            parts.append(f"{'' if pen else 'M'}{spot[0]} {spot[1]}")
            pen = True
        last = spot
    return " ".join(parts)


def _legend(chart: Chart) -> str:
    """The labels with their last values; the script writes the values under the cursor there."""
    keys = []
    every = math.ceil(len(chart.lines) / MOST_KEYS)
    for i, line in enumerate(chart.lines):
        last = next((v for v in reversed(line.y) if v is not None), None)
        value = number(last) if last is not None else "-"
        hidden = "" if i % every == 0 or i == len(chart.lines) - 1 else " hidden"
        keys.append(
            f'<span class="key"{hidden}><i class="{line.kind}" style="--c:{line.colour}"></i>'
            f"{escape(line.label)} <b>{value}</b></span>"
        )
    for label, at in chart.levels:
        keys.append(
            f'<span class="key"><i class="level"></i>{escape(label)} <b>{number(at)}</b></span>'
        )
    return "".join(keys)


def _percent(x: float, span: tuple[float, float]) -> str:
    return f"{100 * (x - span[0]) / (span[1] - span[0]):.2f}%"


def _short(value: float | None) -> float | int | None:
    """Five significant digits (whole steps as they are): what a cursor can show."""
    if value is None or value == int(value):
        return value if value is None else int(value)
    return float(f"{value:.5g}")
