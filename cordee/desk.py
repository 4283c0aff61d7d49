"""The run's desk: its clock and limits, its records, its screen, and the wish to leave.

Not here: anything that changes a parameter. Rank 0 writes; the other ranks hold a desk that keeps
quiet, so the loop never asks who it is. Decisions that all ranks must share (when to stop, which
learning rate) follow from the step number and from rank 0's clock in the last tally, never from
this process's own clock.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cordee.build import RunState
from cordee.checkpoint.keep import Keeper
from cordee.checkpoint.state import Progress
from cordee.data.byte_table import ORDER
from cordee.data.ledger import word_of
from cordee.dist.exchange import gather_rows
from cordee.dist.tally import Tally, Wishes
from cordee.evaluate import HeldOut
from cordee.fault.guard import Say, Verdict, name_culprits
from cordee.fault.leave import Asked
from cordee.layout.axes import AXES
from cordee.metrics.meter import Meter
from cordee.metrics.screen import Screen
from cordee.metrics.sinks import JsonLines, now, read_lines
from cordee.model.folder import open_folder
from cordee.optim.clip import layer_norms
from cordee.plan.report import compare, count_text
from cordee.rendezvous import several

KEPT_ROWS = 4096
"""Rows that every rank holds, for the case that the first rank dies before it has written them."""

Row = tuple[dict[str, Any], dict[str, Any] | None]
"""A row of metrics.jsonl, and of layers.jsonl if there is one."""


@dataclass(frozen=True)
class Outcome:
    """What a step was: mean loss in nats before the update, global gradient norm before clipping,
    learning rate, verdict, what all ranks said, gradient norm by layer (or None), loss scale (None
    where it never changes)."""

    loss: float
    grad_norm: float
    lr: float
    verdict: Verdict
    tally: Tally
    layers: dict[str, float] | None
    loss_scale: float | None = None


class Desk:
    """See the file's header."""

    def __init__(self, state: RunState, asked: Asked, before: Desk | None = None) -> None:
        """`before`: the desk of this process's last generation, of which rows and meter go on."""
        first = state.world.first
        folder = state.folder
        self.asked = asked
        self.leave = False
        self.screen = Screen(silent=not first)
        told = state.plan.predicted
        fresh = Meter(state.world.device, told.flops, told.peak_flops)
        self.meter: Meter = before.meter if before else fresh
        self.meter.expect(told.flops, told.peak_flops)
        self.owed: list[str] = []
        """What is due after the step behind and not done yet."""
        self.keeper = Keeper(state.saver, first, state.run.checkpoint.every, self._of_keeper)
        self._first = first
        self._rank = state.world
        self._metrics = JsonLines(folder / "metrics.jsonl")
        self._layers = JsonLines(folder / "layers.jsonl")
        self._events = JsonLines(folder / "events.jsonl")
        self._rows: deque[Row] = before._rows if before else deque(maxlen=KEPT_ROWS)
        if before:  # with what the disk has refused so far
            self._metrics, self._layers, self._events = before._sinks
        # What stands in a log's way does not stop the run.
        self._aside = [name for sink in self._sinks if first and (name := sink.set_aside())]
        if first and several(state.run):
            for sink in self._sinks:  # from a first rank that is frozen or cut off, it may be
                sink.take_over()
        self._began = time.monotonic()
        self._before_s = 0.0
        self._sent = 0
        self._inside: Mapping[str, int] = {}
        self._shared_s = 0.0
        self._changed: set[str] = before._changed if before else set()
        self._complained = ""
        self.members: Sequence[Mapping[str, Any]] = ()
        """Host and pid of every rank; empty where no supervisor has told."""

    @property
    def _sinks(self) -> tuple[JsonLines, JsonLines, JsonLines]:
        return self._metrics, self._layers, self._events

    # ---- clock and limits ----

    def clock_s(self) -> float:
        """Training time of this run so far, earlier starts included, by this rank's clock."""
        return self._before_s + time.monotonic() - self._began

    def wishes(self, compute_s: float) -> Wishes:
        """What this rank says in the tally."""
        leaves = self.asked.number is not None
        return Wishes(leaves, self.keeper.status, self.clock_s(), compute_s)

    def done(self, state: RunState) -> float:
        """Part of the run that is behind, by the limit that is nearest; 1 or more is the end."""
        limits, at = state.run.run, state.progress
        parts = [0.0]
        if limits.steps:
            parts.append(at.step / limits.steps)
        if limits.tokens:
            parts.append(at.tokens / limits.tokens)
        if limits.epochs:
            parts.append(at.step * state.step_rows / (limits.epochs * state.epoch_rows))
        if limits.minutes:
            parts.append(at.elapsed_s / (60 * limits.minutes))
        return max(parts)

    def advance(self, state: RunState, tally: Tally, verdict: Verdict) -> Progress:
        """The progress after a step; also notes whether anybody wants to leave."""
        at = state.progress
        self.leave = tally.leave
        return replace(
            at,
            step=at.step + 1,
            tokens=at.tokens + state.step_tokens,
            elapsed_s=tally.clock_s,
            skipped=at.skipped + (verdict.say is not Say.COMMIT),
            in_a_row=state.guard.in_a_row,
            loss_scale=state.scale.value,
            scale_steps=state.scale.good_steps,
        )

    # ---- records ----

    def cut(self, state: RunState) -> None:
        """Drops records of steps after the one from which the run goes on; starts the clock."""
        step = state.progress.step
        self._before_s = state.progress.elapsed_s
        self._began = time.monotonic()
        while self._rows and self._rows[-1][0]["step"] > step:
            self._rows.pop()
        if not self._first:
            return
        written: dict[JsonLines, int] = {}
        for sink in (self._metrics, self._layers):
            written[sink] = sink.last_step()
            if written[sink] > step:
                sink.cut(step)
        # Rows are committed with the step: what a first rank took with it, this one has too.
        for row, layers in self._rows:
            if written[self._metrics] < row["step"] <= step:
                self._metrics.write(row)
            if layers is not None and written[self._layers] < layers["step"] <= step:
                self._layers.write(layers)
        for name in self._aside:
            self.event("records_set_aside", step, {"path": name})
            self.screen.say(f"records: what is no file was set aside as {name}")
        self._aside = []
        if self._metrics.last_step() < step:
            rows = len(read_lines(self._metrics.path))
            self.event("metrics_lost", step, {"rows": rows, "steps": step})

    def event(self, name: str, step: int, known: Mapping[str, Any]) -> dict[str, Any]:
        """Appends to events.jsonl (rank 0) and returns the record."""
        record = {"time": now(), "event": name, **known, "step": step}
        if self._first:
            self._events.write(record)
        return record

    def record(self, state: RunState, outcome: Outcome) -> None:
        """The step's row, its layers, its events, and the screen."""
        at = state.progress
        sent, shared_s = state.sync.bytes_sent, state.optimizer.shared_s
        self.meter.add("comm", shared_s - self._shared_s)
        skipped = outcome.verdict.say is not Say.COMMIT
        row = {
            "step": at.step,
            "loss": _finite(outcome.loss),
            "bits_per_byte": _bits_per_byte(state, outcome.loss),
            "grad_norm": _finite(outcome.grad_norm),
            "lr": outcome.lr,
            "tokens": at.tokens,
            **self.meter.row(state.step_tokens, sent - self._sent),
            "bytes_inside": self._sent_inside(state),
            "islands": state.plan.layout.island,
            "quorum": at.generation,
            "skipped": skipped,
            "samples": word_of(outcome.tally.samples),
            "elapsed_s": round(at.elapsed_s, 3),
        }
        if len(state.plan.shares) > 1:
            row["shares"] = state.plan.shares
        if outcome.loss_scale is not None:
            row["loss_scale"] = outcome.loss_scale
        self._sent, self._shared_s = sent, shared_s
        if skipped:
            self._tell_skipped(state, outcome)
        by_layer: dict[str, Any] | None = outcome.layers and {
            "step": at.step,
            "grad_norm": outcome.layers,
        }
        self._rows.append((row, by_layer))
        if not self._first:
            return
        self._metrics.write(row)
        if by_layer is not None:
            self._layers.write(by_layer)
        self.screen.step(row, min(1.0, self.done(state)), self._left_s(state))
        self._complain()

    def note_due(self, state: RunState) -> None:
        """Notes what is due after this step; at the last one `train.finish` sees to it."""
        number, every = state.progress.step, state.run.evaluate.every
        if self.done(state) >= 1.0:
            return
        if every and number % every == 0:
            self.owed.append("evaluation")
        if self.keeper.due(number):
            self.owed.append("save")

    def owes(self) -> list[str]:
        """What another generation has to do in this one's place: also a save that was not done."""
        lost = self.keeper.unfinished and "save" not in self.owed
        return [*self.owed, "save"] if lost else list(self.owed)

    def layers(
        self, state: RunState, gradients: Sequence[Tensor], step: int
    ) -> dict[str, float] | None:
        """Gradient norm per layer, when a record of it is due."""
        every = state.run.evaluate.layers_every
        if not every or (step - 1) % every:
            return None
        named = zip(state.parameters, gradients, strict=True)
        norms = layer_norms(named, state.totals)
        return {name: _finite(norm) or 0.0 for name, norm in norms.items()}

    def culprits(self, state: RunState) -> list[str]:
        """Names of parameters whose agreed gradient is not finite (on this rank)."""
        return name_culprits(
            (name, p.grad) for name, p in state.parameters.items() if p.grad is not None
        )

    def tell_again(self, step: int, norms: Sequence[float], odd: Sequence[int]) -> None:
        """A step that is computed once more, before it counts as dropped."""
        done = "the step is computed again"
        if odd:
            self.tell_odd(step, norms, odd, done)
            return
        cause = "the gradient is not finite"
        self.event("step_repeated", step, {"cause": cause, "done": done})
        self.screen.say(f"step {step:>5}  {cause}; {done}")

    def tell_odd(self, step: int, norms: Sequence[float], odd: Sequence[int], done: str) -> None:
        """Ranks that hold another gradient than the others after all agreed on it."""
        who = [{"rank": rank, **self._member(rank)} for rank in odd]
        named = ", ".join(f"rank {rank} ({norms[rank]:.6g})" for rank in odd[:4])
        says = f"ranks hold gradients of different norms: {named}; {done}"
        known = {"norms": [_finite(norm) for norm in norms], "ranks": who, "done": done}
        self.event("ranks_differ", step, {**known, "says": says})
        self.screen.say(f"step {step:>5}  {says}")

    def _member(self, rank: int) -> Mapping[str, Any]:
        """Host and pid of a rank, as far as a supervisor has told."""
        return self.members[rank] if rank < len(self.members) else {}

    def evaluated(self, state: RunState, scored: HeldOut | None) -> None:
        """An evaluation in between; what it sent belongs to no step."""
        self._sent_inside(state)
        if scored is None:
            return
        known = {**scores(scored), "tokens": scored.tokens}
        self.event("evaluated", state.progress.step, known)
        self.screen.say(f"step {state.progress.step:>5}  held out: {_held_out(known)}")

    def rejected(self, path: Path, reason: str) -> None:
        """A checkpoint that does not verify."""
        self.event("checkpoint_rejected", 0, {"path": path.name, "cause": reason})
        self.screen.say(f"checkpoint {path.name} is rejected: {reason}")

    def passed_over(self, path: Path, reason: str) -> None:
        """What has a checkpoint's name and is none."""
        self.event("checkpoint_passed_over", 0, {"path": path.name, "cause": reason})
        self.screen.say(f"checkpoint {path.name} is passed over: it {reason}")

    def cannot_write(self, cause: str) -> None:
        """Something of this start that is no record of a step; nothing when there is no cause."""
        if cause:
            self.event("cannot_write", 0, {"cause": cause, "done": "training goes on"})
            self.screen.say(f"CANNOT WRITE {cause}; training goes on")

    def data_changed(self, step: int, files: Sequence[str]) -> None:
        """Source files that are not what they were; said once each."""
        new = [name for name in files if name not in self._changed]
        self._changed.update(new)
        if new:
            known = {"files": new, "done": "training goes on with the snapshot in the run's folder"}
            self.event("data_changed", step, known)
            self.screen.say(f"data changed on disk: {', '.join(new[:3])}; the snapshot is used")

    def drain(self, state: RunState, again: Any) -> bool:
        """Ends saves in flight; True when the newest one is complete."""

        def ask(status: int) -> list[int]:
            row = torch.tensor([status], dtype=torch.int64)
            return gather_rows(row, state.mesh.group(*AXES), state.world.size)[:, 0].tolist()

        return self.keeper.drain(ask, again)

    def tell_verdicts(self, step: int, verdicts: Sequence[Mapping[str, Any]]) -> None:
        """What the supervisors found and did, one event and one sentence each."""
        told = {event.get("says") for event in read_lines(self._events.path)} if verdicts else set()
        for verdict in verdicts:
            if verdict["event"] == "begun" or verdict["says"] in told:
                continue
            self.event(str(verdict["event"]), step, {**verdict, "event": verdict["event"]})
            self.screen.say(f"step {step:>5}  {verdict['says']}")

    def tell_start(self, state: RunState, came_from: str | None) -> None:
        """The lines before the first step: what is trained, on which layout and why, from where."""
        plan, batch, run = state.plan, state.run.batch, state.run
        image = run.model.image
        images = f"images of {image.channels} x {image.side} x {image.side}"
        row = images if run.model.classifies else f"x {run.data.sequence} tokens"
        row = row if state.live.loss is None else "samples"
        size = count_text(plan.predicted.parameters)
        self.screen.say(
            f"model   {state.brought or run.model.name}: {size} parameters;"
            f" {batch.microbatches} microbatches x {batch.microbatch} {row}"
            f" a step, {run.optim.name}, {run.run.precision}"
            + (f" ({plan.precision})" if plan.precision else "")
        )
        if (
            run.model.hub
            and came_from is None
            and not open_folder(run.model.hub, "model.hub").files
        ):
            self.screen.say("weights drawn by the model's own rules: its folder has none")
        self.screen.say(f"layout  {plan.why}")
        if plan.layout.island > 1 and plan.layout.pipeline > 1 and run.layout.balance:
            told = "a pipeline's schedule is made for its number of microbatches"
            self.screen.say(f"shares  stay equal whatever islands' speeds: {told}")
        if came_from is not None:
            self.screen.say(f"resumed after step {state.progress.step} from {came_from}")

    def tell_end(self, state: RunState, finished: Mapping[str, Any]) -> None:
        """The last lines on the screen: held-out loss, sample, plan check, what next."""
        self.screen.close()
        if finished["sample"]:
            self.screen.say("sample\n" + _indented(finished["sample"]))
        self.screen.say(compare(state.plan, self.meter.measured()))
        if state.held_out is not None and (told := _held_out(finished)):
            entropy = state.data.entropy_bits
            known = "" if entropy is None else f"  (the source's entropy is {entropy:.4f})"
            if table := finished["table_bits_per_byte"]:
                known += f"  (a counted table of {ORDER} bytes of context: {table:.4f})"
            self.screen.say(f"held out   {told}{known}")
        self.screen.say(f"weights    {finished['weights_sha256']}")
        folder = state.run.run.dir
        self.screen.say(f"run        {folder}  ({finished['steps']} steps)")
        writes = state.bytes_per_token is not None and not state.brought
        sample = f" · cordee sample {folder}" if writes else ""
        more = "" if state.brought else " · cordee lr · cordee train run.minutes=5 run.dir=..."
        self.screen.say(f"next       cordee report {folder}{sample}{more}")

    def close(self) -> None:
        """Gives the terminal back and writes what still waits."""
        self.screen.close()
        if self._first:
            for sink in self._sinks:
                sink.sync()

    def _sent_inside(self, state: RunState) -> dict[str, int]:
        """Bytes that this rank has sent on each axis since the last call."""
        before, self._inside = self._inside, state.engine.bytes_sent
        since = {axis: sent - before.get(axis, 0) for axis, sent in self._inside.items()}
        return {axis: sent for axis, sent in since.items() if sent}

    def _of_keeper(self, event: str, step: int, known: Mapping[str, Any]) -> None:
        self.event(event, step, known)
        if event == "checkpoint_failed":
            self.screen.say(f"CHECKPOINT FAILED after step {step}: {known['cause']}; will retry")
        elif self._first:
            self._metrics.sync()

    def _tell_skipped(self, state: RunState, outcome: Outcome) -> None:
        step, sick = state.progress.step, outcome.tally.sick
        who = {"pid": self._rank.pid, "rank": self._rank.rank, "host": self._rank.host}
        if sick:  # not who writes this: the first whose own sums are not finite
            who = {"pid": None, "host": None, **self._member(sick[0]), "rank": sick[0]}
        known = {
            "cause": outcome.verdict.cause,
            "in": self.culprits(state),
            "in_a_row": state.guard.in_a_row,
            "done": "no parameter was touched",
            "sick": [{"rank": rank, **self._member(rank)} for rank in sick],
            **who,
        }
        self.event("step_skipped", step, known)
        by = f" (rank {', '.join(map(str, sick[:4]))})" if sick else ""
        self.screen.say(f"step {step} skipped: {outcome.verdict.cause}{by}")

    def _left_s(self, state: RunState) -> float:
        done = self.done(state)
        return self.clock_s() / done * (1 - done) if done > 0 else 0.0

    def _complain(self) -> None:
        """A disk that refuses records is said once, and again when the reason changes."""
        failure = self._metrics.failure or self._events.failure
        if failure and failure != self._complained:
            self.screen.say(f"CANNOT WRITE {failure}; records wait in memory, training goes on")
        self._complained = failure


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _bits_per_byte(state: RunState, loss: float) -> float | None:
    """A mean loss in nats a token as bits per byte; None where targets are no tokens."""
    if state.bytes_per_token is None:
        return None
    return _finite(loss / math.log(2) / state.bytes_per_token)


