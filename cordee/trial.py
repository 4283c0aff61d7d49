"""Short trainings for an experiment: a curve of losses, and nothing written but the run's data.

What `cordee lr` measures with. Not here: the experiment (`optim/search.py`). The step is the run's
own, without its records, its checkpoints and its guard: a loss that is not finite is an answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from cordee.begin import check_compiler, lay_out_data, settle
from cordee.build import Parts, build
from cordee.config.load import override
from cordee.config.run import Run
from cordee.dist.start import Launched, world
from cordee.optim.clip import clip_gradients, global_norm
from cordee.plan.cluster import local_cluster
from cordee.plan.plan import make_plan


def losses_at(run: Run, lr_of_step: Sequence[float], seed: int) -> list[float]:
    """Training loss before each update, in this process, with the learning rate of each step.

    Parameters, order of samples and dropout follow `seed`. Ends early after a loss or gradient that
    is not finite (the last value then is infinity). Writes nothing but the run's data.
    """
    values = {
        "run.seed": seed, "layout.islands": "auto", "layout.shard": "auto",
        "run.steps": max(1, len(lr_of_step)), "run.minutes": 0.0, "run.tokens": 0,
    }  # fmt: skip
    run = settle(override(run, values))
    data = lay_out_data(run)
    plan = make_plan(run, local_cluster(), data.vocabulary, 1)
    check_compiler(run, plan.device)
    losses: list[float] = []
    offload = run.memory.offload != "none"
    with world(Launched(), plan.device, plan.threads, run.launch.timeout_s, offload) as here:
        state = build(run, plan, here, data, Parts())
        for number, rate in enumerate(lr_of_step):
            state.optimizer.set_lr(rate / state.optimizer.peak_lr)
            sums, partial = state.engine.forward_backward(number, state.scale.value)
            loss = math.fsum(map(float, sums)) / state.step_tokens
            gradients = state.engine.place(state.sync.agree(partial))
            state.scale.unscale(gradients)
            norm = global_norm(gradients, state.by_rows)
            if state.scale.follow([loss], float(norm)):
                losses.append(loss)
                continue
            if not (math.isfinite(loss) and math.isfinite(float(norm))):
                losses.append(math.inf)
                break
            losses.append(loss)
            clip_gradients(state.named_gradients(gradients), run.clip, norm)
            state.optimizer.step()
    return losses
