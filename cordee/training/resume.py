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
from cordee.checkpoint.train_state import Progress, parse_progress
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
from cordee.training.run_logger import start_lines
from cordee.training.trainer import Trainer


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

    trainer: Trainer | None = None

    @property
    def data(self) -> DatasetInfo | None:
        """The dataset, if it has been laid out."""
        return None if self.trainer is None else self.trainer.data

    @property
    def step(self) -> int:
        """The last step that was committed here; -1 when nothing is held."""
        return -1 if self.trainer is None else self.trainer.progress.step

    def snapshots(self) -> list[StateSnapshot]:
        """The moments that this process can give to others."""
        trainer = self.trainer
        if trainer is None:
            return []
        meta = {**trainer.metadata(), "owed": _unfinished_tasks(trainer)}
        peer_snapshots = trainer.peer_backup.snapshots() if trainer.peer_backup else []
        tensors = trainer.state.tensors(include_replicas=True)
        return [StateSnapshot(self.step, meta, tensors), *peer_snapshots]

    def adopt(self, trainer: Trainer) -> None:
        """`trainer` is what this process holds from now on; it keeps the neighbours' copies."""
        trainer.peer_backup = self.trainer.peer_backup if self.trainer else None
        self.trainer = trainer


def _unfinished_tasks(trainer: Trainer) -> list[str]:
    """What another generation has to do in this one's place: also a save that was not done."""
    tasks = trainer.pending_tasks
    save_was_lost = trainer.checkpointer.has_pending_save and "save" not in tasks
    return [*tasks, "save"] if save_was_lost else list(tasks)


def start_peer_backup(trainer: Trainer, assignment: Assignment) -> None:
    """From now on, and at once, a neighbour keeps what only this rank holds."""
    every_steps, process = trainer.run.fault.copy_every, trainer.process
    if not assignment.generation or trainer.mesh.size(*MODEL_AXES) == 1 or not every_steps:
        trainer.peer_backup = None
        return
    group, hosts = trainer.mesh.group(*AXES), [str(m["host"]) for m in assignment.members]
    if trainer.peer_backup is None:
        trainer.peer_backup = PeerBackup(
            every_steps, group, process.rank, process.size, hosts, trainer.drill.fault_point
        )
    else:
        trainer.peer_backup.discard_after(trainer.progress.step)
        trainer.peer_backup.rebind(group, process.rank, process.size, hosts)
    trainer.back_up_to_peer()


def restore_state(trainer: Trainer, assignment: Assignment, survivor: SurvivorState) -> None:
    """Puts back what live ranks hold, else the newest complete checkpoint, and says how the run
    begins or goes on."""
    group, size, logger = trainer.mesh.group(*AXES), trainer.process.size, trainer.logger
    logger.members = assignment.members
    trainer.drill.fault_point("fill", max(survivor.step, 0))
    stats = None
    if assignment.generation:
        stats = restore_from_peers(
            trainer.state.tensors(include_replicas=True), survivor.snapshots(), group,
            trainer.process.rank, size, trainer.drill.fault_point,
        )  # fmt: skip
    checkpoint, generation = None, assignment.generation
    if stats is not None:
        _restore_meta(trainer, stats.meta, generation)
        trainer.pending_tasks = list(stats.meta["owed"])
    else:
        checkpoint, generation = choose_checkpoint(trainer, assignment)
        if checkpoint is None:
            loss_scale = trainer.loss_scale.value
            trainer.set_progress(Progress(generation=generation, loss_scale=loss_scale))
        else:
            _load_checkpoint(trainer, checkpoint, generation)
    survivor.adopt(trainer)
    logger.truncate_records(trainer.progress.step)
    if stats is not None:
        start_peer_backup(trainer, assignment)
        _log_generation(trainer, assignment, stats)
        return
    fields = {
        "layout": trainer.plan.layout.describe(), "ranks": size, "why": trainer.plan.why,
        "generation": generation, "entropy_bits": trainer.data.entropy_bits,
        "brought": trainer.user_model_name, "members": list(assignment.members),
        "pid": trainer.process.pid, "rank": trainer.process.rank, "host": trainer.process.host,
    }  # fmt: skip
    logger.log_verdicts(trainer.progress.step, assignment.verdicts)
    checkpoint_name = "" if checkpoint is None else checkpoint.path.name
    if checkpoint is None:
        logger.log_event("started", 0, fields)
    else:
        fields["checkpoint"] = checkpoint_name
        logger.log_event("resumed", trainer.progress.step, fields)
    start_peer_backup(trainer, assignment)
    for line in start_lines(
        trainer.run, trainer.plan, trainer.user_model_name, _row_text(trainer), trainer.progress,
        checkpoint_name,
    ):  # fmt: skip
        logger.screen.print_line(line)


