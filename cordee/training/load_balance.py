"""Gives a live run other shares of its microbatches: no new group, no message, the same sums.

Every rank has heard the same tally and so makes the same change between the same two steps. Not
here: which shares (`layout/load_balance.py`), or what a rank measures (`Engine.compute_s`). Only
ranges change hands; parameters, groups and the step's list of microbatches stay what they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cordee.dist.gradient_sync import TreeSync
from cordee.dist.step_sync import StepSummary
from cordee.layout.load_balance import describe_balance, microbatch_ranges
from cordee.training.build import RunState, find_loss_owners
from cordee.training.run_logger import RunLogger


def rebalance(state: RunState, logger: RunLogger, step_summary: StepSummary) -> None:
    """After a step: notes how long islands computed, and moves microbatches when that pays."""
    balancer = state.load_balancer
    if balancer is None:
        return
    island_count = state.plan.layout.island
    ranks_per_island = state.process.size // island_count
    # Ranks of an island wait for each other as they compute: the slowest one's time is theirs.
    balancer.add_step(
        [
            max(step_summary.compute_s[i * ranks_per_island : (i + 1) * ranks_per_island])
            for i in range(island_count)
        ]
    )
    old_shares = list(balancer.counts)
    new_shares = balancer.next_counts()
    if new_shares is None:
        return
    set_worker_ranges(
        state, microbatch_ranges(new_shares, state.plan.layout.dp_size // island_count)
    )
    reason = describe_balance(new_shares, balancer.microbatch_seconds)
    fields = {
        "before": old_shares,
        "after": new_shares,
        "seconds_per_microbatch": [round(s, 6) for s in balancer.microbatch_seconds],
        "why": reason,
    }
    logger.log_event("rebalanced", state.progress.step, fields)
    logger.screen.print_line(f"step {state.progress.step:>5}  shares: {reason}")


def set_worker_ranges(state: RunState, splits: Sequence[tuple[int, int]]) -> None:
    """Worker w computes the microbatches [start, stop) of `splits[w]` from the next step on."""
    state.plan = replace(state.plan, splits=tuple(splits))
    ranges = [range(start, stop) for start, stop in splits]
    state.engine.set_microbatches(ranges[state.mesh.worker_index])
    if isinstance(state.sync, TreeSync):
        state.sync.set_ranges(ranges)
    state.loss_owners = find_loss_owners(state.run, state.plan, state.model.stages)
