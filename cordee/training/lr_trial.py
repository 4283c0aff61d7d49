"""Short trainings without records: the curve of losses that a search for a learning rate measures.

The steps are those of a run (`Trainer.train_step`); nothing is written but the run's data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext

from cordee.config.from_hf import with_hub_shape
from cordee.config.load import override
from cordee.config.run import Run
from cordee.data.manifest import DatasetInfo
from cordee.dist.process_group import LaunchInfo, join_process_group
from cordee.launcher.local_cluster import measure_cluster
from cordee.launcher.prepare import (
    acquire_run_lock,
    check_compiler,
    find_dataset_dir,
    prepare_dataset,
    resolve_config,
)
from cordee.planner.cluster import with_precision
from cordee.planner.plan import make_plan, select_cluster
from cordee.training.fault_injection import FaultInjector
from cordee.training.trainer import Trainer
from cordee.training.user_parts import Parts


def measure_losses(run: Run, lr_of_step: Sequence[float], seed: int) -> list[float]:
    """Training loss before each update, in this process, with the learning rate of each step.

    Parameters, order of samples and dropout follow `seed`. Ends early after a loss or gradient that
    is not finite (the last value then is infinity).
    """
    default_layout = {f"layout.{name}": value for name, value in vars(Run().layout).items()}
    no_limits = {"run.minutes": 0.0, "run.tokens": 0, "run.epochs": 0, "evaluate.layers_every": 0}
    values = {"run.seed": seed, **default_layout, **no_limits, "run.steps": max(1, len(lr_of_step))}
    run_seed, run = run.run.seed, resolve_config(override(run, values))
    data = _prepare_trial_dataset(override(run, {"run.seed": run_seed}))
    cluster = measure_cluster(run.launch.probe)[0]
    run = with_precision(run, select_cluster(run, cluster))
    plan = make_plan(with_hub_shape(run), cluster, data.vocabulary, 1)
    check_compiler(run, plan.device)
    losses: list[float] = []
    offload, timeout_s = run.memory.offload != "none", run.launch.timeout_s
    with join_process_group(
        LaunchInfo(), plan.device, plan.threads, timeout_s, force_group=offload
    ) as process:
        no_drill = FaultInjector(process.rank, None, None, None)
        trainer = Trainer(run, plan, process, data, Parts(), drill=no_drill)
        peak_lr = trainer.optimizer.peak_lr
        trainer.lr_schedule = lambda _, step: lr_of_step[step] / peak_lr
        while len(losses) < len(lr_of_step):
            result = trainer.train_step()
            # A dropped step counts unless fp16 overflowed, which its scale has answered.
            diverged = trainer.guard.consecutive_skips > 0
            losses.append(math.inf if diverged else result.loss)
            if diverged:
                break
    return losses


def _prepare_trial_dataset(run: Run) -> DatasetInfo:
    """The dataset that the run itself would use, whatever the seed of a trial; made, if it must be,
    under the lock of the run's folder."""
    with acquire_run_lock(run) if find_dataset_dir(run) is None else nullcontext():
        return prepare_dataset(run)
