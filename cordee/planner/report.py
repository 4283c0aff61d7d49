"""A plan as plain text for terminals, logs and diffs: the ranked table, one rank of it, and the
prediction beside what a run measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cordee.config.run import Run
from cordee.layout.axes import AXES, Layout
from cordee.layout.counts import TensorSpecs, count_tensors
from cordee.layout.stages import Stages
from cordee.planner.cluster import Cluster, precision_text
from cordee.planner.compute_cost import device_constants, matrix_share
from cordee.planner.memory import USABLE_MEMORY_SHARE, rank_state_bytes
from cordee.planner.plan import Plan
from cordee.planner.profile import NOISY_SPREAD
from cordee.planner.search import MIB, Prediction, Ranking
from cordee.planner.traffic import axis_bytes

HEADINGS = (
    "", "layout", "ranks x threads", "ms/step", "low - high", "tokens/s", "MiB/rank", "MiB sent",
    "",
)  # fmt: skip

MAX_REJECTIONS = 16
"""Lines of layouts that are out."""

BAR_WIDTH = 24
"""Characters of the longest bar."""


def plan_text(run: Run, cluster: Cluster, plan: Plan, ranking: Ranking, top: int = 8) -> str:
    """The whole page: job, ranked layouts, what was dropped, memory, time, assumptions."""
    parts = [
        job_text(run, cluster, plan),
        ranked_table(plan, ranking, top),
        _rejections_text(ranking),
        _memory_text(plan),
        _time_text(plan),
        _traffic_text(plan),
        _assumptions_text(run, cluster),
        "\n".join(f"why   {part.strip()}" for part in plan.why.split(";"))
        + "".join(f"\nnote  {part.strip()}" for part in plan.note.split(";") if part),
    ]
    return "\n\n".join(part for part in parts if part)


def ranked_table(plan: Plan, ranking: Ranking, top: int) -> str:
    """The best `top` layouts, and the pick's row wherever it stands."""
    rows: list[tuple[str, ...]] = [HEADINGS]
    hidden_count, is_pick_shown = 0, False
    for position, candidate in enumerate(ranking.candidates, 1):
        is_pick = (candidate.layout, candidate.threads) == (plan.layout, plan.threads)
        is_pick_shown |= is_pick
        if position > top and not is_pick:
            hidden_count += 1
            continue
        layout, threads, prediction = candidate.layout, candidate.threads, candidate.prediction
        rows.append(_layout_row(str(position), layout, threads, prediction, is_pick))
    if not is_pick_shown:
        rows.append(_layout_row("-", plan.layout, plan.threads, plan.predicted, True))
    more_text = f"\nand {hidden_count} slower (--top {len(ranking.candidates)})"
    return _align_columns(rows, left_aligned=(1, 8)) + (more_text if hidden_count else "")


def comparison_text(plan: Plan, measurements: Mapping[str, float]) -> str:
    """Predicted against measured at the end of a run.

    `measurements`: step_s (median), bytes_sent (gradient bytes of a step, rank 0), memory_bytes
    (peak above the process before the model was built). Keys that are missing are left out.
    """
    prediction = plan.predicted
    if not prediction.step_s:
        return plan.note
    rows = [("plan against run", "predicted", "measured", "ratio", "")]
    if math.isfinite(step_s := measurements.get("step_s", math.nan)) and step_s > 0:
        is_inside = prediction.low_s <= step_s <= prediction.high_s
        relation = "within" if is_inside else "outside"
        span = f"{relation} {seconds_text(prediction.low_s)} - {seconds_text(prediction.high_s)}"
        time_texts = seconds_text(prediction.step_s), seconds_text(step_s)
        rows.append(("  step", *time_texts, f"{step_s / prediction.step_s:.2f}", span))
    for name, key, predicted_value in (
        ("  gradients sent", "bytes_sent", prediction.bytes_sent),
        ("  memory of a rank", "memory_bytes", prediction.memory_bytes),
    ):
        value = measurements.get(key, math.nan)
        if math.isfinite(value) and (value or predicted_value):
            ratio = f"{value / predicted_value:.2f}" if predicted_value else "-"
            exactness = "to the byte" if value == predicted_value else ""
            sizes = _mib_text(predicted_value) + " MiB", _mib_text(value) + " MiB"
            rows.append((name, *sizes, ratio, exactness))
    return _align_columns(rows, left_aligned=(0, 4))


