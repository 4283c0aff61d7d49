"""How a run goes on: from what live ranks hold, else from the newest checkpoint that verifies.

Start, resume, shrink, grow and repair are this one path: take an assignment, build, restore. What
survives is listed in `checkpoint/train_state.py`; this file puts it back.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cordee.checkpoint.checkpointer import Checkpointer
from cordee.checkpoint.emergency import EmergencySave, write_emergency_save
from cordee.checkpoint.format import folder_name
from cordee.checkpoint.load import Checkpoint, find_newest, open_checkpoint
from cordee.checkpoint.peer_backup import PeerBackup
from cordee.checkpoint.peer_restore import RestoreStats, StateSnapshot, no_fault, restore_from_peers
from cordee.checkpoint.train_state import Progress, make_metadata, make_reader, parse_progress
from cordee.config.load import RUN_FILE, recorded_settings
from cordee.config.run import Run
from cordee.data.manifest import DatasetInfo
from cordee.dist.ipc import Assignment
from cordee.dist.process_group import LaunchInfo, RankProcess
from cordee.dist.tree_all_reduce import all_gather_bytes, all_gather_rows
from cordee.dist.worker_channel import SupervisorClient
from cordee.errors import CheckpointError, ConfigError, DataError
from cordee.launcher.prepare import PreparedRun
from cordee.launcher.rendezvous import last_generation, remedy
from cordee.layout.axes import AXES, MODEL_AXES
from cordee.model.arithmetic import arithmetic_fingerprint, library_versions
from cordee.report.metrics_writer import JsonLinesWriter, utc_timestamp
from cordee.report.screen import Screen
from cordee.training.build import RunState
from cordee.training.run_logger import RunLogger


def assignments(
    prepared_run: PreparedRun, supervisor: SupervisorClient | None
) -> Iterator[Assignment]:
    """The assignments of this process, one after another; without a supervisor there is one."""
    if supervisor is None:
        launch_info, drill = prepared_run.launch_info, prepared_run.run.fault.kill_specs[0]
        yield Assignment(
            rank=launch_info.rank, size=launch_info.size, local_rank=launch_info.local_rank,
            drill=drill,
        )  # fmt: skip
        return
    supervisor.report_ready()
    while (assignment := supervisor.next_assignment()) is not None:
        yield assignment


@dataclass
class SurvivorState:
    """What this process holds from one generation to the next; nothing at first."""

    state: RunState | None = None
    logger: RunLogger | None = None
    peer_backup: PeerBackup | None = None

    @property
    def data(self) -> DatasetInfo | None:
        """The dataset, if it has been laid out."""
        return None if self.state is None else self.state.data

    @property
    def step(self) -> int:
        """The last step that was committed here; -1 when nothing is held."""
        return -1 if self.state is None else self.state.progress.step

    def snapshots(self) -> list[StateSnapshot]:
        """The moments that this process can give to others."""
        if self.state is None or self.logger is None:
            return []
        meta = {**checkpoint_meta(self.state), "owed": self.logger.unfinished_tasks()}
        peer_snapshots = self.peer_backup.snapshots() if self.peer_backup else []
        return [
            StateSnapshot(self.step, meta, self.state.state_tensors(include_replicas=True)),
            *peer_snapshots,
        ]

    def start_peer_backup(self, state: RunState, assignment: Assignment) -> None:
        """From now on, and at once, a neighbour keeps what only this rank holds."""
        run, size = state.run, state.process.size
        if (
            not assignment.generation
            or state.mesh.size(*MODEL_AXES) == 1
            or not run.fault.copy_every
        ):
            self.peer_backup = None
            return
        group, hosts = state.mesh.group(*AXES), [str(m["host"]) for m in assignment.members]
        if self.peer_backup is None:
            self.peer_backup = PeerBackup(
                run.fault.copy_every, group, state.process.rank, size, hosts,
                state.drill.fault_point,
            )  # fmt: skip
        else:
            self.peer_backup.discard_after(state.progress.step)
            self.peer_backup.rebind(group, state.process.rank, size, hosts)
        state.peer_backup = self.peer_backup
        backup_to_peer(state)


def checkpoint_meta(state: RunState) -> dict[str, Any]:
    """What goes with the tensors of this moment."""
    progress = replace(state.progress, in_a_row=state.guard.consecutive_skips)
    layout = state.plan.layout.describe()
    return make_metadata(
        progress, state.sync.state(), state.data.fingerprint, layout, state.arithmetic
    )


def backup_to_peer(state: RunState) -> None:
    """Gives a neighbour a copy of this moment (checkpoint/peer_backup.py)."""
    if state.peer_backup is not None:
        tensors = state.state_tensors(include_replicas=True)
        state.peer_backup.back_up(
            state.progress.step, {**checkpoint_meta(state), "owed": []}, tensors
        )


def restore_state(
    state: RunState, logger: RunLogger, assignment: Assignment, survivor: SurvivorState
) -> None:
    """Puts back what live ranks hold, else the newest complete checkpoint, and says how the run
    begins or goes on."""
    group, size = state.mesh.group(*AXES), state.process.size
    logger.members = assignment.members
    state.drill.fault_point("fill", max(survivor.step, 0))
    stats = None
    if assignment.generation:
        tensors = state.state_tensors(include_replicas=True)
        stats = restore_from_peers(
            tensors, survivor.snapshots(), group, state.process.rank, size, state.drill.fault_point
        )
    if stats is not None:
        _restore_meta(state, stats.meta, assignment.generation)
        logger.pending = list(stats.meta["owed"])
        survivor.state, survivor.logger = state, logger
        logger.truncate_records(state)
        survivor.start_peer_backup(state, assignment)
        _log_generation(state, logger, assignment, stats)
        return
    checkpoint, generation = choose_checkpoint(state, logger, assignment)
    if checkpoint is None:
        state.progress = Progress(generation=generation, loss_scale=state.loss_scale.value)
    else:
        _load_checkpoint(state, checkpoint, generation)
    survivor.state, survivor.logger = state, logger
    logger.truncate_records(state)
    start_fields = {
        "layout": state.plan.layout.describe(), "ranks": size, "why": state.plan.why,
        "generation": generation, "entropy_bits": state.data.entropy_bits,
        "brought": state.user_model_name, "members": list(assignment.members),
        "pid": state.process.pid, "rank": state.process.rank, "host": state.process.host,
    }  # fmt: skip
    logger.log_verdicts(state.progress.step, assignment.verdicts)
    if checkpoint is None:
        logger.log_event("started", 0, start_fields)
    else:
        logger.log_event(
            "resumed", state.progress.step, {**start_fields, "checkpoint": checkpoint.path.name}
        )
    survivor.start_peer_backup(state, assignment)
    logger.show_start(state, None if checkpoint is None else checkpoint.path.name)


def check_arithmetic(state: RunState, launch_info: LaunchInfo) -> dict[str, str]:
    """What computes here, by name, where bits are promised: the fingerprint of the arithmetic, the
    versions of the libraries that the model is made of. ConfigError: the run began with another, or
    the ranks of a launcher differ (hosts of our own compare theirs when they meet)."""
    run, process = state.run, state.process
    if not run.requires_same_bits:
        return {}
    arithmetic_id = arithmetic_fingerprint(process.device, run.run.precision, run.run.arithmetic)
    local_identity = {"arithmetic": arithmetic_id}
    for chunk in state.model.stage_modules:
        local_identity |= library_versions(chunk)
    identities = [local_identity]
    if process.size > 1 and not launch_info.is_supervised:
        replies = all_gather_bytes(
            json.dumps(local_identity).encode(), state.mesh.group(*AXES), process.size
        )
        identities = [json.loads(identity) for identity in replies]
    recorded_identity = recorded_settings(state.folder / RUN_FILE)
    for rank, identity in enumerate(identities):  # on every rank, so that all of them end alike
        _check_identities(recorded_identity, identity, state)
        _check_identities(identity, identities[0], state, f"on rank {rank}", "on rank 0")
    return local_identity


def _check_identities(
    first_identity: Mapping[str, str], second_identity: Mapping[str, str], state: RunState,
    first_label: str = "when it began", second_label: str = "here",
) -> None:  # fmt: skip
    """ConfigError when two of what `check_arithmetic` returns differ; nothing is known of runs that
    were begun before it was recorded."""
    differing_names = [
        name
        for name in sorted({*first_identity, *second_identity})
        if first_identity and first_identity.get(name) != second_identity.get(name)
    ]
    if not differing_names:
        return
    device = state.process.device.partition(":")[0]
    fix = (
        remedy(state.run, device)
        if "arithmetic" in differing_names
        else "the same versions everywhere"
    )
    raise ConfigError(
        "the bits of this run are promised, and other code would compute them",
        values={
            f"{name} {label}": identity.get(name)
            for name in differing_names
            for label, identity in ((first_label, first_identity), (second_label, second_identity))
        }
        | {"run.arithmetic": state.run.run.arithmetic},
        fix=f"{fix}; this one goes on only where the same is computed",
    )


def emergency_save(
    run: Run, assignment: Assignment, survivor: SurvivorState, process: RankProcess
) -> None:
    """Ranks that are no island save what they hold together, and keep it while they wait."""
    folder, group = Path(run.run.dir), dist.group.WORLD if process.size > 1 else None
    checkpointer = Checkpointer(
        folder / "checkpoints", process.rank, process.size, run.checkpoint.keep, no_fault
    )
    events, screen = JsonLinesWriter(folder / "events.jsonl"), Screen(silent=not process.is_first)
    checkpoint = None
    if process.is_first:
        with suppress(CheckpointError):  # the folder cannot be listed: what is held may be all
            checkpoint = find_newest(folder / "checkpoints", lambda *_: None)
    saved_step = checkpoint.step if checkpoint else -1
    required_names = [f"model/{name}" for name in survivor.state.specs] if survivor.state else []
    try:
        save_result = write_emergency_save(
            survivor.snapshots(), required_names, checkpointer, assignment.generation, saved_step,
            group, process.rank, process.size,
        )  # fmt: skip
    except CheckpointError as error:
        save_result = EmergencySave(None, None, error.message)
    if process.is_first:
        events.claim_file()
        fields = {"generation": assignment.generation, "members": list(assignment.members),
                  **save_result.event_fields()}  # fmt: skip
        events.write(
            {"time": utc_timestamp(), "event": "rescued", **fields, "step": max(survivor.step, 0)}
        )
        path = save_result.report.path.name if save_result.report else ""
        message = (
            f"what is left is saved: {path}" if path else f"nothing is saved: {save_result.reason}"
        )
        screen.print_line(
            f"step {survivor.step:>5}  {message}; the ranks that are left wait for others"
        )


def _load_checkpoint(state: RunState, checkpoint: Checkpoint, generation: int) -> None:
    """The tensors and the progress of a checkpoint. DataError: it was made with other data;
    ConfigError: by other code, where bits are promised."""
    if checkpoint.meta.get("data") != state.data.fingerprint:
        raise DataError(
            "the checkpoint was made with other data",
            values={"there": checkpoint.meta.get("data"), "here": state.data.fingerprint},
            fix="give the data back its old content, or train in another run.dir",
        )
    _check_identities(checkpoint.meta.get("arithmetic", {}), state.arithmetic, state)
    read_local = make_reader(checkpoint, state.local_slices)
    with torch.no_grad():
        for name, tensor in state.model_tensors.items():
            tensor.copy_(read_local(f"model/{name}"))
    tensor_names = set(checkpoint.names())
    state.optimizer.load_state(
        lambda k: read_local(f"optim/{k}") if f"optim/{k}" in tensor_names else None
    )
    _restore_meta(state, checkpoint.meta, generation)


def _restore_meta(state: RunState, meta: Mapping[str, Any], generation: int) -> None:
    """Everything that survives and is no tensor."""
    state.sync.restore(meta.get("sync") or {})
    state.progress = replace(parse_progress(meta), generation=generation)
    state.guard.consecutive_skips = state.progress.in_a_row
    state.loss_scale.value = state.progress.loss_scale
    state.loss_scale.good_steps = state.progress.scale_steps


def _log_generation(
    state: RunState, logger: RunLogger, assignment: Assignment, stats: RestoreStats
) -> None:
    """The events of a generation that goes on from live ranks."""
    step = state.progress.step
    logger.log_verdicts(step, assignment.verdicts)
    fields = {
        "generation": assignment.generation, "islands": state.plan.layout.island,
        "ranks": state.process.size, "layout": state.plan.layout.describe(),
        "members": list(assignment.members), "donors": stats.donors, "receivers": stats.receivers,
        "bytes": stats.bytes, "seconds": round(time.monotonic() - assignment.previous_end_s, 4),
        "pid": state.process.pid, "rank": state.process.rank, "host": state.process.host,
    }  # fmt: skip
    logger.log_event("quorum", step, fields)
    verb = "go" if state.plan.layout.island > 1 else "goes"
    restore_note = f", {stats.receivers} filled by {stats.donors}" if stats.receivers else ""
    logger.screen.print_line(
        f"step {step:>5}  {state.plan.layout.describe()} {verb} on in generation"
        f" {assignment.generation}"
        f"{restore_note}; {fields['seconds']:.2f} s"
    )


def choose_checkpoint(
    state: RunState, logger: RunLogger, assignment: Assignment
) -> tuple[Checkpoint | None, int]:
    """Rank 0 looks for the newest checkpoint that verifies, all open that one: (it, generation).

    One rank has checked every byte: the others check the manifest and read what is theirs.
    """
    folder = state.folder / "checkpoints"
    checkpoint: Checkpoint | None = None
    generation = assignment.generation or 1
    if state.process.is_first:
        checkpoint = find_newest(
            folder, logger.log_rejected_checkpoint, logger.log_skipped_checkpoint
        )
        generation = assignment.generation or last_generation(state.folder) + 1
    saved = (checkpoint.step, checkpoint.generation) if checkpoint else (-1, -1)
    row = torch.tensor([generation, *saved], dtype=torch.int64)
    generation, step, saved_generation = all_gather_rows(
        row, state.mesh.group(*AXES), state.process.size
    )[0].tolist()
    if step < 0 or state.process.is_first:
        return checkpoint, generation
    return open_checkpoint(folder / folder_name(step, saved_generation), verify=False), generation
