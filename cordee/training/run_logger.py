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

from cordee.checkpoint.checkpointer import Checkpointer
from cordee.checkpoint.train_state import Progress
from cordee.data.byte_table import NGRAM_ORDER
from cordee.data.ledger import step_digest
from cordee.dist.step_sync import RankStatus, StepSummary
from cordee.dist.tree_all_reduce import all_gather_rows
from cordee.hf.safetensors_io import open_folder
from cordee.launcher.rendezvous import is_multi_host
from cordee.layout.axes import AXES
from cordee.optim.clip import layer_norms
from cordee.planner.report import comparison_text, count_text
from cordee.report.meter import StepMeter
from cordee.report.metrics_writer import JsonLinesWriter, utc_timestamp
from cordee.report.reader import read_records
from cordee.report.screen import Screen
from cordee.training.build import RunState
from cordee.training.evaluate import EvaluationResult
from cordee.training.step_guard import Decision, StepVerdict, nonfinite_names
from cordee.training.stop_request import StopRequest

MAX_BUFFERED_ROWS = 4096
"""Rows that every rank holds, for the case that the first rank dies before it has written them."""

StepRows = tuple[dict[str, Any], dict[str, Any] | None]
"""A row of metrics.jsonl, and of layers.jsonl if there is one."""


@dataclass(frozen=True)
class StepResult:
    """What a step was: mean loss in nats before the update, global gradient norm before clipping,
    learning rate, verdict, what all ranks said, gradient norm by layer (or None), loss scale (None
    where it never changes)."""

    loss: float
    grad_norm: float
    lr: float
    verdict: StepVerdict
    step_summary: StepSummary
    layer_grad_norms: dict[str, float] | None
    loss_scale: float | None = None