def rank_text(view: RankView, rehearsal: Mapping[str, float] | None = None) -> str:
    """One rank as a table; `rehearsal` is what building its modules gave: parameters, bytes,
    modules, seconds, memory (bytes)."""
    coords_text = ", ".join(f"{axis} {index}" for axis, index in view.coordinates.items())
    stages = " and ".join(
        f"{start} to {stop - 1} (stage {stage})"
        for stage, (start, stop) in zip(view.stages, view.layers, strict=True)
    )
    first, stop = view.microbatches
    parameter_text = f"{view.parameters:,} of {count_text(view.model_parameters)}"
    rows = [
        ("  stands at", coords_text),
        ("  layers", stages),
        ("  microbatches", f"{first} to {stop - 1} of a step (worker {view.worker})"),
        *((f"  {axis} group", _ranks_text(group)) for axis, group in view.groups.items()),
        ("  holds", f"{parameter_text} parameters, in {view.tensors:,} tensors"),
        *((f"  {name}", f"{size:,} bytes") for name, size in view.state_bytes.items()),
        *((f"  sends, {axis}", f"{size:,} bytes") for axis, size in view.sent_bytes.items()),
    ]
    if rehearsal is not None:
        parameters = int(rehearsal["parameters"])
        is_equal = parameters == view.parameters
        agreement = "as above" if is_equal else f"above: {view.parameters:,}"
        rows += [
            ("  built on meta", f"{parameters:,} parameters ({agreement})"),
            ("  its bytes", f"{int(rehearsal['bytes']):,}, optimiser included"),
            ("  its modules", f"{int(rehearsal['modules']):,}"),
            ("  building took", f"{seconds_text(rehearsal['seconds'])},"
             f" {_mib_text(rehearsal['memory'])} MiB of memory"),
        ]  # fmt: skip
    return f"rank {view.rank} of {view.ranks}\n" + _align_columns(rows, left_aligned=(0, 1))


def _ranks_text(group: Sequence[int]) -> str:
    text = ", ".join(map(str, group if len(group) <= 8 else group[:3]))
    return text if len(group) <= 8 else f"{text} ... {group[-1]} ({len(group)} ranks)"


def assumptions(run: Run, cluster: Cluster) -> dict[str, str]:
    """What the figures rest on, in words."""
    constants, precision = device_constants(cluster, run.run.precision), run.run.precision
    peak = "bf16" if precision == "fp8" else precision
    share = matrix_share(cluster, precision)
    unit, memory_owner = ("core", "host") if cluster.device == "cpu" else ("device", "device")
    widening = f", wider by {min(1.0, cluster.spread):.0%} as repeated figures differ"
    source = "; rates measured here" if cluster.measured else ", not measured on it"
    texts = {
        "devices": _devices_text(cluster),
        "precision": f"{precision}: {precision_text(precision, cluster)}",
        "peak": f"{cluster.flops(precision) / 1e9:,.0f} GFLOP/s a {unit}"
        f" ({peak}), of which matrix products reach {share:.0%}",
        "memory bandwidth": f"{cluster.memory_bytes_per_s / 1e9:,.0f} GB/s a {unit}",
        "link": f"{cluster.link_bytes_per_s / 1e9:,.2f} GB/s,"
        f" {cluster.link_s * 1e6:.0f} us between ranks of a host",
        "interval": f"{constants.low_factor:.2f} to {constants.high_factor:.2f} x the prediction"
        + (widening if cluster.spread > NOISY_SPREAD else "")
        + " (more with several CPU threads, or ranks that share cores)",
        "constants": f"of this kind of device (planner/compute_cost.py){source}",
        "memory": f"a plan may fill {USABLE_MEMORY_SHARE:.0%} of the {memory_owner}",
    }
    if cluster.hosts > 1:
        texts["network"] = (
            f"{cluster.network_bytes_per_s / 1e9:,.2f} GB/s a rank,"
            f" {cluster.network_s * 1e6:.0f} us between hosts"
        )
    return texts


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


def _assumptions_text(run: Run, cluster: Cluster) -> str:
    rows = [(f"  {name}", text) for name, text in assumptions(run, cluster).items()]
    return "assumed\n" + _align_columns(rows, left_aligned=(0, 1))


def job_text(run: Run, cluster: Cluster, plan: Plan) -> str:
    """Model, step and devices in three lines."""
    batch, model = run.batch, run.model
    exactness = ", exact" if run.run.exact else ""
    heads = f", {model.heads} heads{f' ({model.kv_heads} of keys)' if model.kv_heads else ''}"
    row = f"sequences x {run.data.sequence} tokens"
    return (
        f"model    {model.name}: {count_text(plan.predicted.parameters)} parameters,"
        f" {model.layers} layers x width {model.width}{heads}\n"
        f"step     {batch.microbatches} microbatches x {batch.microbatch} {row},"
        f" {run.optim.name}, {run.run.precision}{exactness}\n"
        f"devices  {_devices_text(cluster)}"
    )


def _devices_text(cluster: Cluster) -> str:
    owner = "a host" if cluster.device == "cpu" else "each"
    hosts = f"{cluster.hosts} hosts of " if cluster.hosts > 1 else ""
    return f"{hosts}{cluster.name}, {cluster.memory_bytes / 2**30:.1f} GiB {owner}"


def _layout_row(
    position: str, layout: Layout, threads: int, prediction: Prediction, is_pick: bool
) -> tuple[str, ...]:
    return (
        position,
        layout.describe().removeprefix("1 island x "),
        f"{layout.size} x {threads}",
        f"{prediction.step_s * 1e3:,.1f}",
        f"{prediction.low_s * 1e3:,.0f} - {prediction.high_s * 1e3:,.0f}",
        f"{prediction.tokens_per_s:,.0f}",
        _mib_text(prediction.memory_bytes),
        _mib_text(prediction.all_bytes_sent),
        "<- pick" if is_pick else "",
    )