def scores(scored: HeldOut | None) -> dict[str, Any]:
    """An evaluation as records hold it: None for what there is not, or is no finite number; then
    also in how many batches."""
    loss, bits = (scored.loss, scored.bits_per_byte) if scored else (None, None)
    known: dict[str, Any] = {
        "held_out_bits_per_byte": None if bits is None else _finite(bits),
        "held_out_loss": None if loss is None else _finite(loss),
        "held_out_accuracy": scored and scored.accuracy,
    }
    if scored and scored.not_finite:
        known["held_out_not_finite"] = scored.not_finite
    return known


def _held_out(known: Mapping[str, Any]) -> str:
    """Scores in words; empty when nothing was evaluated."""
    if odd := known.get("held_out_not_finite"):
        return f"NO FINITE LOSS in {odd} of the batches: look for NaN in the held-out samples"
    names = ("held_out_bits_per_byte", "held_out_accuracy", "held_out_loss")
    bits, accuracy, loss = (known[name] for name in names)
    if loss is None:
        return ""
    if bits is not None:
        return f"{bits:.4f} bits per byte"
    return f"loss {loss:.4f}" if accuracy is None else f"{accuracy:.2%} of images right"


def _indented(text: str) -> str:
    return "\n".join("  | " + line for line in text.splitlines())
