"""Gives a live run other shares of its microbatches: no new group, no message, the same sums.

Every rank has heard the same tally and so makes the same change between the same two steps. Not
here: which shares (`layout/shares.py`), or what a rank measures (`Engine.compute_s`). Only ranges
change hands; parameters, groups and the step's list of microbatches stay what they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cordee.build import RunState, speakers
from cordee.desk import Desk
from cordee.dist.tally import Tally
from cordee.layout.shares import deal, explain
from cordee.sync.protocol import ByExchange


def rebalance(state: RunState, desk: Desk, tally: Tally) -> None:
    """After a step: notes how long islands computed, and moves microbatches when that pays."""
    balance = state.balance
    if balance is None:
        return
    islands = state.plan.layout.island
    ranks = state.world.size // islands
    # Ranks of an island wait for each other as they compute: the slowest one's time is theirs.
    balance.feed([max(tally.compute_s[i * ranks : (i + 1) * ranks]) for i in range(islands)])
    before = list(balance.counts)
    after = balance.decide()
    if after is None:
        return
    share_out(state, deal(after, state.plan.layout.workers // islands))
    why = explain(after, balance.seconds)
    known = {
        "before": before,
        "after": after,
        "seconds_per_microbatch": [round(s, 6) for s in balance.seconds],
        "why": why,
    }
    desk.event("rebalanced", state.progress.step, known)
    desk.screen.say(f"step {state.progress.step:>5}  shares: {why}")


def share_out(state: RunState, splits: Sequence[tuple[int, int]]) -> None:
    """Worker w computes the microbatches [start, stop) of `splits[w]` from the next step on."""
    state.plan = replace(state.plan, splits=tuple(splits))
    ranges = [range(start, stop) for start, stop in splits]
    state.engine.deal(ranges[state.mesh.worker])
    if isinstance(state.sync, ByExchange):
        state.sync.deal(ranges)
    state.spoken = speakers(state.run, state.plan, state.live.stages)
