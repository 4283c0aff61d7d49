"""The promise, on real processes: the same bits on any ranks, after any kill, and fp32 curves."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import (
    SMALL,
    TINY,
    clean_environment,
    read_events,
    read_rows,
    run_cordee,
    train_small,
    wait_for_step,
    weights_digest,
)

EXACT_OVERRIDES = ("run.exact=true", "run.steps=60", "evaluate.sample=0")
NO_REPLACEMENT = "fault.recover=false"
"""A death ends the run: the same command then goes on from disk (`test_recovery.py`: in place)."""


@pytest.fixture(scope="module")
def reference_digest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the undisturbed run on one process."""
    folder = tmp_path_factory.mktemp("clean") / "run"
    train_small(folder, *EXACT_OVERRIDES, "launch.processes=1")
    return weights_digest(folder)


@pytest.mark.parametrize(
    "layout",
    [
        ("launch.processes=2",), ("launch.processes=3",), ("launch.processes=4",),
        ("launch.processes=2", "layout.shard=2"), ("launch.processes=4", "layout.shard=2"),
    ],
    ids=lambda words: " ".join(words),
)  # fmt: skip
def test_same_bits_on_any_ranks(
    layout: tuple[str, ...], reference_digest: str, run_dir: Path
) -> None:
    train_small(run_dir, *EXACT_OVERRIDES, *layout)
    assert weights_digest(run_dir) == reference_digest
    assert [row["step"] for row in read_rows(run_dir)] == list(range(1, 61))


def test_same_bits_with_dropout(tmp_path: Path) -> None:
    digests = set()
    for processes in (1, 3):
        folder = tmp_path / str(processes)
        train_small(folder, *EXACT_OVERRIDES, "model.dropout=0.1", f"launch.processes={processes}")
        digests.add(weights_digest(folder))
    assert len(digests) == 1


@pytest.mark.parametrize("point", ["step.commit:33:0", "save.rename:40:0"])
def test_killed_at_a_point_ends_in_the_same_bits(
    point: str, reference_digest: str, run_dir: Path
) -> None:
    command = ("train", *SMALL, *EXACT_OVERRIDES, f"run.dir={run_dir}", "checkpoint.every=10")
    kill_result = run_cordee(*command, "launch.processes=2", f"fault.kill={point}", NO_REPLACEMENT)
    assert kill_result.returncode == 1
    processes = random.Random(point).choice((1, 2, 3))
    assert run_cordee(*command, f"launch.processes={processes}").returncode == 0
    assert weights_digest(run_dir) == reference_digest
    assert [row["step"] for row in read_rows(run_dir)] == list(range(1, 61))


KILL_POINTS = (
    ("save.stage:20:0", 2), ("save.write:20:1", 3), ("save.part:30:0", 1),
    ("save.manifest:30:0", 2), ("save.delete:40:0", 3),
)  # fmt: skip
"""Where each start is killed, and on how many processes. Whatever is left of a step is the same for
the next start: the other points of a step are in `test_recovery.py`, where ranks survive them."""


