"""THE RUN, read top to bottom: distributed gradient descent, theta <- theta - eta * grad F(theta).

    initialise            config/  layout/  plan/  model/init_weights.py      `train`, `descend`
    distribute the data   data/order.py  data/loader.py                  `descend`, `build`
    distribute the model  parallel/parallelize.py                              `build`
    update                optim/                                         `step`
    communicate           dist/tree_all_reduce.py  sync/                        `step`
    iterate               below                                          `walk`

One step is the same on one rank and on many, on the first day and after a restart; it did not
happen unless its last message came (`step`). Nothing is scheduled anywhere else: when to evaluate,
save, log and leave is decided in `walk`.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cordee.checkpoint.pieces import weights_sha256
from cordee.checkpoint.train_state import make_metadata, select_pieces
from cordee.config.run import Run
from cordee.data.byte_table import ngram_bits_per_byte
from cordee.data.dataset import TokenDataset, open_dataset
from cordee.data.loader import describe_samples, held_out_token_batches, sample_batches
from cordee.data.manifest import DatasetInfo, list_changed_sources
from cordee.dist.ipc import Assignment
from cordee.dist.process_group import (
    LaunchInfo,
    broadcast_text,
    exit_with_parent,
    join_process_group,
    raise_file_limit,
)
from cordee.dist.step_sync import StepSummary, gather_step_summary
from cordee.dist.tree_all_reduce import all_gather_bytes, all_gather_rows
from cordee.dist.worker_channel import SupervisorClient
from cordee.errors import CheckpointError, CordeeError, RunError
from cordee.hf.safetensors_io import slice_box
from cordee.launcher.prepare import (
    PartsInfo,
    PreparedRun,
    acquire_run_lock,
    dump_run_and_plan,
    inspect_run_dir,
    launch_local_ranks,
    load_run_and_plan,
    prepare_dataset,
    prepare_run,
    read_or_prepare_dataset,
    write_run_files,
)
from cordee.layout.axes import AXES, DATA_AXES, MODEL_AXES
from cordee.model.arithmetic import COMPATIBLE, portable_sqrt
from cordee.optim.clip import clip_gradients, limit_parameters
from cordee.optim.optimizer import lr_factor
from cordee.parallel.parallelize import make_local_slice
from cordee.planner.plan import Plan
from cordee.report.reader import last_event
from cordee.training.build import RunState, build_run_state
from cordee.training.evaluate import EvaluationResult, evaluate, sum_or_nan
from cordee.training.fault_injection import make_fault_injector
from cordee.training.generate import generate, to_text
from cordee.training.load_balance import rebalance
from cordee.training.resume import (
    SurvivorState,
    assignments,
    backup_to_peer,
    check_arithmetic,
    emergency_save,
    restore_state,
)
from cordee.training.run_logger import RunLogger, StepResult, score_fields
from cordee.training.step_guard import Decision, find_divergent_ranks, nonfinite_names
from cordee.training.stop_request import StopRequest, catch_stop_signals
from cordee.training.user_parts import Parts

SAMPLE_PROMPT = "def "
TABLE_BYTES = 4 << 20
"""Bytes that the counted table is made from at most: it takes half a second."""

NORM_TOLERANCE = 1e-3
"""How far apart ranks' norms of one gradient may lie, as a part of it, where bits are not promised:
other devices add in another order. What a flipped bit does to a norm is far more, or nothing."""


@dataclass(frozen=True)
class Report:
    """How a run ended. `exit_code` is 0 when it is finished, 128 + signal when it was asked to
    leave, 1 when it failed; `plan_of_candidate` is the last event of a finished run."""

    folder: str
    exit_code: int
    finished: Mapping[str, Any] | None = None


# ---- initialise ----------------------------------------------------------------------------------


def train(run: Run, parts: Parts | None = None, **named_parts: Any) -> Report:
    """Runs `run` to its end, or on from where it stands; the one way in, also for the CLI.

    `named_parts` are the fields of `Parts` by name: `train(run, model=module, loss=function,
    data=samples)`. Outside a launcher, the plan's ranks are started on this machine (not with
    parts, which cannot travel; under torchrun they are on every rank). Raises CordeeError with exit
    code 2 before anything is started or written when the command or its input is wrong.
    """
    user_parts = replace(parts or Parts(), **named_parts)
    user_parts.check(run)
    model = user_parts.model
    parameter_count = 0 if model is None else sum(p.numel() for p in model.parameters())
    parts_info = PartsInfo(
        user_parts.model_name, parameter_count, user_parts.data is not None, user_parts.has_any
    )
    prepared_run = prepare_run(run, parts_info)
    if prepared_run.status.end_event is not None:
        return Report(prepared_run.run.run.dir, 0, prepared_run.status.end_event)
    if prepared_run.is_launcher:
        exit_code = launch_local_ranks(prepared_run.run, prepared_run.plan)
        event = last_event(Path(prepared_run.run.run.dir))
        return Report(
            prepared_run.run.run.dir, exit_code, event if event.get("event") == "finished" else None
        )
    return run_worker(prepared_run, user_parts)


def run_worker(prepared_run: PreparedRun, parts: Parts) -> Report:
    """This process as one rank, in one generation after another: when the members change, it keeps
    what it holds and takes its next seat. Outside a supervisor there is one generation."""
    exit_with_parent()
    raise_file_limit()
    run, launch_info = prepared_run.run, prepared_run.launch_info
    supervisor = SupervisorClient(launch_info) if launch_info.is_supervised else None
    lock = acquire_run_lock(run) if supervisor is None and launch_info.rank == 0 else nullcontext()
    survivor = SurvivorState()
    with lock, catch_stop_signals(supervisor) as stop_request:
        if (
            supervisor is None and launch_info.rank == 0
        ):  # another run may have begun here meanwhile
            inspect_run_dir(run, parts.model_name)
        for assignment in assignments(prepared_run, supervisor):
            try:
                report = run_generation(
                    prepared_run, parts, assignment, supervisor, survivor, stop_request
                )
            except RuntimeError as error:
                if supervisor is None or not supervisor.is_generation_end(
                    error, run.launch.timeout_s
                ):
                    raise
            except CordeeError as error:
                if supervisor is not None:
                    supervisor.report_exit(error.exit_code, error.message)
                raise
            else:
                if report is None:
                    continue
                if supervisor is not None:
                    supervisor.report_exit(report.exit_code)
                return report
    return Report(run.run.dir, stop_request.exit_code)


def run_generation(
    prepared_run: PreparedRun,
    parts: Parts,
    assignment: Assignment,
    supervisor: SupervisorClient | None,
    survivor: SurvivorState,
    stop_request: StopRequest,
) -> Report | None:
    """One generation: join, build, load, walk, finish; None after one that only saved."""
    run, launch_info = prepared_run.run, replace(
        prepared_run.launch_info,
        rank=assignment.rank, size=assignment.size, local_rank=assignment.local_rank,
    )  # fmt: skip
    # A generation's plan is the leader's, whose devices, and cores, may be others than this host's.
    plan = Plan.from_json(assignment.plan) if assignment.plan else prepared_run.plan
    device, threads = (
        prepared_run.plan.device,
        (prepared_run.plan if plan.devices else plan).threads,
    )
    record_phase = None if supervisor is None else supervisor.record_phase
    drill = make_fault_injector(assignment.drill, run.fault, launch_info.rank, record_phase)
    drill.fault_point("group", max(survivor.step, 0))
    with join_process_group(
        launch_info, device, threads, run.launch.timeout_s,
        force_group=run.memory.offload != "none",
        store=None if supervisor is None else supervisor.make_store(assignment),
        has_mixed_devices=plan.has_mixed_devices or assignment.is_emergency,
    ) as process, portable_sqrt(run.run.arithmetic == COMPATIBLE):  # fmt: skip
        drill.fault_point("build", max(survivor.step, 0))
        if launch_info.has_launcher and launch_info.size > 1 and not launch_info.is_supervised:
            run, plan = broadcast_config(run, plan)
        if assignment.is_emergency:
            drill.fault_point("rescue", max(survivor.step, 0))
            emergency_save(run, assignment, survivor, process)
            return None
        data = survivor.data or distribute_data(run, parts, launch_info)
        # Distribute the model: replicated over islands, sharded inside them; then the state, of
        # peers that hold it, else of the newest checkpoint, cut for this layout.
        state = build_run_state(run, plan, process, data, parts, survivor.state, drill)
        state.arithmetic = check_arithmetic(state, launch_info)
        write_failure = ""
        if process.is_first:
            write_failure = write_run_files(run, plan, survivor.state is not None, state.arithmetic)
        logger = RunLogger(state, stop_request, survivor.logger)
        try:
            logger.log_write_failure(write_failure)
            restore_state(state, logger, assignment, survivor)
            log_device_kinds(state, logger)
            fit(state, logger)
            return finish_run(state, logger)
        finally:
            logger.close()


def broadcast_config(run: Run, plan: Plan) -> tuple[Run, Plan]:
    """Rank 0's run and plan: under a launcher each rank has resolved its own, and profiles of
    hosts, or of one host at two times, differ."""
    return load_run_and_plan(broadcast_text(dump_run_and_plan(run, plan)))


def log_device_kinds(state: RunState, logger: RunLogger) -> None:
    """Says, once, that islands are on devices of different kinds, and what that means."""
    if state.plan.has_mixed_devices:
        kinds = ", ".join(sorted(set(state.plan.devices)))
        message = f"devices differ ({kinds}): the samples of each step are the same, " + (
            "the bits are not promised"
        )
        verdict = {"event": "devices_differ", "devices": list(state.plan.devices), "says": message}
        logger.log_verdicts(state.progress.step, [verdict])


def distribute_data(run: Run, parts: Parts, launch_info: LaunchInfo) -> DatasetInfo:
    """The dataset: one process writes the snapshot; then one of each host, should hosts share no
    disk; then the others read it. Which rows are whose follows from the order and the plan's
    splits alone. A supervisor has laid it out before its workers began."""
    own_turn = 0 if launch_info.rank == 0 else 1 if launch_info.local_rank == 0 else 2
    for turn in range(3):
        if turn == own_turn:
            samples = parts.data
            if samples is not None:
                data = describe_samples(samples, run.run.seed)
            elif launch_info.rank == 0 and not launch_info.is_supervised:
                data = prepare_dataset(run)
            else:
                data = read_or_prepare_dataset(run, launch_info.is_supervised)
        if launch_info.size > 1 and not launch_info.is_supervised:
            torch.distributed.barrier()
    return data


# ---- iterate -------------------------------------------------------------------------------------


def fit(state: RunState, logger: RunLogger) -> None:
    """Steps until a limit is reached or somebody asks to leave."""
    while True:
        while logger.pending:
            run_pending(state, logger, logger.pending[0])
        if logger.fraction_done(state) >= 1.0 or logger.should_stop:
            return
        result = train_step(state, logger)
        logger.log_step(state, result)
        if not math.isfinite(result.loss):
            check_finite(state, logger)
        logger.checkpointer.advance(result.step_summary.save_statuses)
        if logger.fraction_done(state) < 1.0:
            rebalance(state, logger, result.step_summary)
        if state.peer_backup is not None and state.peer_backup.is_due(state.progress.step):
            backup_to_peer(state)
        if result.verdict.decision is Decision.STOP:
            stop_run(state, logger, result)
        logger.queue_pending(state)


def run_pending(state: RunState, logger: RunLogger, task: str) -> None:
    """What is due after a step; owed until it is done, also when a fault comes between."""
    if task == "evaluation":
        logger.log_evaluation(state, run_evaluation(state))
    else:
        save_checkpoint(state, logger)
    logger.pending.remove(task)


def train_step(state: RunState, logger: RunLogger) -> StepResult:
    """One optimiser step: microbatches -> backward -> agree -> clip -> judge -> commit or drop.

    Nothing that survives is changed before the last collective has succeeded: whatever a collective
    raises, the step can be done again, and what is left then is this rank's own work. But for one:
    an island that cuts tensors and limits their norms adds squares after the update.
    """
    step = state.progress.step + 1
    logger.meter.start_step()
    state.drill.fault_point("step.start", step)
    lr_scale = lr_factor(state.run.optim, logger.fraction_done(state), state.progress.step)
    state.optimizer.set_lr(lr_scale)
    loss_scale = state.loss_scale.value
    gradients, norm, step_summary, divergent_ranks = compute_gradients(state, logger, step)
    # What went wrong may not do so again; an overflow of fp16 would, and its scale follows it.
    is_nonfinite = not math.isfinite(float(norm)) and not state.loss_scale.is_dynamic
    if divergent_ranks or is_nonfinite:
        logger.log_recompute(step, step_summary.grad_norms, divergent_ranks)
        gradients, norm, step_summary, divergent_ranks = compute_gradients(
            state, logger, step, check_sums=True
        )

    # Update: theta <- theta - eta * grad F(theta), unless the guard drops the step.
    mean_losses = [loss / state.microbatch_tokens for loss in step_summary.losses]
    next_scale, next_guard = copy.copy(state.loss_scale), copy.copy(state.guard)
    overflow_cause = "" if divergent_ranks else next_scale.update(mean_losses, float(norm))
    verdict = next_guard.decide(mean_losses, float(norm), overflow_cause, divergent_ranks)
    if divergent_ranks:
        logger.log_differing_ranks(
            step, step_summary.grad_norms, divergent_ranks, "the step is dropped"
        )
    layer_grad_norms = logger.layer_grad_norms(state, gradients, step)
    if verdict.decision is Decision.COMMIT:
        clip_gradients(state.named_gradients(gradients), state.run.clip, norm)
        updates, expert_loads = state.optimizer.prepare(), state.engine.prepare()
        state.drill.fault_point("step.update", step)
        state.optimizer.step(updates)
        state.engine.commit(expert_loads)
        limit_parameters(state.parameter_groups, state.run.clip, state.norm_reducer)
    state.loss_scale, state.guard = next_scale, next_guard
    state.drill.fault_point("step.commit", step)
    state.sync.after_step(step)
    state.progress = logger.advance(state, step_summary, verdict)
    loss = sum_or_nan(mean_losses) / len(mean_losses)
    lr = lr_scale * state.optimizer.peak_lr
    reported_scale = loss_scale if state.loss_scale.is_dynamic else None
    return StepResult(
        loss, float(norm), lr, verdict, step_summary, layer_grad_norms, reported_scale
    )


def check_finite(state: RunState, logger: RunLogger) -> None:
    """RunError, on every rank, when a parameter or what the optimiser keeps of it is not finite on
    any rank: an update overflowed. Nothing of it is saved, so the newest checkpoint is a good one.
    """
    named_tensors = {**state.parameters, **state.optimizer.state_tensors()}
    local_names = json.dumps(nonfinite_names(named_tensors.items())).encode()
    replies = all_gather_bytes(local_names, state.mesh.group(*AXES), state.process.size)
    names = list(dict.fromkeys(name for names in replies for name in json.loads(names)))
    if not names:
        return
    step = state.progress.step
    logger.drain_saves(state, lambda: None)
    values = {"step": step, "cause": "not finite after an update", "in": names[:3]}
    logger.log_event("stopped", step, values)
    raise RunError(
        "parameters, or the optimiser's state, are not finite; nothing of them was saved",
        values={**values, "last good checkpoint": logger.checkpointer.saved_step},
        fix="a lower optim.lr (cordee lr finds one), clip.kind=norm, a larger optim.eps",
    )


def compute_gradients(
    state: RunState, logger: RunLogger, step: int, check_sums: bool = False
) -> tuple[list[Tensor], Tensor, StepSummary, list[int]]:
    """A step up to its verdict; nothing that survives is changed. This rank's part of the agreed
    gradient, its norm, what all ranks said, the ranks that hold another norm than the others.
    `check_sums`: each rank says whether its own sums are finite, which takes a pass over them."""
    # Compute: losses of this rank's microbatches and their gradients, summed as far as it may.
    losses, partial_sums = state.engine.forward_backward(
        step - 1, state.loss_scale.value, lambda: state.drill.fault_point("step.forward", step)
    )
    state.drill.corrupt_gradient(partial_sums[0][1], step)
    state.drill.fault_point("step.backward", step)
    sums = (tensor for _, tensors in partial_sums for tensor in tensors) if check_sums else ()
    has_nonfinite = not all(bool(torch.isfinite(tensor).all()) for tensor in sums)

    # Communicate: the gradient of the whole step, then what everybody lost, wants and holds.
    logger.meter.add_phase_time("data", state.engine.data_s)
    with logger.meter.phase("comm"):
        compute_s = state.engine.compute_s  # until now: what follows waits for the slowest island
        total_sums = state.sync.reduce_gradients(
            partial_sums, lambda: state.drill.fault_point("step.reduce", step)
        )
        gradients = state.engine.set_gradients(total_sums)
        state.loss_scale.unscale(gradients)
    del partial_sums, total_sums
    state.drill.fault_point("step.agree", step)
    norm = state.gradient_norm(gradients)
    with logger.meter.phase("comm"):
        rank_status = replace(
            logger.rank_status(compute_s), grad_norm=float(norm), is_nonfinite=has_nonfinite
        )
        group = state.mesh.group(*AXES)
        step_summary = gather_step_summary(
            state.reported_losses(losses),
            state.sample_digests(),
            rank_status,
            state.loss_owners,
            group,
        )
    divergent_ranks = find_divergent_ranks(
        step_summary.grad_norms, 0.0 if state.run.run.exact else NORM_TOLERANCE
    )
    # One norm for all, whatever the last bits of other devices: clipping must not part replicas.
    reference_rank = next(
        (rank for rank in range(len(step_summary.grad_norms)) if rank not in divergent_ranks), 0
    )
    return (
        gradients,
        torch.full_like(norm, step_summary.grad_norms[reference_rank]),
        step_summary,
        divergent_ranks,
    )


def stop_run(state: RunState, logger: RunLogger, result: StepResult) -> None:
    """Too many dropped steps in a row: keep what is good and fail with the cause."""
    step = state.progress.step
    names = logger.nonfinite_parameters(state)
    values = {"steps in a row": state.guard.limit, "cause": result.verdict.cause, "in": names}
    save_final_checkpoint(state, logger)
    logger.log_event("stopped", step, values)
    raise RunError(
        f"{state.guard.limit} steps in a row were dropped; no parameter was touched by them",
        values=values,
        fix="a lower optim.lr (cordee lr finds one), clip.kind=norm, or look at the data there",
    )


# ---- what is due from time to time ---------------------------------------------------------------


def save_checkpoint(state: RunState, logger: RunLogger) -> None:
    """Begins a checkpoint of this moment in the background; RunError when it is not finite."""
    check_finite(state, logger)
    changed_files = list_changed_sources(state.data) if state.process.is_first else []
    logger.log_changed_data(state.progress.step, changed_files)
    state.progress = replace(state.progress, in_a_row=state.guard.consecutive_skips)
    meta = make_metadata(
        state.progress, state.sync.state(), state.data.fingerprint, state.plan.layout.describe(),
        state.arithmetic,
    )  # fmt: skip
    local_pieces = select_pieces(state.state_tensors())
    logger.checkpointer.begin(state.progress.step, state.progress.generation, local_pieces, meta)


def save_final_checkpoint(state: RunState, logger: RunLogger) -> bool:
    """Ends the save in flight and saves this moment, unless it is saved; whether it succeeded."""
    is_saved = logger.drain_saves(state, lambda: save_checkpoint(state, logger))
    if logger.checkpointer.saved_step != state.progress.step:
        save_checkpoint(state, logger)
        is_saved = logger.drain_saves(state, lambda: save_checkpoint(state, logger))
    return is_saved


def run_evaluation(state: RunState) -> EvaluationResult | None:
    """Held-out loss of the parameters as they are; None when nothing is held out."""
    run = state.run
    if state.held_out is None or not run.evaluate.tokens:
        return None
    state.drill.fault_point("evaluate", state.progress.step)
    worker_count = state.mesh.size(*DATA_AXES)
    return evaluate(
        state.engine,
        held_out_batches(state),
        (state.mesh.worker_index, worker_count),
        lambda sums: all_gather_rows(sums, state.mesh.group(*DATA_AXES), worker_count),
        state.bytes_per_token,
    )


def held_out_batches(state: RunState) -> list[Any]:
    """What an evaluation scores: the first rows of the held-out data, evaluate.tokens of them."""
    run, rows = state.run, state.run.batch.microbatch
    count = max(1, int(run.evaluate.tokens) * run.batch.microbatches // state.step_tokens)
    if isinstance(state.held_out, TokenDataset):
        return list(held_out_token_batches(state.held_out, run.data.sequence, rows, count))
    return list(sample_batches(state.held_out, rows, count)) if state.held_out else []


def score_byte_table(state: RunState) -> float | None:
    """Bits per byte of a counted table on what the evaluation scored, by rank 0: counts of as many
    bytes as the model was trained on. None where the data is not bytes."""
    sequence, source = state.run.data.sequence, state.held_out
    if not state.process.is_first or state.data.tokenizer != "bytes" or state.user_model_name:
        return None
    if not isinstance(source, TokenDataset) or not state.run.evaluate.tokens:
        return None
    rows = torch.cat(held_out_batches(state)).numpy().astype(np.uint8)
    train_source = open_dataset(state.data.folder, "train", verify=False)
    row_count = min(
        train_source.rows(sequence), TABLE_BYTES // sequence, state.progress.tokens // sequence
    )
    # Spread over the whole text, as training rows are.
    row_ids = np.linspace(0, train_source.rows(sequence) - 1, max(1, row_count)).astype(np.int64)
    train_bytes = train_source.gather(row_ids, sequence)[:, 1:].astype(np.uint8).reshape(-1)
    return ngram_bits_per_byte(train_bytes, rows)


def finish_run(state: RunState, logger: RunLogger) -> Report:
    """The last checkpoint, then (unless asked to leave) evaluation, sample, digest and report."""
    step = state.progress.step
    state.drill.fault_point("finish", step)
    is_saved = save_final_checkpoint(state, logger)
    if logger.should_stop:
        logger.log_event(
            "interrupted", step, {"signal": logger.stop_request.signal_name, "saved": is_saved}
        )
        logger.screen.print_line(f"left after step {step}; the same command goes on from there")
        return Report(state.run.run.dir, logger.stop_request.exit_code)
    evaluation = run_evaluation(state)
    table_bits = score_byte_table(state)
    digest = weights_sha256(state.specs, lambda name: full_tensor(state, name))
    sample_text = generate_sample(state)
    final_fields = {
        "weights_sha256": digest, **score_fields(evaluation), "table_bits_per_byte": table_bits,
        "steps": step, "tokens": state.progress.tokens,
        "elapsed_s": round(state.progress.elapsed_s, 3), "skipped": state.progress.skipped,
        "saved": is_saved, "sample": sample_text,
    }  # fmt: skip
    event = logger.log_event("finished", step, final_fields)
    logger.show_end(state, final_fields)
    if not is_saved:
        raise CheckpointError(
            "the run is finished but its last checkpoint could not be written",
            values={"run.dir": state.run.run.dir, "step": step},
            fix="make room or mend the disk, then give the same command again",
        )
    return Report(state.run.run.dir, 0, event)


def full_tensor(state: RunState, name: str) -> Tensor:
    """A whole parameter (every rank of the island must ask): parts are added as bits into zeros, so
    that they arrive as they are."""
    spec, local_part = state.specs[name], state.model_tensors.get(name)
    if (
        local_part is not None
        and tuple(local_part.shape) == spec.shape
        and state.model.stages.ranks == 1
    ):
        return local_part
    local_slice = make_local_slice(spec, state.mesh)
    result = torch.zeros(spec.shape, dtype=torch.float32, device=state.process.device)
    if local_part is not None and not any(
        state.mesh.coords[axis] for axis in local_slice.replicated_axes if axis in MODEL_AXES
    ):
        slice_box(result, local_slice.box).copy_(local_part)
    torch.distributed.all_reduce(result.view(torch.int32), group=state.mesh.group(*MODEL_AXES))
    return result


def generate_sample(state: RunState) -> str | None:
    """A text that the model writes; every rank of an island takes part."""
    run = state.run
    if not run.evaluate.sample or state.data.tokenizer != "bytes" or state.user_model_name:
        return None
    if state.mesh.coords["island"]:
        return None
    prompt = torch.tensor(list(SAMPLE_PROMPT.encode()))
    state.engine.set_training(training=False)
    is_compiled = run.run.compile != "none"
    # Every length of the window would be compiled anew.
    with torch.compiler.set_stance("force_eager") if is_compiled else nullcontext():
        count, window = int(run.evaluate.sample), run.data.sequence
        token_ids = generate(state.engine.logits, prompt, count, window, 0.8, run.run.seed)
    return to_text(token_ids)