def _row_text(trainer: Trainer) -> str:
    """What a row of a microbatch is, in words."""
    if trainer.model.loss_function is not None:
        return "samples"
    return f"x {trainer.run.data.sequence} tokens"


def check_arithmetic(trainer: Trainer, launch_info: LaunchInfo) -> dict[str, str]:
    """What computes here, by name, where bits are promised: the fingerprint of the arithmetic, the
    versions of the libraries that the model is made of. ConfigError: the run began with another, or
    the ranks of a launcher differ (hosts of our own compare theirs when they meet)."""
    run, process = trainer.run, trainer.process
    if not run.requires_same_bits:
        return {}
    arithmetic_id = arithmetic_fingerprint(process.device, run.run.precision, run.run.arithmetic)
    local_identity = {"arithmetic": arithmetic_id}
    for chunk in trainer.model.stage_modules:
        local_identity |= library_versions(chunk)
    identities = [local_identity]
    if process.size > 1 and not launch_info.is_supervised:
        replies = all_gather_bytes(
            json.dumps(local_identity).encode(), trainer.mesh.group(*AXES), process.size
        )
        identities = [json.loads(identity) for identity in replies]
    recorded_identity = recorded_settings(trainer.folder / RUN_FILE)
    for rank, identity in enumerate(identities):  # on every rank, so that all of them end alike
        _check_identities(recorded_identity, identity, trainer)
        _check_identities(identity, identities[0], trainer, f"on rank {rank}", "on rank 0")
    return local_identity


