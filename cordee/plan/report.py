"""The plan as a table that a person trusts, and predicted held against measured.

Text only, no colours: it is read in terminals, logs and diffs. Not here: any number of its own;
every figure comes from the search or the plan.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from cordee.config.run import Run
from cordee.layout.axes import Layout
from cordee.plan.cluster import Cluster
from cordee.plan.costs import kind_of, matrix_share
from cordee.plan.devices import precision_text
from cordee.plan.memory import FITS
from cordee.plan.plan import Plan
from cordee.plan.profile import NOISY
from cordee.plan.rank import RankView
from cordee.plan.search import MIB, Prediction, Ranking

HEADINGS = (
    "", "layout", "ranks x threads", "ms/step", "low - high", "tokens/s", "MiB/rank", "MiB sent",
    "",
)  # fmt: skip

MOST_REJECTED = 16
"""Lines of layouts that are out."""

BAR = 24
"""Characters of the longest bar."""


def plan_text(run: Run, cluster: Cluster, plan: Plan, ranking: Ranking, top: int = 8) -> str:
    """The whole page: job, ranked layouts, what was dropped, memory, time, assumptions."""
    parts = [
        job_text(run, cluster, plan),
        ranked_table(plan, ranking, top),
        _rejected(ranking),
        _memory(plan),
        _time(plan),
        _sent(plan),
        _assumptions(run, cluster),
        "\n".join(f"why   {part.strip()}" for part in plan.why.split(";"))
        + "".join(f"\nnote  {part.strip()}" for part in plan.note.split(";") if part),
    ]
    return "\n\n".join(part for part in parts if part)


def ranked_table(plan: Plan, ranking: Ranking, top: int) -> str:
    """The best `top` layouts, and the pick's row wherever it stands."""
    rows: list[tuple[str, ...]] = [HEADINGS]
    hidden, picked = 0, False
    for place, made in enumerate(ranking.ranked, 1):
        mine = (made.layout, made.threads) == (plan.layout, plan.threads)
        picked |= mine
        if place > top and not mine:
            hidden += 1
        else:
            rows.append(_row(str(place), made.layout, made.threads, made.predicted, mine))
    if not picked:
        rows.append(_row("-", plan.layout, plan.threads, plan.predicted, True))
    text = _columns(rows, left=(1, 8))
    return text + (f"\nand {hidden} slower (--top {len(ranking.ranked)})" if hidden else "")


def compare(plan: Plan, measured: Mapping[str, float]) -> str:
    """Predicted against measured at the end of a run.

    `measured`: step_s (median), bytes_sent (gradient bytes of a step, rank 0), memory_bytes (peak
    above the process before the model was built). Keys that are missing are left out.
    """
    told = plan.predicted
    if not told.step_s:
        return plan.note
    rows = [("plan against run", "predicted", "measured", "ratio", "")]
    if math.isfinite(step_s := measured.get("step_s", math.nan)) and step_s > 0:
        inside = told.low_s <= step_s <= told.high_s
        said = "within" if inside else "outside"
        span = f"{said} {seconds_text(told.low_s)} - {seconds_text(told.high_s)}"
        times = seconds_text(told.step_s), seconds_text(step_s)
        rows.append(("  step", *times, f"{step_s / told.step_s:.2f}", span))
    for name, key, predicted in (
        ("  gradients sent", "bytes_sent", told.bytes_sent),
        ("  memory of a rank", "memory_bytes", told.memory_bytes),
    ):
        value = measured.get(key, math.nan)
        if math.isfinite(value) and (value or predicted):
            ratio = f"{value / predicted:.2f}" if predicted else "-"
            exact = "to the byte" if value == predicted else ""
            rows.append((name, _mib(predicted) + " MiB", _mib(value) + " MiB", ratio, exact))
    return _columns(rows, left=(0, 4))


