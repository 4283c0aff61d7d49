"""The seed program against its formula, on any number of ranks."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import clean_environment, read_events

PROGRAM = Path(__file__).resolve().parents[2] / "examples" / "quadratic.py"


@cache
def run_losses(ranks: int) -> tuple[float, ...]:
    """What the program prints."""
    result = subprocess.run(
        [sys.executable, str(PROGRAM), "--ranks", str(ranks), "--json"],
        env=clean_environment(), capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    answer = json.loads(result.stdout)
    assert answer["ranks"] == ranks
    return tuple(answer["losses"])


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_loss_follows_the_formula(ranks: int) -> None:
    values = run_losses(ranks)
    assert len(values) == 1000
    ratio = (1 - 2 * 0.01 / 1000) ** 2
    max_error = max(abs(loss / (values[0] * ratio**t) - 1) for t, loss in enumerate(values))
    assert max_error < 1e-5
    assert values == run_losses(1)


@pytest.mark.parametrize("name", ["any_module", "keras_model"])
def test_a_brought_model_learns(name: str, tmp_path: Path) -> None:
    if name == "keras_model" and importlib.util.find_spec("keras") is None:
        pytest.skip('needs pip install "cordee[keras]"')
    program = PROGRAM.with_name(f"{name}.py")
    result = subprocess.run(
        [sys.executable, str(program), "run.steps=60", f"run.dir={tmp_path / 'run'}"],
        env=clean_environment(), capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    loss = float(result.stdout.split("loss ")[1].split()[0])
    assert loss == pytest.approx(read_events(tmp_path / "run")[-1]["held_out_loss"], abs=1e-4)
    assert loss < 0.7
    assert len(program.read_text().splitlines()) <= 42


def test_it_is_as_short_as_it_says() -> None:
    assert len(PROGRAM.read_text().splitlines()) <= 60
