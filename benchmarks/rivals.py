"""The systems that `recovery.py` measures Cordée against, and how each of them is struck.

No benchmark by itself. torchrun runs in this environment; torchft 0.2.0 and nvidia-resiliency-ext
0.4.1 in one of their own, whose interpreter `--rivals` names (docs/performance.md says how to make
it): nothing here imports them. All train restarted.py's model on two gloo processes; every system
is set for as fast a recovery as its options allow, which is said at each.

`measure_torchrun`: restarted.py, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, group timeout 10 s.
`torchrun-stop`: the same, SIGSTOP; twice, given 120 s. `measure_torchft`: two replica groups of one
process, heartbeats every 25 ms, dead after 200 ms, group timeout 5 s; the killed one is started
again at once by this benchmark, as torchft leaves that to a scheduler; goes on with half the batch
meanwhile. `torchft-all`: the same, but no step is committed without both. `measure_nvrx`:
in-process restart, two active ranks and a third in reserve, intervals of 50 ms, no last call.
`nvrx-launcher`: ft_launcher in torchrun's place, monitor interval 50 ms.
"""

from __future__ import annotations

import math
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.watched import (
    DeadlineExceeded,
    FaultTrial,
    RunMonitor,
    free_port,
    median_step_s,
    send_signal,
    subreaper,
    wait_for_rows,
    with_digest_check,
)

if TYPE_CHECKING:
    from benchmarks.recovery import RecoveryBench

BENCHMARKS_DIR = Path(__file__).resolve().parent
TORCHRUN_ENVIRONMENT = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
GROUP_TIMEOUT_S = 10
COMPARED_STEPS, FAULT_STEP = 120, 33
"""Steps whose losses are compared with a run without faults, and the step of the fault."""

StartSystem = Callable[["RecoveryBench", RunMonitor], list[subprocess.Popen[bytes]]]
"""Starts a system's processes; the last one can be struck."""


def read_losses(run: RunMonitor) -> dict[int, float]:
    """The losses of the first STEPS steps that were seen, by step."""
    wait_for_rows(run, COMPARED_STEPS)
    return {step: row["loss"] for step, row in run.rows.items() if step <= COMPARED_STEPS}


def clean_losses(bench: RecoveryBench, name: str, start_system: StartSystem) -> dict[int, float]:
    """The losses of a system's run without a fault, measured once."""
    if name not in bench.losses:
        with subreaper(), bench.new_run() as run:
            start_system(bench, run)
            bench.losses[name] = read_losses(run)
    return bench.losses[name]


# ---- torchrun ------------------------------------------------------------------------------------


def elastic_command(python: str, launcher: tuple[str, ...], folder: Path) -> list[str]:
    """restarted.py under a launcher with as many restarts as it likes."""
    return [
        python,
        "-m",
        *launcher,
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "9",
        str(BENCHMARKS_DIR / "restarted.py"),
        str(folder),
        str(COMPARED_STEPS),
        str(GROUP_TIMEOUT_S),
    ]


def start_torchrun(bench: RecoveryBench, run: RunMonitor) -> list[subprocess.Popen[bytes]]:
    """The agent; its workers tell their pids."""
    command = elastic_command(sys.executable, ("torch.distributed.run",), run.folder)
    return [run.start(command, {**TORCHRUN_ENVIRONMENT, "TMPDIR": str(run.folder)})]


def measure_torchrun(bench: RecoveryBench, signal_number: int = signal.SIGKILL) -> list[FaultTrial]:
    """torchrun's restart of all workers from a checkpoint; a stopped run is not waited for."""
    is_kill = signal_number == signal.SIGKILL
    with bench.new_run() as run:
        start_torchrun(bench, run)
        wait_for_rows(run, FAULT_STEP)
        pid, recovery_s = run.last_row["pids"][1], (math.nan, math.nan)
        step_s = median_step_s(run)
        try:
            recovery_s = run.measure_recovery(lambda: send_signal(pid, signal_number), 2)
        except DeadlineExceeded as error:
            print(f"torchrun: {error}", file=sys.stderr)
        trials = [
            FaultTrial(f"torchrun: {'kill' if is_kill else 'SIGSTOP'} rank 1", *recovery_s, step_s)
        ]
        if not is_kill or math.isnan(recovery_s[0]):
            return trials
        return with_digest_check(
            trials, read_losses(run) == clean_losses(bench, "torchrun", start_torchrun)
        )


def measure_torchrun_stop(bench: RecoveryBench) -> list[FaultTrial]:
    """The same with a worker that is stopped, not dead."""
    return measure_torchrun(bench, signal.SIGSTOP)


# ---- torchft -------------------------------------------------------------------------------------

LIGHTHOUSE_FLAGS = (
    "--heartbeat_timeout_ms",
    "200",
    "--join_timeout_ms",
    "200",
    "--quorum_tick_ms",
    "10",
)


