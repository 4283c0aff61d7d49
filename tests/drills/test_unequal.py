"""Islands of unequal speed: microbatches move to who is faster and come back, the bits stay."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cordee.layout.shares import HOLD, shares
from cordee.testing import slowed
from tests.conftest import (
    SMALL,
    clean_environment,
    cordee,
    digest,
    events,
    rows,
    train,
    wait_for_step,
)

WORDS = ("run.exact=true", "run.steps=120", "evaluate.sample=0", "model.width=128",
         "model.layers=2", "optim.name=adamw", "fault.spares=0")  # fmt: skip
"""No spare: its import slows both ranks of two cores for seconds, which is not what is judged."""
PERIOD_S = 0.015
"""Short, so that even a microbatch is long beside it."""


def rank_of(folder: Path, rank: int) -> int:
    """The pid of a rank of the run in `folder`, as it is now."""
    told = [event["members"] for event in events(folder) if "members" in event]
    return int(told[-1][rank]["pid"])  # type: ignore[index]


@pytest.mark.slow
def test_microbatches_follow_speed_and_the_bits_stay(tmp_path: Path) -> None:
    """Equal, then 1 : 3, then equal again, in one run."""
    folder = tmp_path / "run"
    train(tmp_path / "even", *WORDS, "launch.processes=1")
    process = subprocess.Popen(
        [sys.executable, "-m", "cordee", "train", *SMALL, *WORDS, f"run.dir={folder}",
         "launch.processes=2"],
        env=clean_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    begun = wait_for_step(folder, 12)
    with slowed(rank_of(folder, 1), 1 / 3, PERIOD_S):
        ended = wait_for_step(folder, begun + 25)
    assert process.wait(240) == 0

    assert digest(folder) == digest(tmp_path / "even")
    done = cordee("data", "ledger", str(folder), "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["holds"]
    given = {int(str(row["step"])): list(row["shares"]) for row in rows(folder)}  # type: ignore[call-overload]
    assert all(sum(share) == 12 for share in given.values())
    moved = [event for event in events(folder) if event["event"] == "rebalanced"]
    for event in moved:
        step, seconds = int(str(event["step"])), event["seconds_per_microbatch"]
        assert event["after"] == given[step + 1] == shares(seconds, 12)  # type: ignore[arg-type]
        assert event["before"] == given[step] and "times as long" in str(event["why"])
    assert all(b - a >= HOLD for a, b in zip(*(_steps(moved)[i:] for i in (0, 1)), strict=False))
    # A slow machine's noise is in the shares; that they follow within ten steps is not noise. How
    # soon they come back is, where other work slows a rank that nobody stops any more.
    assert min(given[s][1] for s in range(begun, begun + 12)) <= 4, (begun, moved)
    assert given[ended][1] <= 5, (ended, moved)
    assert max(given[s][1] for s in range(ended, 121)) >= 5, (ended, moved)


def _steps(moved: list[dict[str, object]]) -> list[int]:
    return [int(str(event["step"])) for event in moved]


@pytest.mark.slow
def test_what_cannot_be_balanced_says_so(tmp_path: Path) -> None:
    words = ("run.steps=4", "launch.processes=4", "layout.pipeline=2", "model.layers=2")
    done = train(tmp_path / "run", *words, "evaluate.sample=0")
    assert "shares  stay equal" in done.stderr
