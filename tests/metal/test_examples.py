"""The seed program against its formula, on any number of ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import clean_environment

PROGRAM = Path(__file__).resolve().parents[2] / "examples" / "quadratic.py"


@cache
def losses(ranks: int) -> tuple[float, ...]:
    """What the program prints."""
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "--ranks", str(ranks), "--json"],
        env=clean_environment(), capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    told = json.loads(done.stdout)
    assert told["ranks"] == ranks
    return tuple(told["losses"])


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_loss_follows_the_formula(ranks: int) -> None:
    found = losses(ranks)
    assert len(found) == 1000
    ratio = (1 - 2 * 0.01 / 1000) ** 2
    worst = max(abs(loss / (found[0] * ratio**t) - 1) for t, loss in enumerate(found))
    assert worst < 1e-5
    assert found == losses(1)


def test_it_is_as_short_as_it_says() -> None:
    assert len(PROGRAM.read_text().splitlines()) <= 60