def start_rival(
    bench: RecoveryBench,
    run: RunMonitor,
    arguments: list[str],
    environment: dict[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """A process of the rivals' environment; its temporary files lie in the run's folder."""
    base_environment = {
        "PYTHONPATH": str(BENCHMARKS_DIR.parent), "OMP_NUM_THREADS": "1", "TMPDIR": str(run.folder),
        "TORCH_CPP_LOG_LEVEL": "error", "RUST_LOG": "warn",
    }  # fmt: skip
    return run.start([bench.rival_python, *arguments], {**base_environment, **(environment or {})})


def start_replica(
    bench: RecoveryBench, run: RunMonitor, rank: int, port: int, min_replicas: int
) -> subprocess.Popen[bytes]:
    """A replica group of one process."""
    arguments = [str(run.folder), str(rank), f"http://127.0.0.1:{port}", str(min_replicas)]
    return start_rival(bench, run, ["-m", "benchmarks.rival_torchft", *arguments])


def measure_torchft(bench: RecoveryBench, min_replicas: int = 1) -> list[FaultTrial]:
    """A replica group dies and is started again at once; the lighthouse lives."""
    name = "torchft" if min_replicas == 1 else "torchft-all"
    port = free_port()

    def start_groups(bench: RecoveryBench, run: RunMonitor) -> list[subprocess.Popen[bytes]]:
        lighthouse = Path(bench.rival_python).with_name("torchft_lighthouse")
        arguments = [
            "--bind",
            f"127.0.0.1:{port}",
            "--min_replicas",
            str(min_replicas),
            *LIGHTHOUSE_FLAGS,
        ]
        run.start([str(lighthouse), *arguments], {"RUST_LOG": "warn"})
        return [start_replica(bench, run, rank, port, min_replicas) for rank in (0, 1)]

    with bench.new_run() as run:
        victim = start_groups(bench, run)[1]

        def restart_victim() -> None:
            send_signal(victim.pid, signal.SIGKILL)
            start_replica(bench, run, 1, port, min_replicas)

        wait_for_rows(run, FAULT_STEP)
        trials = [bench.inject_fault(run, f"{name}: kill group 1", restart_victim)]
        loss_by_step = read_losses(run)
    return with_digest_check(trials, loss_by_step == clean_losses(bench, "torchft", start_groups))


def measure_torchft_all(bench: RecoveryBench) -> list[FaultTrial]:
    """The same, but a step needs both groups."""
    return measure_torchft(bench, 2)


# ---- nvidia-resiliency-ext -----------------------------------------------------------------------


def start_nvrx(bench: RecoveryBench, run: RunMonitor) -> list[subprocess.Popen[bytes]]:
    """Three ranks started by hand, as a scheduler does that lets a job live when a rank dies."""
    port = str(free_port())
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "3"}
    arguments = ["-m", "benchmarks.rival_nvrx", str(run.folder), str(COMPARED_STEPS)]
    return [
        start_rival(
            bench, run, arguments, {**rendezvous, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank in range(3)
    ]


def start_nvrx_launcher(bench: RecoveryBench, run: RunMonitor) -> list[subprocess.Popen[bytes]]:
    """ft_launcher in torchrun's place."""
    launcher = (
        "nvidia_resiliency_ext.fault_tolerance.launcher", "--monitor-interval", "0.05",
        "--ft-workload-check-interval", "0.05", "--ft-enable-nic-monitor", "false",
        "--workers-stop-timeout", "1",
    )  # fmt: skip
    return [
        start_rival(
            bench,
            run,
            elastic_command(bench.rival_python, launcher, run.folder)[1:],
            TORCHRUN_ENVIRONMENT,
        )
    ]


def measure_kill(
    bench: RecoveryBench, fault: str, name: str, start_system: StartSystem
) -> list[FaultTrial]:
    """SIGKILL of rank 1; what the extension's processes leave behind is ended with the run."""
    with subreaper(), bench.new_run() as run:
        start_system(bench, run)
        wait_for_rows(run, FAULT_STEP)
        pid = run.last_row["pids"][1]
        trials = [bench.inject_fault(run, fault, lambda: send_signal(pid, signal.SIGKILL))]
        loss_by_step = read_losses(run)
    return with_digest_check(trials, loss_by_step == clean_losses(bench, name, start_system))


def measure_nvrx(bench: RecoveryBench) -> list[FaultTrial]:
    """Restart in place: a reserve rank takes the dead one's, the state is read from disk."""
    return measure_kill(bench, "nvrx: kill rank 1", "nvrx", start_nvrx)


def measure_nvrx_launcher(bench: RecoveryBench) -> list[FaultTrial]:
    """Restart of all workers by ft_launcher."""
    return measure_kill(bench, "nvrx-launcher: kill rank 1", "nvrx-launcher", start_nvrx_launcher)


# ---- all of them ---------------------------------------------------------------------------------

RIVALS: dict[str, Callable[[RecoveryBench], list[FaultTrial]]] = {
    "torchrun": measure_torchrun,
    "torchrun-stop": measure_torchrun_stop,
    "torchft": measure_torchft,
    "torchft-all": measure_torchft_all,
    "nvrx": measure_nvrx,
    "nvrx-launcher": measure_nvrx_launcher,
}
RIVAL_PACKAGES = {
    "torchft": "torchft", "torchft-all": "torchft", "nvrx": "nvidia_resiliency_ext",
    "nvrx-launcher": "nvidia_resiliency_ext",
}  # fmt: skip


def find_interpreter(name: str | None) -> str:
    """The rivals' interpreter as a path; "": none was given, or it is not there."""
    return shutil.which(name) or "" if name else ""


def missing_packages(python: str) -> dict[str, str]:
    """The systems that this interpreter cannot run, and the package of each that it lacks."""
    packages = []
    if python:
        code = "import importlib.util, sys; print(*filter(importlib.util.find_spec, sys.argv[1:]))"
        command = [python, "-c", code, *sorted(set(RIVAL_PACKAGES.values()))]
        packages = subprocess.run(
            command, capture_output=True, text=True, timeout=60
        ).stdout.split()
    return {name: package for name, package in RIVAL_PACKAGES.items() if package not in packages}
