"""What ranks noted as they loaded proves exactly-once, whatever the layout and whatever broke."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SMALL, read_rows, run_cordee, train_small


def ledger(run: Path, *arguments: str, exit_code: int = 0) -> dict[str, Any]:
    result = run_cordee("data", "ledger", str(run), *arguments, "--json")
    assert result.returncode == exit_code, result.stderr
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


@pytest.mark.parametrize(
    "layout",
    ["layout.pipeline=2", "layout.context=2", "layout.tensor=2", "data.placement=replicate"],
)
def test_layouts_leave_the_same_words(layout: str, tmp_path: Path) -> None:
    overrides = ("run.steps=6", "evaluate.sample=0", "model.layers=2", "data.prefetch=1")
    train_small(tmp_path / "one", *overrides[:3], "launch.processes=1")
    train_small(tmp_path / "cut", *overrides, "launch.processes=2", layout)
    reference_samples, layout_samples = (
        [row["samples"] for row in read_rows(tmp_path / name)] for name in ("one", "cut")
    )
    assert reference_samples == layout_samples
    assert ledger(tmp_path / "cut")["holds"]


def test_a_killed_run_took_each_sample_once(run_dir: Path) -> None:
    command = ("train", *SMALL, f"run.dir={run_dir}", "run.steps=40", "checkpoint.every=10",
             "evaluate.sample=0")  # fmt: skip
    drill = ("fault.kill=step.commit:25:1", "fault.recover=false")
    assert run_cordee(*command, "launch.processes=2", *drill).returncode == 1
    assert run_cordee(*command, "launch.processes=3").returncode == 0
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
    proof = ledger(run_dir, exit_code=1)
    assert (proof["wrong"], proof["missing"]) == ([8], [31])


def test_questions_without_an_answer_are_refused(run_dir: Path) -> None:
    train_small(run_dir, "run.steps=3", "launch.processes=1", "evaluate.sample=0")
    for arguments in (("--step", "4"), ("--sample", "-1"), ("--step", "1", "--sample", "1")):
        result = run_cordee("data", "ledger", str(run_dir), *arguments)
        assert result.returncode == 2 and "fix" in result.stderr and not result.stdout
    assert run_cordee("data", "ledger", str(run_dir / "nowhere")).returncode == 2
