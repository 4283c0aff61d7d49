"""The charts of a run: which there are, their numbers thinned to what a screen shows, their HTML.

A chart is an HTML figure with its numbers as JSON beside it; `assets/page.js` draws it with uPlot.
No torch, no numpy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import accumulate
from statistics import fmean, median
from typing import Any, Literal

from cordee.report.reader import Column, RunRecords, finite_number
from cordee.report.summary import compute_label, format_number

Values = Sequence[float | None]
Thinned = tuple[list[float], list[float | None]]

MAX_LINE_POINTS = 1500
"""Points of a line; a figure is some 500 pixels wide and may be zoomed."""
MAX_LAYER_POINTS = 24_000
"""Points of all layers' lines together."""
MAX_LEGEND_KEYS = 12
"""Labels that a legend shows; of more lines it shows every second, third, ..., and the last."""
MARKED_EVENTS = (
    "resumed", "step_skipped", "checkpoint_failed", "data_changed", "lost", "left", "joined",
)  # fmt: skip
"""Events that are marked in the charts of the loss, the newest MAX_MARKS of them."""
MAX_MARKS = 100
SENT_TITLES = {"bytes_sent": "Sent in a step", "bytes_inside": "Sent in a step inside the island"}
"""Columns of bytes that a rank sends, and what their charts are called."""
LAYER_COLOURS = {"embed": "var(--soft)", "norm": "var(--c3)", "head": "var(--c5)"}
BLUE, ORANGE, GREEN, AMBER = "var(--c0)", "var(--c1)", "var(--c2)", "var(--c4)"
LN2 = math.log(2)


