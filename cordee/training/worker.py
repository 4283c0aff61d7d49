"""This process as one rank: from its assignment to a Trainer that goes on where the run stands.

When the members of a run change, a process keeps what it holds and takes its next assignment.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import torch

from cordee.config.run import Run
from cordee.data.loader import describe_samples
from cordee.data.manifest import DatasetInfo
from cordee.dist.ipc import Assignment
from cordee.dist.process_group import (
    LaunchInfo,
    broadcast_text,
    exit_with_parent,
    join_process_group,
    raise_file_limit,
)
from cordee.dist.worker_channel import SupervisorClient
from cordee.errors import CordeeError
from cordee.launcher.prepare import (
    PreparedRun,
    Report,
    acquire_run_lock,
    dump_run_and_plan,
    inspect_run_dir,
    load_run_and_plan,
    prepare_dataset,
    read_or_prepare_dataset,
    write_run_files,
)
from cordee.model.arithmetic import COMPATIBLE, portable_sqrt
from cordee.planner.plan import Plan
from cordee.training.fault_injection import make_fault_injector
from cordee.training.resume import (
    SurvivorState,
    assignments,
    check_arithmetic,
    emergency_save,
    restore_state,
)
from cordee.training.run_logger import RunLogger
from cordee.training.stop_request import StopRequest, catch_stop_signals
from cordee.training.trainer import Trainer
from cordee.training.user_parts import Parts


def run_worker(prepared_run: PreparedRun, parts: Parts) -> Report:
    """This process as one rank, in one generation after another; outside a supervisor there is
    one."""
    exit_with_parent()
    raise_file_limit()
    run, launch_info = prepared_run.run, prepared_run.launch_info
    supervisor = SupervisorClient(launch_info) if launch_info.is_supervised else None
    lock = acquire_run_lock(run) if supervisor is None and launch_info.rank == 0 else nullcontext()
    survivor = SurvivorState()
    with lock, catch_stop_signals(supervisor) as stop_request:
        if supervisor is None and launch_info.rank == 0:  # another run may have begun meanwhile
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
    """One generation: join, build, restore, fit, finish; None after one that only saved."""
    run, own_plan = prepared_run.run, prepared_run.plan
    launch_info = replace(
        prepared_run.launch_info,
        rank=assignment.rank, size=assignment.size, local_rank=assignment.local_rank,
    )  # fmt: skip
    # A generation's plan is the leader's, whose devices, and cores, may be others than this host's.
    plan = Plan.from_json(assignment.plan) if assignment.plan else own_plan
    device, threads = own_plan.device, (own_plan if plan.devices else plan).threads
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
        trainer = Trainer(run, plan, process, data, parts, survivor.trainer, drill)
        trainer.stop_request = stop_request
        try:
            go_on(trainer, assignment, survivor, launch_info)
            trainer.fit()
            return trainer.finish()
        finally:
            trainer.logger.close()


def go_on(
    trainer: Trainer, assignment: Assignment, survivor: SurvivorState, launch_info: LaunchInfo
) -> None:
    """Brings a new trainer to where the run stands, and opens the run's records."""
    run, plan, process = trainer.run, trainer.plan, trainer.process
    previous, write_failure = survivor.trainer, ""
    trainer.arithmetic = check_arithmetic(trainer, launch_info)
    if process.is_first:
        write_failure = write_run_files(run, plan, previous is not None, trainer.arithmetic)
    trainer.logger = RunLogger(run, process, previous.logger if previous else None)
    trainer.logger.log_write_failure(write_failure)
    restore_state(trainer, assignment, survivor)
    if plan.has_mixed_devices:
        kinds = ", ".join(sorted(set(plan.devices)))
        message = f"devices differ ({kinds}): the samples of each step are the same, the bits are"
        fields = {"devices": list(plan.devices), "says": f"{message} not promised"}
        verdict = {"event": "devices_differ", **fields}
        trainer.logger.log_verdicts(trainer.progress.step, [verdict])


def broadcast_config(run: Run, plan: Plan) -> tuple[Run, Plan]:
    """Rank 0's run and plan: under a launcher each rank has resolved its own, and profiles of
    hosts, or of one host at two times, differ."""
    return load_run_and_plan(broadcast_text(dump_run_and_plan(run, plan)))


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
