"""What a run writes: metrics.jsonl, layers.jsonl, events.jsonl and lines on the screen.

Rank 0 writes. The other ranks hold a logger that keeps quiet, and so do experiments that leave no
records (`writes=False`), so that the trainer never asks who it is.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cordee.checkpoint.train_state import Progress
from cordee.config.run import Run
from cordee.data.byte_table import NGRAM_ORDER
from cordee.data.ledger import step_digest
from cordee.dist.process_group import RankProcess
from cordee.hf.safetensors_io import open_folder
from cordee.launcher.rendezvous import is_multi_host
from cordee.planner.plan import Plan
from cordee.planner.report import count_text
from cordee.report.metrics_writer import JsonLinesWriter, utc_timestamp
from cordee.report.reader import read_records
from cordee.report.screen import Screen
from cordee.training.evaluate import EvaluationResult
from cordee.training.step_guard import Decision, StepResult

MAX_BUFFERED_ROWS = 4096
"""Rows that every rank holds, for the case that the first rank dies before it has written them."""

StepRows = tuple[dict[str, Any], dict[str, Any] | None]
"""A row of metrics.jsonl, and of layers.jsonl if there is one."""


class RunLogger:
    """Records and screen of one generation of a run."""

    def __init__(
        self,
        run: Run,
        process: RankProcess,
        previous: RunLogger | None = None,
        *,
        writes: bool = True,
    ) -> None:
        """`previous`: the logger of this process's last generation, whose rows go on here."""
        folder = Path(run.run.dir)
        self._process = process
        self._is_writer = process.is_first and writes
        self.screen = Screen(silent=not self._is_writer)
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
            name for sink in self._sinks if self._is_writer and (name := sink.move_obstacle())
        ]
        if self._is_writer and is_multi_host(run):
            for sink in self._sinks:  # from a first rank that is frozen or cut off, it may be
                sink.claim_file()
        self._changed_files: set[str] = previous._changed_files if previous else set()
        self._last_failure = ""
        self.members: Sequence[Mapping[str, Any]] = ()
        """Host and pid of every rank; empty where there is no supervisor."""

    @property
    def _sinks(self) -> tuple[JsonLinesWriter, JsonLinesWriter, JsonLinesWriter]:
        return self._metrics_sink, self._layers_sink, self._events_sink

    def truncate_records(self, step: int) -> None:
        """Drops records of steps after `step`, from which the run goes on."""
        while self._row_buffer and self._row_buffer[-1][0]["step"] > step:
            self._row_buffer.pop()
        if not self._is_writer:
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
        if self._is_writer:
            self._events_sink.write(record)
        return record

    def log_step(
        self,
        row: dict[str, Any],
        layer_norms: Mapping[str, float] | None,
        fraction_done: float,
        remaining_s: float,
    ) -> None:
        """The step's row of metrics.jsonl, its row of layers.jsonl where one is due, the screen."""
        layer_row = {"step": row["step"], "grad_norm": layer_norms} if layer_norms else None
        self._row_buffer.append((row, layer_row))
        if not self._is_writer:
            return
        self._metrics_sink.write(row)
        if layer_row:
            self._layers_sink.write(layer_row)
        self.screen.show_step(row, min(1.0, fraction_done), remaining_s)
        self._show_write_failure()

    def log_skipped_step(self, result: StepResult, consecutive_skips: int) -> None:
        """A step that the guard dropped, and the rank whose own sums are not finite."""
        nonfinite_ranks = result.step_summary.nonfinite_ranks
        culprit = {"pid": self._process.pid, "rank": self._process.rank, "host": self._process.host}
        if nonfinite_ranks:  # not who writes this: the first whose own sums are not finite
            first_rank = nonfinite_ranks[0]
            culprit = {"pid": None, "host": None, **self._member(first_rank), "rank": first_rank}
        fields = {
            "cause": result.verdict.cause,
            "in": list(result.nonfinite_parameters),
            "in_a_row": consecutive_skips,
            "done": "no parameter was touched",
            "sick": [{"rank": rank, **self._member(rank)} for rank in nonfinite_ranks],
            **culprit,
        }
        self.log_event("step_skipped", result.step, fields)
        rank_text = f" (rank {', '.join(map(str, nonfinite_ranks[:4]))})" if nonfinite_ranks else ""
        self.screen.print_line(f"step {result.step} skipped: {result.verdict.cause}{rank_text}")

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
        finite_norms = [finite_or_none(norm) for norm in norms]
        fields = {"norms": finite_norms, "ranks": rank_infos, "done": action}
        self.log_event("ranks_differ", step, {**fields, "says": message})
        self.screen.print_line(f"step {step:>5}  {message}")

    def _member(self, rank: int) -> Mapping[str, Any]:
        """Host and pid of a rank, as far as a supervisor has told."""
        return self.members[rank] if rank < len(self.members) else {}

    def log_evaluation(self, step: int, evaluation: EvaluationResult | None) -> None:
        """An evaluation between two steps."""
        if evaluation is None:
            return
        fields = {**score_fields(evaluation), "tokens": evaluation.tokens}
        self.log_event("evaluated", step, fields)
        self.screen.print_line(f"step {step:>5}  held out: {_score_text(fields)}")

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
            done = "training goes on with the snapshot in the run's folder"
            self.log_event("data_changed", step, {"files": new_files, "done": done})
            self.screen.print_line(
                f"data changed on disk: {', '.join(new_files[:3])}; the snapshot is used"
            )

    def log_checkpoint_event(self, event: str, step: int, fields: Mapping[str, Any]) -> None:
        """A checkpoint that was committed, or failed."""
        self.log_event(event, step, fields)
        if event == "checkpoint_failed":
            self.screen.print_line(
                f"CHECKPOINT FAILED after step {step}: {fields['cause']}; will retry"
            )
        elif self._is_writer:
            self._metrics_sink.sync()

    def log_verdicts(self, step: int, verdicts: Sequence[Mapping[str, Any]]) -> None:
        """What the supervisors found and did, one event and one sentence each."""
        events = read_records(self._events_sink.path) if verdicts else []
        logged_messages = {event.get("says") for event in events}
        for verdict in verdicts:
            if verdict["event"] == "begun" or verdict["says"] in logged_messages:
                continue
            self.log_event(str(verdict["event"]), step, {**verdict, "event": verdict["event"]})
            self.screen.print_line(f"step {step:>5}  {verdict['says']}")

    def close(self) -> None:
        """Gives the terminal back and writes what still waits."""
        self.screen.close()
        if self._is_writer:
            for sink in self._sinks:
                sink.sync()

    def _show_write_failure(self) -> None:
        """A disk that refuses records is said once, and again when the reason changes."""
        failure = self._metrics_sink.failure or self._events_sink.failure
        if failure and failure != self._last_failure:
            self.screen.print_line(
                f"CANNOT WRITE {failure}; records wait in memory, training goes on"
            )
        self._last_failure = failure


