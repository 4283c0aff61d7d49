"""Mixtures and finite epochs: any number of islands, any kill, the same samples and bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import read_events, read_rows, run_cordee, train_small, weights_digest
from tests.drills.background_run import BackgroundRun, check_same_descent

OVERRIDES = ("run.exact=true", "evaluate.sample=0", "checkpoint.every=10", "run.epochs=3",
         "data.tokens=0", "data.weights=3,1")  # fmt: skip


@pytest.fixture
def mixture_overrides(tmp_path: Path) -> tuple[str, ...]:
    """A run of three epochs over a text and a folder of shards."""
    (tmp_path / "one.txt").write_text("the quick brown fox jumps over it. " * 120)
    (tmp_path / "two.txt").write_text("0123456789 and so on; " * 140)
    result = run_cordee(
        "data", "prepare", "two.txt", "shards", "--held-out", "0.2", folder=tmp_path
    )
    assert result.returncode == 0, result.stderr
    return (*OVERRIDES, f"data.path={tmp_path}/one.txt;{tmp_path}/shards")


def ledger(run: Path, *arguments: str) -> dict[str, Any]:
    result = run_cordee("data", "ledger", str(run), *arguments, "--json")
    assert result.returncode == 0, result.stdout + result.stderr
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def test_a_mixture_is_the_same_on_any_islands_over_any_kill(
    mixture_overrides: tuple[str, ...], tmp_path: Path
) -> None:
    train_small(tmp_path / "clean", *mixture_overrides, "launch.processes=1")
    steps = len(read_rows(tmp_path / "clean"))
    kill = f"fault.kill=step.reduce:{steps // 2}:0"
    with BackgroundRun(tmp_path / "run", *mixture_overrides, "launch.processes=3", kill) as run:
        assert run.wait_exit() == 0, run.output[-3000:]
        assert len(run.events_named("lost")) == 1
    check_same_descent(tmp_path / "run", weights_digest(tmp_path / "clean"), steps)
    proof = ledger(tmp_path / "run")
    assert 3.0 <= proof["epochs"] < 3.0 + 1 / 3
    text_source, shard_source = proof["sources"]
    assert text_source["drawn"] + shard_source["drawn"] == round(proof["epochs"] * proof["samples"])
    assert abs(text_source["drawn"] - 3 * shard_source["drawn"]) <= 0.1 * text_source["drawn"]
    step = ledger(tmp_path / "run", "--step", "4")
    sample = step["samples"][1][0]
    sample_answer = ledger(tmp_path / "run", "--sample", str(sample))
    assert {(use["step"], use["microbatch"], use["row"]) for use in sample_answer["uses"]} >= {
        (4, 1, 0)
    }
    assert sample_answer["source"].endswith(("one.txt", "shards"))


def test_other_weights_are_another_run(mixture_overrides: tuple[str, ...], run_dir: Path) -> None:
    train_small(run_dir, *mixture_overrides, "launch.processes=1")
    event_count = len(read_events(run_dir))
    result = run_cordee("train", *mixture_overrides, "data.weights=1,1", f"run.dir={run_dir}")
    assert result.returncode == 2 and "data.weights" in result.stderr
    assert len(read_events(run_dir)) == event_count


def test_a_prepared_folder_on_two_ranks(mixture_overrides: tuple[str, ...], tmp_path: Path) -> None:
    """The ranks' launcher reads it where it lies."""
    overrides = (
        "data.tokens=0",
        f"data.path={tmp_path}/shards",
        "run.steps=4",
        "evaluate.sample=0",
    )
    train_small(tmp_path / "run", *overrides, "launch.processes=2")
    assert ledger(tmp_path / "run")["holds"]
