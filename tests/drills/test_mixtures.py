"""Mixtures and finite epochs: any number of islands, any kill, the same samples and bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import cordee, digest, events, rows, train
from tests.drills.live import Live, same_descent

WORDS = ("run.exact=true", "evaluate.sample=0", "checkpoint.every=10", "run.epochs=3",
         "data.tokens=0", "data.weights=3,1")  # fmt: skip


@pytest.fixture
def mixed(tmp_path: Path) -> tuple[str, ...]:
    """A run of three epochs over a text and a folder of shards."""
    (tmp_path / "one.txt").write_text("the quick brown fox jumps over it. " * 120)
    (tmp_path / "two.txt").write_text("0123456789 and so on; " * 140)
    made = cordee("data", "prepare", "two.txt", "shards", "--held-out", "0.2", folder=tmp_path)
    assert made.returncode == 0, made.stderr
    return (*WORDS, f"data.path={tmp_path}/one.txt;{tmp_path}/shards")


def ledger(run: Path, *words: str) -> dict[str, Any]:
    done = cordee("data", "ledger", str(run), *words, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_mixture_is_the_same_on_any_islands_over_any_kill(
    mixed: tuple[str, ...], tmp_path: Path
) -> None:
    train(tmp_path / "clean", *mixed, "launch.processes=1")
    steps = len(rows(tmp_path / "clean"))
    kill = f"fault.kill=step.reduce:{steps // 2}:0"
    with Live(tmp_path / "run", *mixed, "launch.processes=3", kill) as run:
        assert run.end() == 0, run.said[-3000:]
        assert len(run.told("lost")) == 1
    same_descent(tmp_path / "run", digest(tmp_path / "clean"), steps)
    proof = ledger(tmp_path / "run")
    assert 3.0 <= proof["epochs"] < 3.0 + 1 / 3
    one, two = proof["sources"]
    assert one["drawn"] + two["drawn"] == round(proof["epochs"] * proof["samples"])
    assert abs(one["drawn"] - 3 * two["drawn"]) <= 0.1 * one["drawn"]
    step = ledger(tmp_path / "run", "--step", "4")
    sample = step["samples"][1][0]
    found = ledger(tmp_path / "run", "--sample", str(sample))
    assert {(use["step"], use["microbatch"], use["row"]) for use in found["uses"]} >= {(4, 1, 0)}
    assert found["source"].endswith(("one.txt", "shards"))


def test_other_weights_are_another_run(mixed: tuple[str, ...], run_dir: Path) -> None:
    train(run_dir, *mixed, "launch.processes=1")
    before = len(events(run_dir))
    other = cordee("train", *mixed, "data.weights=1,1", f"run.dir={run_dir}")
    assert other.returncode == 2 and "data.weights" in other.stderr
    assert len(events(run_dir)) == before


def test_a_prepared_folder_on_two_ranks(mixed: tuple[str, ...], tmp_path: Path) -> None:
    """The ranks' launcher reads it where it lies."""
    words = ("data.tokens=0", f"data.path={tmp_path}/shards", "run.steps=4", "evaluate.sample=0")
    train(tmp_path / "run", *words, "launch.processes=2")
    assert ledger(tmp_path / "run")["holds"]
