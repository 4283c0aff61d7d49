"""A short soak: seeded faults of all kinds in one run, which ends as if there were none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import clean_environment

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.nightly
@pytest.mark.parametrize("hosts", [1, 2])
def test_a_short_soak_leaves_the_descent_and_the_machine_as_they_were(hosts: int) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.soak", "--minutes", "0.5", "--seed", "3",
         "--hosts", str(hosts), "--workers", str(3 - hosts), "--steps", "200", "--pause", "1.5"],
        cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    assert "passed: python -m benchmarks.soak" in result.stdout
