"""THE RUN on one rank: distributed gradient descent, theta <- theta - eta * grad F(theta).

    initialise, distribute the data, distribute the model    `Trainer.__init__` (build.py)
    compute, communicate, update                             `Trainer.train_step`
    iterate: what is due between steps                       `Trainer.fit`

One step is the same on one rank and on many, on the first day and after a restart.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cordee.checkpoint.checkpointer import Checkpointer
from cordee.checkpoint.peer_backup import PeerBackup
from cordee.checkpoint.pieces import weights_sha256
from cordee.checkpoint.train_state import Progress, make_metadata, select_pieces
from cordee.config.run import Run
from cordee.data.manifest import DatasetInfo, list_changed_sources
from cordee.dist.gradient_sync import TreeSync
from cordee.dist.mesh import make_mesh
from cordee.dist.process_group import RankProcess
from cordee.dist.step_sync import RankStatus, StepSummary, gather_step_summary
from cordee.dist.tree_all_reduce import all_gather_bytes, all_gather_rows
from cordee.errors import CheckpointError
from cordee.launcher.prepare import Report
from cordee.layout.axes import AXES, DATA_AXES, MODEL_AXES
from cordee.layout.load_balance import microbatch_ranges
from cordee.optim.clip import clip_gradients, layer_norms, limit_parameters
from cordee.optim.optimizer import lr_factor, split_groups
from cordee.parallel.engine import Engine
from cordee.planner.plan import Plan
from cordee.planner.report import comparison_text
from cordee.report.meter import StepMeter
from cordee.training import build
from cordee.training.evaluate import (
    EvaluationResult,
    evaluate,
    generate_sample,
    held_out_batches,
    score_byte_table,
    sum_or_nan,
)
from cordee.training.fault_injection import FaultInjector, make_fault_injector
from cordee.training.local_state import LocalState
from cordee.training.run_logger import (
    RunLogger,
    end_lines,
    finite_or_none,
    metrics_row,
    score_fields,
)
from cordee.training.step_guard import (
    Decision,
    StepGuard,
    StepResult,
    find_divergent_ranks,
    nonfinite_names,
    overflow_error,
    stop_error,
)
from cordee.training.stop_request import StopRequest
from cordee.training.user_parts import Parts

NORM_TOLERANCE = 1e-3
"""How far apart ranks' norms of one gradient may lie, as a part of it, where bits are not promised:
other devices add in another order. What a flipped bit does to a norm is far more, or nothing."""


@dataclass(frozen=True)
class ReducedGradients:
    """The agreed gradient of a step before its verdict: this rank's parts of it, its global norm
    (0-d, the same on all ranks), what all ranks said, and the ranks that hold another norm."""

    tensors: list[Tensor]
    norm: Tensor
    step_summary: StepSummary
    divergent_ranks: list[int]


class Trainer:
    """A run on this rank. What of it survives a restart is listed in checkpoint/train_state.py.

    `parameters` are this rank's parts, plain tensors in model order; `loss_owners[r]` are the
    microbatches whose losses rank r reports; `epoch_rows` are the samples of a pass over the data;
    `user_model_name` is the type of a model that a caller brought; `arithmetic` names what
    computes, where bits are promised. Without a logger of the run, nothing is written.
    """

    def __init__(
        self, run: Run, plan: Plan, process: RankProcess, data: DatasetInfo, parts: Parts,
        previous: Trainer | None = None, drill: FaultInjector | None = None,
    ) -> None:  # fmt: skip
        """`previous`: this rank's trainer of the generation before."""
        # Initialise: who this rank is, and where the run stands.
        self.run, self.plan, self.process, self.data = run, plan, process, data
        offload = run.memory.offload != "none"
        self.mesh = make_mesh(plan.layout, process.rank, process.device, offload)
        self.drill = drill or make_fault_injector(run.fault.kill_specs[0], run.fault, process.rank)
        self.progress, self.guard = Progress(), StepGuard(run.guard.in_a_row)
        self.user_model_name = parts.model_name
        self.arithmetic: Mapping[str, str] = {}
        self.pending_tasks: list[str] = []  # what is due after the step behind and not done yet
        self.stop_request, self.should_stop = StopRequest(), False
        self.logger = RunLogger(run, process, writes=False)
        self.peer_backup: PeerBackup | None = None

        # Distribute data and model. Where a rank is an island by itself, nothing of its model and
        # optimiser knows of groups: a later generation takes both on as they are.
        heir = previous if self.mesh.size(*MODEL_AXES) == 1 else None
        self.engine: Engine = build.build_engine(
            run, plan, process, self.mesh, data, parts, heir.engine if heir else None
        )
        self.model, self.parameters = self.engine.local_model, self.engine.parameters
        self.parameter_groups = split_groups(self.parameters.items())
        self.held_out: build.HeldOut = (
            heir.held_out if heir else build.open_held_out(data, parts.held_out)
        )
        self.epoch_rows = build.count_epoch_rows(run, data, parts.data)

        # Update: the rule, the rate over time, the scale of fp16, norms over ranks.
        self.optimizer = build.build_optimizer(run, plan, self.mesh, self.model, self.parameters)
        if heir is not None:
            self.optimizer.adopt_state(heir.optimizer)
        self.state = LocalState(self.engine, self.optimizer, self.mesh)
        self.lr_schedule: Callable[[float, int], float] = partial(lr_factor, run.optim)
        """Factor on the peak rate by the fraction of the run that is done and the step (from 0)."""
        self.loss_scale = build.make_loss_scaler(run)
        self.norm_reducer = norms = build.make_norm_reducer(self.mesh, self.model)
        canonical = self.engine.step_spec.sharding.canonical
        self._gradient_norm = build.make_gradient_norm(self.mesh, self.model, canonical, norms)

        # Communicate: the protocol between islands, and who reports which losses.
        self.sync = build.make_sync(run, plan, self.mesh, canonical)
        self.loss_owners = build.find_loss_owners(run, plan, self.model.stages)
        self.load_balancer = build.make_load_balancer(run, plan)

        # Iterate: checkpoints, clocks, counters.
        self.checkpointer = Checkpointer(
            self.folder / "checkpoints", process.rank, process.size, run.checkpoint.keep,
            self.drill.fault_point, run.checkpoint.every,
            lambda *event: self.logger.log_checkpoint_event(*event),
        )  # fmt: skip
        self.meter: StepMeter = previous.meter if previous else StepMeter(process.device)
        self.meter.begin_plan(plan.predicted.flops, plan.predicted.peak_flops)
        self._start_s = time.monotonic()

    # ---- iterate ---------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """Whether a limit is reached, or somebody asked to leave."""
        return self.fraction_done >= 1.0 or self.should_stop

    def fit(self) -> None:
        """Steps until the run is done, with all that is due between two of them."""
        self.run_pending_tasks()  # a generation before may have left some
        while not self.done:
            result = self.train_step()
            if not math.isfinite(result.loss):
                self.check_finite()
            self.checkpointer.advance(result.step_summary.save_statuses)
            if self.fraction_done < 1.0:
                self.rebalance(result.step_summary)
            if self.peer_backup is not None and self.peer_backup.is_due(self.progress.step):
                self.back_up_to_peer()
            if result.decision is Decision.STOP:
                self.stop(result)
            # At the last step `finish` evaluates and saves.
            step, evaluate_every = self.progress.step, self.run.evaluate.every
            if self.fraction_done < 1.0:
                if evaluate_every and step % evaluate_every == 0:
                    self.pending_tasks.append("evaluation")
                if self.checkpointer.is_due(step):
                    self.pending_tasks.append("save")
            self.run_pending_tasks()

    def run_pending_tasks(self) -> None:
        """Does what is due; each task is pending until it is done, also when a fault interrupts."""
        while self.pending_tasks:
            if self.pending_tasks[0] == "evaluation":
                self.logger.log_evaluation(self.progress.step, self.evaluate())
                self.meter.take_axis_bytes(self.engine.bytes_sent)  # they belong to no step
            else:
                self.begin_checkpoint()
            self.pending_tasks.pop(0)

    def train_step(self) -> StepResult:
        """One optimiser step: microbatches, backward, sum over ranks, verdict, update, record.

        Nothing that survives is changed before the last collective has succeeded: whatever a
        collective raises, the step can be done again, and what is left then is this rank's own
        work. But for one: an island that cuts tensors and limits their norms adds squares after the
        update.
        """
        step, loss_scale = self.progress.step + 1, self.loss_scale.value
        self.meter.start_step()
        self.drill.fault_point("step.start", step)
        lr_scale = self.lr_schedule(self.fraction_done, self.progress.step)
        self.optimizer.set_lr(lr_scale)
        gradients = self.compute_gradients(step)
        # What went wrong may not do so again; an overflow of fp16 would, and its scale follows it.
        is_nonfinite = not math.isfinite(float(gradients.norm)) and not self.loss_scale.is_dynamic
        if gradients.divergent_ranks or is_nonfinite:
            norms = gradients.step_summary.grad_norms
            self.logger.log_recompute(step, norms, gradients.divergent_ranks)
            gradients = self.compute_gradients(step, check_sums=True)
        summary, divergent_ranks = gradients.step_summary, gradients.divergent_ranks
        norm = float(gradients.norm)

        # Judge: by numbers that all ranks hold, so that all decide the same.
        losses = [loss / self.microbatch_tokens for loss in summary.losses]
        next_scale, next_guard = copy.copy(self.loss_scale), copy.copy(self.guard)
        overflow_cause = "" if divergent_ranks else next_scale.update(losses, norm)
        verdict = next_guard.decide(losses, norm, overflow_cause, divergent_ranks)
        if divergent_ranks:
            done = "the step is dropped"
            self.logger.log_differing_ranks(step, summary.grad_norms, divergent_ranks, done)
        layer_grad_norms = self._layer_grad_norms(gradients.tensors, step)

        # Update: theta <- theta - eta * grad F(theta), unless the guard drops the step.
        if verdict.decision is Decision.COMMIT:
            clip_gradients(self._named(gradients.tensors), self.run.clip, gradients.norm)
            updates, expert_loads = self.optimizer.prepare(), self.engine.prepare()
            self.drill.fault_point("step.update", step)
            self.optimizer.step(updates)
            self.engine.commit(expert_loads)
            limit_parameters(self.parameter_groups, self.run.clip, self.norm_reducer)
        self.loss_scale, self.guard = next_scale, next_guard
        self.drill.fault_point("step.commit", step)
        self.sync.after_step(step)
        self._advance(summary, verdict.decision)

        result = StepResult(
            step, sum_or_nan(losses) / len(losses), norm, lr_scale * self.optimizer.peak_lr,
            verdict, summary, layer_grad_norms,
            loss_scale if self.loss_scale.is_dynamic else None,
        )  # fmt: skip
        return self._record(result)

    def compute_gradients(self, step: int, check_sums: bool = False) -> ReducedGradients:
        """A step up to its verdict; nothing that survives is changed. `check_sums`: each rank says
        whether its own sums are finite, which takes a pass over them."""
        # Compute: losses of this rank's microbatches and their gradients, summed as far as it may.
        losses, partial_sums = self.engine.forward_backward(
            step - 1, self.loss_scale.value, lambda: self.drill.fault_point("step.forward", step)
        )
        self.drill.corrupt_gradient(partial_sums[0][1], step)
        self.drill.fault_point("step.backward", step)
        sums = (tensor for _, tensors in partial_sums for tensor in tensors) if check_sums else ()
        has_nonfinite = not all(bool(torch.isfinite(tensor).all()) for tensor in sums)

        # Communicate: the gradient of the whole step, then what everybody lost, wants and holds.
        self.meter.add_phase_time("data", self.engine.data_s)
        with self.meter.phase("comm"):
            compute_s = self.engine.compute_s  # until now: what follows waits for the slowest
            total_sums = self.sync.reduce_gradients(
                partial_sums, lambda: self.drill.fault_point("step.reduce", step)
            )
            tensors = self.engine.set_gradients(total_sums)
            self.loss_scale.unscale(tensors)
        del partial_sums, total_sums
        self.drill.fault_point("step.agree", step)
        norm = self.gradient_norm(tensors)
        with self.meter.phase("comm"):
            own_microbatches = self.loss_owners[self.process.rank]
            summary = gather_step_summary(
                [float(loss) for loss in losses] if own_microbatches else [],
                [self.engine.sample_digests[index] for index in own_microbatches],
                self._rank_status(compute_s, float(norm), has_nonfinite),
                self.loss_owners,
                self.mesh.group(*AXES),
            )
        tolerance = 0.0 if self.run.run.exact else NORM_TOLERANCE
        divergent_ranks = find_divergent_ranks(summary.grad_norms, tolerance)
        # One norm for all, whatever the last bits of other devices: clipping must not part
        # replicas.
        ranks = range(len(summary.grad_norms))
        reference_rank = next((rank for rank in ranks if rank not in divergent_ranks), 0)
        shared_norm = torch.full_like(norm, summary.grad_norms[reference_rank])
        return ReducedGradients(tensors, shared_norm, summary, divergent_ranks)

    def gradient_norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """Global norm of the step's gradient, 0-d."""
        return self._gradient_norm(dict(zip(self.parameters, gradients, strict=True)))

    def _named(self, gradients: Sequence[Tensor]) -> list[tuple[str, Tensor, Tensor]]:
        """(name, parameter, this rank's part of its gradient), in parameter order."""
        pairs = zip(self.parameters.items(), gradients, strict=True)
        return [(name, parameter, gradient) for (name, parameter), gradient in pairs]

    def _layer_grad_norms(self, gradients: Sequence[Tensor], step: int) -> dict[str, float] | None:
        """Gradient norm per layer, when a record of it is due."""
        every = self.run.evaluate.layers_every
        if not every or (step - 1) % every:
            return None
        norms = layer_norms(zip(self.parameters, gradients, strict=True), self.norm_reducer)
        return {name: finite_or_none(norm) or 0.0 for name, norm in norms.items()}

    def _rank_status(self, compute_s: float, norm: float, has_nonfinite: bool) -> RankStatus:
        """What this rank says to all in a step."""
        wants_stop = self.stop_request.signal_number is not None
        save_status = self.checkpointer.status
        return RankStatus(wants_stop, save_status, self.elapsed_s, compute_s, norm, has_nonfinite)

    # ---- progress and records --------------------------------------------------------------------

    @property
    def elapsed_s(self) -> float:
        """Training time of this run so far, earlier starts included, by this rank's clock."""
        return time.monotonic() - self._start_s

    @property
    def fraction_done(self) -> float:
        """Part of the run that is behind, by the limit that is nearest; 1 or more is the end. By
        numbers that all ranks share: the time is rank 0's, of the last step."""
        limits, progress = self.run.run, self.progress
        fractions = [0.0]
        if limits.steps:
            fractions.append(progress.step / limits.steps)
        if limits.tokens:
            fractions.append(progress.tokens / limits.tokens)
        if limits.epochs:
            fractions.append(progress.step * self.step_rows / (limits.epochs * self.epoch_rows))
        if limits.minutes:
            fractions.append(progress.elapsed_s / (60 * limits.minutes))
        return max(fractions)

    def set_progress(self, progress: Progress) -> None:
        """The run stands there: sets the guard, the loss scale and the clock."""
        self.progress = progress
        self.guard.consecutive_skips = progress.in_a_row
        self.loss_scale.value = progress.loss_scale
        self.loss_scale.good_steps = progress.scale_steps
        self._start_s = time.monotonic() - progress.elapsed_s

    def _advance(self, step_summary: StepSummary, decision: Decision) -> None:
        """The progress after a step, and whether anybody wants to leave."""
        self.should_stop = step_summary.wants_stop
        self.progress = replace(
            self.progress,
            step=self.progress.step + 1,
            tokens=self.progress.tokens + self.step_tokens,
            elapsed_s=step_summary.clock_s,
            skipped=self.progress.skipped + (decision is not Decision.COMMIT),
            in_a_row=self.guard.consecutive_skips,
            loss_scale=self.loss_scale.value,
            scale_steps=self.loss_scale.good_steps,
        )

    def _record(self, result: StepResult) -> StepResult:
        """Gives the logger the step's row, its layers and, of a dropped one, where it failed."""
        costs = self.meter.step_metrics(
            self.step_tokens, self.sync.bytes_sent, self.engine.bytes_sent,
            self.optimizer.exchange_s,
        )  # fmt: skip
        if result.decision is not Decision.COMMIT:
            gradients = ((n, p.grad) for n, p in self.parameters.items() if p.grad is not None)
            result = replace(result, nonfinite_parameters=tuple(nonfinite_names(gradients)))
            self.logger.log_skipped_step(result, self.guard.consecutive_skips)
        fraction = self.fraction_done
        remaining_s = self.elapsed_s / fraction * (1 - fraction) if fraction > 0 else 0.0
        row = metrics_row(result, self.progress, self.plan, self.bytes_per_token, costs)
        self.logger.log_step(row, result.layer_grad_norms, fraction, remaining_s)
        return result

    # ---- what is due from time to time -----------------------------------------------------------

    def check_finite(self) -> None:
        """RunError, on every rank, when a parameter or what the optimiser keeps of it is not finite
        on any rank: an update overflowed. Nothing of it is saved, so the newest checkpoint is a
        good one."""
        tensors = {**self.parameters, **self.optimizer.state_tensors()}
        local_names = json.dumps(nonfinite_names(tensors.items())).encode()
        replies = all_gather_bytes(local_names, self.mesh.group(*AXES), self.process.size)
        names = list(dict.fromkeys(name for names in replies for name in json.loads(names)))
        if not names:
            return
        step = self.progress.step
        self._drain_saves(retry=lambda: None)
        cause = "not finite after an update"
        self.logger.log_event("stopped", step, {"step": step, "cause": cause, "in": names[:3]})
        raise overflow_error(step, names, self.checkpointer.saved_step)

    def stop(self, result: StepResult) -> None:
        """Too many dropped steps in a row: keeps what is good and raises RunError with the
        cause."""
        error = stop_error(self.guard.limit, result.verdict.cause, result.nonfinite_parameters)
        self.save_checkpoint()
        self.logger.log_event("stopped", self.progress.step, error.values)
        raise error

    def begin_checkpoint(self) -> None:
        """Begins a checkpoint of this moment in the background; RunError when it is not finite."""
        self.check_finite()
        changed_files = list_changed_sources(self.data) if self.process.is_first else []
        self.logger.log_changed_data(self.progress.step, changed_files)
        pieces = select_pieces(self.state.tensors())
        step, generation = self.progress.step, self.progress.generation
        self.checkpointer.begin(step, generation, pieces, self.metadata())

    def save_checkpoint(self) -> bool:
        """Ends the save in flight and saves this moment, unless it is saved; whether it succeeded.
        Every rank calls it."""
        is_saved = self._drain_saves(self.begin_checkpoint)
        if self.checkpointer.saved_step != self.progress.step:
            self.begin_checkpoint()
            is_saved = self._drain_saves(self.begin_checkpoint)
        return is_saved

    def _drain_saves(self, retry: Any) -> bool:
        """Ends saves in flight; whether the newest one is complete."""

        def gather_statuses(status: int) -> list[int]:
            row = torch.tensor([status], dtype=torch.int64)
            rows = all_gather_rows(row, self.mesh.group(*AXES), self.process.size)
            return rows[:, 0].tolist()

        return self.checkpointer.drain(gather_statuses, retry)

    def back_up_to_peer(self) -> None:
        """Gives a neighbour a copy of this moment (checkpoint/peer_backup.py)."""
        if self.peer_backup is not None:
            tensors = self.state.tensors(include_replicas=True)
            self.peer_backup.back_up(self.progress.step, {**self.metadata(), "owed": []}, tensors)

    def rebalance(self, step_summary: StepSummary) -> None:
        """Moves microbatches between islands of unequal speed when that pays. No message: every
        rank has the same numbers and makes the same change between the same two steps."""
        balancer, islands = self.load_balancer, self.plan.layout.island
        if balancer is None:
            return
        # Ranks of an island wait for each other as they compute: the slowest one's time is theirs.
        size, seconds = self.process.size // islands, step_summary.compute_s
        balancer.add_step([max(seconds[i * size : (i + 1) * size]) for i in range(islands)])
        if (change := balancer.rebalance()) is not None:
            workers = self.plan.layout.dp_size // islands
            self.set_worker_ranges(microbatch_ranges(change["after"], workers))
            self.logger.log_event("rebalanced", self.progress.step, change)
            self.logger.screen.print_line(f"step {self.progress.step:>5}  shares: {change['why']}")

    def set_worker_ranges(self, splits: Sequence[tuple[int, int]]) -> None:
        """Worker w computes the microbatches [start, stop) of `splits[w]` from the next step on."""
        self.plan = replace(self.plan, splits=tuple(splits))
        ranges = [range(start, stop) for start, stop in splits]
        self.engine.set_microbatches(ranges[self.mesh.worker_index])
        if isinstance(self.sync, TreeSync):
            self.sync.set_ranges(ranges)
        self.loss_owners = build.find_loss_owners(self.run, self.plan, self.model.stages)

    def evaluate(self) -> EvaluationResult | None:
        """Held-out loss of the parameters as they are; None when nothing is held out. Every rank
        calls it."""
        if self.held_out is None or not self.run.evaluate.tokens:
            return None
        self.drill.fault_point("evaluate", self.progress.step)
        workers = self.mesh.size(*DATA_AXES)
        return evaluate(
            self.engine,
            held_out_batches(self.held_out, self.run, self.step_tokens),
            (self.mesh.worker_index, workers),
            lambda sums: all_gather_rows(sums, self.mesh.group(*DATA_AXES), workers),
            self.bytes_per_token,
        )

    def finish(self) -> Report:
        """The last checkpoint, then (unless asked to leave) evaluation, sample, digest, report."""
        step, folder = self.progress.step, self.run.run.dir
        self.drill.fault_point("finish", step)
        is_saved = self.save_checkpoint()
        if self.should_stop:
            fields = {"signal": self.stop_request.signal_name, "saved": is_saved}
            self.logger.log_event("interrupted", step, fields)
            self.logger.screen.print_line(
                f"left after step {step}; the same command goes on from there"
            )
            return Report(folder, self.stop_request.exit_code)
        run, evaluation, table_bits, sample = self.run, self.evaluate(), None, None
        models_bytes = self.data.tokenizer == "bytes" and not self.user_model_name
        if models_bytes and self.process.is_first and run.evaluate.tokens:
            batches = held_out_batches(self.held_out, run, self.step_tokens)
            table_bits = score_byte_table(
                self.data, run.data.sequence, batches, self.progress.tokens
            )
        digest = weights_sha256(self.state.specs, self.state.full_tensor)
        if models_bytes and run.evaluate.sample and not self.mesh.coords["island"]:
            self.engine.set_training(training=False)
            sample = generate_sample(self.engine.logits, run)  # all ranks of the first island
        fields = {
            "weights_sha256": digest, **score_fields(evaluation), "table_bits_per_byte": table_bits,
            "steps": step, "tokens": self.progress.tokens,
            "elapsed_s": round(self.progress.elapsed_s, 3), "skipped": self.progress.skipped,
            "saved": is_saved, "sample": sample,
        }  # fmt: skip
        event = self.logger.log_event("finished", step, fields)
        self.logger.screen.close()
        plan_check = comparison_text(self.plan, self.meter.measurements())
        entropy, has_text = self.data.entropy_bits, self.bytes_per_token is not None
        for line in end_lines(folder, fields, plan_check, self.user_model_name, entropy, has_text):
            self.logger.screen.print_line(line)
        if not is_saved:
            raise CheckpointError(
                "the run is finished but its last checkpoint could not be written",
                values={"run.dir": folder, "step": step},
                fix="make room or mend the disk, then give the same command again",
            )
        return Report(folder, 0, event)

    # ---- the tensors of this rank ----------------------------------------------------------------

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.run.run.dir)

    @property
    def step_rows(self) -> int:
        """Samples of one step, over all ranks."""
        return self.run.batch.microbatches * self.run.batch.microbatch

    @property
    def step_tokens(self) -> int:
        """Training tokens of one step, over all ranks; samples, where the loss is a caller's."""
        has_user_loss = self.model.loss_function is not None
        return self.step_rows if has_user_loss else self.step_rows * self.run.data.sequence

    @property
    def microbatch_tokens(self) -> int:
        """Targets of one microbatch: its tokens or samples."""
        return self.engine.step_spec.step_tokens // self.engine.step_spec.total_microbatches

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes of text a target stands for; None where it stands for a sample."""
        return None if self.model.loss_function is not None else self.data.bytes_per_token

    def metadata(self) -> dict[str, Any]:
        """What goes with the tensors of this moment."""
        progress = replace(self.progress, in_a_row=self.guard.consecutive_skips)
        layout = self.plan.layout.describe()
        return make_metadata(
            progress, self.sync.state(), self.data.fingerprint, layout, self.arithmetic
        )
