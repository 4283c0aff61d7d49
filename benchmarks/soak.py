"""Mixed faults for minutes on end: the run must come back every time and end bit for bit the same.

    python -m benchmarks.soak --minutes 30 --seed 1 [--hosts 1|2] [--workers N] [--json]
                              [--steps N [--digest D]]

One exact run; the seed chooses faults and pauses (mean --pause seconds): SIGKILL of any worker, of
the spare, of all, of two in a row, of a supervisor (the same command follows; of two hosts, the
other goes on and the dead one joins it again); SIGSTOP, short, or longer than fault.silence_s with
SIGCONT when it has been replaced; SIGTERM to one worker (it leaves until its supervisor is started
again). After 90 % of the steps the run is let alone; then the digest must be that of a run without
faults, each sample once by `cordee data ledger`, one row a step, and nothing be left: no
process, port, shared memory or temporary file. --digest: that of N steps without faults, known from
another soak (hosts and workers do not change it). The last line replays it. Exit code 1: it failed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from benchmarks.recovery import final_digest
from benchmarks.watched import (
    DeadlineExceeded,
    RunMonitor,
    child_pids,
    find_live_address,
    free_port,
    is_alive,
    is_listening,
    read_events,
    subreaper,
    train_command,
    worker_name,
)

SILENCE_S = 5.0
RECOVERY_LIMIT_S = 60.0
"""A run that commits no step for so long after a fault hangs."""
EXIT_LIMIT_S = 2.0
"""Workers may outlive their supervisor by so much."""

FAULT_WEIGHTS = {
    "kill": 6, "twice": 3, "all": 1, "spare": 2, "short stop": 2, "long stop": 1, "leave": 1,
    "supervisor": 2,
}  # fmt: skip


def signal_sender(pid: int) -> Callable[[int], None]:
    """Sends signals to the process that has this pid now, and to no later one."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return lambda signal_number: None

    def send_signal(signal_number: int) -> None:
        try:
            signal.pidfd_send_signal(descriptor, signal_number)
        except ProcessLookupError:
            return

    return send_signal


