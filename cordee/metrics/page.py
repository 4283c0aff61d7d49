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
from cordee.config.model import USUAL_PRESET
from cordee.config.presets import model_presets
from cordee.config.run import Run
from cordee.metrics.charts import Chart, Line, extremes, figure, means, number, smooth
from cordee.metrics.records import Column, Records
from cordee.metrics.records import number as number_of
from cordee.metrics.report import Summary, amount, computing, mean_ratio, seconds
from cordee.metrics.style import SCRIPT, STYLE

SENT = {"bytes_sent": "Sent in a step", "bytes_inside": "Sent in a step inside the island"}
"""Columns of bytes that a rank sends, and what their charts are called."""

TITLE_END = " · cordee report</title>"
"""How the title of every page ends, by which a page is known."""
POINTS = 800
"""Points of a line; a figure is some 500 pixels wide, and each bucket keeps both its extremes."""
ALL_LAYERS = 24_000
"""Points of all layers' lines together."""
MOST_EVENTS = 200
MOST_ISLANDS = 64
"""Rows of the table of shares."""
MARKED = ("resumed", "step_skipped", "checkpoint_failed", "data_changed")
"""Events that are marked in the charts of the loss."""
NAMES = {"seconds": "took", "bytes": "size"}
"""Keys of events that read better under another name."""
BLUE = "var(--c0)"
LN2 = 0.6931471805599453


def page(records: Records, summary: Summary) -> str:
    """The whole report as one HTML document; at most some hundred kilobytes for any run."""
    body = _head(records, summary) + _figures(records) + _plan_table(summary)
    body += _share_table(records)
    body += _config_table(records.run) + _event_table(records.events) + _sample(records)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(summary.run)}{TITLE_END}<style>{STYLE}</style></head>"
        f"<body><main>{body}<footer>cordee report {escape(str(records.folder))}"
        + (f" · weights {escape(summary.weights_sha256)}" if summary.weights_sha256 else "")
        + f"</footer></main><script>{SCRIPT}</script></body></html>\n"
    )


