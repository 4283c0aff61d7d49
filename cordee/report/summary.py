"""What a run's records say: a summary, and a verdict by plain rules. No torch, no numpy.

Every rule of the verdict is a comparison of medians that a reader can do by eye on the chart
beside it.
"""

from __future__ import annotations

import math
import os
import socket
import time
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from cordee.report.reader import RunRecords, finite_number

MEDIAN_COLUMNS = (
    "step_s", "data_s", "comm_s", "tokens_per_s", "bytes_sent", "bytes_inside",
    "memory_bytes", "mfu", "grad_norm",
)  # fmt: skip
SILENCE_LIMIT_S = 120.0
"""A run without a last event is taken to be running if it wrote something this recently."""
HIGH_DATA_SHARE, HIGH_COMM_SHARE = 0.15, 0.35
"""Parts of a step above which waiting for data, or communication, is worth a remark."""
EXPLOSION_FACTOR, MAX_BLOCK_RATIO = 10.0, 100.0
"""A layer's gradient explodes when it grew so many times; blocks should not lie further apart."""

RunPhase = Literal["finished", "running", "stopped"]


@dataclass(frozen=True)
class Remark:
    """One sentence of the verdict. `bad` asks for action, `note` for a look."""

    kind: Literal["good", "note", "bad"]
    text: str


@dataclass(frozen=True)
class RunSummary:
    """What `cordee report --json` prints, and the head of the page."""

    run: str
    state: RunPhase
    steps: int
    last_step: int | None
    last_loss: float | None
    held_out_bits_per_byte: float | None
    held_out_accuracy: float | None
    weights_sha256: str | None
    skipped: int
    verdict: str
    remarks: list[Remark]
    medians: dict[str, float | None]
    predicted: dict[str, float]


def summarise(records: RunRecords, now_s: float | None = None) -> RunSummary:
    """State, last values, medians of the last steps, and the verdict. `now_s` is for tests."""
    state = _run_phase(records, time.time() if now_s is None else now_s)
    finish_event = records.last_event("finished") or {}
    held_out_bits = [finite_number(e.get("held_out_bits_per_byte")) for e in records.events]
    held_out_values = [v for v in held_out_bits if v is not None]
    losses = records.column_values("loss")
    remarks = [_about_end(records, state), *_about_loss(records), *_about_held_out(records)]
    remarks += [*_about_time(records), *_about_steps(records), *_about_layers(records)]
    remarks += [*_about_shares(records), *_about_plan(records)]
    problems = [r.text for r in remarks if r.kind == "bad"]
    headline = " ".join(r.text for r in remarks[:2])
    other_problems = [text for text in problems if text not in headline]
    if not problems and records.steps:
        headline += " Nothing speaks against it."
    digest = finish_event.get("weights_sha256")
    return RunSummary(
        run=records.run.run.name if records.run and records.run.run.name else records.folder.name,
        state=state,
        steps=len(records.steps),
        last_step=records.steps[-1] if records.steps else None,
        last_loss=losses[-1] if losses else None,
        held_out_bits_per_byte=held_out_values[-1] if held_out_values else None,
        held_out_accuracy=finite_number(finish_event.get("held_out_accuracy")),
        weights_sha256=digest if isinstance(digest, str) else None,
        skipped=sum(1 for v in records.columns["skipped"] if v),
        verdict=" ".join([headline, *other_problems]),
        remarks=remarks,
        medians={name: last_median(records, name) for name in MEDIAN_COLUMNS},
        predicted=dict(records.prediction),
    )