class Soak:
    """The run, its hosts, and what was done to it. `recovery_times_s`: seconds to the next step, by
    fault."""

    def __init__(self, run: RunMonitor, overrides: list[str], hosts: int, seed: int) -> None:
        self.run, self.overrides, self.seed = run, overrides, seed
        self.rng = random.Random(seed)
        self.address = f"127.0.0.1:{free_port()}" if hosts > 1 else ""
        self.host_count = hosts
        self.hosts: list[subprocess.Popen[bytes]] = []
        self.recovery_times_s: dict[str, list[float]] = {}
        self.seen_pids: set[int] = set()
        self.temporary_folder = run.folder.with_name("temporary")
        self.temporary_folder.mkdir()
        self.draining_host: subprocess.Popen[bytes] | None = None

    # ---- hosts ----

    def start_host(self) -> None:
        """Starts a supervisor: the first founds the run, another joins who is there now."""
        flags = ["--listen", self.address] if self.address else []
        if self.hosts:
            flags = ["--join", find_live_address(self.run.folder, "")]
        environment = {"TMPDIR": str(self.temporary_folder)}
        self.hosts.append(
            self.run.start([*train_command(self.run.folder, *self.overrides), *flags], environment)
        )

    def worker_names(self) -> dict[int, str]:
        """Living workers of all hosts, by pid, with what they call themselves."""
        names = {pid: worker_name(pid) for host in self.hosts for pid in child_pids(host.pid)}
        self.seen_pids |= set(names)
        return names

    def rank_pids(self) -> list[int]:
        """Pids of those that compute."""
        return sorted(pid for pid, name in self.worker_names().items() if name.startswith("rank"))

    def is_whole(self) -> bool:
        """Whether every host is up and has a rank."""
        names_by_host = [
            [worker_name(child) for child in child_pids(host.pid)] for host in self.hosts
        ]
        return len(names_by_host) == self.host_count and all(
            any(name.startswith(("rank", "ready")) for name in names) for names in names_by_host
        )

    def check_hosts(self) -> None:
        """Late: a supervisor ended that nobody killed, before the run was over."""
        for host in self.hosts:
            if host.poll() not in (None, 0):
                raise DeadlineExceeded(
                    f"a supervisor left with {host.returncode}\n{self.run.log_tail()}"
                )

    # ---- faults ----

    def choose_fault(self) -> str:
        """The next fault; a host that was left by a worker is soon started again."""
        if self.draining_host:
            return "supervisor"
        return self.rng.choices(list(FAULT_WEIGHTS), list(FAULT_WEIGHTS.values()))[0]

    def inject(self, fault: str) -> None:
        """One fault, and the run's way back. Late: it did not come back."""
        ranks, rng = self.rank_pids(), self.rng
        fraction, pause_s = rng.random(), rng.uniform(0.0, 0.4)
        if not ranks:
            return
        pid = ranks[int(fraction * len(ranks))]
        signal_victim = signal_sender(pid)
        match fault:
            case "kill":
                self._expect_recovery(fault, lambda: signal_victim(signal.SIGKILL))
            case "twice":
                self._expect_recovery(
                    fault, lambda: self._kill_twice(signal_victim, pause_s, fraction)
                )
            case "all":
                senders = [signal_sender(pid) for pid in self.worker_names()]
                self._expect_recovery(
                    fault, lambda: [send_signal(signal.SIGKILL) for send_signal in senders]
                )
            case "spare":
                for spare_pid in [p for p, name in self.worker_names().items() if name == "ready"][
                    :1
                ]:
                    signal_sender(spare_pid)(signal.SIGKILL)
                    self._expect_progress(fault)
            case "short stop":
                signal_victim(signal.SIGSTOP)
                time.sleep(0.1 + 3 * pause_s)
                signal_victim(signal.SIGCONT)
                self._expect_progress(fault)
            case "long stop":
                self._expect_recovery(fault, lambda: signal_victim(signal.SIGSTOP))
                signal_victim(signal.SIGCONT)
            case "leave" if len(ranks) > 1:
                self.draining_host = next(
                    (host for host in self.hosts if pid in child_pids(host.pid)), None
                )
                self._expect_recovery(fault, lambda: signal_victim(signal.SIGTERM))
            case "supervisor":
                self._kill_host(self.draining_host or self.hosts[int(fraction * len(self.hosts))])
                self.draining_host = None

    def _kill_twice(
        self, signal_first: Callable[[int], None], pause_s: float, fraction: float
    ) -> None:
        signal_first(signal.SIGKILL)
        time.sleep(pause_s)
        if survivors := sorted(pid for pid, name in self.worker_names().items() if name):
            signal_sender(survivors[int(fraction * len(survivors))])(signal.SIGKILL)

    def _kill_host(self, host: subprocess.Popen[bytes]) -> None:
        """Kills a supervisor; with other hosts only when all are whole, so that they can go on, or
        when it is the one that was left."""
        if self.host_count > 1 and host is not self.draining_host and not self.is_whole():
            return
        worker_pids = child_pids(host.pid)
        self.seen_pids |= {host.pid, *worker_pids}

        def kill() -> None:
            host.kill()
            host.wait()
            end_s = time.monotonic() + EXIT_LIMIT_S
            while any(map(is_alive, worker_pids)):
                if time.monotonic() > end_s:
                    raise DeadlineExceeded(f"workers outlive their supervisor: {worker_pids}")
                time.sleep(0.005)
            self.hosts.remove(host)
            if not self.hosts:
                self.start_host()

        self._expect_recovery("supervisor" if self.host_count == 1 else "host", kill)
        if len(self.hosts) < self.host_count:
            self.start_host()

    def _expect_recovery(self, fault: str, inject: Callable[[], object]) -> None:
        """A fault after which there is a new generation, which then gets further than the last: a
        third failure before that is taken for a crash that repeats."""
        furthest_step = max(self.run.rows, default=0)
        first_s, _ = self.run.measure_recovery(inject, 1, RECOVERY_LIMIT_S)
        self.recovery_times_s.setdefault(fault, []).append(first_s)
        self.run.wait_until(
            lambda: max(self.run.rows) > furthest_step, RECOVERY_LIMIT_S, f"progress after {fault}"
        )

    def _expect_progress(self, fault: str) -> None:
        """A fault that may change nothing: the next row must come."""
        self.run.read_new_rows()
        start_s, old_row = time.monotonic(), self.run.last_row
        self.run.wait_until(
            lambda: self.run.last_row is not old_row,
            RECOVERY_LIMIT_S,
            f"a step after {fault}",
            0.002,
        )
        self.recovery_times_s.setdefault(fault, []).append(time.monotonic() - start_s)

    # ---- the whole ----

    def run_faults(self, steps: int, minutes: float, pause_s: float) -> None:
        """Faults until 90 % of the steps are done or twice the time is over."""
        end_s = time.monotonic() + 120 * minutes
        while len(self.hosts) < self.host_count:
            self.start_host()
            self.run.wait_until(lambda: len(self.run.rows) > 5, RECOVERY_LIMIT_S, "the first steps")
        while True:
            wait_s = min(self.rng.expovariate(1 / pause_s), 4 * pause_s)
            pause_end_s = time.monotonic() + wait_s
            while time.monotonic() < pause_end_s:
                self.run.read_new_rows()
                self.check_hosts()
                time.sleep(0.02)
            if max(self.run.rows, default=0) > 0.9 * steps or time.monotonic() > end_s:
                return
            fault = self.choose_fault()
            print(f"step {max(self.run.rows):6d}  {fault}", file=sys.stderr, flush=True)
            self.inject(fault)


def find_leftovers(soak: Soak) -> list[str]:
    """Whatever of the run is still there."""
    leftovers = [f"process {pid}" for pid in child_pids(os.getpid())]
    if soak.address and is_listening(soak.address):
        leftovers.append(f"somebody listens on {soak.address}")
    names = [path.name for path in soak.temporary_folder.rglob("*")]
    leftovers += [f"file {name}" for name in names if not name.startswith("torchinductor_")]
    pids = set(map(str, soak.seen_pids))
    shared_names = [path.name for path in Path("/dev/shm").iterdir()]
    name_parts = {name: set(name.replace("-", "_").split("_")) for name in shared_names}
    return leftovers + [f"shared memory {name}" for name in shared_names if pids & name_parts[name]]


