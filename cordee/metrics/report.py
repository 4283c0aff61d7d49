"""What a run's records say: a summary, and a verdict by plain rules.

PAPER: no torch, no numpy. Not here: reading them (`records.py`), the page (`page.py`), the command
(`cli/report.py`). Traded away: statistics; every rule of the verdict is a
comparison of medians that a reader can do by eye on the chart beside it.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any, Literal

from cordee.metrics.records import Records, number

MEDIANS = (
    "step_s", "data_s", "comm_s", "tokens_per_s", "bytes_sent", "bytes_inside",
    "memory_bytes", "mfu", "grad_norm",
)  # fmt: skip
SILENT_S = 120.0
"""A run without a last event is taken to be running if it wrote something this recently."""
MUCH_DATA, MUCH_COMMUNICATION = 0.15, 0.35
"""Parts of a step above which waiting for data, or communication, is worth a remark."""
GREW, APART = 10.0, 100.0
"""A layer's gradient explodes when it grew so many times; blocks should not lie further apart."""

State = Literal["finished", "running", "stopped"]


@dataclass(frozen=True)
class Remark:
    """One sentence of the verdict. `bad` asks for action, `note` for a look."""

    kind: Literal["good", "note", "bad"]
    text: str


@dataclass(frozen=True)
class Summary:
    """What `cordee report --json` prints, and the head of the page."""

    run: str
    state: State
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


def summarise(records: Records, now: float | None = None) -> Summary:
    """State, last values, medians of the last steps, and the verdict. `now` is for tests."""
    state = _state(records, time.time() if now is None else now)
    end = records.event("finished") or {}
    held_out = [number(e.get("held_out_bits_per_byte")) for e in records.events]
    seen = [v for v in held_out if v is not None]
    losses = records.seen("loss")
    remarks = [_about_end(records, state), *_about_loss(records), *_about_held_out(records)]
    remarks += [*_about_time(records), *_about_steps(records), *_about_layers(records)]
    remarks += [*_about_shares(records), *_about_plan(records)]
    bad = [r.text for r in remarks if r.kind == "bad"]
    headline = " ".join(r.text for r in remarks[:2])
    others = [text for text in bad if text not in headline]
    if not bad and records.steps:
        headline += " Nothing speaks against it."
    digest = end.get("weights_sha256")
    return Summary(
        run=records.run.run.name if records.run and records.run.run.name else records.folder.name,
        state=state,
        steps=len(records.steps),
        last_step=records.steps[-1] if records.steps else None,
        last_loss=losses[-1] if losses else None,
        held_out_bits_per_byte=seen[-1] if seen else None,
        held_out_accuracy=number(end.get("held_out_accuracy")),
        weights_sha256=digest if isinstance(digest, str) else None,
        skipped=sum(1 for v in records.columns["skipped"] if v),
        verdict=" ".join([headline, *others]),
        remarks=remarks,
        medians={name: last_median(records, name) for name in MEDIANS},
        predicted=dict(records.predicted),
    )


