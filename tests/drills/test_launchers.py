"""A rank that hangs though its heart beats, and torchrun's own restarts: the same descent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import (
    SMALL,
    clean_environment,
    read_events,
    read_rows,
    train_small,
    weights_digest,
)

OVERRIDES = ("run.exact=true", "run.steps=60", "evaluate.sample=0", "checkpoint.every=10")


@pytest.fixture(scope="module")
def reference_digest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the undisturbed run on one process."""
    folder = tmp_path_factory.mktemp("clean") / "run"
    train_small(folder, *OVERRIDES, "launch.processes=1")
    return weights_digest(folder)


@pytest.mark.slow
def test_a_rank_that_hangs_is_found_by_the_time_that_steps_take(
    reference_digest: str, run_dir: Path
) -> None:
    result = train_small(
        run_dir,
        *OVERRIDES,
        "launch.processes=2",
        "fault.kill=!step.start:40:1",
        "fault.silence_s=60",
    )
    assert weights_digest(run_dir) == reference_digest
    loss_events = [e for e in read_events(run_dir) if e["event"] in ("stuck", "lost")]
    assert [e["event"] for e in loss_events] == ["stuck", "lost"], loss_events
    assert {e["rank"] for e in loss_events} == {1} and {e["phase"] for e in loss_events} == {
        "step.start"
    }
    assert "did not leave generation" in result.stderr
    assert [row["step"] for row in read_rows(run_dir)] == list(range(1, 61))


@pytest.mark.slow
def test_torchrun_restarts_find_each_other_and_go_on(reference_digest: str, run_dir: Path) -> None:
    """Its store keeps the addresses of the dead; keys of another restart must not be read."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
        "--max-restarts", "3", "-m", "cordee", "train", *SMALL, *OVERRIDES, f"run.dir={run_dir}",
    ]  # fmt: skip
    with subprocess.Popen(
        command, env=clean_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as agent:
        try:
            for step in (12, 33):
                _wait_for_row(run_dir, step, agent)
                os.kill(int(str(_start_events(run_dir)[-1]["pid"])), signal.SIGKILL)
            _, stderr_bytes = agent.communicate(timeout=240)
        finally:
            agent.kill()
    assert agent.returncode == 0, stderr_bytes.decode()[-3000:]
    assert len(_start_events(run_dir)) == 3
    assert weights_digest(run_dir) == reference_digest


def _start_events(folder: Path) -> list[dict[str, object]]:
    return [e for e in read_events(folder) if e["event"] in ("started", "resumed")]


def _wait_for_row(folder: Path, step: int, agent: subprocess.Popen[bytes]) -> None:
    metrics_path, deadline_s = folder / "metrics.jsonl", time.monotonic() + 120
    while not metrics_path.exists() or len(metrics_path.read_text().splitlines()) < step:
        assert agent.poll() is None and time.monotonic() < deadline_s, "no such step came"
        time.sleep(0.02)
