"""Line charts as inline SVG: numbers in, one string of HTML out, light and dark by the page's CSS.

PAPER: no torch, no numpy, no file, nothing fetched. A figure stretches to any width because lines
live in a stretched inner SVG (strokes do not scale) while text is placed in per cent. Not here:
what is drawn, style and script (`report_page.py`), PNGs (`png.py`). Traded away: zoom; each figure
has its linear and its logarithmic form drawn in advance, so that the script stays small.
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
AxisScale = Literal["linear", "log"]

SUPERSCRIPT_DIGITS = str.maketrans(
    "-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079"
)
MAX_LEGEND_KEYS = 12
"""Labels that a legend shows; of more lines it shows every second, third, ..., and the last."""
VIEW_BOX_SIZE = 1000
"""Units of the stretched inner SVG in both directions; finer than a pixel."""


@dataclass(frozen=True, kw_only=True)
class ChartSeries:
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
    series: Sequence[ChartSeries] = ()
    levels: Sequence[tuple[str, float]] = ()
    step_marks: Sequence[tuple[str, float]] = ()
    scale: AxisScale = "linear"
    has_scale_toggle: bool = True
    """Whether the reader may switch between linear and logarithmic."""
    from_zero: bool = False
    clips_peaks: bool = False
    """Leave single peaks outside, so that they do not flatten the rest."""
    is_tall: bool = False
    x_range: tuple[float, float] | None = None
    """First and last step of the axis; None takes them from the lines."""


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round values (1, 2, 2.5 or 5 times a power of ten) in [low, high]."""
    if not high > low:
        return [low]
    raw_step = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw_step))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw_step * 0.999)
    first_multiple = math.ceil(low / step - 1e-9)
    values = [i * step for i in range(first_multiple, math.floor(high / step + 1e-9) + 1)]
    return [0.0 if abs(t) < step * 1e-9 else t for t in values]


def log_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Powers of ten in [low, high], every few where there are many, with 2 and 5 where few."""
    low_power, high_power = math.floor(math.log10(low)), math.ceil(math.log10(high))
    decades = [10.0**e for e in range(low_power, high_power + 1)]
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 4, 5, 6, 7, 8, 9)):
        values = [d * f for d in decades for f in factors if low * 0.999 <= d * f <= high * 1.001]
        if len(values) >= 3:
            break
    if len(values) < 2:
        return ticks(low, high, 4)
    stride = math.ceil(len(values) / count)
    return values[:: max(1, stride)]


def format_number(value: float) -> str:
    """A number for a person: four significant digits, thousands parted, powers where needed."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    if not 1e-3 <= abs(value) < 1e7:
        mantissa, _, power = f"{value:.3g}".partition("e")
        return f"{mantissa}e{int(power)}" if power else mantissa
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def tick_labels(tick_values: Sequence[float]) -> list[str]:
    """Labels of one axis, with as many decimals as its steps need and no more."""
    gaps = [abs(b - a) for a, b in pairwise(tick_values)]
    is_even = bool(gaps) and max(gaps) - min(gaps) < 1e-6 * max(gaps)
    if not is_even or not 1e-4 <= min(gaps) < 1e7:
        return [format_number(t) for t in tick_values]
    exact_decimals = (n for n in range(5) if abs(gaps[0] * 10**n - round(gaps[0] * 10**n)) < 1e-6)
    decimals = next(exact_decimals, 5)
    return [f"{t:,.{decimals}f}" for t in tick_values]


def log_labels(tick_values: Sequence[float]) -> list[str]:
    """Labels of a logarithmic axis: powers of ten as powers where plain numbers would be long."""
    powers = [round(math.log10(t)) for t in tick_values]
    if all(abs(10.0**p / t - 1) < 1e-9 for p, t in zip(powers, tick_values, strict=True)) and (
        min(powers) < -3 or max(powers) > 4
    ):
        return [f"10{str(p).translate(SUPERSCRIPT_DIGITS)}" if p else "1" for p in powers]
    return [format_number(t) for t in tick_values]


