"""The report as one HTML page: header, verdict, figures, tables; style and script are in it.

PAPER: a Records and a Summary in, a string out; the page fetches nothing and may be mailed. Not
here: reading and judging (`report.py`), drawing (`charts.py`). Traded away: a template language;
the page is one column of sections, each a function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from html import escape
from math import isfinite
from typing import Any

from cordee.config.load import field_doc, flatten
from cordee.config.model import DEFAULT_PRESET
from cordee.config.presets import model_presets
from cordee.config.run import Run
from cordee.report.charts import (
    Chart,
    ChartSeries,
    downsample_extremes,
    downsample_means,
    figure_html,
    format_number,
    smooth,
)
from cordee.report.reader import Column, RunRecords
from cordee.report.reader import finite_number as number_of
from cordee.report.style import SCRIPT, STYLE
from cordee.report.summary import (
    RunSummary,
    compute_label,
    format_amount,
    format_seconds,
    mean_ratio,
)

SENT_TITLES = {"bytes_sent": "Sent in a step", "bytes_inside": "Sent in a step inside the island"}
"""Columns of bytes that a rank sends, and what their charts are called."""

TITLE_SUFFIX = " · cordee report</title>"
"""How the title of every page ends, by which a page is known."""
MAX_LINE_POINTS = 800
"""Points of a line; a figure is some 500 pixels wide, and each bucket keeps both its extremes."""
MAX_LAYER_POINTS = 24_000
"""Points of all layers' lines together."""
MAX_EVENTS = 200
MAX_ISLANDS = 64
"""Rows of the table of shares."""
MARKED_EVENTS = ("resumed", "step_skipped", "checkpoint_failed", "data_changed")
"""Events that are marked in the charts of the loss."""
KEY_NAMES = {"seconds": "took", "bytes": "size"}
"""Keys of events that read better under another name."""
BLUE = "var(--c0)"
LN2 = 0.6931471805599453


def report_page(records: RunRecords, summary: RunSummary) -> str:
    """The whole report as one HTML document; at most some hundred kilobytes for any run."""
    body = _header_html(records, summary) + _figures_html(records) + _plan_table(summary)
    body += _share_table(records)
    body += _config_table(records.run) + _event_table(records.events) + _sample_html(records)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(summary.run)}{TITLE_SUFFIX}<style>{STYLE}</style></head>"
        f"<body><main>{body}<footer>cordee report {escape(str(records.folder))}"
        + (f" · weights {escape(summary.weights_sha256)}" if summary.weights_sha256 else "")
        + f"</footer></main><script>{SCRIPT}</script></body></html>\n"
    )


