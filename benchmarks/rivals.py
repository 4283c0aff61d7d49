"""The systems that `recovery.py` measures Cordée against, and how each of them is struck.

No benchmark by itself. torchrun runs in this environment; torchft 0.2.0 and nvidia-resiliency-ext
0.4.1 in one of their own, whose interpreter `--rivals` names (docs/performance.md says how to make
it): nothing here imports them. All train restarted.py's model on two gloo processes; every system
is set for as fast a recovery as its options allow, which is said at each.

`torchrun`: restarted.py, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, group timeout 10 s. `torchrun-stop`:
the same, SIGSTOP; twice, given 120 s. `torchft`: two replica groups of one process, heartbeats
every 25 ms, dead after 200 ms, group timeout 5 s; the killed one is started again at once by this
benchmark, as torchft leaves that to a scheduler; goes on with half the batch meanwhile.
`torchft-all`: the same, but no step is committed without both. `nvrx`: in-process restart, two
active ranks and a third in reserve, intervals of 50 ms, no last call. `nvrx-launcher`: ft_launcher
in torchrun's place, monitor interval 50 ms.
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
    Late,
    Trial,
    Watched,
    free_port,
    household,
    judged,
    send,
    step_median_s,
    until_rows,
)

if TYPE_CHECKING:
    from benchmarks.recovery import Bench

HERE = Path(__file__).resolve().parent
FREE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
GROUP_TIMEOUT_S = 10
STEPS, STRIKE_AT = 120, 33
"""Steps whose losses are compared with a run without faults, and the step of the fault."""

Begin = Callable[["Bench", Watched], list[subprocess.Popen[bytes]]]
"""Starts a system's processes; the last one can be struck."""


def losses(run: Watched) -> dict[int, float]:
    """The losses of the first STEPS steps that were seen, by step."""
    until_rows(run, STEPS)
    return {number: row["loss"] for number, row in run.rows.items() if number <= STEPS}


def clean(bench: Bench, name: str, begin: Begin) -> dict[int, float]:
    """The losses of a system's run without a fault, measured once."""
    if name not in bench.losses:
        with household(), bench.watch() as run:
            begin(bench, run)
            bench.losses[name] = losses(run)
    return bench.losses[name]


# ---- torchrun ------------------------------------------------------------------------------------


def elastic(python: str, launcher: tuple[str, ...], folder: Path) -> list[str]:
    """restarted.py under a launcher with as many restarts as it likes."""
    return [
        python, "-m", *launcher, "--standalone", "--nproc-per-node", "2", "--max-restarts", "9",
        str(HERE / "restarted.py"), str(folder), str(STEPS), str(GROUP_TIMEOUT_S),
    ]  # fmt: skip


def begin_torchrun(bench: Bench, run: Watched) -> list[subprocess.Popen[bytes]]:
    """The agent; its workers tell their pids."""
    words = elastic(sys.executable, ("torch.distributed.run",), run.folder)
    return [run.start(words, {**FREE, "TMPDIR": str(run.folder)})]


def torchrun(bench: Bench, number: int = signal.SIGKILL) -> list[Trial]:
    """torchrun's restart of all workers from a checkpoint; a stopped run is not waited for."""
    killed = number == signal.SIGKILL
    with bench.watch() as run:
        begin_torchrun(bench, run)
        until_rows(run, STRIKE_AT)
        pid, took = run.last["pids"][1], (math.nan, math.nan)
        step_s = step_median_s(run)
        try:
            took = run.recovery(lambda: send(pid, number), 2)
        except Late as error:
            print(f"torchrun: {error}", file=sys.stderr)
        found = [Trial(f"torchrun: {'kill' if killed else 'SIGSTOP'} rank 1", *took, step_s)]
        if not killed or math.isnan(took[0]):
            return found
        return judged(found, losses(run) == clean(bench, "torchrun", begin_torchrun))


def torchrun_stop(bench: Bench) -> list[Trial]:
    """The same with a worker that is stopped, not dead."""
    return torchrun(bench, signal.SIGSTOP)


# ---- torchft -------------------------------------------------------------------------------------

LIGHTHOUSE = ("--heartbeat_timeout_ms", "200", "--join_timeout_ms", "200", "--quorum_tick_ms", "10")