def downsample_extremes(
    x: Sequence[float], y: Values, max_points: int
) -> tuple[list[float], list[float | None]]:
    """At most about `max_points` points: lowest and highest of each bucket, in their order, so that
    no spike is lost. A bucket without values leaves a gap."""
    if len(x) <= max_points:
        return list(x), list(y)
    buckets = max(1, max_points // 2)
    out_x: list[float] = []
    out_y: list[float | None] = []
    for i in range(buckets):
        start, end = i * len(x) // buckets, (i + 1) * len(x) // buckets
        value_indices = [(v, j) for j in range(start, end) if (v := y[j]) is not None]
        indices = (
            sorted({min(value_indices)[1], max(value_indices)[1]}) if value_indices else [start]
        )
        out_x += [x[j] for j in indices]
        out_y += [y[j] for j in indices]
    return out_x, out_y


def downsample_means(
    x: Sequence[float], y: Values, max_points: int
) -> tuple[list[float], list[float | None]]:
    """At most `max_points` points: the mean of each bucket at its middle, for areas."""
    if len(x) <= max_points:
        return list(x), list(y)
    out_x: list[float] = []
    out_y: list[float | None] = []
    for i in range(max_points):
        start, end = i * len(x) // max_points, (i + 1) * len(x) // max_points
        values = [v for v in y[start:end] if v is not None]
        out_x.append(x[(start + end) // 2])
        out_y.append(sum(values) / len(values) if values else None)
    return out_x, out_y


def smooth(
    x: Sequence[float], y: Values, max_points: int, *, max_half_width: int, log_scale: bool = False
) -> tuple[list[float], list[float | None]]:
    """Centred mean (geometric if `log_scale`) at about `max_points` places, over a window that
    grows with the step up to `max_half_width` on each side: the early fall is left alone, and
    nothing lags."""
    if log_scale:
        y = [math.log(v) if v is not None and v > 0 else None for v in y]
    sums = list(accumulate((v or 0.0 for v in y), initial=0.0))
    counts = list(accumulate((v is not None for v in y), initial=0))
    indices = (
        sorted({round(i * (len(x) - 1) / (max_points - 1)) for i in range(max_points)}) if x else []
    )
    out_y: list[float | None] = []
    for i in indices:
        half_width = min(max_half_width, i // 6)
        start, end = i - half_width, min(len(y), i + half_width + 1)
        count = counts[end] - counts[start]
        mean = (sums[end] - sums[start]) / count if count else None
        out_y.append(math.exp(mean) if log_scale and mean is not None else mean)
    return [x[i] for i in indices], out_y


def figure_html(chart: Chart) -> str:
    """The chart as an HTML figure with its legend, its SVG and the data for the cursor."""
    bounds = _stack_areas(chart.series)
    x_values = [x for line in chart.series for x in line.x] or [0]
    first_x, last_x = chart.x_range or (min(x_values), max(x_values))
    x_range = (first_x, max(last_x, first_x + 1))
    limits_by_scale: dict[AxisScale, tuple[float, float]] = {}
    for scale in ("linear", "log") if chart.has_scale_toggle else (chart.scale,):
        limits = _y_limits(chart, bounds, scale)
        if limits:
            limits_by_scale[scale] = limits
    if not limits_by_scale:
        return ""
    initial_scale: AxisScale = (
        chart.scale if chart.scale in limits_by_scale else next(iter(limits_by_scale))
    )
    toggle_html = (
        '<button type="button" class="toggle"></button>' if len(limits_by_scale) > 1 else ""
    )
    unit_html = f" <small>{escape(chart.unit)}</small>" if chart.unit else ""
    plots_svg = "".join(
        _plot_svg(chart, bounds, scale, x_range, scale_limits)
        for scale, scale_limits in limits_by_scale.items()
    )
    data = {
        "x": x_range,
        "y": limits_by_scale,
        "lines": [
            {
                "x": list(map(_round_significant, line.x)),
                "y": list(map(_round_significant, line.y)),
                "top": list(map(_round_significant, top)) if line.kind == "area" else None,
                "colour": line.colour,
            }
            for line, (_, top) in zip(chart.series, bounds, strict=True)
        ],
    }
    x_ticks = ticks(*x_range, 6)
    x_labels_svg = "".join(
        f'<text x="{_percent(x, x_range)}" y="100%" dy="19" text-anchor="middle">{label}</text>'
        for x, label in zip(x_ticks, tick_labels(x_ticks), strict=True)
    )
    return (
        f'<figure class="{"tall" if chart.is_tall else ""}" data-scale="{initial_scale}">'
        f"<figcaption><h3>{escape(chart.title)}{unit_html}</h3>{toggle_html}</figcaption>"
        f'<p class="legend">{_legend_html(chart)}</p>'
        f'<svg class="plot" role="img" aria-label="{escape(chart.title)} over steps">{plots_svg}'
        f'<g class="axis">{x_labels_svg}<text x="0" dx="-9" y="100%" dy="19" text-anchor="end">step'
        '</text></g><g class="cursor"></g><rect class="catch" width="100%" height="100%"/></svg>'
        f'<script type="application/json">{json.dumps(data, separators=(",", ":"))}</script>'
        "</figure>\n"
    )


def _stack_areas(
    series: Sequence[ChartSeries],
) -> list[tuple[list[float | None], list[float | None]]]:
    """Bottom and top of each line; areas stand on those before them, other lines on nothing."""
    bounds = []
    bottom: list[float | None] = []
    for line in series:
        top: list[float | None] = list(line.y)
        if line.kind == "area":
            bottom = bottom or [0.0] * len(top)
            top = [(a or 0.0) + (b or 0.0) for a, b in zip(bottom, top, strict=True)]
        bounds.append((bottom, top))
        bottom = top if line.kind == "area" else bottom
    return bounds


def _y_limits(
    chart: Chart, bounds: Sequence[tuple[Values, Values]], scale: AxisScale
) -> tuple[float, float] | None:
    values = [v for _, top in bounds for v in top if v is not None and (scale == "linear" or v > 0)]
    if not values:
        return None
    values.sort()
    low, high = values[0], values[-1]
    if chart.clips_peaks and scale == "linear":
        high = min(high, 1.25 * values[int(0.97 * (len(values) - 1))])
    # A level far away is left out: the measured values are what the figure is for.
    near_levels = [
        v for _, v in chart.levels if v < 1.6 * high and (scale == "linear" or v > low / 10)
    ]
    low, high = min([low, *near_levels]), max([high, *near_levels])
    if scale == "log":
        high = max(high, low * 1.5)
        margin = (high / low) ** 0.04
        return low / margin, high * margin
    if chart.from_zero or (low >= 0 and low < 0.2 * high):
        low = 0.0
    margin = 0.05 * ((high - low) or abs(high) or 1.0)
    return (low if low == 0 else low - margin), high + margin


def _plot_svg(
    chart: Chart,
    bounds: Sequence[tuple[Values, Values]],
    scale: AxisScale,
    x_range: tuple[float, float],
    limits: tuple[float, float],
) -> str:
    """Grid, levels, marks and lines in one of the two scales."""

    def to_fraction(value: float) -> float:
        low, high = limits
        if scale == "log":
            return math.log(max(value, 1e-300) / low) / math.log(high / low)
        return (value - low) / (high - low)

    tick_values = (
        log_ticks(*limits) if scale == "log" else ticks(*limits, 6 if chart.is_tall else 4)
    )
    parts, dots_svg = [f'<g class="{scale}"><g class="axis">'], list[str]()
    labels = log_labels(tick_values) if scale == "log" else tick_labels(tick_values)
    for value, label in zip(tick_values, labels, strict=True):
        y = f"{100 - 100 * to_fraction(value):.2f}%"
        parts.append(f'<line x2="100%" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="0" dx="-9" y="{y}" dy="4" text-anchor="end">{label}</text>')
    parts.append("</g>")
    for label, step in chart.step_marks:
        x = _percent(step, x_range)
        title_svg = f"<title>{escape(label)}</title>"
        parts.append(f'<line class="mark" x1="{x}" x2="{x}" y2="100%">{title_svg}</line>')
    parts.append(
        f'<svg width="100%" height="100%" viewBox="0 0 {VIEW_BOX_SIZE} {VIEW_BOX_SIZE}"'
        ' preserveAspectRatio="none">'
    )
    for line, (bottom, top) in zip(chart.series, bounds, strict=True):
        points = [
            None
            if v is None or (scale == "log" and v <= 0)
            else (
                round(VIEW_BOX_SIZE * (x - x_range[0]) / (x_range[1] - x_range[0])),
                round(VIEW_BOX_SIZE * (1 - to_fraction(v))),
            )
            for x, v in zip(line.x, top, strict=True)
        ]
        if line.kind == "dots":
            dots_svg += [
                f'<circle style="--c:{line.colour}" cx="{x / VIEW_BOX_SIZE:.2%}"'
                f' cy="{y / VIEW_BOX_SIZE:.2%}"/>'
                for x, y in filter(None, points)
            ]
            continue
        path = _path_data(points)
        if line.kind == "area":
            bottom_points = [(point[0], round(VIEW_BOX_SIZE * (1 - to_fraction(v or 0.0))))
                     for point, v in zip(points, bottom, strict=True) if point]  # fmt: skip
            path += (
                "L" + " ".join(f"{x} {y}" for x, y in reversed(bottom_points)) + "Z"
                if bottom_points
                else ""
            )
        parts.append(f'<path class="{line.kind}" style="--c:{line.colour}" d="{path}"/>')
    parts.append("</svg>")
    for _, value in chart.levels:
        if -0.001 <= to_fraction(value) <= 1.001:
            y = f"{1 - to_fraction(value):.2%}"
            parts.append(f'<line class="level" x2="100%" y1="{y}" y2="{y}"/>')
    return "".join([*parts, *dots_svg, "</g>"])


def _path_data(points: Sequence[tuple[int, int] | None]) -> str:
    """An SVG path with gaps."""
    parts: list[str] = []
    is_pen_down = False
    last_point = None
    for point in points:
        if point is None:
            is_pen_down = False
        elif point != last_point or not is_pen_down:
            parts.append(f"{'' if is_pen_down else 'M'}{point[0]} {point[1]}")
            is_pen_down = True
        last_point = point
    return " ".join(parts)


def _legend_html(chart: Chart) -> str:
    """The labels with their last values; the script writes the values under the cursor there."""
    items = []
    stride = math.ceil(len(chart.series) / MAX_LEGEND_KEYS)
    for i, line in enumerate(chart.series):
        last_value = next((v for v in reversed(line.y) if v is not None), None)
        value_text = format_number(last_value) if last_value is not None else "-"
        hidden_attribute = "" if i % stride == 0 or i == len(chart.series) - 1 else " hidden"
        items.append(
            f'<span class="key"{hidden_attribute}><i class="{line.kind}"'
            f' style="--c:{line.colour}"></i>'
            f"{escape(line.label)} <b>{value_text}</b></span>"
        )
    for label, level in chart.levels:
        items.append(
            f'<span class="key"><i class="level"></i>{escape(label)}'
            f" <b>{format_number(level)}</b></span>"
        )
    return "".join(items)


def _percent(x: float, x_range: tuple[float, float]) -> str:
    return f"{100 * (x - x_range[0]) / (x_range[1] - x_range[0]):.2f}%"


def _round_significant(value: float | None) -> float | int | None:
    """Five significant digits (whole steps as they are): what a cursor can show."""
    if value is None or value == int(value):
        return value if value is None else int(value)
    return float(f"{value:.5g}")