def _header_html(records: RunRecords, summary: RunSummary) -> str:
    state_class = {"finished": "good", "running": "note", "stopped": "bad"}[summary.state]
    remarks = "".join(f'<li class="{r.kind}">{escape(r.text)}</li>' for r in summary.remarks)
    start_event = records.last_event("started") or {}
    facts = [str(start_event.get("time", ""))[:19].replace("T", " ")]
    if records.run:
        model, data = records.run.model, records.run.data
        name = str(start_event.get("brought") or model.name)
        is_preset = name == model.preset
        facts.append(f"{name}: {model.layers} layers of width {model.width}" if is_preset else name)
        row_text = (
            "images, a label and {} bytes each" if model.is_classifier else "{} tokens a sequence"
        )
        facts.append(f"{data.path}, {row_text.format(data.sequence - model.is_classifier)}")
        facts.append(f"{records.run.optim.name}, {records.run.run.precision}")
    islands = records.column_values("islands")
    if islands:
        facts.append(f"{islands[-1]:.0f} island" + ("s" if islands[-1] != 1 else ""))
    if summary.last_step is not None:
        facts.append(f"last step {summary.last_step:,}")
    medians = summary.medians
    max_half_width = max(1, len(records.steps) // 60)
    _, losses = smooth(records.steps, records.columns["loss"], 2, max_half_width=max_half_width)
    tiles = [
        ("Training loss", _format_optional(losses[-1] if losses else None, format_number)),
        ("Held-out bits per byte", _format_optional(summary.held_out_bits_per_byte, format_number)),
        (
            "Held-out images right",
            _format_optional(summary.held_out_accuracy, lambda v: f"{v:.2%}"),
        ),
        ("Tokens a second", _format_optional(medians["tokens_per_s"], format_number)),
        ("A step", _format_optional(medians["step_s"], format_seconds)),
        (
            "Memory of a rank",
            _format_optional(medians["memory_bytes"], lambda v: format_amount(v, "B")),
        ),
        ("Model FLOP utilisation", _format_optional(medians["mfu"], lambda v: f"{v:.1%}")),
        ("Skipped steps", str(summary.skipped)),
    ]
    cells = "".join(f"<div><dt>{n}</dt><dd>{escape(v)}</dd></div>" for n, v in tiles if v)
    return (
        f'<header><h1>{escape(summary.run)}</h1><span class="state'
        f' {state_class}">{summary.state}</span>'
        f'</header><p class="about">{escape(" · ".join(fact for fact in facts if fact))}</p>'
        f'<ul class="verdict">{remarks}</ul><dl class="tiles">{cells}</dl>'
    )


def _figures_html(records: RunRecords) -> str:
    if not records.steps:
        return "<h2>Learning</h2><p>No step has been recorded yet.</p>"
    learning_charts = [
        *_loss_charts(records),
        _lr_chart(records),
        _grad_norm_chart(records),
        _layer_gradient_chart(records),
    ]
    speed_charts = [
        _column_chart(records, "Tokens a second", "tokens_per_s", with_mean=True),
        _step_time_chart(records),
        _column_chart(records, "Memory of a rank", "memory_bytes", is_size=True),
    ]
    sent_columns = [name for name in SENT_TITLES if any(records.column_values(name))] or [
        *SENT_TITLES
    ][:1]
    speed_charts += [
        _column_chart(records, SENT_TITLES[name], name, is_size=True) for name in sent_columns
    ]
    if len(set(records.column_values("islands"))) > 1:
        speed_charts.append(_column_chart(records, "Islands", "islands"))
    x_range = (records.steps[0], records.steps[-1])
    sections_html = ""
    for title, charts in (("Learning", learning_charts), ("Speed", speed_charts)):
        figures_html = "".join(figure_html(replace(chart, x_range=x_range)) for chart in charts)
        sections_html += (
            f'<h2>{title}</h2><div class="grid">{figures_html}</div>' if figures_html else ""
        )
    return sections_html


def _column_series(records: RunRecords, label: str, column: Column, **style: Any) -> ChartSeries:
    x, y = downsample_extremes(records.steps, column, MAX_LINE_POINTS)
    return ChartSeries(label=label, x=x, y=y, **style)


def _series_with_mean(
    records: RunRecords, column: Column, *, log_scale: bool = False, colour: str = BLUE
) -> list[ChartSeries]:
    """A column as it is, faint, and smoothed."""
    max_half_width = max(1, len(records.steps) // 60)
    x, y = smooth(
        records.steps, column, MAX_LINE_POINTS, max_half_width=max_half_width, log_scale=log_scale
    )
    return [
        _column_series(records, "each step", column, kind="faint", colour=colour),
        ChartSeries(label="smoothed", x=x, y=y, colour=colour),
    ]


def _loss_charts(records: RunRecords) -> list[Chart]:
    """Loss in nats, and in bits a byte: training, smoothed, held out, and the floor."""
    start_event = records.last_event("started") or {}
    entropy = number_of(start_event.get("entropy_bits"))
    loss, bits = records.columns["loss"], records.columns["bits_per_byte"]
    ratio = mean_ratio(bits, loss)
    floors: dict[str, float] = {}
    if entropy is not None:
        floors["loss"] = entropy * LN2
        floors["bits_per_byte"] = entropy * LN2 * (ratio or 1 / LN2)
    step_marks = [
        (f"{e['event'].replace('_', ' ')} at step {e['step']}", float(e["step"]))
        for e in records.events
        if e["event"] in MARKED_EVENTS and isinstance(e.get("step"), int)
    ]
    charts = []
    for name, title, unit in (
        ("loss", "Loss", records.run.loss_unit if records.run else "nats a token"),
        ("bits_per_byte", "Bits per byte", ""),
    ):
        column = records.columns[name]
        if not any(v is not None for v in column):
            continue
        series = _series_with_mean(records, column)
        points = [
            (e.get("step", records.steps[-1]), score)
            for e in records.events
            if (score := number_of(e.get(f"held_out_{name}"))) is not None
        ]
        if points:
            x, y = zip(*points, strict=True)
            series.append(ChartSeries(label="held out", x=x, y=y, colour="var(--c1)", kind="dots"))
        levels = [("entropy of the data", floors[name])] if name in floors else []
        is_tall = name == "loss"
        charts.append(
            Chart(
                title=title,
                unit=unit,
                series=series,
                levels=levels,
                step_marks=step_marks,
                is_tall=is_tall,
            )
        )
    return charts


def _lr_chart(records: RunRecords) -> Chart:
    series = _column_series(records, "learning rate", records.columns["lr"], colour="var(--c4)")
    return Chart(title="Learning rate", series=[series], from_zero=True)


def _grad_norm_chart(records: RunRecords) -> Chart:
    clip = records.run.clip if records.run else None
    levels = [("clipped at", clip.limit)] if clip and clip.kind == "norm" else []
    series = _series_with_mean(
        records, records.columns["grad_norm"], log_scale=True, colour="var(--c2)"
    )
    return Chart(title="Gradient norm", series=series, levels=levels, scale="log", clips_peaks=True)


def _layer_gradient_chart(records: RunRecords) -> Chart:
    """One line a layer; blocks run from blue (first) to amber (last)."""
    blocks = [name for name in records.layers if name.startswith("blocks.")]
    named_colours = {"embed": "var(--soft)", "norm": "var(--c3)", "head": "var(--c5)"}
    block_colours = {
        name: f"hsl({215 - 180 * i / max(1, len(blocks) - 1):.0f} 52% 50%)"
        for i, name in enumerate(blocks)
    }
    points_per_layer = min(MAX_LINE_POINTS, MAX_LAYER_POINTS // max(1, len(records.layers)))
    max_half_width = len(records.layer_steps) // 200
    series = []
    for name, column in records.layers.items():
        x, y = smooth(
            records.layer_steps,
            column,
            points_per_layer,
            max_half_width=max_half_width,
            log_scale=True,
        )
        colour = block_colours.get(name) or named_colours.get(name, "var(--c1)")
        series.append(ChartSeries(label=name, x=x, y=y, colour=colour))
    return Chart(title="Gradient norm of each layer", series=series, scale="log")


def _step_time_chart(records: RunRecords) -> Chart:
    """Stacked: computing, communicating, waiting for data."""
    step_s, data_s, comm_s = (records.columns[n] for n in ("step_s", "data_s", "comm_s"))
    compute_s: Column = [
        None if s is None else max(0.0, s - (d or 0.0) - (c or 0.0))
        for s, d, c in zip(step_s, data_s, comm_s, strict=True)
    ]
    median_s = sorted(records.column_values("step_s"))[len(records.column_values("step_s")) // 2 :][
        :1
    ] or [1.0]
    factor, unit = (1000.0, "ms a step") if median_s[0] < 1 else (1.0, "s a step")
    series = []
    for label, column, colour in (
        (compute_label(records), compute_s, "var(--c0)"),
        ("communication", comm_s, "var(--c1)"),
        ("waiting for data", data_s, "var(--c4)"),
    ):
        scaled_column: Column = [None if v is None else v * factor for v in column]
        x, y = downsample_means(records.steps, scaled_column, MAX_LINE_POINTS // 4)
        series.append(ChartSeries(label=label, x=x, y=y, colour=colour, kind="area"))
    planned_s = records.prediction.get("step_s")
    return Chart(
        title="Where a step goes",
        unit=unit,
        series=series if any(v is not None for v in step_s) else [],
        levels=[("planned", planned_s * factor)] if planned_s else [],
        has_scale_toggle=False,
        from_zero=True,
        clips_peaks=True,
    )


def _column_chart(
    records: RunRecords, title: str, name: str, *, is_size: bool = False, with_mean: bool = False
) -> Chart:
    """A column from zero upwards, with what the plan said of it; sizes in a fitting unit."""
    column = records.columns[name]
    planned_value = records.prediction.get(name)
    factor, unit = 1.0, ""
    if is_size:
        largest = max(records.column_values(name), default=0.0)
        powers = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
        power, unit = next((p for p in powers if largest >= p[0]), (1.0, "B"))
        factor = 1 / power
    scaled_column: Column = [None if v is None else v * factor for v in column]
    series = [_column_series(records, "each step", scaled_column)]
    if with_mean:
        series = _series_with_mean(records, scaled_column)
    return Chart(
        title=title,
        unit=unit,
        series=series if records.column_values(name) else [],
        levels=[("planned", planned_value * factor)] if planned_value else [],
        has_scale_toggle=False,
        from_zero=True,
        clips_peaks=True,
    )


def _plan_table(summary: RunSummary) -> str:
    """What the plan predicted beside the medians of the last steps."""
    if not summary.predicted.get("step_s"):
        return ""
    rows = []
    for name, label, formatter in (
        ("step_s", "Time of a step", format_seconds),
        ("bytes_sent", "Sent by a rank in a step", lambda v: format_amount(v, "B")),
        ("memory_bytes", "Memory of a rank", lambda v: format_amount(v, "B")),
    ):
        planned_value, measured_value = summary.predicted.get(name), summary.medians.get(name)
        if planned_value is None or measured_value is None:
            continue
        ratio = (
            f"{measured_value / planned_value:.2f}"
            if planned_value
            else ("1.00" if not measured_value else "-")
        )
        rows.append(
            f'<tr><td>{label}</td><td class="n">{formatter(planned_value)}</td>'
            f'<td class="n">{formatter(measured_value)}</td><td class="n">{ratio}</td></tr>'
        )
    if not rows:
        return ""
    header = (
        '<th></th><th class="n">planned</th><th class="n">measured</th><th class="n">ratio</th>'
    )
    return f"<h2>Planned and measured</h2>{_table_html(header, rows)}"


def _share_table(records: RunRecords) -> str:
    """What each island computed at last and why: its time for a microbatch."""
    event = records.last_event("rebalanced") or {}
    shares, island_times = (event.get(name) for name in ("after", "seconds_per_microbatch"))
    if not (isinstance(shares, list) and isinstance(island_times, list) and shares):
        return ""
    rows = []
    for island, (count, island_time) in enumerate(zip(shares, island_times, strict=False)):
        time_s = number_of(island_time)
        if island < MAX_ISLANDS and isinstance(count, int) and time_s:
            rows.append(
                f'<tr><td class="n">{island}</td><td class="n">{count}</td>'
                f'<td class="n">{format_seconds(time_s)}</td><td'
                f' class="n">{format_seconds(count * time_s)}</td></tr>'
            )
    header = "".join(
        f'<th class="n">{name}</th>'
        for name in ("island", "microbatches", "time for one", "for all of them")
    )
    return f"<h2>Shares of the islands</h2>{_table_html(header, rows)}"


def _config_table(run: Run | None) -> str:
    """Keys that differ from the default; of the model, from its preset."""
    if run is None:
        return ""
    model = model_presets().get(run.model.preset, Run().model)
    default_values = flatten(replace(Run(), model=model)) | {"model.preset": DEFAULT_PRESET}
    rows = [
        f'<tr title="{escape(field_doc(key))}"><td><code>{key}</code></td>'
        f"<td><code>{escape(str(value))}</code></td>"
        f'<td class="d"><code>{escape(str(default_values[key]))}</code></td></tr>'
        for key, value in flatten(run).items()
        if value != default_values[key]
    ]
    if not rows:
        return "<h2>Configuration</h2><p>Every key has its default.</p>"
    header = "<th>key</th><th>value</th><th>default</th>"
    return f"<h2>Configuration that differs from the default</h2>{_table_html(header, rows)}"


def _event_table(events: Sequence[dict[str, Any]]) -> str:
    if not events:
        return ""
    start_time = _event_time(events[0])
    rows = []
    for event in events:
        time = _event_time(event)
        elapsed_text = (
            format_seconds((time - start_time).total_seconds()) if time and start_time else ""
        )
        details = [
            f"{escape(KEY_NAMES.get(key) or key.replace('_', ' '))}"
            f" <b>{escape(_format_value(key, value))}</b>"
            for key, value in event.items()
            if key not in ("time", "event", "step", "sample") and value is not None
        ]
        if "says" in event:  # the sentence holds all of them
            details = [escape(str(event["says"]))]
        rows.append(
            f'<tr><td class="n" title="{escape(str(event.get("time", "")))}">{elapsed_text}</td>'
            f"<td>{escape(event['event'].replace('_', ' '))}</td>"
            f'<td class="n">{escape(_format_value("step", event.get("step", "")))}</td>'
            f'<td class="d">{" · ".join(details)}</td></tr>'
        )
    omitted_count = len(rows) - MAX_EVENTS
    if omitted_count > 0:
        gap_row = (
            f'<tr><td></td><td></td><td></td><td class="d">{omitted_count} more events</td></tr>'
        )
        rows = [*rows[: MAX_EVENTS // 4], gap_row, *rows[-(MAX_EVENTS * 3 // 4) :]]
    header = '<th class="n">after</th><th>event</th><th class="n">step</th><th></th>'
    return f"<h2>Events</h2>{_table_html(header, rows)}"


def _sample_html(records: RunRecords) -> str:
    text = (records.last_event("finished") or {}).get("sample")
    if not isinstance(text, str) or not text:
        return ""
    return f'<h2>A sample of its text</h2><div class="scroll"><pre>{escape(text)}</pre></div>'


def _table_html(header: str, rows: Sequence[str]) -> str:
    return f'<div class="scroll"><table><tr>{header}</tr>{"".join(rows)}</table></div>'


def _event_time(event: dict[str, Any]) -> datetime | None:
    try:
        time = datetime.fromisoformat(str(event.get("time")))
    except ValueError:
        return None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _format_value(key: str, value: object) -> str:
    """A value of an event as a person reads it, by the unit in its name."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value):
        if key.endswith("bytes"):
            return format_amount(value, "B")
        if key == "seconds" or key.endswith("_s"):
            return format_seconds(value)
        if isinstance(value, int):
            return str(value) if key in ("pid", "rank", "generation") else f"{value:,}"
        return format_number(value)
    if key == "members" and isinstance(value, list):
        members = [member for member in value if isinstance(member, dict)]
        return ", ".join(f"{member.get('pid')} on {member.get('host')}" for member in members)
    return str(value)


def _format_optional(value: float | None, formatter: Callable[[float], str]) -> str:
    return "" if value is None else formatter(value)
