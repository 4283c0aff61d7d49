"""Short trainings without records: a step of a live run, and a curve of losses for an experiment.

What `cordee lr` measures with. Not here: the experiment (`optim/search.py`). The step is the run's
own, without its records, its checkpoints and its guard: a loss that is not finite is an answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext

from cordee.begin import check_compiler, find_data, lay_out_data, locked, settle
from cordee.build import RunState, build
from cordee.config.hub import on_paper
from cordee.config.load import override
from cordee.config.run import Run
from cordee.data.manifest import DatasetInfo
from cordee.dist.start import Launched, world
from cordee.dist.tally import Wishes, gather_tally
from cordee.layout.axes import AXES
from cordee.machine import measured_cluster
from cordee.optim.clip import clip_gradients, limit_parameters
from cordee.parts import Parts
from cordee.plan.devices import with_precision
from cordee.plan.plan import devices_of, make_plan


def losses_at(run: Run, lr_of_step: Sequence[float], seed: int) -> list[float]:
    """Training loss before each update, in this process, with the learning rate of each step.

    Parameters, order of samples and dropout follow `seed`. Ends early after a loss or gradient that
    is not finite (the last value then is infinity). Writes nothing but the run's data.
    """
    alone = {f"layout.{name}": value for name, value in vars(Run().layout).items()}
    none = {"run.minutes": 0.0, "run.tokens": 0, "run.epochs": 0}
    values = {"run.seed": seed, **alone, **none, "run.steps": max(1, len(lr_of_step))}
    own, run = run.run.seed, settle(override(run, values))
    data = _data_of(override(run, {"run.seed": own}))
    cluster = measured_cluster(run.launch.probe)[0]
    run = with_precision(run, devices_of(run, cluster))
    plan = make_plan(on_paper(run), cluster, data.vocabulary, 1)
    check_compiler(run, plan.device)
    losses: list[float] = []
    offload = run.memory.offload != "none"
    limit_s = run.launch.timeout_s
    with world(Launched(), plan.device, plan.threads, limit_s, always=offload) as here:
        state = build(run, plan, here, data, Parts())
        for number, rate in enumerate(lr_of_step):
            state.optimizer.set_lr(rate / state.optimizer.peak_lr)
            loss, norm = step(state, number)
            if state.scale.follow([loss], norm):
                losses.append(loss)
                continue
            if not (math.isfinite(loss) and math.isfinite(norm)):
                losses.append(math.inf)
                break
            losses.append(loss)
    return losses


def _data_of(run: Run) -> DatasetInfo:
    """The dataset that the run itself would use, whatever the seed of a trial; made, if it must be,
    under the lock of the run's folder."""
    with locked(run) if find_data(run) is None else nullcontext():
        return lay_out_data(run)


def step(state: RunState, number: int) -> tuple[float, float]:
    """Step `number` (from 0) at the rate that is set: (mean loss before the update in nats, norm of
    the gradient before clipping), the same on all ranks. Nothing is updated if one is not finite.
    """
    losses, partial = state.engine.forward_backward(number, state.scale.value)
    group = state.mesh.group(*AXES)
    tally = gather_tally(state.speaks(losses), state.loaded(), Wishes(), state.spoken, group)
    loss = math.fsum(tally.losses) / state.engine.work.tokens
    gradients = state.engine.place(state.sync.agree(partial))
    state.scale.unscale(gradients)
    norm = state.norm(gradients)
    if math.isfinite(loss) and math.isfinite(float(norm)):
        clip_gradients(state.named_gradients(gradients), state.run.clip, norm)
        updates, loads = state.optimizer.prepare(), state.engine.prepare()
        state.optimizer.step(updates)
        state.engine.commit(loads)
        limit_parameters(state.groups, state.run.clip, state.totals)
        state.sync.settle(number + 1)
    return loss, float(norm)
