"""Hosts on devices of different kinds in one run: who is let in, what is said, and the samples.

The other kind is a name here (`worker_name.py`): what an accelerator computes is tested on one
(tests/gpu), and how messages reach it in tests/metal.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.conftest import read_events, read_rows, run_cordee
from tests.drills.hosts import HostGroup

CUDA_PREFIX = (sys.executable, "-m", "tests.drills.rendezvous_by_call", "cuda")
TOLERANT_OVERRIDES = ("run.exact=false", "run.precision=fp32", "sync.protocol=exchange")


def test_another_kind_is_let_in_and_starts_with_the_least(run_dir: Path) -> None:
    with HostGroup(run_dir, *TOLERANT_OVERRIDES) as host_group:
        founder, joiner = host_group.start_first(prefix=CUDA_PREFIX), host_group.join()
        host_group.wait_for_islands(2)
        plan = json.loads((run_dir / "plan.json").read_text())
        host_group.wait_for_step(host_group.last_step + 20)
        assert [founder.wait_exit(), joiner.wait_exit()] == [0, 0], host_group.transcript()
    device_events = [event for event in read_events(run_dir) if event["event"] == "devices_differ"]
    sentence = "devices differ (cpu, cuda): the samples of each step are the same, the bits are not"
    assert [event["devices"] for event in device_events] == [["cuda", "cpu"]]
    assert sentence in str(device_events[0]["says"])
    assert founder.output.count(sentence) == 1
    assert plan["devices"] == ["cuda", "cpu"]
    assert plan["predicted"]["step_s"] == 0
    two_island_rows = [row for row in read_rows(run_dir) if row["islands"] == 2]
    assert two_island_rows[0]["shares"] == [11, 1]
    assert two_island_rows[-1]["shares"] not in ([11, 1], [12, 0]), "shares follow what is measured"
    assert {row["mfu"] for row in two_island_rows} == {None}
    ledger_result = run_cordee("data", "ledger", str(run_dir))
    assert ledger_result.returncode == 0, ledger_result.stdout + ledger_result.stderr


def test_bits_are_promised_to_like_devices_only(run_dir: Path) -> None:
    with HostGroup(run_dir) as host_group:
        founder, joiner = host_group.start_first(), host_group.join(prefix=CUDA_PREFIX)
        assert joiner.wait_exit(60) == 2, host_group.transcript()
        line = next(line for line in joiner.lines if "bits are the same only among like" in line)
        assert line.split()[-2:] == ["cuda", "cpu"]
        assert founder.wait_exit() == 0, host_group.transcript()
    assert {row["islands"] for row in read_rows(run_dir)} == {1}


@pytest.mark.slow
def test_islands_of_two_ranks(run_dir: Path) -> None:
    with HostGroup(run_dir, *TOLERANT_OVERRIDES, "layout.shard=2") as host_group:
        founder, joiner = (
            host_group.start_first(ranks=2, prefix=CUDA_PREFIX),
            host_group.join(ranks=2),
        )
        host_group.wait_for_islands(2)
        host_group.wait_for_step(host_group.last_step + 3)
        assert [founder.wait_exit(), joiner.wait_exit()] == [0, 0], host_group.transcript()
    device_events = [event for event in read_events(run_dir) if event["event"] == "devices_differ"]
    assert [event["devices"] for event in device_events] == [["cuda", "cpu"]]
    ledger_result = run_cordee("data", "ledger", str(run_dir))
    assert ledger_result.returncode == 0, ledger_result.stdout + ledger_result.stderr
