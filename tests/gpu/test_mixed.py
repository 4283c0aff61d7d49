"""A CUDA host and a CPU host in one run, on one machine's loopback: the same samples, and near."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conftest import read_events, read_rows, run_cordee, train_small
from tests.drills.hosts import LONG_RUN, HostGroup

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
STEPS = 300
COMMON_RUN = ("run.exact=false", "run.precision=fp32", f"run.steps={STEPS}")
"""Long enough for a host to import torch and join."""
CUDA_DEVICE, CPU_DEVICE = "launch.device=cuda", "launch.device=cpu"


def losses(folder: Path) -> list[float]:
    return [float(str(row["loss"])) for row in read_rows(folder)]


@pytest.mark.parametrize(
    "overrides",
    [
        ("sync.protocol=allreduce",), ("sync.protocol=exchange", "sync.codec=bf16"),
        ("sync.protocol=exchange", "optim.name=muon"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("devices", [(CUDA_DEVICE, CPU_DEVICE), (CPU_DEVICE, CUDA_DEVICE)])
def test_the_samples_are_the_same(
    overrides: tuple[str, ...], devices: tuple[str, str], run_dir: Path
) -> None:
    single_dir = run_dir.with_name("alone")
    train_small(single_dir, *LONG_RUN, *COMMON_RUN, *overrides, CPU_DEVICE, "launch.processes=1")
    with HostGroup(run_dir, *COMMON_RUN, *overrides) as host_group:
        hosts = [host_group.start_first(devices[0]), host_group.join(devices[1])]
        host_group.wait_for_islands(2)
        assert [host.wait_exit() for host in hosts] == [0, 0], host_group.transcript()
    assert [row["step"] for row in read_rows(run_dir)] == list(range(1, STEPS + 1))
    assert [row["samples"] for row in read_rows(run_dir)] == [
        row["samples"] for row in read_rows(single_dir)
    ]
    ledger = run_cordee("data", "ledger", str(run_dir))
    assert ledger.returncode == 0, ledger.stdout + ledger.stderr
    rel = 4e-2 if "sync.codec=bf16" in overrides else 1e-2
    assert losses(run_dir) == pytest.approx(losses(single_dir), rel=rel)
    notices = [event for event in read_events(run_dir) if event["event"] == "devices_differ"]
    assert len(notices) == 1
    assert "devices differ (cpu, cuda)" in str(notices[0]["says"])


def test_a_cpu_host_dies_and_another_comes(run_dir: Path) -> None:
    with HostGroup(run_dir, *COMMON_RUN) as host_group:
        founder, joiner = host_group.start_first(CUDA_DEVICE), host_group.join(CPU_DEVICE)
        host_group.wait_for_islands(2)
        host_group.wait_for_step(host_group.last_step + 5)
        joiner.kill()
        host_group.wait_for_islands(1)
        last_joiner = host_group.join(CPU_DEVICE)
        host_group.wait_for_islands(2)
        assert [founder.wait_exit(), last_joiner.wait_exit()] == [0, 0], host_group.transcript()
    ledger = run_cordee("data", "ledger", str(run_dir))
    assert ledger.returncode == 0, ledger.stdout + ledger.stderr


def test_bits_are_promised_to_like_devices_only(run_dir: Path) -> None:
    with HostGroup(run_dir, "run.precision=fp32", f"run.steps={STEPS}") as host_group:
        founder, joiner = host_group.start_first(CUDA_DEVICE), host_group.join(CPU_DEVICE)
        assert joiner.wait_exit(60) == 2, host_group.transcript()
        assert "bits are the same only among like devices" in joiner.output
        assert founder.wait_exit() == 0, host_group.transcript()
    assert {row["islands"] for row in read_rows(run_dir)} == {1}
