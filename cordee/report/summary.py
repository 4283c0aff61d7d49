"""What a run's records say: a summary, and a verdict by plain rules. No torch, no numpy.

Every rule of the verdict is a comparison of medians that a reader can do by eye on the chart
beside it.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
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
    losses = records.column_values("loss")
    rules = (
        _about_loss, _about_held_out, _about_time, _about_steps, _about_layers, _about_shares,
        _about_plan,
    )  # fmt: skip
    remarks = [_about_end(records, state), *chain.from_iterable(rule(records) for rule in rules)]
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
        held_out_bits_per_byte=next((v for v in reversed(held_out_bits) if v is not None), None),
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
    event = records.events[-1] if records.events else {}
    if event.get("event") in ("stopped", "interrupted"):
        cause = event.get("cause") or event.get("reason") or event.get("signal")
        text = event["event"].capitalize() + (f" ({cause})" if cause else "")
        return Remark("bad", f"{text} after {steps_text}{cost_text}.")
    text = f"Ended without a last word after {steps_text}{cost_text}: killed, or cut off."
    return Remark("bad", text)


def _about_loss(records: RunRecords) -> Iterator[Remark]:
    losses = records.column_values("loss")
    if len(losses) < 5:
        return
    window = max(3, len(losses) // 10)
    first, last = median(losses[:3]), median(losses[-window:])
    spread = median(abs(b - a) for a, b in pairwise(losses[-window - 1 :]))
    starts = range(0, len(losses) - window + 1, window)
    lowest = min(median(losses[i : i + window]) for i in starts)
    if last > first - 2 * spread:
        yield Remark("bad", f"The loss did not fall: {first:.3g} at first, {last:.3g} at last.")
    elif last - lowest > max(2 * spread, 0.05 * (first - lowest)):
        yield Remark("bad", f"The loss fell to {lowest:.3g} but rose again to {last:.3g}.")
    else:
        yield Remark("good", f"The loss fell from {first:.3g} to {last:.3g} nats a token.")


def _about_held_out(records: RunRecords) -> Iterator[Remark]:
    losses = [(e.get("step"), finite_number(e.get("held_out_loss"))) for e in records.events]
    points = [(step, loss) for step, loss in losses if loss is not None]
    if len(points) < 3:
        return
    step, best = min(points, key=lambda p: p[1])
    last = points[-1][1]
    if min(last, points[-2][1]) > 1.02 * best:
        text = f"The held-out loss was best at step {step} ({best:.3g}) and has risen to {last:.3g}"
        yield Remark("bad", text + ": the model learns its data by heart.")


def _about_time(records: RunRecords) -> Iterator[Remark]:
    step_s = last_median(records, "step_s")
    if not step_s:
        return
    data_share, comm_share = (
        (last_median(records, name) or 0.0) / step_s for name in ("data_s", "comm_s")
    )
    compute_share = max(0.0, 1 - data_share - comm_share)
    text = f"A step takes {format_seconds(step_s)}: {compute_share:.0%} {compute_label(records)},"
    text += f" {comm_share:.0%} communication{' between islands' * has_island_traffic(records)},"
    text += f" {data_share:.0%} waiting for data."
    if data_share > HIGH_DATA_SHARE:
        yield Remark("bad", text + " Reading is too slow; data.prefetch may help.")
    elif comm_share > HIGH_COMM_SHARE:
        yield Remark("note", text + " Larger batches, or a smaller codec, would help.")
    else:
        yield Remark("good", text)


def has_island_traffic(records: RunRecords) -> bool:
    """Whether ranks of an island sent each other anything."""
    return any(records.column_values("bytes_inside"))


def compute_label(records: RunRecords) -> str:
    """What is left of a step: layers that wait for each other's messages are not told apart."""
    return "compute and messages inside the island" if has_island_traffic(records) else "compute"


def _about_steps(records: RunRecords) -> Iterator[Remark]:
    steps = [s for s, v in zip(records.steps, records.columns["skipped"], strict=True) if v]
    if steps:
        event = records.last_event("step_skipped") or {}
        cause = f", the last for: {event['cause']}" if event.get("cause") else ""
        count_text = "1 step was" if len(steps) == 1 else f"{len(steps)} steps were"
        yield Remark("bad", f"{count_text} skipped (last: {steps[-1]}){cause}.")
    for name, outcome in (("failed", "could not be written"), ("rejected", "was not sound")):
        count = sum(e["event"] == f"checkpoint_{name}" for e in records.events)
        if count:
            yield Remark("bad", f"A checkpoint {outcome} ({count} times).")


def _about_layers(records: RunRecords) -> Iterator[Remark]:
    """Exploding: a layer's norm grew. Vanishing: a block's norm lies far below the others'."""
    count = len(records.layer_steps)
    if count < 6:
        return
    problems = []
    norms: dict[str, float] = {}
    growth: dict[str, float] = {}
    for name, column in records.layers.items():
        # The first records are left out: heads and residuals that start at zero pass no gradient.
        early_norms = [v for v in column[count // 10 + 1 : count // 2] if v]
        late_norms = [v for v in column[-(count // 3) :] if v is not None]
        if not late_norms:
            problems.append(f"The gradient of {name} is not finite.")
            continue
        norms[name] = median(late_norms)
        growth[name] = norms[name] / median(early_norms) if early_norms else 1.0
    problems += [f"No gradient reaches {name}." for name, norm in norms.items() if norm == 0]
    if growth and max(growth.values()) > EXPLOSION_FACTOR:
        name = max(growth, key=growth.__getitem__)
        problems.append(f"Exploding gradients: the norm of {name} grew {growth[name]:,.3g} times.")
    blocks = sorted((norm, name) for name, norm in norms.items() if norm and "blocks." in name[:7])
    if len(blocks) > 1 and blocks[-1][0] > MAX_BLOCK_RATIO * blocks[0][0]:
        (low, low_name), (high, high_name) = blocks[0], blocks[-1]
        middle = median(norm for norm, _ in blocks)
        kind = "Vanishing" if middle / low >= high / middle else "Exploding"
        text = f"the norm of {high_name} is {high / low:,.0f} times that of {low_name}"
        problems.append(f"{kind} gradients: {text}.")
    yield from (Remark("bad", text) for text in problems)
    if not problems:
        yield Remark("good", "Gradients neither explode nor vanish in any layer.")


def _about_shares(records: RunRecords) -> Iterator[Remark]:
    change_count = sum(e["event"] == "rebalanced" for e in records.events)
    event = records.last_event("rebalanced") or {}
    if isinstance(event.get("why"), str):
        frequency_text = "" if change_count == 1 else f", the last of {change_count} changes"
        yield Remark("note", f"From step {event.get('step')} on{frequency_text}: {event['why']}.")


def _about_plan(records: RunRecords) -> Iterator[Remark]:
    planned_s, measured_s = records.prediction.get("step_s"), last_median(records, "step_s")
    if not planned_s or not measured_s or 0.6 < measured_s / planned_s < 1.6:
        return
    is_slower = measured_s > planned_s
    ratio = measured_s / planned_s if is_slower else planned_s / measured_s
    direction = "slower" if is_slower else "faster"
    yield Remark("note", f"Steps are {ratio:.3g} times {direction} than the plan said.")