def _check_identities(
    first_identity: Mapping[str, str], second_identity: Mapping[str, str], trainer: Trainer,
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
    fix = "the same versions everywhere"
    if "arithmetic" in differing_names:
        fix = remedy(trainer.run, trainer.process.device.partition(":")[0])
    labels = {first_label: first_identity, second_label: second_identity}
    values = {f"{n} {label}": labels[label].get(n) for n in differing_names for label in labels}
    raise ConfigError(
        "the bits of this run are promised, and other code would compute them",
        values={**values, "run.arithmetic": trainer.run.run.arithmetic},
        fix=f"{fix}; this one goes on only where the same is computed",
    )


def emergency_save(
    run: Run, assignment: Assignment, survivor: SurvivorState, process: RankProcess
) -> None:
    """Ranks that are no island save what they hold together, and keep it while they wait."""
    step = max(survivor.step, 0)
    folder, group = Path(run.run.dir), dist.group.WORLD if process.size > 1 else None
    checkpointer = Checkpointer(
        folder / "checkpoints", process.rank, process.size, run.checkpoint.keep, no_fault
    )
    checkpoint = None
    if process.is_first:
        with suppress(CheckpointError):  # the folder cannot be listed: what is held may be all
            checkpoint = find_newest(folder / "checkpoints", lambda *_: None)
    specs = survivor.trainer.state.specs if survivor.trainer else {}
    try:
        save_result = write_emergency_save(
            survivor.snapshots(), [f"model/{name}" for name in specs], checkpointer,
            assignment.generation, checkpoint.step if checkpoint else -1, group,
            process.rank, process.size,
        )  # fmt: skip
    except CheckpointError as error:
        save_result = EmergencySave(None, None, error.message)
    if not process.is_first:
        return
    events = JsonLinesWriter(folder / "events.jsonl")
    events.claim_file()
    fields = {"generation": assignment.generation, "members": list(assignment.members)}
    fields |= save_result.event_fields()
    events.write({"time": utc_timestamp(), "event": "rescued", **fields, "step": step})
    message = f"nothing is saved: {save_result.reason}"
    if save_result.report:
        message = f"what is left is saved: {save_result.report.path.name}"
    Screen(silent=False).print_line(
        f"step {survivor.step:>5}  {message}; the ranks that are left wait for others"
    )


def _load_checkpoint(trainer: Trainer, checkpoint: Checkpoint, generation: int) -> None:
    """The tensors and the progress of a checkpoint. DataError: it was made with other data;
    ConfigError: by other code, where bits are promised."""
    if checkpoint.meta.get("data") != trainer.data.fingerprint:
        raise DataError(
            "the checkpoint was made with other data",
            values={"there": checkpoint.meta.get("data"), "here": trainer.data.fingerprint},
            fix="give the data back its old content, or train in another run.dir",
        )
    _check_identities(checkpoint.meta.get("arithmetic", {}), trainer.arithmetic, trainer)
    trainer.state.load(checkpoint)
    _restore_meta(trainer, checkpoint.meta, generation)


def _restore_meta(trainer: Trainer, meta: Mapping[str, Any], generation: int) -> None:
    """Everything that survives and is no tensor."""
    trainer.sync.restore(meta.get("sync") or {})
    trainer.set_progress(replace(parse_progress(meta), generation=generation))


def _log_generation(trainer: Trainer, assignment: Assignment, stats: RestoreStats) -> None:
    """The events of a generation that goes on from live ranks."""
    step, logger = trainer.progress.step, trainer.logger
    logger.log_verdicts(step, assignment.verdicts)
    fields = {
        "generation": assignment.generation, "islands": trainer.plan.layout.island,
        "ranks": trainer.process.size, "layout": trainer.plan.layout.describe(),
        "members": list(assignment.members), "donors": stats.donors, "receivers": stats.receivers,
        "bytes": stats.bytes, "seconds": round(time.monotonic() - assignment.previous_end_s, 4),
        "pid": trainer.process.pid, "rank": trainer.process.rank, "host": trainer.process.host,
    }  # fmt: skip
    logger.log_event("quorum", step, fields)
    verb = "go" if trainer.plan.layout.island > 1 else "goes"
    restore_note = f", {stats.receivers} filled by {stats.donors}" if stats.receivers else ""
    logger.screen.print_line(
        f"step {step:>5}  {trainer.plan.layout.describe()} {verb} on in generation"
        f" {assignment.generation}{restore_note}; {fields['seconds']:.2f} s"
    )


def choose_checkpoint(trainer: Trainer, assignment: Assignment) -> tuple[Checkpoint | None, int]:
    """Rank 0 looks for the newest checkpoint that verifies, all open that one: (it, generation).

    One rank has checked every byte: the others check the manifest and read what is theirs.
    """
    folder = trainer.folder / "checkpoints"
    checkpoint: Checkpoint | None = None
    generation = assignment.generation or 1
    if trainer.process.is_first:
        checkpoint = find_newest(
            folder, trainer.logger.log_rejected_checkpoint, trainer.logger.log_skipped_checkpoint
        )
        generation = assignment.generation or last_generation(trainer.folder) + 1
    choice = (checkpoint.step, checkpoint.generation) if checkpoint else (-1, -1)
    row = torch.tensor([generation, *choice], dtype=torch.int64)
    rows = all_gather_rows(row, trainer.mesh.group(*AXES), trainer.process.size)
    generation, step, saved_generation = rows[0].tolist()
    if step < 0 or trainer.process.is_first:
        return checkpoint, generation
    return open_checkpoint(folder / folder_name(step, saved_generation), verify=False), generation
