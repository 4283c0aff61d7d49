"""Hosts on devices of different kinds in one run: who is let in, what is said, and the samples.

The other kind is a name here (`called.py`): what an accelerator computes is tested on one
(tests/gpu), and how messages reach it in tests/metal.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.conftest import cordee, events, rows
from tests.drills.hosts import Rope

CALLED_CUDA = (sys.executable, "-m", "tests.drills.called", "cuda")
ALIKE = ("run.exact=false", "run.precision=fp32", "sync.protocol=exchange")


def test_another_kind_is_let_in_and_starts_with_the_least(run_dir: Path) -> None:
    with Rope(run_dir, *ALIKE) as rope:
        founder, joined = rope.found(prefix=CALLED_CUDA), rope.join()
        rope.until_islands(2)
        plan = json.loads((run_dir / "plan.json").read_text())
        rope.until_step(rope.step + 20)
        assert [founder.end(), joined.end()] == [0, 0], rope.told()
    told = [event for event in events(run_dir) if event["event"] == "devices_differ"]
    says = "devices differ (cpu, cuda): the samples of each step are the same, the bits are not"
    assert [event["devices"] for event in told] == [["cuda", "cpu"]]
    assert says in str(told[0]["says"])
    assert founder.said.count(says) == 1
    assert plan["devices"] == ["cuda", "cpu"]
    assert plan["predicted"]["step_s"] == 0
    both = [row for row in rows(run_dir) if row["islands"] == 2]
    assert both[0]["shares"] == [11, 1]
    assert both[-1]["shares"] not in ([11, 1], [12, 0]), "shares follow what is measured"
    assert {row["mfu"] for row in both} == {None}
    ledger = cordee("data", "ledger", str(run_dir))
    assert ledger.returncode == 0, ledger.stdout + ledger.stderr


def test_bits_are_promised_to_like_devices_only(run_dir: Path) -> None:
    with Rope(run_dir) as rope:
        founder, other = rope.found(), rope.join(prefix=CALLED_CUDA)
        assert other.end(60) == 2, rope.told()
        line = next(line for line in other.lines if "bits are the same only among like" in line)
        assert line.split()[-2:] == ["cuda", "cpu"]
        assert founder.end() == 0, rope.told()
    assert {row["islands"] for row in rows(run_dir)} == {1}


@pytest.mark.slow
def test_islands_of_two_ranks(run_dir: Path) -> None:
    with Rope(run_dir, *ALIKE, "layout.shard=2") as rope:
        founder, joined = rope.found(ranks=2, prefix=CALLED_CUDA), rope.join(ranks=2)
        rope.until_islands(2)
        rope.until_step(rope.step + 3)
        assert [founder.end(), joined.end()] == [0, 0], rope.told()
    told = [event for event in events(run_dir) if event["event"] == "devices_differ"]
    assert [event["devices"] for event in told] == [["cuda", "cpu"]]
    ledger = cordee("data", "ledger", str(run_dir))
    assert ledger.returncode == 0, ledger.stdout + ledger.stderr
