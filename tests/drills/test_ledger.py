"""What ranks noted as they loaded proves exactly-once, whatever the layout and whatever broke."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SMALL, cordee, rows, train


def ledger(run: Path, *words: str, code: int = 0) -> dict[str, Any]:
    done = cordee("data", "ledger", str(run), *words, "--json")
    assert done.returncode == code, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    "layout",
    ["layout.pipeline=2", "layout.context=2", "layout.tensor=2", "data.placement=replicate"],
)
def test_layouts_leave_the_same_words(layout: str, tmp_path: Path) -> None:
    words = ("run.steps=6", "evaluate.sample=0", "model.layers=2", "data.prefetch=1")
    train(tmp_path / "one", *words[:3], "launch.processes=1")
    train(tmp_path / "cut", *words, "launch.processes=2", layout)
    one, cut = ([row["samples"] for row in rows(tmp_path / name)] for name in ("one", "cut"))
    assert one == cut
    assert ledger(tmp_path / "cut")["holds"]


def test_a_killed_run_took_each_sample_once(run_dir: Path) -> None:
    words = ("train", *SMALL, f"run.dir={run_dir}", "run.steps=40", "checkpoint.every=10",
             "evaluate.sample=0")  # fmt: skip
    drill = ("fault.kill=step.commit:25:1", "fault.recover=false")
    assert cordee(*words, "launch.processes=2", *drill).returncode == 1
    assert cordee(*words, "launch.processes=3").returncode == 0
    proof = ledger(run_dir)
    assert proof["holds"] and proof["steps"] == 40 and not proof["skipped"]
    step = ledger(run_dir, "--step", "21")
    sample = step["samples"][3][1]
    use = {"step": 21, "microbatch": 3, "row": 1, "epoch": 0}
    assert use in ledger(run_dir, "--sample", str(sample))["uses"]

    # A row that says otherwise, and one that is gone, are found.
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    lines[7] = lines[7].replace('"samples": "', '"samples": "0')
    (run_dir / "metrics.jsonl").write_text("\n".join([*lines[:30], *lines[31:]]) + "\n")
    proof = ledger(run_dir, code=1)
    assert (proof["wrong"], proof["missing"]) == ([8], [31])


def test_questions_without_an_answer_are_refused(run_dir: Path) -> None:
    train(run_dir, "run.steps=3", "launch.processes=1", "evaluate.sample=0")
    for words in (("--step", "4"), ("--sample", "-1"), ("--step", "1", "--sample", "1")):
        done = cordee("data", "ledger", str(run_dir), *words)
        assert done.returncode == 2 and "fix" in done.stderr and not done.stdout
    assert cordee("data", "ledger", str(run_dir / "nowhere")).returncode == 2