@dataclass(frozen=True, kw_only=True)
class ChartSeries:
    """A series. `faint` is drawn behind and thin, `dots` are single points, `area` is stacked."""

    label: str
    x: Sequence[float]
    y: Values
    colour: str = BLUE
    kind: Literal["line", "faint", "dots", "area"] = "line"


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A figure: series over steps, level lines (label, value), marked steps (label, step)."""

    title: str
    unit: str = ""
    series: Sequence[ChartSeries] = ()
    levels: Sequence[tuple[str, float]] = ()
    step_marks: Sequence[tuple[str, float]] = ()
    scale: Literal["linear", "log"] = "linear"
    has_scale_toggle: bool = True
    """Whether the reader may switch between linear and logarithmic."""
    from_zero: bool = False
    clips_peaks: bool = False
    """Leave single peaks outside, so that they do not flatten the rest."""
    is_tall: bool = False


def downsample_extremes(x: Sequence[float], y: Values, max_points: int) -> Thinned:
    """At most about `max_points` points: lowest and highest of each bucket, in their order, so that
    no spike is lost. A bucket without values leaves a gap."""
    if len(x) <= max_points:
        return list(x), list(y)
    buckets = max(1, max_points // 2)
    indices: list[int] = []
    for i in range(buckets):
        start, end = i * len(x) // buckets, (i + 1) * len(x) // buckets
        values = [(v, j) for j in range(start, end) if (v := y[j]) is not None]
        indices += sorted({min(values)[1], max(values)[1]}) if values else [start]
    return [x[j] for j in indices], [y[j] for j in indices]


def smooth(
    x: Sequence[float], y: Values, max_points: int, *, max_half_width: int, log_scale: bool = False
) -> Thinned:
    """Centred mean (geometric if `log_scale`) at about `max_points` places, over a window that
    grows with the step up to `max_half_width` on each side: the early fall is left alone, and
    nothing lags."""
    if not x:
        return [], []
    if log_scale:
        y = [math.log(v) if v is not None and v > 0 else None for v in y]
    sums = list(accumulate((v or 0.0 for v in y), initial=0.0))
    counts = list(accumulate((v is not None for v in y), initial=0))
    indices = sorted({round(i * (len(x) - 1) / (max_points - 1)) for i in range(max_points)})
    out_y: list[float | None] = []
    for i in indices:
        half_width = min(max_half_width, i // 6)
        start, end = i - half_width, min(len(y), i + half_width + 1)
        count = counts[end] - counts[start]
        mean = (sums[end] - sums[start]) / count if count else None
        out_y.append(math.exp(mean) if log_scale and mean is not None else mean)
    return [x[i] for i in indices], out_y


def figure_html(chart: Chart, x_range: tuple[float, float]) -> str:
    """The chart with its legend and its numbers; "" when none can be drawn. `x_range`: first and
    last step of the axis."""
    values = [v for line in chart.series for v in line.y if v is not None]
    has_log = any(v > 0 for v in values)
    if not values or (chart.scale == "log" and not has_log and not chart.has_scale_toggle):
        return ""
    toggle = '<button type="button" class="toggle"></button>'
    unit = f" <small>{escape(chart.unit)}</small>" if chart.unit else ""
    tables: list[list[Sequence[float | None]]] = []
    for line in chart.series:  # neighbours over the same steps share one table
        if not tables or tables[-1][0] != line.x:
            tables.append([line.x])
        # Five significant digits are what a cursor can show.
        tables[-1].append([None if v is None else float(f"{v:.5g}") for v in line.y])
    numbers = {
        "x": (x_range[0], max(x_range[1], x_range[0] + 1)),
        "tables": tables,
        "series": [{"kind": s.kind, "colour": s.colour, "count": len(s.x)} for s in chart.series],
        "levels": [level for _, level in chart.levels],
        "marks": chart.step_marks,
        "zero": chart.from_zero,
        "clips": chart.clips_peaks,
    }
    # Nothing in it can end the element that holds it.
    data = json.dumps(numbers, separators=(",", ":"), default=list).replace("<", "\\u003c")
    return (
        f'<figure class="{"tall" if chart.is_tall else ""}"'
        f' data-scale="{chart.scale if has_log else "linear"}">'
        f"<figcaption><h3>{escape(chart.title)}{unit}</h3>"
        f"{toggle if chart.has_scale_toggle and has_log else ''}</figcaption>"
        f'<p class="legend">{_legend_html(chart)}</p>'
        f'<div class="plot" role="img" aria-label="{escape(chart.title)} over steps"></div>'
        f'<script type="application/json">{data}</script></figure>\n'
    )


def _legend_html(chart: Chart) -> str:
    """The labels with their last values; the script writes the values under the cursor there."""
    items = []
    stride = math.ceil(len(chart.series) / MAX_LEGEND_KEYS)
    for i, line in enumerate(chart.series):
        last_value = next((v for v in reversed(line.y) if v is not None), None)
        value_text = "-" if last_value is None else format_number(last_value)
        extra = "" if i % stride == 0 or i == len(chart.series) - 1 else " extra"
        items.append(
            f'<button type="button" class="key{extra}" data-series="{i + 1}" aria-pressed="true">'
            f'<i class="{line.kind}" style="--c:{escape(line.colour)}"></i>{escape(line.label)}'
            f" <b>{value_text}</b></button>"
        )
    for label, level in chart.levels:
        key = f'<i class="level"></i>{escape(label)} <b>{format_number(level)}</b>'
        items.append(f'<span class="key">{key}</span>')
    return "".join(items)


def learning_charts(records: RunRecords) -> list[Chart]:
    """Loss, learning rate and gradients."""
    lr = _column_series(records, "learning rate", records.columns["lr"], colour=AMBER)
    clip = records.run.clip if records.run else None
    norms = _series_with_mean(records, records.columns["grad_norm"], log_scale=True, colour=GREEN)
    return [
        *_loss_charts(records),
        Chart(title="Learning rate", series=[lr], from_zero=True),
        Chart(
            title="Gradient norm",
            series=norms,
            levels=[("clipped at", clip.limit)] if clip and clip.kind == "norm" else [],
            scale="log",
            clips_peaks=True,
        ),
        _layer_chart(records),
    ]


def speed_charts(records: RunRecords) -> list[Chart]:
    """Rate, time by phase, memory and traffic; islands where their number changed."""
    charts = [
        _column_chart(records, "Tokens a second", "tokens_per_s", with_mean=True),
        _step_time_chart(records),
        _column_chart(records, "Memory of a rank", "memory_bytes", is_size=True),
    ]
    names = [name for name in SENT_TITLES if any(records.column_values(name))] or ["bytes_sent"]
    charts += [_column_chart(records, SENT_TITLES[name], name, is_size=True) for name in names]
    if len(set(records.column_values("islands"))) > 1:
        charts.append(_column_chart(records, "Islands", "islands"))
    return charts


def _column_series(records: RunRecords, label: str, column: Column, **style: Any) -> ChartSeries:
    x, y = downsample_extremes(records.steps, column, MAX_LINE_POINTS)
    return ChartSeries(label=label, x=x, y=y, **style)


def _series_with_mean(
    records: RunRecords, column: Column, *, log_scale: bool = False, colour: str = BLUE
) -> list[ChartSeries]:
    """A column as it is, faint, and smoothed."""
    width = max(1, len(records.steps) // 60)
    x, y = smooth(records.steps, column, MAX_LINE_POINTS, max_half_width=width, log_scale=log_scale)
    return [
        _column_series(records, "each step", column, kind="faint", colour=colour),
        ChartSeries(label="smoothed", x=x, y=y, colour=colour),
    ]


def _loss_charts(records: RunRecords) -> list[Chart]:
    """Loss in nats, and in bits a byte: training, smoothed, held out, and the data's entropy."""
    entropy_bits = finite_number((records.last_event("started") or {}).get("entropy_bits"))
    pairs = zip(records.columns["bits_per_byte"], records.columns["loss"], strict=True)
    ratios = [bits / loss for bits, loss in pairs if bits is not None and loss]
    bits_per_nat = fmean(ratios) if ratios else 1 / LN2
    step_marks = [
        (str(e.get("says") or f"{e['event'].replace('_', ' ')} at step {e['step']}"), e["step"])
        for e in records.events
        if e["event"] in MARKED_EVENTS and isinstance(e.get("step"), int)
    ]
    charts = []
    for name, title, unit, factor in (
        ("loss", "Loss", "nats a token", 1.0),
        ("bits_per_byte", "Bits per byte", "", bits_per_nat),
    ):
        if not records.column_values(name):
            continue
        series = _series_with_mean(records, records.columns[name])
        held_out = {
            e.get("step", records.steps[-1]): score
            for e in records.events
            if (score := finite_number(e.get(f"held_out_{name}"))) is not None
        }
        if held_out:
            x, y = zip(*sorted(held_out.items()), strict=True)
            series.append(ChartSeries(label="held out", x=x, y=y, colour=ORANGE, kind="dots"))
        level = None if entropy_bits is None else entropy_bits * LN2 * factor
        charts.append(
            Chart(
                title=title,
                unit=unit,
                series=series,
                levels=[] if level is None else [("entropy of the data", level)],
                step_marks=step_marks[-MAX_MARKS:],
                is_tall=name == "loss",
            )
        )
    return charts