def rank_text(view: RankView, rehearsal: Mapping[str, float] | None = None) -> str:
    """One rank as a table; `rehearsal` is what building its modules gave: parameters, bytes,
    modules, seconds, memory (bytes)."""
    at = ", ".join(f"{axis} {place}" for axis, place in view.coordinates.items())
    stages = " and ".join(
        f"{start} to {stop - 1} (stage {stage})"
        for stage, (start, stop) in zip(view.stages, view.layers, strict=True)
    )
    first, last = view.microbatches
    part = f"{view.parameters:,} of {count_text(view.model_parameters)}"
    rows = [
        ("  stands at", at),
        ("  layers", stages),
        ("  microbatches", f"{first} to {last - 1} of a step (worker {view.worker})"),
        *((f"  {axis} group", _ranks(group)) for axis, group in view.groups.items()),
        ("  holds", f"{part} parameters, in {view.tensors:,} tensors"),
        *((f"  {name}", f"{size:,} bytes") for name, size in view.state_bytes.items()),
        *((f"  sends, {axis}", f"{size:,} bytes") for axis, size in view.sent_bytes.items()),
    ]
    if rehearsal is not None:
        built = int(rehearsal["parameters"])
        agrees = "as above" if built == view.parameters else f"above: {view.parameters:,}"
        rows += [
            ("  built on meta", f"{built:,} parameters ({agrees})"),
            ("  its bytes", f"{int(rehearsal['bytes']):,}, optimiser included"),
            ("  its modules", f"{int(rehearsal['modules']):,}"),
            ("  building took", f"{seconds_text(rehearsal['seconds'])},"
             f" {_mib(rehearsal['memory'])} MiB of memory"),
        ]  # fmt: skip
    return f"rank {view.rank} of {view.ranks}\n" + _columns(rows, left=(0, 1))


def _ranks(group: Sequence[int]) -> str:
    """Ranks with equal steps between them."""
    shown = ", ".join(map(str, group if len(group) <= 8 else group[:3]))
    return shown if len(group) <= 8 else f"{shown} ... {group[-1]} ({len(group)} ranks)"


def assumed(run: Run, cluster: Cluster) -> dict[str, str]:
    """What the figures rest on, in words."""
    kind, precision = kind_of(cluster, run.run.precision), run.run.precision
    peak = "bf16" if precision == "fp8" else precision
    reach = matrix_share(cluster, precision)
    unit = "core" if cluster.device == "cpu" else "device"
    told = {
        "devices": _devices(cluster),
        "precision": f"{precision}: {precision_text(precision, cluster)}",
        "peak": f"{cluster.flops(precision) / 1e9:,.0f} GFLOP/s a {unit}"
        f" ({peak}), of which matrix products reach {reach:.0%}",
        "memory bandwidth": f"{cluster.memory_bytes_per_s / 1e9:,.0f} GB/s a {unit}",
        "link": f"{cluster.link_bytes_per_s / 1e9:,.2f} GB/s,"
        f" {cluster.link_s * 1e6:.0f} us between ranks of a host",
        "interval": f"{kind.low:.2f} to {kind.high:.2f} x the prediction"
        + (
            f", wider by {min(1.0, cluster.spread):.0%} as repeated figures differ"
            if cluster.spread > NOISY
            else ""
        )
        + " (more with several CPU threads, or ranks that share cores)",
        "constants": "of this kind of device (plan/costs.py); rates measured here"
        if cluster.measured
        else "of this kind of device (plan/costs.py), not measured on it",
        "memory": f"a plan may fill {FITS:.0%} of the {'host' if unit == 'core' else 'device'}",
    }
    if cluster.hosts > 1:
        told["network"] = (
            f"{cluster.network_bytes_per_s / 1e9:,.2f} GB/s a rank,"
            f" {cluster.network_s * 1e6:.0f} us between hosts"
        )
    return told


def seconds_text(seconds: float) -> str:
    """A time with three digits and its unit."""
    if seconds <= 0:
        return "0 s"
    unit, factor = ("s", 1.0) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("us", 1e6)
    value = seconds * factor
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f} {unit}"