def last_median(records: RunRecords, name: str) -> float | None:
    """Median over the last tenth of the run, and at least 20 steps of it."""
    column = records.columns[name][-max(20, len(records.steps) // 10) :]
    values = [v for v in column if v is not None]
    return median(values) if values else None


def format_number(value: float) -> str:
    """A number for a person: four significant digits, thousands parted, powers where needed."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    if not 1e-3 <= abs(value) < 1e7:
        mantissa, _, power = f"{value:.3g}".partition("e")
        return f"{mantissa}e{int(power)}" if power else mantissa
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def format_seconds(value: float) -> str:
    """A duration for a person."""
    if 0 < value < 1:
        return f"{1000 * value:.3g} ms"
    if value < 120:
        return f"{value:.3g} s"
    minutes, remainder = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {remainder} s"


def format_amount(value: float, unit: str = "") -> str:
    """A count or a size with a decimal prefix: 3.3 M, 812 MB."""
    for power, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= power:
            return f"{value / power:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".strip()


def _run_phase(records: RunRecords, now_s: float) -> RunPhase:
    life_events = ("started", "resumed", "interrupted", "stopped", "finished")
    no_event: dict[str, Any] = {"event": ""}
    last_event = next((e for e in reversed(records.events) if e["event"] in life_events), no_event)
    if last_event["event"] == "finished":
        return "finished"
    if last_event["event"] in ("interrupted", "stopped"):
        return "stopped"
    pid = last_event.get("pid")
    if isinstance(pid, int) and last_event.get("host") == socket.gethostname():
        return "running" if _is_alive(pid) else "stopped"
    silence_limit_s = max(SILENCE_LIMIT_S, 10 * (last_median(records, "step_s") or 0.0))
    return "running" if now_s - records.last_write_s < silence_limit_s else "stopped"


def _is_alive(pid: int) -> bool:
    """Whether a process of this machine is there; signal 0 only asks."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # somebody else's
    return True


def _about_end(records: RunRecords, state: RunPhase) -> Remark:
    tokens, elapsed = records.column_values("tokens"), records.column_values("elapsed_s")
    steps_text = f"{len(records.steps):,} steps"
    total_tokens = sum(tokens) if tokens and tokens[-1] <= tokens[0] else max(tokens, default=0.0)
    cost_text = f", {format_amount(total_tokens)} tokens" if tokens else ""
    cost_text += f" in {format_seconds(elapsed[-1])}" if elapsed else ""
    if state == "finished":
        return Remark("good", f"Finished: {steps_text}{cost_text}.")
    if state == "running":
        return Remark("note", f"Running: {steps_text} so far{cost_text}.")
    for name in ("stopped", "interrupted"):
        event = records.last_event(name)
        if event is not None and event is records.events[-1]:
            cause = event.get("cause") or event.get("reason") or event.get("signal")
            cause_text = f" ({cause})" if cause else ""
            return Remark("bad", f"{name.capitalize()}{cause_text} after {steps_text}{cost_text}.")
    return Remark(
        "bad", f"Ended without a last word after {steps_text}{cost_text}: killed, or cut off."
    )


def _about_loss(records: RunRecords) -> list[Remark]:
    losses = records.column_values("loss")
    if len(losses) < 5:
        return []
    window = max(3, len(losses) // 10)
    first_loss, last_loss = median(losses[:3]), median(losses[-window:])
    spread = median(
        abs(b - a) for a, b in zip(losses[-window - 1 :], losses[-window:], strict=False)
    )
    if last_loss > first_loss - 2 * spread:
        return [
            Remark(
                "bad", f"The loss did not fall: {first_loss:.3g} at first, {last_loss:.3g} at last."
            )
        ]
    lowest_loss = min(
        median(losses[i : i + window]) for i in range(0, len(losses) - window + 1, window)
    )
    if last_loss - lowest_loss > max(2 * spread, 0.05 * (first_loss - lowest_loss)):
        return [
            Remark("bad", f"The loss fell to {lowest_loss:.3g} but rose again to {last_loss:.3g}.")
        ]
    unit = records.run.loss_unit if records.run else "nats a token"
    return [Remark("good", f"The loss fell from {first_loss:.3g} to {last_loss:.3g} {unit}.")]


def _about_held_out(records: RunRecords) -> list[Remark]:
    points = [
        (e.get("step"), loss)
        for e in records.events
        if (loss := finite_number(e.get("held_out_loss"))) is not None
    ]
    if len(points) < 3:
        return []
    step, best_loss = min(points, key=lambda p: p[1])
    last_loss = points[-1][1]
    if min(last_loss, points[-2][1]) > 1.02 * best_loss:
        text = (
            f"The held-out loss was best at step {step} ({best_loss:.3g}) and has risen to"
            f" {last_loss:.3g}"
        )
        return [Remark("bad", text + ": the model learns its data by heart.")]
    return []


def _about_time(records: RunRecords) -> list[Remark]:
    step_s = last_median(records, "step_s")
    if not step_s:
        return []
    data_share, comm_share = (
        (last_median(records, n) or 0.0) / step_s for n in ("data_s", "comm_s")
    )
    compute_share = max(0.0, 1 - data_share - comm_share)
    text = f"A step takes {format_seconds(step_s)}: {compute_share:.0%} {compute_label(records)},"
    text += f" {comm_share:.0%} communication{' between islands' * has_island_traffic(records)},"
    text += f" {data_share:.0%} waiting for data."
    if data_share > HIGH_DATA_SHARE:
        return [Remark("bad", text + " Reading is too slow; data.prefetch may help.")]
    if comm_share > HIGH_COMM_SHARE:
        return [Remark("note", text + " Larger batches, or a smaller codec, would help.")]
    return [Remark("good", text)]


def has_island_traffic(records: RunRecords) -> bool:
    """Whether ranks of an island sent each other anything."""
    return any(records.column_values("bytes_inside"))


def compute_label(records: RunRecords) -> str:
    """What is left of a step: layers that wait for each other's messages are not told apart."""
    return "compute and messages inside the island" if has_island_traffic(records) else "compute"


def _about_steps(records: RunRecords) -> list[Remark]:
    remarks = []
    skipped_steps = [s for s, v in zip(records.steps, records.columns["skipped"], strict=True) if v]
    if skipped_steps:
        event = records.last_event("step_skipped") or {}
        cause = f", the last for: {event['cause']}" if event.get("cause") else ""
        count_text = "1 step was" if len(skipped_steps) == 1 else f"{len(skipped_steps)} steps were"
        remarks.append(Remark("bad", f"{count_text} skipped (last: {skipped_steps[-1]}){cause}."))
    for name, outcome in (("failed", "could not be written"), ("rejected", "was not sound")):
        count = sum(e["event"] == f"checkpoint_{name}" for e in records.events)
        if count:
            remarks.append(Remark("bad", f"A checkpoint {outcome} ({count} times)."))
    return remarks


def _about_layers(records: RunRecords) -> list[Remark]:
    """Exploding: a layer's norm grew. Vanishing: a block's norm lies far below the others'."""
    count = len(records.layer_steps)
    if count < 6:
        return []
    remarks = []
    last_norms: dict[str, float] = {}
    growth: dict[str, float] = {}
    for name, column in records.layers.items():
        # The first records are left out: heads and residuals that start at zero pass no gradient.
        early_norms = [v for v in column[count // 10 + 1 : count // 2] if v]
        late_norms = [v for v in column[-(count // 3) :] if v is not None]
        if not late_norms:
            remarks.append(Remark("bad", f"The gradient of {name} is not finite."))
            continue
        last_norms[name] = median(late_norms)
        growth[name] = last_norms[name] / median(early_norms) if early_norms else 1.0
    dead_layers = [name for name, norm in last_norms.items() if norm == 0]
    remarks += [Remark("bad", f"No gradient reaches {name}.") for name in dead_layers]
    if growth and max(growth.values()) > EXPLOSION_FACTOR:
        name = max(growth, key=growth.__getitem__)
        growth_text = f"grew {growth[name]:,.3g} times"
        remarks.append(Remark("bad", f"Exploding gradients: the norm of {name} {growth_text}."))
    block_norms = {
        name: norm for name, norm in last_norms.items() if name.startswith("blocks.") and norm
    }
    if len(block_norms) > 1 and max(block_norms.values()) > MAX_BLOCK_RATIO * min(
        block_norms.values()
    ):
        low_layer, high_layer = (
            select(block_norms, key=block_norms.__getitem__) for select in (min, max)
        )
        median_norm = median(block_norms.values())
        ratio_text = f"{block_norms[high_layer] / block_norms[low_layer]:,.0f} times"
        if median_norm / block_norms[low_layer] >= block_norms[high_layer] / median_norm:
            text = (
                f"Vanishing gradients: the norm of {high_layer} is {ratio_text} that of"
                f" {low_layer}."
            )
        else:
            text = (
                f"Exploding gradients: the norm of {high_layer} is {ratio_text} that of"
                f" {low_layer}."
            )
        remarks.append(Remark("bad", text))
    if not remarks:
        remarks.append(Remark("good", "Gradients neither explode nor vanish in any layer."))
    return remarks


def _about_shares(records: RunRecords) -> list[Remark]:
    change_count = sum(e["event"] == "rebalanced" for e in records.events)
    event = records.last_event("rebalanced") or {}
    if not isinstance(event.get("why"), str):
        return []
    frequency_text = "" if change_count == 1 else f", the last of {change_count} changes"
    return [Remark("note", f"From step {event.get('step')} on{frequency_text}: {event['why']}.")]


def _about_plan(records: RunRecords) -> list[Remark]:
    planned_s, measured_s = records.prediction.get("step_s"), last_median(records, "step_s")
    if not planned_s or not measured_s or 0.6 < measured_s / planned_s < 1.6:
        return []
    is_slower = measured_s > planned_s
    ratio = measured_s / planned_s if is_slower else planned_s / measured_s
    direction = "slower" if is_slower else "faster"
    return [Remark("note", f"Steps are {ratio:.3g} times {direction} than the plan said.")]