def _head(records: Records, summary: Summary) -> str:
    kind = {"finished": "good", "running": "note", "stopped": "bad"}[summary.state]
    remarks = "".join(f'<li class="{r.kind}">{escape(r.text)}</li>' for r in summary.remarks)
    begin = records.event("started") or {}
    about = [str(begin.get("time", ""))[:19].replace("T", " ")]
    if records.run:
        m, d = records.run.model, records.run.data
        name = str(begin.get("brought") or m.name)
        house = name == m.preset
        about.append(f"{name}: {m.layers} layers of width {m.width}" if house else name)
        row = "images, a label and {} bytes each" if m.classifies else "{} tokens a sequence"
        about.append(f"{d.path}, {row.format(d.sequence - m.classifies)}")
        about.append(f"{records.run.optim.name}, {records.run.run.precision}")
    islands = records.seen("islands")
    if islands:
        about.append(f"{islands[-1]:.0f} island" + ("s" if islands[-1] != 1 else ""))
    if summary.last_step is not None:
        about.append(f"last step {summary.last_step:,}")
    middle = summary.medians
    widest = max(1, len(records.steps) // 60)
    _, losses = smooth(records.steps, records.columns["loss"], 2, widest=widest)
    tiles = [
        ("Training loss", _maybe(losses[-1] if losses else None, number)),
        ("Held-out bits per byte", _maybe(summary.held_out_bits_per_byte, number)),
        ("Held-out images right", _maybe(summary.held_out_accuracy, lambda v: f"{v:.2%}")),
        ("Tokens a second", _maybe(middle["tokens_per_s"], number)),
        ("A step", _maybe(middle["step_s"], seconds)),
        ("Memory of a rank", _maybe(middle["memory_bytes"], lambda v: amount(v, "B"))),
        ("Model FLOP utilisation", _maybe(middle["mfu"], lambda v: f"{v:.1%}")),
        ("Skipped steps", str(summary.skipped)),
    ]
    cells = "".join(f"<div><dt>{n}</dt><dd>{escape(v)}</dd></div>" for n, v in tiles if v)
    return (
        f'<header><h1>{escape(summary.run)}</h1><span class="state {kind}">{summary.state}</span>'
        f'</header><p class="about">{escape(" · ".join(a for a in about if a))}</p>'
        f'<ul class="verdict">{remarks}</ul><dl class="tiles">{cells}</dl>'
    )


def _figures(records: Records) -> str:
    if not records.steps:
        return "<h2>Learning</h2><p>No step has been recorded yet.</p>"
    learning = [*_losses(records), _rates(records), _norms(records), _layers(records)]
    speed = [
        _simple(records, "Tokens a second", "tokens_per_s", smoothed=True),
        _step_parts(records),
        _simple(records, "Memory of a rank", "memory_bytes", size=True),
    ]
    sent = [name for name in SENT if any(records.seen(name))] or [*SENT][:1]
    speed += [_simple(records, SENT[name], name, size=True) for name in sent]
    if len(set(records.seen("islands"))) > 1:
        speed.append(_simple(records, "Islands", "islands"))
    span = (records.steps[0], records.steps[-1])
    out = ""
    for title, charts in (("Learning", learning), ("Speed", speed)):
        drawn = "".join(figure(replace(chart, span=span)) for chart in charts)
        out += f'<h2>{title}</h2><div class="grid">{drawn}</div>' if drawn else ""
    return out


def _line(records: Records, label: str, column: Column, **style: Any) -> Line:
    x, y = extremes(records.steps, column, POINTS)
    return Line(label=label, x=x, y=y, **style)


def _pair(records: Records, column: Column, *, log: bool = False, colour: str = BLUE) -> list[Line]:
    """A column as it is, faint, and smoothed."""
    widest = max(1, len(records.steps) // 60)
    x, y = smooth(records.steps, column, POINTS, widest=widest, log=log)
    return [
        _line(records, "each step", column, kind="faint", colour=colour),
        Line(label="smoothed", x=x, y=y, colour=colour),
    ]


def _losses(records: Records) -> list[Chart]:
    """Loss in nats, and in bits a byte: training, smoothed, held out, and the floor."""
    begin = records.event("started") or {}
    entropy = number_of(begin.get("entropy_bits"))
    loss, bits = records.columns["loss"], records.columns["bits_per_byte"]
    ratio = mean_ratio(bits, loss)
    floors: dict[str, float] = {}
    if entropy is not None:
        floors["loss"] = entropy * LN2
        floors["bits_per_byte"] = entropy * LN2 * (ratio or 1 / LN2)
    marks = [
        (f"{e['event'].replace('_', ' ')} at step {e['step']}", float(e["step"]))
        for e in records.events
        if e["event"] in MARKED and isinstance(e.get("step"), int)
    ]
    charts = []
    for name, title, unit in (
        ("loss", "Loss", records.run.loss_unit if records.run else "nats a token"),
        ("bits_per_byte", "Bits per byte", ""),
    ):
        column = records.columns[name]
        if not any(v is not None for v in column):
            continue
        lines = _pair(records, column)
        points = [
            (e.get("step", records.steps[-1]), score)
            for e in records.events
            if (score := number_of(e.get(f"held_out_{name}"))) is not None
        ]
        if points:
            x, y = zip(*points, strict=True)
            lines.append(Line(label="held out", x=x, y=y, colour="var(--c1)", kind="dots"))
        floor = [("entropy of the data", floors[name])] if name in floors else []
        tall = name == "loss"
        charts.append(
            Chart(title=title, unit=unit, lines=lines, levels=floor, marks=marks, tall=tall)
        )
    return charts


def _rates(records: Records) -> Chart:
    line = _line(records, "learning rate", records.columns["lr"], colour="var(--c4)")
    return Chart(title="Learning rate", lines=[line], from_zero=True)


def _norms(records: Records) -> Chart:
    clip = records.run.clip if records.run else None
    levels = [("clipped at", clip.limit)] if clip and clip.kind == "norm" else []
    lines = _pair(records, records.columns["grad_norm"], log=True, colour="var(--c2)")
    return Chart(title="Gradient norm", lines=lines, levels=levels, scale="log", robust=True)


def _layers(records: Records) -> Chart:
    """One line a layer; blocks run from blue (first) to amber (last)."""
    blocks = [name for name in records.layers if name.startswith("blocks.")]
    fixed = {"embed": "var(--soft)", "norm": "var(--c3)", "head": "var(--c5)"}
    colours = {
        name: f"hsl({215 - 180 * i / max(1, len(blocks) - 1):.0f} 52% 50%)"
        for i, name in enumerate(blocks)
    }
    each = min(POINTS, ALL_LAYERS // max(1, len(records.layers)))
    widest = len(records.layer_steps) // 200
    lines = []
    for name, column in records.layers.items():
        x, y = smooth(records.layer_steps, column, each, widest=widest, log=True)
        colour = colours.get(name) or fixed.get(name, "var(--c1)")
        lines.append(Line(label=name, x=x, y=y, colour=colour))
    return Chart(title="Gradient norm of each layer", lines=lines, scale="log")


def _step_parts(records: Records) -> Chart:
    """Stacked: computing, communicating, waiting for data."""
    step, data, comm = (records.columns[n] for n in ("step_s", "data_s", "comm_s"))
    rest: Column = [
        None if s is None else max(0.0, s - (d or 0.0) - (c or 0.0))
        for s, d, c in zip(step, data, comm, strict=True)
    ]
    typical = sorted(records.seen("step_s"))[len(records.seen("step_s")) // 2 :][:1] or [1.0]
    factor, unit = (1000.0, "ms a step") if typical[0] < 1 else (1.0, "s a step")
    lines = []
    for label, column, colour in (
        (computing(records), rest, "var(--c0)"),
        ("communication", comm, "var(--c1)"),
        ("waiting for data", data, "var(--c4)"),
    ):
        scaled: Column = [None if v is None else v * factor for v in column]
        x, y = means(records.steps, scaled, POINTS // 4)
        lines.append(Line(label=label, x=x, y=y, colour=colour, kind="area"))
    planned = records.predicted.get("step_s")
    return Chart(
        title="Where a step goes",
        unit=unit,
        lines=lines if any(v is not None for v in step) else [],
        levels=[("planned", planned * factor)] if planned else [],
        both=False,
        from_zero=True,
        robust=True,
    )


def _simple(
    records: Records, title: str, name: str, *, size: bool = False, smoothed: bool = False
) -> Chart:
    """A column from zero upwards, with what the plan said of it; sizes in a fitting unit."""
    column = records.columns[name]
    planned = records.predicted.get(name)
    factor, unit = 1.0, ""
    if size:
        largest = max(records.seen(name), default=0.0)
        powers = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
        power, unit = next((p for p in powers if largest >= p[0]), (1.0, "B"))
        factor = 1 / power
    scaled: Column = [None if v is None else v * factor for v in column]
    lines = [_line(records, "each step", scaled)]
    if smoothed:
        lines = _pair(records, scaled)
    return Chart(
        title=title,
        unit=unit,
        lines=lines if records.seen(name) else [],
        levels=[("planned", planned * factor)] if planned else [],
        both=False,
        from_zero=True,
        robust=True,
    )


def _plan_table(summary: Summary) -> str:
    """What the plan predicted beside the medians of the last steps."""
    if not summary.predicted.get("step_s"):
        return ""
    rows = []
    for name, label, show in (
        ("step_s", "Time of a step", seconds),
        ("bytes_sent", "Sent by a rank in a step", lambda v: amount(v, "B")),
        ("memory_bytes", "Memory of a rank", lambda v: amount(v, "B")),
    ):
        planned, measured = summary.predicted.get(name), summary.medians.get(name)
        if planned is None or measured is None:
            continue
        ratio = f"{measured / planned:.2f}" if planned else ("1.00" if not measured else "-")
        rows.append(
            f'<tr><td>{label}</td><td class="n">{show(planned)}</td>'
            f'<td class="n">{show(measured)}</td><td class="n">{ratio}</td></tr>'
        )
    if not rows:
        return ""
    head = '<th></th><th class="n">planned</th><th class="n">measured</th><th class="n">ratio</th>'
    return f"<h2>Planned and measured</h2>{_table(head, rows)}"


def _share_table(records: Records) -> str:
    """What each island computed at last and why: its time for a microbatch."""
    event = records.event("rebalanced") or {}
    given, times = (event.get(name) for name in ("after", "seconds_per_microbatch"))
    if not (isinstance(given, list) and isinstance(times, list) and given):
        return ""
    rows = []
    for island, (count, each) in enumerate(zip(given, times, strict=False)):
        took = number_of(each)
        if island < MOST_ISLANDS and isinstance(count, int) and took:
            rows.append(
                f'<tr><td class="n">{island}</td><td class="n">{count}</td>'
                f'<td class="n">{seconds(took)}</td><td class="n">{seconds(count * took)}</td></tr>'
            )
    head = "".join(
        f'<th class="n">{name}</th>'
        for name in ("island", "microbatches", "time for one", "for all of them")
    )
    return f"<h2>Shares of the islands</h2>{_table(head, rows)}"


def _config_table(run: Run | None) -> str:
    """Keys that differ from the default; of the model, from its preset."""
    if run is None:
        return ""
    model = model_presets().get(run.model.preset, Run().model)
    default = flatten(replace(Run(), model=model)) | {"model.preset": USUAL_PRESET}
    rows = [
        f'<tr title="{escape(field_doc(key))}"><td><code>{key}</code></td>'
        f"<td><code>{escape(str(value))}</code></td>"
        f'<td class="d"><code>{escape(str(default[key]))}</code></td></tr>'
        for key, value in flatten(run).items()
        if value != default[key]
    ]
    if not rows:
        return "<h2>Configuration</h2><p>Every key has its default.</p>"
    head = "<th>key</th><th>value</th><th>default</th>"
    return f"<h2>Configuration that differs from the default</h2>{_table(head, rows)}"


def _event_table(events: Sequence[dict[str, Any]]) -> str:
    if not events:
        return ""
    start = _when(events[0])
    rows = []
    for event in events:
        at = _when(event)
        since = seconds((at - start).total_seconds()) if at and start else ""
        parts = [
            f"{escape(NAMES.get(k) or k.replace('_', ' '))} <b>{escape(_value(k, v))}</b>"
            for k, v in event.items()
            if k not in ("time", "event", "step", "sample") and v is not None
        ]
        if "says" in event:  # the sentence holds all of them
            parts = [escape(str(event["says"]))]
        rows.append(
            f'<tr><td class="n" title="{escape(str(event.get("time", "")))}">{since}</td>'
            f"<td>{escape(event['event'].replace('_', ' '))}</td>"
            f'<td class="n">{escape(_value("step", event.get("step", "")))}</td>'
            f'<td class="d">{" · ".join(parts)}</td></tr>'
        )
    left_out = len(rows) - MOST_EVENTS
    if left_out > 0:
        gap = f'<tr><td></td><td></td><td></td><td class="d">{left_out} more events</td></tr>'
        rows = [*rows[: MOST_EVENTS // 4], gap, *rows[-(MOST_EVENTS * 3 // 4) :]]
    head = '<th class="n">after</th><th>event</th><th class="n">step</th><th></th>'
    return f"<h2>Events</h2>{_table(head, rows)}"


def _sample(records: Records) -> str:
    text = (records.event("finished") or {}).get("sample")
    if not isinstance(text, str) or not text:
        return ""
    return f'<h2>A sample of its text</h2><div class="scroll"><pre>{escape(text)}</pre></div>'


def _table(head: str, rows: Sequence[str]) -> str:
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _when(event: dict[str, Any]) -> datetime | None:
    try:
        when = datetime.fromisoformat(str(event.get("time")))
    except ValueError:
        return None
    return when if when.tzinfo else when.replace(tzinfo=UTC)


def _value(key: str, value: object) -> str:
    """A value of an event as a person reads it, by the unit in its name."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value):
        if key.endswith("bytes"):
            return amount(value, "B")
        if key == "seconds" or key.endswith("_s"):
            return seconds(value)
        if isinstance(value, int):
            return str(value) if key in ("pid", "rank", "generation") else f"{value:,}"
        return number(value)
    if key == "members" and isinstance(value, list):
        named = [member for member in value if isinstance(member, dict)]
        return ", ".join(f"{member.get('pid')} on {member.get('host')}" for member in named)
    return str(value)


def _maybe(value: float | None, show: Callable[[float], str]) -> str:
    return "" if value is None else show(value)