@pytest.mark.slow
def test_killed_at_one_point_after_another(reference_digest: str, run_dir: Path) -> None:
    command = ("train", *SMALL, *EXACT_OVERRIDES, f"run.dir={run_dir}", "checkpoint.every=10")
    for point, processes in KILL_POINTS:
        kill_result = run_cordee(
            *command, f"launch.processes={processes}", f"fault.kill={point}", NO_REPLACEMENT
        )
        exit_code = 1 if processes > 1 else -signal.SIGKILL  # one process has no supervisor
        assert kill_result.returncode == exit_code, (point, kill_result.stderr[-2000:])
    assert run_cordee(*command, "launch.processes=2").returncode == 0
    assert weights_digest(run_dir) == reference_digest
    assert [row["step"] for row in read_rows(run_dir)] == list(range(1, 61))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_at_a_random_moment(seed: int, reference_digest: str, run_dir: Path) -> None:
    rng = random.Random(seed)
    command = [
        sys.executable, "-m", "cordee", "train", *SMALL, *EXACT_OVERRIDES, f"run.dir={run_dir}",
        "checkpoint.every=5",
    ]  # fmt: skip
    process = subprocess.Popen(
        [*command, f"launch.processes={rng.choice((1, 2))}"],
        env=clean_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for_step(run_dir, rng.randint(0, 50))
    time.sleep(rng.uniform(0, 0.2))
    process.send_signal(signal.SIGKILL)  # its ranks die with it
    process.wait()
    time.sleep(0.3)
    result = run_cordee(*command[3:], f"launch.processes={rng.choice((1, 2, 3))}")
    assert result.returncode == 0, result.stderr[-2000:]
    assert weights_digest(run_dir) == reference_digest
    assert [row["step"] for row in read_rows(run_dir)] == list(range(1, 61))


def test_bf16_gives_the_same_bits_anywhere_and_after_a_kill(tmp_path: Path) -> None:
    """Little: where a processor has no instructions for bf16 it is emulated, and slow."""
    overrides = (
        *EXACT_OVERRIDES, *TINY, "run.steps=12", "run.precision=bf16", "checkpoint.every=5",
    )  # fmt: skip
    train_small(tmp_path / "one", *overrides, "launch.processes=1")
    command = ("train", *SMALL, *overrides, f"run.dir={tmp_path / 'two'}", "launch.processes=2")
    assert run_cordee(*command, "fault.kill=step.agree:8:1", NO_REPLACEMENT).returncode == 1
    assert run_cordee(*command).returncode == 0
    assert weights_digest(tmp_path / "one") == weights_digest(tmp_path / "two")


def test_fp32_curves_agree_without_exact(tmp_path: Path) -> None:
    curves = []
    for processes in (1, 4):
        folder = tmp_path / str(processes)
        train_small(folder, "run.steps=60", "run.precision=fp32", f"launch.processes={processes}")
        curves.append([float(str(row["loss"])) for row in read_rows(folder)])
    assert max(abs(a / b - 1) for a, b in zip(*curves, strict=True)) < 1e-5


def test_corrupted_checkpoint_falls_back(reference_digest: str, run_dir: Path) -> None:
    command = ("train", *SMALL, *EXACT_OVERRIDES, f"run.dir={run_dir}", "checkpoint.every=10")
    run_cordee(*command, "fault.kill=step.start:35:0", NO_REPLACEMENT)
    checkpoint = sorted((run_dir / "checkpoints").glob("step-*"))[-1]
    file = next(checkpoint.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert run_cordee(*command).returncode == 0
    assert weights_digest(run_dir) == reference_digest
    assert any(event["event"] == "checkpoint_rejected" for event in read_events(run_dir))


def test_ctrl_c_saves_and_leaves_then_resumes(reference_digest: str, run_dir: Path) -> None:
    arguments = ("train", *SMALL, *EXACT_OVERRIDES, f"run.dir={run_dir}", "launch.processes=2")
    process = subprocess.Popen(
        [sys.executable, "-m", "cordee", *arguments], env=clean_environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for_step(run_dir, 1)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert read_events(run_dir)[-1]["event"] == "interrupted"
    assert read_events(run_dir)[-1]["saved"] is True
    assert run_cordee(*arguments).returncode == 0
    assert weights_digest(run_dir) == reference_digest


def test_non_finite_gradient_never_reaches_parameters(run_dir: Path) -> None:
    train_small(run_dir, "run.steps=20", "launch.processes=2", "fault.poison=7:1")
    skip_events = [event for event in read_events(run_dir) if event["event"] == "step_skipped"]
    assert [event["step"] for event in skip_events] == [7]
    assert all(row["loss"] is not None for row in read_rows(run_dir))


def test_non_finite_in_a_row_stops_with_the_cause(run_dir: Path) -> None:
    command = ("train", *SMALL, f"run.dir={run_dir}", "run.steps=40", "fault.poison=7-30:0")
    result = run_cordee(*command, "launch.processes=1")
    assert result.returncode == 1
    assert "gradient" in result.stderr
    assert read_events(run_dir)[-1]["event"] == "stopped"


def test_same_command_on_a_finished_run_changes_nothing(run_dir: Path) -> None:
    train_small(run_dir, "run.steps=5")
    old_events = (run_dir / "events.jsonl").read_bytes()
    train_small(run_dir, "run.steps=5")
    assert (run_dir / "events.jsonl").read_bytes() == old_events