def _rejections_text(ranking: Ranking) -> str:
    if not ranking.rejections:
        return ""
    rows = [(f"  {rejection.layout}", rejection.reason) for rejection in ranking.rejections]
    # Rules come first; layouts that do not fit come last, by number of ranks.
    is_long = len(rows) > MAX_REJECTIONS
    visible_rows = [*rows[: MAX_REJECTIONS - 4], *rows[-4:]] if is_long else rows
    hidden_count = len(rows) - len(visible_rows)
    more_text = f"\n  and {hidden_count} more (--json)" if hidden_count else ""
    return "not these\n" + _align_columns(visible_rows, left_aligned=(0, 1)) + more_text


def _memory_text(plan: Plan) -> str:
    prediction = plan.predicted
    rows = [*prediction.memory_items.items(), ("in all", prediction.memory_bytes)]
    lines = _bars_text([(name, size, _mib_text(size)) for name, size in rows], total="in all")
    process = f"  and {_mib_text(prediction.overhead_bytes)} MiB for the process itself"
    zero = f" (zero {plan.zero})" if plan.layout.shard > 1 else ""
    title = f"memory of the fullest rank at the worst moment, MiB{zero}"
    return title + "\n" + lines + "\n" + process


def _time_text(plan: Plan) -> str:
    prediction = plan.predicted
    rows = [*prediction.time_items.items(), ("in all", prediction.step_s)]
    cells = [(name, s, f"{s * 1e3:,.1f}") for name, s in rows if s > 0]
    return "time of a step, ms\n" + _bars_text(cells, total="in all")


def _traffic_text(plan: Plan) -> str:
    items = plan.predicted.bytes_items
    if not items:
        return "sent in a step: nothing"
    lines = [(f"  {name}", f"{size:,}") for name, size in items.items()]
    protocol = plan.protocol if plan.codec == "identity" else f"{plan.protocol}, {plan.codec}"
    title = f"sent by the busiest rank in a step, bytes ({protocol})\n"
    return title + _align_columns(lines, left_aligned=(0,))


def _bars_text(rows: Sequence[tuple[str, float, str]], total: str) -> str:
    longest = max((value for name, value, _ in rows if name != total), default=0) or 1
    cells = []
    for name, value, text in rows:
        bar = "" if name == total else "#" * max(1, round(BAR_WIDTH * value / longest))
        cells.append((f"  {name}", text, bar))
    return _align_columns(cells, left_aligned=(0, 2))


def _align_columns(rows: Sequence[tuple[str, ...]], left_aligned: tuple[int, ...]) -> str:
    """Rows as columns, two spaces apart, aligned at the right but for those in `left_aligned`."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = (
            cell.ljust(width) if i in left_aligned else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _mib_text(size: float) -> str:
    return f"{size / MIB:,.1f}" if size < 1000 * MIB else f"{size / MIB:,.0f}"


@dataclass(frozen=True, kw_only=True)
class RankView:
    """What rank `rank` of `ranks` is, holds and sends. `layers` are [start, stop) blocks of each of
    its stages; `groups` the ranks that differ from it along one axis; `sent_bytes` those of a step
    by axis."""

    rank: int
    ranks: int
    coordinates: Mapping[str, int]
    stages: tuple[int, ...]
    layers: tuple[tuple[int, int], ...]
    worker: int
    microbatches: tuple[int, int]
    groups: Mapping[str, tuple[int, ...]]
    tensors: int
    parameters: int
    model_parameters: int
    state_bytes: Mapping[str, int]
    sent_bytes: Mapping[str, int]


def view_rank(run: Run, plan: Plan, rank: int, specs: TensorSpecs) -> RankView:
    """Rank `rank` of `plan`; LayoutError when there is no such rank."""
    tensor_counts, layout = count_tensors(specs), plan.layout
    coords = layout.coordinates(rank)
    stages = Stages(plan.stages, layout.pipeline, run.layout.schedule)
    rank_stages = stages.rank_stages(coords["pipeline"])
    layer_ranges = stages.layer_ranges(coords["pipeline"])
    rank_tensors = list(tensor_counts.rank_tensors(layout, coords, layer_ranges))
    dp_rank = layout.dp_rank(rank)
    return RankView(
        rank=rank,
        ranks=layout.size,
        coordinates=coords,
        stages=tuple(rank_stages),
        layers=tuple(plan.stages[stage] for stage in rank_stages),
        worker=dp_rank,
        microbatches=plan.splits[dp_rank],
        groups={
            axis: tuple(layout.rank({**coords, axis: i}) for i in range(getattr(layout, axis)))
            for axis in AXES
            if getattr(layout, axis) > 1
        },
        tensors=sum(tensors.count for tensors in rank_tensors if tensors.elements),
        parameters=sum(tensors.elements for tensors in rank_tensors),
        model_parameters=tensor_counts.parameters,
        state_bytes=rank_state_bytes(run, tensor_counts, layout, stages, coords),
        sent_bytes=axis_bytes(run, tensor_counts, layout, stages, coords, plan.zero),
    )
