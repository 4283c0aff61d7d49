"""The report as one HTML page that may be mailed: header, verdict, charts, tables.

Style, script and the chart library (`assets/`) are written into the page, and its security policy
lets the browser run those scripts only and fetch nothing. No torch, no numpy.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from hashlib import sha256
from html import escape
from importlib.resources import files
from math import isfinite
from typing import Any

from cordee.config.load import field_doc, flatten
from cordee.config.model import DEFAULT_PRESET
from cordee.config.presets import model_presets
from cordee.config.run import Run
from cordee.report.charts import figure_html, learning_charts, smooth, speed_charts
from cordee.report.reader import RunRecords, finite_number
from cordee.report.summary import RunSummary, format_amount, format_number, format_seconds

TITLE_SUFFIX = " · cordee report</title>"
"""How the title of every page ends, by which a page is known."""
MAX_EVENTS = 200
MAX_ISLANDS = 64
"""Rows of the table of shares."""
KEY_NAMES = {"seconds": "took", "bytes": "size"}
"""Keys of events that read better under another name."""
STATE_CLASSES = {"finished": "good", "running": "note", "stopped": "bad"}
HINT = "drag to zoom, double-click for the whole run; click a label to hide its line"


def report_page(records: RunRecords, summary: RunSummary) -> str:
    """The whole report as one HTML document; at most some hundred kilobytes for any run."""
    assets = files("cordee.report") / "assets"
    style, script, chart_style, chart_script, licence = (
        (assets / name).read_text(encoding="utf-8")
        for name in ("page.css", "page.js", "uPlot.min.css", "uPlot.iife.min.js", "uPlot.LICENSE")
    )
    scripts = (f"/*\n{licence}\n*/\n{chart_script}", script)
    hashes = " ".join(
        f"'sha256-{b64encode(sha256(s.encode()).digest()).decode()}'" for s in scripts
    )
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src {hashes}"
    sections = (
        _header_html(records, summary), _charts_html(records), _plan_table(summary),
        _share_table(records), _config_table(records.run), _event_table(records.events),
        _sample_html(records),
    )  # fmt: skip
    digest = f" · weights {escape(summary.weights_sha256)}" if summary.weights_sha256 else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(summary.run)}{TITLE_SUFFIX}<style>{chart_style}\n{style}</style></head>"
        f"<body><main>{''.join(sections)}<footer>cordee report {escape(str(records.folder))}"
        f'{digest}</footer></main><button type="button" class="unzoom" hidden>whole run</button>'
        f"{''.join(f'<script>{s}</script>' for s in scripts)}</body></html>\n"
    )


def _header_html(records: RunRecords, summary: RunSummary) -> str:
    remarks = "".join(f'<li class="{r.kind}">{escape(r.text)}</li>' for r in summary.remarks)
    width = max(1, len(records.steps) // 60)
    _, losses = smooth(records.steps, records.columns["loss"], 2, max_half_width=width)
    tiles: list[tuple[str, float | None, Callable[[float], str]]] = [
        ("Training loss", losses[-1] if losses else None, format_number),
        ("Held-out bits per byte", summary.held_out_bits_per_byte, format_number),
        ("Tokens a second", summary.medians["tokens_per_s"], format_number),
        ("A step", summary.medians["step_s"], format_seconds),
        ("Memory of a rank", summary.medians["memory_bytes"], lambda v: format_amount(v, "B")),
        ("Model FLOP utilisation", summary.medians["mfu"], lambda v: f"{v:.1%}"),
        ("Skipped steps", summary.skipped, str),
    ]
    cells = "".join(
        f"<div><dt>{name}</dt><dd>{escape(formatter(value))}</dd></div>"
        for name, value, formatter in tiles
        if value is not None
    )
    facts = " · ".join(fact for fact in _run_facts(records, summary) if fact)
    return (
        f"<header><h1>{escape(summary.run)}</h1>"
        f'<span class="state {STATE_CLASSES[summary.state]}">{summary.state}</span></header>'
        f'<p class="about">{escape(facts)}</p>'
        f'<ul class="verdict">{remarks}</ul><dl class="tiles">{cells}</dl>'
    )


def _run_facts(records: RunRecords, summary: RunSummary) -> list[str]:
    """When it began, on what, how; what is not known is left out."""
    start_event = records.last_event("started") or {}
    facts = [str(start_event.get("time", ""))[:19].replace("T", " ")]
    if records.run:
        model, data = records.run.model, records.run.data
        name = str(start_event.get("brought") or model.name)
        is_preset = name == model.preset
        facts.append(f"{name}: {model.layers} layers of width {model.width}" if is_preset else name)
        facts.append(f"{data.path}, {data.sequence} tokens a sequence")
        facts.append(f"{records.run.optim.name}, {records.run.run.precision}")
    islands = records.column_values("islands")
    if islands:
        facts.append(f"{islands[-1]:.0f} island" + ("s" if islands[-1] != 1 else ""))
    if summary.last_step is not None:
        facts.append(f"last step {summary.last_step:,}")
    return facts


def _charts_html(records: RunRecords) -> str:
    if not records.steps:
        return "<h2>Learning</h2><p>No step has been recorded yet.</p>"
    x_range = (records.steps[0], records.steps[-1])
    html, hint = "", f' <span class="hint">{HINT}</span>'
    for title, charts in (("Learning", learning_charts(records)), ("Speed", speed_charts(records))):
        figures = "".join(figure_html(chart, x_range) for chart in charts)
        if figures:
            html += f'<h2>{title}{hint}</h2><div class="grid">{figures}</div>'
            hint = ""
    return html + "<noscript><p>The charts are drawn by a script.</p></noscript>"


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
        planned, measured = summary.predicted.get(name), summary.medians.get(name)
        if planned is None or measured is None:
            continue
        ratio = f"{measured / planned:.2f}" if planned else "-" if measured else "1.00"
        rows.append([label, formatter(planned), formatter(measured), ratio])
    return _table_html("Planned and measured", ["", "planned", "measured", "ratio"], rows, "123")


def _share_table(records: RunRecords) -> str:
    """What each island computed at last and why: its time for a microbatch."""
    event = records.last_event("rebalanced") or {}
    shares, island_times = event.get("after"), event.get("seconds_per_microbatch")
    if not (isinstance(shares, list) and isinstance(island_times, list)):
        return ""
    rows = []
    for island, (count, island_time) in enumerate(zip(shares, island_times, strict=False)):
        time_s = finite_number(island_time)
        if island < MAX_ISLANDS and isinstance(count, int) and time_s:
            times = [format_seconds(time_s), format_seconds(count * time_s)]
            rows.append([str(island), str(count), *times])
    header = ["island", "microbatches", "time for one", "for all of them"]
    return _table_html("Shares of the islands", header, rows, "0123")


def _config_table(run: Run | None) -> str:
    """Keys that differ from the default; of the model, from its preset."""
    if run is None:
        return ""
    model = model_presets().get(run.model.preset, Run().model)
    defaults = flatten(replace(Run(), model=model)) | {"model.preset": DEFAULT_PRESET}
    rows = [
        [
            f'<code title="{escape(field_doc(key))}">{key}</code>',
            f"<code>{escape(str(value))}</code>",
            f"<code>{escape(str(defaults[key]))}</code>",
        ]
        for key, value in flatten(run).items()
        if value != defaults[key]
    ]
    if not rows:
        return "<h2>Configuration</h2><p>Every key has its default.</p>"
    title = "Configuration that differs from the default"
    return _table_html(title, ["key", "value", "default"], rows, details="2")


def _event_table(events: Sequence[dict[str, Any]]) -> str:
    rows = []
    start_time = _event_time(events[0]) if events else None
    for event in events:
        time = _event_time(event)
        elapsed_s = (time - start_time).total_seconds() if time and start_time else None
        details = [
            f"{escape(KEY_NAMES.get(key) or key.replace('_', ' '))}"
            f" <b>{escape(_format_value(key, value))}</b>"
            for key, value in event.items()
            if key not in ("time", "event", "step", "sample") and value is not None
        ]
        if "says" in event:  # the sentence holds all of them
            details = [escape(str(event["says"]))]
        elapsed_text = "" if elapsed_s is None else format_seconds(elapsed_s)
        rows.append(
            [
                f'<span title="{escape(str(event.get("time", "")))}">{elapsed_text}</span>',
                escape(event["event"].replace("_", " ")),
                escape(_format_value("step", event.get("step", ""))),
                " · ".join(details),
            ]
        )
    omitted_count = len(rows) - MAX_EVENTS
    if omitted_count > 0:
        gap_row = ["", "", "", f"{omitted_count} more events"]
        rows = [*rows[: MAX_EVENTS // 4], gap_row, *rows[-(MAX_EVENTS * 3 // 4) :]]
    return _table_html("Events", ["after", "event", "step", ""], rows, "02", "3")


def _sample_html(records: RunRecords) -> str:
    text = (records.last_event("finished") or {}).get("sample")
    if not isinstance(text, str) or not text:
        return ""
    return f'<h2>A sample of its text</h2><div class="scroll"><pre>{escape(text)}</pre></div>'


def _table_html(
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    numbers: str = "",
    details: str = "",
) -> str:
    """A titled table of cells of HTML; "" without rows. `numbers` and `details`: the places of the
    columns that are set to the right, and softly."""
    if not rows:
        return ""
    places = [str(i) for i in range(len(header))]
    classes = [' class="n"' * (i in numbers) + ' class="d"' * (i in details) for i in places]
    lines = [
        f"<tr>{''.join(f'<th{c}>{h}</th>' for c, h in zip(classes, header, strict=True))}</tr>"
    ]
    for row in rows:
        cells = (f"<td{c}>{cell}</td>" for c, cell in zip(classes, row, strict=True))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f'<h2>{title}</h2><div class="scroll"><table>{"".join(lines)}</table></div>'


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