def last_median(records: Records, name: str) -> float | None:
    """Median over the last tenth of the run, and at least 20 steps of it."""
    column = records.columns[name][-max(20, len(records.steps) // 10) :]
    seen = [v for v in column if v is not None]
    return median(seen) if seen else None


def seconds(value: float) -> str:
    """A duration for a person."""
    if 0 < value < 1:
        return f"{1000 * value:.3g} ms"
    if value < 120:
        return f"{value:.3g} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def amount(value: float, unit: str = "") -> str:
    """A count or a size with a decimal prefix: 3.3 M, 812 MB."""
    for power, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= power:
            return f"{value / power:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".strip()


def _state(records: Records, now: float) -> State:
    lives = ("started", "resumed", "interrupted", "stopped", "finished")
    nothing: dict[str, Any] = {"event": ""}
    last = next((e for e in reversed(records.events) if e["event"] in lives), nothing)
    if last["event"] == "finished":
        return "finished"
    if last["event"] in ("interrupted", "stopped"):
        return "stopped"
    pid = last.get("pid")
    if isinstance(pid, int) and last.get("host") == socket.gethostname():
        return "running" if _lives(pid) else "stopped"
    slowest = max(SILENT_S, 10 * (last_median(records, "step_s") or 0.0))
    return "running" if now - records.written < slowest else "stopped"


def _lives(pid: int) -> bool:
    """Whether a process of this machine is there; signal 0 only asks."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # somebody else's
    return True


def _about_end(records: Records, state: State) -> Remark:
    tokens, elapsed = records.seen("tokens"), records.seen("elapsed_s")
    steps = f"{len(records.steps):,} steps"
    total = sum(tokens) if tokens and tokens[-1] <= tokens[0] else max(tokens, default=0.0)
    spent = f", {amount(total)} tokens" if tokens else ""
    spent += f" in {seconds(elapsed[-1])}" if elapsed else ""
    if state == "finished":
        return Remark("good", f"Finished: {steps}{spent}.")
    if state == "running":
        return Remark("note", f"Running: {steps} so far{spent}.")
    for name in ("stopped", "interrupted"):
        event = records.event(name)
        if event is not None and event is records.events[-1]:
            cause = event.get("cause") or event.get("reason") or event.get("signal")
            why = f" ({cause})" if cause else ""
            return Remark("bad", f"{name.capitalize()}{why} after {steps}{spent}.")
    return Remark("bad", f"Ended without a last word after {steps}{spent}: killed, or cut off.")


def _about_loss(records: Records) -> list[Remark]:
    losses = records.seen("loss")
    if len(losses) < 5:
        return []
    part = max(3, len(losses) // 10)
    first, last = median(losses[:3]), median(losses[-part:])
    spread = median(abs(b - a) for a, b in zip(losses[-part - 1 :], losses[-part:], strict=False))
    if last > first - 2 * spread:
        return [Remark("bad", f"The loss did not fall: {first:.3g} at first, {last:.3g} at last.")]
    lowest = min(median(losses[i : i + part]) for i in range(0, len(losses) - part + 1, part))
    if last - lowest > max(2 * spread, 0.05 * (first - lowest)):
        return [Remark("bad", f"The loss fell to {lowest:.3g} but rose again to {last:.3g}.")]
    unit = records.run.loss_unit if records.run else "nats a token"
    return [Remark("good", f"The loss fell from {first:.3g} to {last:.3g} {unit}.")]


def _about_held_out(records: Records) -> list[Remark]:
    points = [
        (e.get("step"), loss)
        for e in records.events
        if (loss := number(e.get("held_out_loss"))) is not None
    ]
    if len(points) < 3:
        return []
    step, best = min(points, key=lambda p: p[1])
    last = points[-1][1]
    if min(last, points[-2][1]) > 1.02 * best:
        text = f"The held-out loss was best at step {step} ({best:.3g}) and has risen to {last:.3g}"
        return [Remark("bad", text + ": the model learns its data by heart.")]
    return []


def _about_time(records: Records) -> list[Remark]:
    step = last_median(records, "step_s")
    if not step:
        return []
    data, comm = ((last_median(records, n) or 0.0) / step for n in ("data_s", "comm_s"))
    rest = max(0.0, 1 - data - comm)
    text = f"A step takes {seconds(step)}: {rest:.0%} {computing(records)},"
    text += f" {comm:.0%} communication{' between islands' * inside(records)},"
    text += f" {data:.0%} waiting for data."
    if data > MUCH_DATA:
        return [Remark("bad", text + " Reading is too slow; data.prefetch may help.")]
    if comm > MUCH_COMMUNICATION:
        return [Remark("note", text + " Larger batches, or a smaller codec, would help.")]
    return [Remark("good", text)]


def inside(records: Records) -> bool:
    """Whether ranks of an island sent each other anything."""
    return any(records.seen("bytes_inside"))


def computing(records: Records) -> str:
    """What is left of a step: layers that wait for each other's messages are not told apart."""
    return "compute and messages inside the island" if inside(records) else "compute"


def _about_steps(records: Records) -> list[Remark]:
    found = []
    skipped = [s for s, v in zip(records.steps, records.columns["skipped"], strict=True) if v]
    if skipped:
        event = records.event("step_skipped") or {}
        cause = f", the last for: {event['cause']}" if event.get("cause") else ""
        times = "1 step was" if len(skipped) == 1 else f"{len(skipped)} steps were"
        found.append(Remark("bad", f"{times} skipped (last: {skipped[-1]}){cause}."))
    for name, what in (("failed", "could not be written"), ("rejected", "was not sound")):
        count = sum(e["event"] == f"checkpoint_{name}" for e in records.events)
        if count:
            found.append(Remark("bad", f"A checkpoint {what} ({count} times)."))
    return found


def _about_layers(records: Records) -> list[Remark]:
    """Exploding: a layer's norm grew. Vanishing: a block's norm lies far below the others'."""
    count = len(records.layer_steps)
    if count < 6:
        return []
    found = []
    last: dict[str, float] = {}
    growth: dict[str, float] = {}
    for name, column in records.layers.items():
        # The first records are left out: heads and residuals that start at zero pass no gradient.
        early = [v for v in column[count // 10 + 1 : count // 2] if v]
        late = [v for v in column[-(count // 3) :] if v is not None]
        if not late:
            found.append(Remark("bad", f"The gradient of {name} is not finite."))
            continue
        last[name] = median(late)
        growth[name] = last[name] / median(early) if early else 1.0
    dead = [name for name, norm in last.items() if norm == 0]
    found += [Remark("bad", f"No gradient reaches {name}.") for name in dead]
    if growth and max(growth.values()) > GREW:
        name = max(growth, key=growth.__getitem__)
        times = f"grew {growth[name]:,.3g} times"
        found.append(Remark("bad", f"Exploding gradients: the norm of {name} {times}."))
    blocks = {name: norm for name, norm in last.items() if name.startswith("blocks.") and norm}
    if len(blocks) > 1 and max(blocks.values()) > APART * min(blocks.values()):
        low, high = (pick(blocks, key=blocks.__getitem__) for pick in (min, max))
        middle = median(blocks.values())
        ratio = f"{blocks[high] / blocks[low]:,.0f} times"
        if middle / blocks[low] >= blocks[high] / middle:
            text = f"Vanishing gradients: the norm of {high} is {ratio} that of {low}."
        else:
            text = f"Exploding gradients: the norm of {high} is {ratio} that of {low}."
        found.append(Remark("bad", text))
    if not found:
        found.append(Remark("good", "Gradients neither explode nor vanish in any layer."))
    return found


def _about_shares(records: Records) -> list[Remark]:
    times = sum(e["event"] == "rebalanced" for e in records.events)
    event = records.event("rebalanced") or {}
    if not isinstance(event.get("why"), str):
        return []
    often = "" if times == 1 else f", the last of {times} changes"
    return [Remark("note", f"From step {event.get('step')} on{often}: {event['why']}.")]


def _about_plan(records: Records) -> list[Remark]:
    planned, measured = records.predicted.get("step_s"), last_median(records, "step_s")
    if not planned or not measured or 0.6 < measured / planned < 1.6:
        return []
    slower = measured > planned
    ratio = measured / planned if slower else planned / measured
    word = "slower" if slower else "faster"
    return [Remark("note", f"Steps are {ratio:.3g} times {word} than the plan said.")]


def mean_ratio(above: Sequence[float | None], below: Sequence[float | None]) -> float | None:
    """Mean of above / below where both were written: e.g. bits a byte per nat a token."""
    ratios = [a / b for a, b in zip(above, below, strict=True) if a is not None and b]
    return fmean(ratios) if ratios else None
