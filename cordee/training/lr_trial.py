"""Short trainings without records: a step of a live run, and a curve of losses for an experiment.

What `cordee lr` measures with. Not here: the experiment (`optim/lr_search.py`). The step is the
run's own, without its records, its checkpoints and its guard: a loss that is not finite is an
answer.
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
from cordee.dist.step_sync import RankStatus, gather_step_summary
from cordee.launcher.local_cluster import measure_cluster
from cordee.launcher.prepare import (
    acquire_run_lock,
    check_compiler,
    find_dataset_dir,
    prepare_dataset,
    resolve_config,
)
from cordee.layout.axes import AXES
from cordee.optim.clip import clip_gradients, limit_parameters
from cordee.planner.cluster import with_precision
from cordee.planner.plan import make_plan, select_cluster
from cordee.training.build import RunState, build_run_state
from cordee.training.user_parts import Parts


def measure_losses(run: Run, lr_of_step: Sequence[float], seed: int) -> list[float]:
    """Training loss before each update, in this process, with the learning rate of each step.

    Parameters, order of samples and dropout follow `seed`. Ends early after a loss or gradient that
    is not finite (the last value then is infinity). Writes nothing but the run's data.
    """
    default_layout = {f"layout.{name}": value for name, value in vars(Run().layout).items()}
    no_limits = {"run.minutes": 0.0, "run.tokens": 0, "run.epochs": 0}
    values = {"run.seed": seed, **default_layout, **no_limits, "run.steps": max(1, len(lr_of_step))}
    run_seed, run = run.run.seed, resolve_config(override(run, values))
    data = _prepare_trial_dataset(override(run, {"run.seed": run_seed}))
    cluster = measure_cluster(run.launch.probe)[0]
    run = with_precision(run, select_cluster(run, cluster))
    plan = make_plan(with_hub_shape(run), cluster, data.vocabulary, 1)
    check_compiler(run, plan.device)
    losses: list[float] = []
    offload = run.memory.offload != "none"
    timeout_s = run.launch.timeout_s
    with join_process_group(
        LaunchInfo(), plan.device, plan.threads, timeout_s, force_group=offload
    ) as process:
        state = build_run_state(run, plan, process, data, Parts())
        for step_index, lr in enumerate(lr_of_step):
            state.optimizer.set_lr(lr / state.optimizer.peak_lr)
            loss, norm = trial_step(state, step_index)
            if state.loss_scale.update([loss], norm):
                losses.append(loss)
                continue
            if not (math.isfinite(loss) and math.isfinite(norm)):
                losses.append(math.inf)
                break
            losses.append(loss)
    return losses


def _prepare_trial_dataset(run: Run) -> DatasetInfo:
    """The dataset that the run itself would use, whatever the seed of a trial; made, if it must be,
    under the lock of the run's folder."""
    with acquire_run_lock(run) if find_dataset_dir(run) is None else nullcontext():
        return prepare_dataset(run)


def trial_step(state: RunState, step_index: int) -> tuple[float, float]:
    """Step `step_index` (from 0) at the rate that is set: (mean loss before the update in nats,
    norm of the gradient before clipping), the same on all ranks. Nothing is updated if one is not
    finite.
    """
    losses, partial_sums = state.engine.forward_backward(step_index, state.loss_scale.value)
    group = state.mesh.group(*AXES)
    step_summary = gather_step_summary(
        state.reported_losses(losses),
        state.sample_digests(),
        RankStatus(),
        state.loss_owners,
        group,
    )
    loss = math.fsum(step_summary.losses) / state.engine.step_spec.step_tokens
    gradients = state.engine.set_gradients(state.sync.reduce_gradients(partial_sums))
    state.loss_scale.unscale(gradients)
    norm = state.gradient_norm(gradients)
    if math.isfinite(loss) and math.isfinite(float(norm)):
        clip_gradients(state.named_gradients(gradients), state.run.clip, norm)
        updates, expert_loads = state.optimizer.prepare(), state.engine.prepare()
        state.optimizer.step(updates)
        state.engine.commit(expert_loads)
        limit_parameters(state.parameter_groups, state.run.clip, state.norm_reducer)
        state.sync.after_step(step_index + 1)
    return loss, float(norm)
