"""Islands of unequal speed: microbatches move to who is faster and come back, the bits stay."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cordee.launcher.run_ranks import throttle
from cordee.layout.load_balance import CHANGE_INTERVAL_STEPS, balance_microbatches
from tests.conftest import (
    SMALL,
    clean_environment,
    read_events,
    read_rows,
    run_cordee,
    train_small,
    wait_for_step,
    weights_digest,
)

OVERRIDES = ("run.exact=true", "run.steps=120", "evaluate.sample=0", "model.width=128",
         "model.layers=2", "optim.name=adamw", "fault.spares=0")  # fmt: skip
"""No spare: its import slows both ranks of two cores for seconds, which is not what is judged."""
PERIOD_S = 0.015
"""Short, so that even a microbatch is long beside it."""


def rank_pid(folder: Path, rank: int) -> int:
    """The pid of a rank of the run in `folder`, as it is now."""
    memberships = [event["members"] for event in read_events(folder) if "members" in event]
    return int(memberships[-1][rank]["pid"])  # type: ignore[index]


@pytest.mark.slow
def test_microbatches_follow_speed_and_the_bits_stay(tmp_path: Path) -> None:
    """Equal, then 1 : 3, then equal again, in one run."""
    folder = tmp_path / "run"
    train_small(tmp_path / "even", *OVERRIDES, "launch.processes=1")
    process = subprocess.Popen(
        [sys.executable, "-m", "cordee", "train", *SMALL, *OVERRIDES, f"run.dir={folder}",
         "launch.processes=2"],
        env=clean_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    slow_step = wait_for_step(folder, 12)
    with throttle(rank_pid(folder, 1), 1 / 3, PERIOD_S):
        fast_step = wait_for_step(folder, slow_step + 25)
    assert process.wait(240) == 0

    assert weights_digest(folder) == weights_digest(tmp_path / "even")
    result = run_cordee("data", "ledger", str(folder), "--json")
    assert result.returncode == 0 and json.loads(result.stdout)["holds"]
    shares_by_step = {int(str(row["step"])): list(row["shares"]) for row in read_rows(folder)}  # type: ignore[call-overload]
    assert all(sum(share) == 12 for share in shares_by_step.values())
    rebalances = [event for event in read_events(folder) if event["event"] == "rebalanced"]
    for event in rebalances:
        step, seconds = int(str(event["step"])), event["seconds_per_microbatch"]
        assert event["after"] == shares_by_step[step + 1] == balance_microbatches(seconds, 12)  # type: ignore[arg-type]
        assert event["before"] == shares_by_step[step] and "times as long" in str(event["why"])
    assert all(
        b - a >= CHANGE_INTERVAL_STEPS
        for a, b in zip(*(_event_steps(rebalances)[i:] for i in (0, 1)), strict=False)
    )
    # A slow machine's noise is in the shares; that they follow within ten steps is not noise. How
    # soon they come back is, where other work slows a rank that nobody stops any more.
    assert min(shares_by_step[s][1] for s in range(slow_step, slow_step + 12)) <= 4, (
        slow_step,
        rebalances,
    )
    assert shares_by_step[fast_step][1] <= 5, (fast_step, rebalances)
    assert max(shares_by_step[s][1] for s in range(fast_step, 121)) >= 5, (fast_step, rebalances)


def _event_steps(rebalances: list[dict[str, object]]) -> list[int]:
    return [int(str(event["step"])) for event in rebalances]


@pytest.mark.slow
def test_what_cannot_be_balanced_says_so(tmp_path: Path) -> None:
    overrides = ("run.steps=4", "launch.processes=4", "layout.pipeline=2", "model.layers=2")
    result = train_small(tmp_path / "run", *overrides, "evaluate.sample=0")
    assert "shares  stay equal" in result.stderr