def count_text(count: float) -> str:
    """A number of parameters: 131 k, 1.87 M, 1.21 B."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            value = count / size
            return f"{value:.{max(0, 2 - int(math.log10(value)))}f} {unit}"
    return str(int(count))


def _assumptions(run: Run, cluster: Cluster) -> str:
    told = assumed(run, cluster)
    return "assumed\n" + _columns([(f"  {k}", v) for k, v in told.items()], left=(0, 1))


def job_text(run: Run, cluster: Cluster, plan: Plan) -> str:
    """Model, step and devices in three lines."""
    batch, model = run.batch, run.model
    exact = ", exact" if run.run.exact else ""
    heads = f", {model.heads} heads{f' ({model.kv_heads} of keys)' if model.kv_heads else ''}"
    row = f"sequences x {run.data.sequence} tokens"
    if model.classifies:
        heads, row = f" ({model.kind})", f"images of {model.image.pixels} bytes"
    return (
        f"model    {model.name}: {count_text(plan.predicted.parameters)} parameters,"
        f" {model.layers} layers x width {model.width}{heads}\n"
        f"step     {batch.microbatches} microbatches x {batch.microbatch} {row},"
        f" {run.optim.name}, {run.run.precision}{exact}\n"
        f"devices  {_devices(cluster)}"
    )


def _devices(cluster: Cluster) -> str:
    what = "a host" if cluster.device == "cpu" else "each"
    hosts = f"{cluster.hosts} hosts of " if cluster.hosts > 1 else ""
    return f"{hosts}{cluster.name}, {cluster.memory_bytes / 2**30:.1f} GiB {what}"


def _row(place: str, layout: Layout, threads: int, told: Prediction, mine: bool) -> tuple[str, ...]:
    return (
        place,
        layout.describe().removeprefix("1 island x "),
        f"{layout.size} x {threads}",
        f"{told.step_s * 1e3:,.1f}",
        f"{told.low_s * 1e3:,.0f} - {told.high_s * 1e3:,.0f}",
        f"{told.tokens_per_s:,.0f}",
        _mib(told.memory_bytes),
        _mib(told.all_bytes_sent),
        "<- pick" if mine else "",
    )


def _rejected(ranking: Ranking) -> str:
    if not ranking.rejected:
        return ""
    rows = [(f"  {r.layout}", r.reason) for r in ranking.rejected]
    # Rules come first; what does not fit comes last, by number of ranks.
    shown = rows if len(rows) <= MOST_REJECTED else [*rows[: MOST_REJECTED - 4], *rows[-4:]]
    hidden = len(rows) - len(shown)
    more = f"\n  and {hidden} more (--json)" if hidden else ""
    return "not these\n" + _columns(shown, left=(0, 1)) + more


def _memory(plan: Plan) -> str:
    told = plan.predicted
    rows = [*told.memory_items.items(), ("in all", told.memory_bytes)]
    lines = _bars([(name, size, _mib(size)) for name, size in rows], total="in all")
    process = f"  and {_mib(told.overhead_bytes)} MiB for the process itself"
    zero = f" (zero {plan.zero})" if plan.layout.shard > 1 else ""
    title = f"memory of the fullest rank at the worst moment, MiB{zero}"
    return title + "\n" + lines + "\n" + process


def _time(plan: Plan) -> str:
    told = plan.predicted
    rows = [*told.time_items.items(), ("in all", told.step_s)]
    shown = [(name, s, f"{s * 1e3:,.1f}") for name, s in rows if s > 0]
    return "time of a step, ms\n" + _bars(shown, total="in all")


def _sent(plan: Plan) -> str:
    items = plan.predicted.bytes_items
    if not items:
        return "sent in a step: nothing"
    lines = [(f"  {name}", f"{size:,}") for name, size in items.items()]
    how = plan.protocol if plan.codec == "identity" else f"{plan.protocol}, {plan.codec}"
    return f"sent by the busiest rank in a step, bytes ({how})\n" + _columns(lines, left=(0,))


def _bars(rows: Sequence[tuple[str, float, str]], total: str) -> str:
    most = max((value for name, value, _ in rows if name != total), default=0) or 1
    cells = []
    for name, value, text in rows:
        bar = "" if name == total else "#" * max(1, round(BAR * value / most))
        cells.append((f"  {name}", text, bar))
    return _columns(cells, left=(0, 2))


def _columns(rows: Sequence[tuple[str, ...]], left: tuple[int, ...]) -> str:
    """Rows as aligned columns, two spaces apart; the columns in `left` start at their left edge."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = (
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _mib(size: float) -> str:
    return f"{size / MIB:,.1f}" if size < 1000 * MIB else f"{size / MIB:,.0f}"