class RunLogger:
    """See the file's header."""

    def __init__(
        self, state: RunState, stop_request: StopRequest, previous: RunLogger | None = None
    ) -> None:
        """`previous`: the desk of this process's last generation, of which rows and meter go on."""
        is_first = state.process.is_first
        folder = state.folder
        self.stop_request = stop_request
        self.should_stop = False
        self.screen = Screen(silent=not is_first)
        prediction = state.plan.predicted
        new_meter = StepMeter(state.process.device, prediction.flops, prediction.peak_flops)
        self.meter: StepMeter = previous.meter if previous else new_meter
        self.meter.set_flops(prediction.flops, prediction.peak_flops)
        self.pending: list[str] = []
        """What is due after the step behind and not done yet."""
        self.checkpointer = Checkpointer(
            folder / "checkpoints", state.process.rank, state.process.size,
            state.run.checkpoint.keep, state.drill.fault_point, state.run.checkpoint.every,
            self._on_checkpoint_event,
        )  # fmt: skip
        self._is_first = is_first
        self._process = state.process
        self._metrics_sink = JsonLinesWriter(folder / "metrics.jsonl")
        self._layers_sink = JsonLinesWriter(folder / "layers.jsonl")
        self._events_sink = JsonLinesWriter(folder / "events.jsonl")
        self._row_buffer: deque[StepRows] = (
            previous._row_buffer if previous else deque(maxlen=MAX_BUFFERED_ROWS)
        )
        if previous:  # with what the disk has refused so far
            self._metrics_sink, self._layers_sink, self._events_sink = previous._sinks
        # What stands in a log's way does not stop the run.
        self._moved_files = [
            name for sink in self._sinks if is_first and (name := sink.move_obstacle())
        ]
        if is_first and is_multi_host(state.run):
            for sink in self._sinks:  # from a first rank that is frozen or cut off, it may be
                sink.claim_file()
        self._start_s = time.monotonic()
        self._earlier_s = 0.0
        self._bytes_sent = 0
        self._axis_bytes_sent: Mapping[str, int] = {}
        self._optimizer_comm_s = 0.0
        self._changed_files: set[str] = previous._changed_files if previous else set()
        self._last_failure = ""
        self.members: Sequence[Mapping[str, Any]] = ()
        """Host and pid of every rank; empty where no supervisor has told."""

    @property
    def _sinks(self) -> tuple[JsonLinesWriter, JsonLinesWriter, JsonLinesWriter]:
        return self._metrics_sink, self._layers_sink, self._events_sink

    # ---- clock and limits ----

    def elapsed_s(self) -> float:
        """Training time of this run so far, earlier starts included, by this rank's clock."""
        return self._earlier_s + time.monotonic() - self._start_s

    def rank_status(self, compute_s: float) -> RankStatus:
        """What this rank says in the tally."""
        wants_stop = self.stop_request.signal_number is not None
        return RankStatus(wants_stop, self.checkpointer.status, self.elapsed_s(), compute_s)

    def fraction_done(self, state: RunState) -> float:
        """Part of the run that is behind, by the limit that is nearest; 1 or more is the end."""
        limits, progress = state.run.run, state.progress
        fractions = [0.0]
        if limits.steps:
            fractions.append(progress.step / limits.steps)
        if limits.tokens:
            fractions.append(progress.tokens / limits.tokens)
        if limits.epochs:
            fractions.append(progress.step * state.step_rows / (limits.epochs * state.epoch_rows))
        if limits.minutes:
            fractions.append(progress.elapsed_s / (60 * limits.minutes))
        return max(fractions)

    def advance(self, state: RunState, step_summary: StepSummary, verdict: StepVerdict) -> Progress:
        """The progress after a step; also notes whether anybody wants to leave."""
        progress = state.progress
        self.should_stop = step_summary.wants_stop
        return replace(
            progress,
            step=progress.step + 1,
            tokens=progress.tokens + state.step_tokens,
            elapsed_s=step_summary.clock_s,
            skipped=progress.skipped + (verdict.decision is not Decision.COMMIT),
            in_a_row=state.guard.consecutive_skips,
            loss_scale=state.loss_scale.value,
            scale_steps=state.loss_scale.good_steps,
        )

    # ---- records ----

    def truncate_records(self, state: RunState) -> None:
        """Drops records of steps after the one from which the run goes on; starts the clock."""
        step = state.progress.step
        self._earlier_s = state.progress.elapsed_s
        self._start_s = time.monotonic()
        while self._row_buffer and self._row_buffer[-1][0]["step"] > step:
            self._row_buffer.pop()
        if not self._is_first:
            return
        last_steps: dict[JsonLinesWriter, int] = {}
        for sink in (self._metrics_sink, self._layers_sink):
            last_steps[sink] = sink.last_step()
            if last_steps[sink] > step:
                sink.truncate_after(step)
        # Rows are committed with the step: what a first rank took with it, this one has too.
        for row, layers in self._row_buffer:
            if last_steps[self._metrics_sink] < row["step"] <= step:
                self._metrics_sink.write(row)
            if layers is not None and last_steps[self._layers_sink] < layers["step"] <= step:
                self._layers_sink.write(layers)
        for name in self._moved_files:
            self.log_event("records_set_aside", step, {"path": name})
            self.screen.print_line(f"records: what is no file was set aside as {name}")
        self._moved_files = []
        if self._metrics_sink.last_step() < step:
            row_count = len(read_records(self._metrics_sink.path))
            self.log_event("metrics_lost", step, {"rows": row_count, "steps": step})

    def log_event(self, name: str, step: int, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Appends to events.jsonl (rank 0) and returns the record."""
        record = {"time": utc_timestamp(), "event": name, **fields, "step": step}
        if self._is_first:
            self._events_sink.write(record)
        return record

    def log_step(self, state: RunState, result: StepResult) -> None:
        """The step's row, its layers, its events, and the screen."""
        progress = state.progress
        bytes_sent, optimizer_comm_s = state.sync.bytes_sent, state.optimizer.exchange_s
        self.meter.add_phase_time("comm", optimizer_comm_s - self._optimizer_comm_s)
        is_skipped = result.verdict.decision is not Decision.COMMIT
        row = {
            "step": progress.step,
            "loss": _finite_or_none(result.loss),
            "bits_per_byte": _bits_per_byte(state, result.loss),
            "grad_norm": _finite_or_none(result.grad_norm),
            "lr": result.lr,
            "tokens": progress.tokens,
            **self.meter.step_metrics(state.step_tokens, bytes_sent - self._bytes_sent),
            "bytes_inside": self._take_axis_bytes(state),
            "islands": state.plan.layout.island,
            "quorum": progress.generation,
            "skipped": is_skipped,
            "samples": step_digest(result.step_summary.sample_digests),
            "elapsed_s": round(progress.elapsed_s, 3),
        }
        if len(state.plan.island_microbatches) > 1:
            row["shares"] = state.plan.island_microbatches
        if result.loss_scale is not None:
            row["loss_scale"] = result.loss_scale
        self._bytes_sent, self._optimizer_comm_s = bytes_sent, optimizer_comm_s
        if is_skipped:
            self._log_skipped_step(state, result)
        layer_row: dict[str, Any] | None = result.layer_grad_norms and {
            "step": progress.step,
            "grad_norm": result.layer_grad_norms,
        }
        self._row_buffer.append((row, layer_row))
        if not self._is_first:
            return
        self._metrics_sink.write(row)
        if layer_row is not None:
            self._layers_sink.write(layer_row)
        self.screen.show_step(row, min(1.0, self.fraction_done(state)), self._remaining_s(state))
        self._show_write_failure()

    def queue_pending(self, state: RunState) -> None:
        """Notes what is due after this step; at the last one `train.finish` sees to it."""
        step, every = state.progress.step, state.run.evaluate.every
        if self.fraction_done(state) >= 1.0:
            return
        if every and step % every == 0:
            self.pending.append("evaluation")
        if self.checkpointer.is_due(step):
            self.pending.append("save")

    def unfinished_tasks(self) -> list[str]:
        """What another generation has to do in this one's place: also a save that was not done."""
        save_was_lost = self.checkpointer.has_pending_save and "save" not in self.pending
        return [*self.pending, "save"] if save_was_lost else list(self.pending)

    def layer_grad_norms(
        self, state: RunState, gradients: Sequence[Tensor], step: int
    ) -> dict[str, float] | None:
        """Gradient norm per layer, when a record of it is due."""
        every = state.run.evaluate.layers_every
        if not every or (step - 1) % every:
            return None
        named_gradients = zip(state.parameters, gradients, strict=True)
        norms = layer_norms(named_gradients, state.norm_reducer)
        return {name: _finite_or_none(norm) or 0.0 for name, norm in norms.items()}

    def nonfinite_parameters(self, state: RunState) -> list[str]:
        """Names of parameters whose agreed gradient is not finite (on this rank)."""
        return nonfinite_names(
            (name, p.grad) for name, p in state.parameters.items() if p.grad is not None
        )

    def log_recompute(
        self, step: int, norms: Sequence[float], divergent_ranks: Sequence[int]
    ) -> None:
        """A step that is computed once more, before it counts as dropped."""
        action = "the step is computed again"
        if divergent_ranks:
            self.log_differing_ranks(step, norms, divergent_ranks, action)
            return
        cause = "the gradient is not finite"
        self.log_event("step_repeated", step, {"cause": cause, "done": action})
        self.screen.print_line(f"step {step:>5}  {cause}; {action}")

    def log_differing_ranks(
        self, step: int, norms: Sequence[float], divergent_ranks: Sequence[int], action: str
    ) -> None:
        """Ranks that hold another gradient than the others after all agreed on it."""
        rank_infos = [{"rank": rank, **self._member(rank)} for rank in divergent_ranks]
        rank_text = ", ".join(f"rank {rank} ({norms[rank]:.6g})" for rank in divergent_ranks[:4])
        message = f"ranks hold gradients of different norms: {rank_text}; {action}"
        fields = {
            "norms": [_finite_or_none(norm) for norm in norms],
            "ranks": rank_infos,
            "done": action,
        }
        self.log_event("ranks_differ", step, {**fields, "says": message})
        self.screen.print_line(f"step {step:>5}  {message}")

    def _member(self, rank: int) -> Mapping[str, Any]:
        """Host and pid of a rank, as far as a supervisor has told."""
        return self.members[rank] if rank < len(self.members) else {}

    def log_evaluation(self, state: RunState, evaluation: EvaluationResult | None) -> None:
        """An evaluation in between; what it sent belongs to no step."""
        self._take_axis_bytes(state)
        if evaluation is None:
            return
        fields = {**score_fields(evaluation), "tokens": evaluation.tokens}
        self.log_event("evaluated", state.progress.step, fields)
        self.screen.print_line(f"step {state.progress.step:>5}  held out: {_score_text(fields)}")

    def log_rejected_checkpoint(self, path: Path, reason: str) -> None:
        """A checkpoint that does not verify."""
        self.log_event("checkpoint_rejected", 0, {"path": path.name, "cause": reason})
        self.screen.print_line(f"checkpoint {path.name} is rejected: {reason}")

    def log_skipped_checkpoint(self, path: Path, reason: str) -> None:
        """What has a checkpoint's name and is none."""
        self.log_event("checkpoint_passed_over", 0, {"path": path.name, "cause": reason})
        self.screen.print_line(f"checkpoint {path.name} is passed over: it {reason}")

    def log_write_failure(self, cause: str) -> None:
        """Something of this start that is no record of a step; nothing when there is no cause."""
        if cause:
            self.log_event("cannot_write", 0, {"cause": cause, "done": "training goes on"})
            self.screen.print_line(f"CANNOT WRITE {cause}; training goes on")

    def log_changed_data(self, step: int, files: Sequence[str]) -> None:
        """Source files that are not what they were; said once each."""
        new_files = [name for name in files if name not in self._changed_files]
        self._changed_files.update(new_files)
        if new_files:
            fields = {
                "files": new_files,
                "done": "training goes on with the snapshot in the run's folder",
            }
            self.log_event("data_changed", step, fields)
            self.screen.print_line(
                f"data changed on disk: {', '.join(new_files[:3])}; the snapshot is used"
            )

    def drain_saves(self, state: RunState, save_again: Any) -> bool:
        """Ends saves in flight; True when the newest one is complete."""

        def gather_statuses(status: int) -> list[int]:
            row = torch.tensor([status], dtype=torch.int64)
            return all_gather_rows(row, state.mesh.group(*AXES), state.process.size)[:, 0].tolist()

        return self.checkpointer.drain(gather_statuses, save_again)

    def log_verdicts(self, step: int, verdicts: Sequence[Mapping[str, Any]]) -> None:
        """What the supervisors found and did, one event and one sentence each."""
        logged_messages = (
            {event.get("says") for event in read_records(self._events_sink.path)}
            if verdicts
            else set()
        )
        for verdict in verdicts:
            if verdict["event"] == "begun" or verdict["says"] in logged_messages:
                continue
            self.log_event(str(verdict["event"]), step, {**verdict, "event": verdict["event"]})
            self.screen.print_line(f"step {step:>5}  {verdict['says']}")

    def show_start(self, state: RunState, checkpoint_name: str | None) -> None:
        """The lines before the first step: what is trained, on which layout and why, from where."""
        plan, batch, run = state.plan, state.run.batch, state.run
        has_user_loss = state.model.loss_function is not None
        row_text = "samples" if has_user_loss else f"x {run.data.sequence} tokens"
        size_text = count_text(plan.predicted.parameters)
        self.screen.print_line(
            f"model   {state.user_model_name or run.model.name}: {size_text} parameters;"
            f" {batch.microbatches} microbatches x {batch.microbatch} {row_text}"
            f" a step, {run.optim.name}, {run.run.precision}"
            + (f" ({plan.precision})" if plan.precision else "")
        )
        if (
            run.model.hub
            and checkpoint_name is None
            and not open_folder(run.model.hub, "model.hub").files
        ):
            self.screen.print_line("weights drawn by the model's own rules: its folder has none")
        self.screen.print_line(f"layout  {plan.why}")
        if plan.layout.island > 1 and plan.layout.pipeline > 1 and run.layout.balance:
            reason = "a pipeline's schedule is made for its number of microbatches"
            self.screen.print_line(f"shares  stay equal whatever islands' speeds: {reason}")
        if checkpoint_name is not None:
            self.screen.print_line(
                f"resumed after step {state.progress.step} from {checkpoint_name}"
            )

    def show_end(self, state: RunState, final_fields: Mapping[str, Any]) -> None:
        """The last lines on the screen: held-out loss, sample, plan check, what next."""
        self.screen.close()
        if final_fields["sample"]:
            self.screen.print_line("sample\n" + _indent(final_fields["sample"]))
        self.screen.print_line(comparison_text(state.plan, self.meter.measurements()))
        if state.held_out is not None and (score_text := _score_text(final_fields)):
            entropy = state.data.entropy_bits
            notes = "" if entropy is None else f"  (the source's entropy is {entropy:.4f})"
            if table_bits := final_fields["table_bits_per_byte"]:
                notes += f"  (a counted table of {NGRAM_ORDER} bytes of context: {table_bits:.4f})"
            self.screen.print_line(f"held out   {score_text}{notes}")
        self.screen.print_line(f"weights    {final_fields['weights_sha256']}")
        folder = state.run.run.dir
        self.screen.print_line(f"run        {folder}  ({final_fields['steps']} steps)")
        is_text_model = state.bytes_per_token is not None and not state.user_model_name
        sample_hint = f" · cordee sample {folder}" if is_text_model else ""
        more_hint = (
            "" if state.user_model_name else " · cordee lr · cordee train run.minutes=5 run.dir=..."
        )
        self.screen.print_line(f"next       cordee report {folder}{sample_hint}{more_hint}")

    def close(self) -> None:
        """Gives the terminal back and writes what still waits."""
        self.screen.close()
        if self._is_first:
            for sink in self._sinks:
                sink.sync()

    def _take_axis_bytes(self, state: RunState) -> dict[str, int]:
        """Bytes that this rank has sent on each axis since the last call."""
        previous_bytes, self._axis_bytes_sent = self._axis_bytes_sent, state.engine.bytes_sent
        axis_bytes = {
            axis: byte_count - previous_bytes.get(axis, 0)
            for axis, byte_count in self._axis_bytes_sent.items()
        }
        return {axis: byte_count for axis, byte_count in axis_bytes.items() if byte_count}

    def _on_checkpoint_event(self, event: str, step: int, fields: Mapping[str, Any]) -> None:
        self.log_event(event, step, fields)
        if event == "checkpoint_failed":
            self.screen.print_line(
                f"CHECKPOINT FAILED after step {step}: {fields['cause']}; will retry"
            )
        elif self._is_first:
            self._metrics_sink.sync()

    def _log_skipped_step(self, state: RunState, result: StepResult) -> None:
        step, nonfinite_ranks = state.progress.step, result.step_summary.nonfinite_ranks
        culprit = {"pid": self._process.pid, "rank": self._process.rank, "host": self._process.host}
        if nonfinite_ranks:  # not who writes this: the first whose own sums are not finite
            culprit = {
                "pid": None,
                "host": None,
                **self._member(nonfinite_ranks[0]),
                "rank": nonfinite_ranks[0],
            }
        fields = {
            "cause": result.verdict.cause,
            "in": self.nonfinite_parameters(state),
            "in_a_row": state.guard.consecutive_skips,
            "done": "no parameter was touched",
            "sick": [{"rank": rank, **self._member(rank)} for rank in nonfinite_ranks],
            **culprit,
        }
        self.log_event("step_skipped", step, fields)
        rank_text = f" (rank {', '.join(map(str, nonfinite_ranks[:4]))})" if nonfinite_ranks else ""
        self.screen.print_line(f"step {step} skipped: {result.verdict.cause}{rank_text}")

    def _remaining_s(self, state: RunState) -> float:
        fraction = self.fraction_done(state)
        return self.elapsed_s() / fraction * (1 - fraction) if fraction > 0 else 0.0

    def _show_write_failure(self) -> None:
        """A disk that refuses records is said once, and again when the reason changes."""
        failure = self._metrics_sink.failure or self._events_sink.failure
        if failure and failure != self._last_failure:
            self.screen.print_line(
                f"CANNOT WRITE {failure}; records wait in memory, training goes on"
            )
        self._last_failure = failure


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _bits_per_byte(state: RunState, loss: float) -> float | None:
    """A mean loss in nats a token as bits per byte; None where targets are no tokens."""
    if state.bytes_per_token is None:
        return None
    return _finite_or_none(loss / math.log(2) / state.bytes_per_token)


def score_fields(evaluation: EvaluationResult | None) -> dict[str, Any]:
    """An evaluation as records hold it: None for what there is not, or is no finite number; then
    also in how many batches."""
    loss, bits = (evaluation.loss, evaluation.bits_per_byte) if evaluation else (None, None)
    fields: dict[str, Any] = {
        "held_out_bits_per_byte": None if bits is None else _finite_or_none(bits),
        "held_out_loss": None if loss is None else _finite_or_none(loss),
    }
    if evaluation and evaluation.nonfinite_batches:
        fields["held_out_not_finite"] = evaluation.nonfinite_batches
    return fields


def _score_text(fields: Mapping[str, Any]) -> str:
    """Scores in words; empty when nothing was evaluated."""
    if count := fields.get("held_out_not_finite"):
        return f"NO FINITE LOSS in {count} of the batches: look for NaN in the held-out samples"
    bits, loss = fields["held_out_bits_per_byte"], fields["held_out_loss"]
    if loss is None:
        return ""
    return f"loss {loss:.4f}" if bits is None else f"{bits:.4f} bits per byte"


def _indent(text: str) -> str:
    return "\n".join("  | " + line for line in text.splitlines())