def finite_or_none(value: float) -> float | None:
    """The value as JSON can hold it."""
    return value if math.isfinite(value) else None


def metrics_row(
    result: StepResult, progress: Progress, plan: Plan, bytes_per_token: float | None,
    costs: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """A step as a line of metrics.jsonl; `costs` is what `StepMeter.step_metrics` measured."""
    bits = bytes_per_token and finite_or_none(result.loss / math.log(2) / bytes_per_token)
    row = {
        "step": result.step,
        "loss": finite_or_none(result.loss),
        "bits_per_byte": bits,
        "grad_norm": finite_or_none(result.grad_norm),
        "lr": result.lr,
        "tokens": progress.tokens,
        **costs,
        "islands": plan.layout.island,
        "quorum": progress.generation,
        "skipped": result.decision is not Decision.COMMIT,
        "samples": step_digest(result.step_summary.sample_digests),
        "elapsed_s": round(progress.elapsed_s, 3),
    }
    if len(plan.island_microbatches) > 1:
        row["shares"] = plan.island_microbatches
    if result.loss_scale is not None:
        row["loss_scale"] = result.loss_scale
    return row


def start_lines(
    run: Run, plan: Plan, model_name: str, row_text: str, progress: Progress, checkpoint_name: str
) -> list[str]:
    """The lines before the first step: what is trained, on which layout and why, from where.
    `model_name` is that of a caller's own model; `checkpoint_name` is empty at a run's start."""
    batch = run.batch
    lines = [
        f"model   {model_name or run.model.name}: {count_text(plan.predicted.parameters)}"
        f" parameters; {batch.microbatches} microbatches x {batch.microbatch} {row_text}"
        f" a step, {run.optim.name}, {run.run.precision}"
        + (f" ({plan.precision})" if plan.precision else "")
    ]
    if run.model.hub and not checkpoint_name and not open_folder(run.model.hub, "model.hub").files:
        lines.append("weights drawn by the model's own rules: its folder has none")
    lines.append(f"layout  {plan.why}")
    if plan.layout.island > 1 and plan.layout.pipeline > 1 and run.layout.balance:
        reason = "a pipeline's schedule is made for its number of microbatches"
        lines.append(f"shares  stay equal whatever islands' speeds: {reason}")
    if checkpoint_name:
        lines.append(f"resumed after step {progress.step} from {checkpoint_name}")
    return lines


def end_lines(
    folder: str, fields: Mapping[str, Any], plan_check: str, model_name: str, entropy: float | None,
    is_text: bool,
) -> list[str]:  # fmt: skip
    """The last lines on the screen: sample, plan check, held-out loss, digest, what next."""
    lines = ["sample\n" + _indent(fields["sample"])] if fields["sample"] else []
    lines.append(plan_check)
    if score_text := _score_text(fields):
        notes = "" if entropy is None else f"  (the source's entropy is {entropy:.4f})"
        if table_bits := fields["table_bits_per_byte"]:
            notes += f"  (a counted table of {NGRAM_ORDER} bytes of context: {table_bits:.4f})"
        lines.append(f"held out   {score_text}{notes}")
    lines.append(f"weights    {fields['weights_sha256']}")
    lines.append(f"run        {folder}  ({fields['steps']} steps)")
    sample_hint = f" · cordee sample {folder}" if is_text and not model_name else ""
    more_hint = "" if model_name else " · cordee lr · cordee train run.minutes=5 run.dir=..."
    lines.append(f"next       cordee report {folder}{sample_hint}{more_hint}")
    return lines


def score_fields(evaluation: EvaluationResult | None) -> dict[str, Any]:
    """An evaluation as records hold it: None for what there is not, or is no finite number; then
    also in how many batches."""
    loss, bits = (evaluation.loss, evaluation.bits_per_byte) if evaluation else (None, None)
    fields: dict[str, Any] = {
        "held_out_bits_per_byte": None if bits is None else finite_or_none(bits),
        "held_out_loss": None if loss is None else finite_or_none(loss),
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