def find_problems(soak: Soak, clean_digest: str, steps: int) -> list[str]:
    """What is wrong with the run at its end; nothing, if all is well."""
    problems = []
    for host in soak.hosts:
        if host.wait(30):
            problems.append(f"a supervisor left with exit code {host.returncode}")
    folder = soak.run.folder
    if final_digest(soak.run) != clean_digest:
        problems.append("the digest is not that of the run without faults")
    soak.run.read_new_rows()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    if [json.loads(line)["step"] for line in lines] != list(range(1, steps + 1)):
        problems.append("the rows are not one a step")
    ledger_result = subprocess.run(
        [sys.executable, "-m", "cordee", "data", "ledger", str(folder), "--json"],
        capture_output=True, text=True,
    )  # fmt: skip
    if ledger_result.returncode:
        problems.append(
            f"the ledger does not prove exactly-once: {ledger_result.stdout}{ledger_result.stderr}"
        )
    soak.seen_pids |= {int(m["pid"]) for e in read_events(folder) for m in e.get("members", ())}
    return [*problems, *find_leftovers(soak)]


def run_without_faults(home: Path, overrides: list[str]) -> tuple[str, float]:
    """The digest without faults, and the median step in seconds."""
    folder = home / f"clean-{len(list(home.iterdir()))}"
    folder.mkdir()
    with RunMonitor(folder, home / "clean.log") as run:
        run.start(train_command(folder, *overrides, "fault.spares=0"))
        run.wait_until(lambda: run.processes[0].poll() is not None, 7200, "the run without faults")
        digest = final_digest(run)
        run.read_new_rows()
        return digest, median(float(row["step_s"]) for row in run.rows.values())


@contextmanager
def home_folder(path: str) -> Iterator[str]:
    """A new folder that is removed at the end, or the one that is to be kept."""
    if path:
        Path(path).mkdir(parents=True)
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="cordee-soak-") as home:
        yield home


def print_report(soak: Soak) -> None:
    """A table of faults and ways back."""
    print(f"{'fault':12s}  times  seconds to the next step: median (smallest - largest)")
    for fault, times_s in sorted(soak.recovery_times_s.items()):
        summary = f"{median(times_s):.2f} ({min(times_s):.2f} - {max(times_s):.2f})"
        print(f"{fault:12s}  {len(times_s):5d}  {summary}")


def main() -> None:
    """Runs, judges, prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--hosts", type=int, default=1, choices=(1, 2))
    parser.add_argument("--workers", type=int, default=2, help="of each host")
    parser.add_argument("--pause", type=float, default=4.0, help="mean seconds between faults")
    parser.add_argument("--steps", type=int, default=0, help="0: from the measured speed")
    parser.add_argument("--digest", default="", help="of --steps without faults, where known")
    parser.add_argument("--keep", default="", help="folder that is kept, for looking into it")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.digest and not args.steps:
        parser.error("--digest is that of a number of steps: give --steps too")
    os.environ.setdefault("PYTHONPATH", str(Path(__file__).resolve().parent.parent))
    problems: list[str] = []
    with home_folder(args.keep) as home, subreaper():
        overrides = [f"launch.processes={args.workers}", f"fault.silence_s={SILENCE_S}"]
        steps = args.steps
        if not steps:  # recoveries take about a quarter of the time
            _, step_s = run_without_faults(Path(home), [*overrides, "run.steps=100"])
            steps = max(100, int(args.minutes * 60 * 0.75 / step_s))
        overrides.append(f"run.steps={steps}")
        replay_command = (
            f"python -m benchmarks.soak --minutes {args.minutes:g} --seed {args.seed}"
            f" --hosts {args.hosts} --workers {args.workers} --pause {args.pause:g}"
            f" --steps {steps}"
        )
        print(replay_command, flush=True)
        clean_digest = args.digest or run_without_faults(Path(home), overrides)[0]
        print(f"digest without faults: {clean_digest}", flush=True)
        folder = Path(home) / "run"
        folder.mkdir()
        with RunMonitor(folder, Path(home) / "run.log") as run:
            soak = Soak(run, overrides, args.hosts, args.seed)
            try:
                soak.run_faults(steps, args.minutes, args.pause)
                run.wait_until(
                    lambda: all(host.poll() is not None for host in soak.hosts),
                    120 * args.minutes + 120, "the end of the run", 0.05,
                )  # fmt: skip
                problems = find_problems(soak, clean_digest, steps)
            except DeadlineExceeded as error:
                problems = [str(error)]
            print_report(soak)
    for problem in problems:
        print(f"WRONG: {problem}")
    print(f"{'failed' if problems else 'passed'}: {replay_command}")
    if args.json:
        print(json.dumps({"wrong": problems, "back_s": soak.recovery_times_s, "steps": steps}))
    raise SystemExit(1 if problems else 0)


if __name__ == "__main__":
    main()