def rival(
    bench: Bench, run: Watched, words: list[str], environment: dict[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """A process of the rivals' environment; its temporary files lie in the run's folder."""
    mine = {
        "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1", "TMPDIR": str(run.folder),
        "TORCH_CPP_LOG_LEVEL": "error", "RUST_LOG": "warn",
    }  # fmt: skip
    return run.start([bench.rivals, *words], {**mine, **(environment or {})})


def replica(
    bench: Bench, run: Watched, rank: int, port: int, least: int
) -> subprocess.Popen[bytes]:
    """A replica group of one process."""
    words = [str(run.folder), str(rank), f"http://127.0.0.1:{port}", str(least)]
    return rival(bench, run, ["-m", "benchmarks.rival_torchft", *words])


def torchft(bench: Bench, least: int = 1) -> list[Trial]:
    """A replica group dies and is started again at once; the lighthouse lives."""
    name = "torchft" if least == 1 else "torchft-all"
    port = free_port()

    def begin(bench: Bench, run: Watched) -> list[subprocess.Popen[bytes]]:
        lighthouse = Path(bench.rivals).with_name("torchft_lighthouse")
        words = ["--bind", f"127.0.0.1:{port}", "--min_replicas", str(least), *LIGHTHOUSE]
        run.start([str(lighthouse), *words], {"RUST_LOG": "warn"})
        return [replica(bench, run, rank, port, least) for rank in (0, 1)]

    with bench.watch() as run:
        victim = begin(bench, run)[1]

        def killed() -> None:
            send(victim.pid, signal.SIGKILL)
            replica(bench, run, 1, port, least)

        until_rows(run, STRIKE_AT)
        found = [bench.strike(run, f"{name}: kill group 1", killed)]
        told = losses(run)
    return judged(found, told == clean(bench, "torchft", begin))


def torchft_all(bench: Bench) -> list[Trial]:
    """The same, but a step needs both groups."""
    return torchft(bench, 2)


# ---- nvidia-resiliency-ext -----------------------------------------------------------------------


def begin_nvrx(bench: Bench, run: Watched) -> list[subprocess.Popen[bytes]]:
    """Three ranks started by hand, as a scheduler does that lets a job live when a rank dies."""
    port = str(free_port())
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "3"}
    words = ["-m", "benchmarks.rival_nvrx", str(run.folder), str(STEPS)]
    return [
        rival(bench, run, words, {**place, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(3)
    ]


def begin_launcher(bench: Bench, run: Watched) -> list[subprocess.Popen[bytes]]:
    """ft_launcher in torchrun's place."""
    launcher = (
        "nvidia_resiliency_ext.fault_tolerance.launcher", "--monitor-interval", "0.05",
        "--ft-workload-check-interval", "0.05", "--ft-enable-nic-monitor", "false",
        "--workers-stop-timeout", "1",
    )  # fmt: skip
    return [rival(bench, run, elastic(bench.rivals, launcher, run.folder)[1:], FREE)]


def struck(bench: Bench, fault: str, name: str, begin: Begin) -> list[Trial]:
    """SIGKILL of rank 1; what the extension's processes leave behind is ended with the run."""
    with household(), bench.watch() as run:
        begin(bench, run)
        until_rows(run, STRIKE_AT)
        pid = run.last["pids"][1]
        found = [bench.strike(run, fault, lambda: send(pid, signal.SIGKILL))]
        told = losses(run)
    return judged(found, told == clean(bench, name, begin))


def nvrx(bench: Bench) -> list[Trial]:
    """Restart in place: a reserve rank takes the dead one's, the state is read from disk."""
    return struck(bench, "nvrx: kill rank 1", "nvrx", begin_nvrx)


def nvrx_launcher(bench: Bench) -> list[Trial]:
    """Restart of all workers by ft_launcher."""
    return struck(bench, "nvrx-launcher: kill rank 1", "nvrx-launcher", begin_launcher)


# ---- all of them ---------------------------------------------------------------------------------

RIVALS: dict[str, Callable[[Bench], list[Trial]]] = {
    "torchrun": torchrun, "torchrun-stop": torchrun_stop, "torchft": torchft,
    "torchft-all": torchft_all, "nvrx": nvrx, "nvrx-launcher": nvrx_launcher,
}  # fmt: skip
NEEDS = {
    "torchft": "torchft", "torchft-all": "torchft", "nvrx": "nvidia_resiliency_ext",
    "nvrx-launcher": "nvidia_resiliency_ext",
}  # fmt: skip


def interpreter(given: str | None) -> str:
    """The rivals' interpreter as a path; "": none was given, or it is not there."""
    return shutil.which(given) or "" if given else ""


def missing(python: str) -> dict[str, str]:
    """The systems that this interpreter cannot run, and the package of each that it lacks."""
    found = []
    if python:
        code = "import importlib.util, sys; print(*filter(importlib.util.find_spec, sys.argv[1:]))"
        words = [python, "-c", code, *sorted(set(NEEDS.values()))]
        found = subprocess.run(words, capture_output=True, text=True, timeout=60).stdout.split()
    return {name: package for name, package in NEEDS.items() if package not in found}
