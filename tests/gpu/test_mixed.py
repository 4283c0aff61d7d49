"""A CUDA host and a CPU host in one run, on one machine's loopback: the same samples, and near."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conftest import cordee, events, rows, train
from tests.drills.hosts import LONG, Rope

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
STEPS = 300
ALIKE = ("run.exact=false", "run.precision=fp32", f"run.steps={STEPS}")
"""Long enough for a host to import torch and join."""
CUDA, CPU = "launch.device=cuda", "launch.device=cpu"


def losses(folder: Path) -> list[float]:
    return [float(str(row["loss"])) for row in rows(folder)]


@pytest.mark.parametrize(
    "words",
    [
        ("sync.protocol=allreduce",), ("sync.protocol=exchange", "sync.codec=bf16"),
        ("sync.protocol=exchange", "optim.name=muon"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kinds", [(CUDA, CPU), (CPU, CUDA)])
def test_the_samples_are_the_same(
    words: tuple[str, ...], kinds: tuple[str, str], run_dir: Path
) -> None:
    alone = run_dir.with_name("alone")
    train(alone, *LONG, *ALIKE, *words, CPU, "launch.processes=1")
    with Rope(run_dir, *ALIKE, *words) as rope:
        hosts = [rope.found(kinds[0]), rope.join(kinds[1])]
        rope.until_islands(2)
        assert [host.end() for host in hosts] == [0, 0], rope.told()
    assert [row["step"] for row in rows(run_dir)] == list(range(1, STEPS + 1))
    assert [row["samples"] for row in rows(run_dir)] == [row["samples"] for row in rows(alone)]
    ledger = cordee("data", "ledger", str(run_dir))
    assert ledger.returncode == 0, ledger.stdout + ledger.stderr
    rel = 4e-2 if "sync.codec=bf16" in words else 1e-2
    assert losses(run_dir) == pytest.approx(losses(alone), rel=rel)
    told = [event for event in events(run_dir) if event["event"] == "devices_differ"]
    assert len(told) == 1
    assert "devices differ (cpu, cuda)" in str(told[0]["says"])


def test_a_cpu_host_dies_and_another_comes(run_dir: Path) -> None:
    with Rope(run_dir, *ALIKE) as rope:
        founder, joined = rope.found(CUDA), rope.join(CPU)
        rope.until_islands(2)
        rope.until_step(rope.step + 5)
        joined.kill()
        rope.until_islands(1)
        last = rope.join(CPU)
        rope.until_islands(2)
        assert [founder.end(), last.end()] == [0, 0], rope.told()
    ledger = cordee("data", "ledger", str(run_dir))
    assert ledger.returncode == 0, ledger.stdout + ledger.stderr


def test_bits_are_promised_to_like_devices_only(run_dir: Path) -> None:
    with Rope(run_dir, "run.precision=fp32", f"run.steps={STEPS}") as rope:
        founder, other = rope.found(CUDA), rope.join(CPU)
        assert other.end(60) == 2, rope.told()
        assert "bits are the same only among like devices" in other.said
        assert founder.end() == 0, rope.told()
    assert {row["islands"] for row in rows(run_dir)} == {1}