def _layer_chart(records: RunRecords) -> Chart:
    """One line a layer; blocks run from blue (first) to amber (last)."""
    blocks = [name for name in records.layers if name.startswith("blocks.")]
    colours = LAYER_COLOURS | {
        name: f"hsl({215 - 180 * i / max(1, len(blocks) - 1):.0f} 52% 50%)"
        for i, name in enumerate(blocks)
    }
    points = max(2, min(MAX_LINE_POINTS, MAX_LAYER_POINTS // max(1, len(records.layers))))
    width = len(records.layer_steps) // 200
    series = []
    for name, column in records.layers.items():
        x, y = smooth(records.layer_steps, column, points, max_half_width=width, log_scale=True)
        series.append(ChartSeries(label=name, x=x, y=y, colour=colours.get(name, ORANGE)))
    return Chart(title="Gradient norm of each layer", series=series, scale="log")


def _step_time_chart(records: RunRecords) -> Chart:
    """Stacked: computing, communicating, waiting for data."""
    step_s, data_s, comm_s = (records.columns[n] for n in ("step_s", "data_s", "comm_s"))
    compute_s: Column = [
        None if s is None else max(0.0, s - (d or 0.0) - (c or 0.0))
        for s, d, c in zip(step_s, data_s, comm_s, strict=True)
    ]
    is_short = median(records.column_values("step_s") or [1.0]) < 1
    factor, unit = (1000.0, "ms a step") if is_short else (1.0, "s a step")
    points = MAX_LINE_POINTS // 4
    width = len(records.steps) // (2 * points)
    series = []
    for label, column, colour in (
        (compute_label(records), compute_s, BLUE),
        ("communication", comm_s, ORANGE),
        ("waiting for data", data_s, AMBER),
    ):
        scaled: Column = [None if v is None else v * factor for v in column]
        x, y = smooth(records.steps, scaled, points, max_half_width=width)
        series.append(ChartSeries(label=label, x=x, y=y, colour=colour, kind="area"))
    chart = _column_chart(records, "Where a step goes", "step_s", factor=factor)
    return replace(chart, unit=unit, series=series if chart.series else [])


def _column_chart(
    records: RunRecords,
    title: str,
    name: str,
    *,
    is_size: bool = False,
    with_mean: bool = False,
    factor: float = 1.0,
) -> Chart:
    """A column from zero upwards, with what the plan said of it; sizes in a fitting unit."""
    values, planned = records.column_values(name), records.prediction.get(name)
    unit = ""
    if is_size:
        powers = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
        power, unit = next((p for p in powers if max(values, default=0.0) >= p[0]), powers[-1])
        factor = 1 / power
    scaled: Column = [None if v is None else v * factor for v in records.columns[name]]
    series = [_column_series(records, "each step", scaled)]
    if with_mean:
        series = _series_with_mean(records, scaled)
    return Chart(
        title=title,
        unit=unit,
        series=series if values else [],
        levels=[("planned", planned * factor)] if planned else [],
        has_scale_toggle=False,
        from_zero=True,
        clips_peaks=True,
    )
