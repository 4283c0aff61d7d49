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

from benchmarks.recovery import ending
from benchmarks.watched import (
    Late,
    Watched,
    address_of,
    called,
    children,
    command,
    events,
    free_port,
    household,
    listens,
    lives,
)

SILENCE_S = 5.0
BACK_S = 60.0
"""A run that commits no step for so long after a fault hangs."""
GONE_S = 2.0
"""Workers may outlive their supervisor by so much."""

WEIGHTS = {
    "kill": 6, "twice": 3, "all": 1, "spare": 2, "short stop": 2, "long stop": 1, "leave": 1,
    "supervisor": 2,
}  # fmt: skip


def aim(pid: int) -> Callable[[int], None]:
    """Sends signals to the process that has this pid now, and to no later one."""
    try:
        target = os.pidfd_open(pid)
    except ProcessLookupError:
        return lambda number: None

    def fire(number: int) -> None:
        try:
            signal.pidfd_send_signal(target, number)
        except ProcessLookupError:
            return

    return fire


class Soak:
    """The run, its hosts, and what was done to it. `back_s`: seconds to the next step, by fault."""

    def __init__(self, run: Watched, words: list[str], hosts: int, seed: int) -> None:
        self.run, self.words, self.seed = run, words, seed
        self.random = random.Random(seed)
        self.place = f"127.0.0.1:{free_port()}" if hosts > 1 else ""
        self.wanted = hosts
        self.hosts: list[subprocess.Popen[bytes]] = []
        self.back_s: dict[str, list[float]] = {}
        self.pids: set[int] = set()
        self.temporary = run.folder.with_name("temporary")
        self.temporary.mkdir()
        self.left: subprocess.Popen[bytes] | None = None

    # ---- hosts ----

    def raise_host(self) -> None:
        """Starts a supervisor: the first founds the run, another joins who is there now."""
        flags = ["--listen", self.place] if self.place else []
        if self.hosts:
            flags = ["--join", address_of(self.run.folder, "")]
        more = {"TMPDIR": str(self.temporary)}
        self.hosts.append(self.run.start([*command(self.run.folder, *self.words), *flags], more))

    def workers(self) -> dict[int, str]:
        """Living workers of all hosts, by pid, with what they call themselves."""
        found = {pid: called(pid) for host in self.hosts for pid in children(host.pid)}
        self.pids |= set(found)
        return found

    def ranks(self) -> list[int]:
        """Pids of those that compute."""
        return sorted(pid for pid, name in self.workers().items() if name.startswith("rank"))

    def whole(self) -> bool:
        """Whether every host is up and has a rank."""
        each = [[called(c) for c in children(h.pid)] for h in self.hosts]
        return len(each) == self.wanted and all(any(map(str.strip, names)) for names in each)

    def check_hosts(self) -> None:
        """Late: a supervisor ended that nobody killed, before the run was over."""
        for host in self.hosts:
            if host.poll() not in (None, 0):
                raise Late(f"a supervisor left with {host.returncode}\n{self.run.words()}")

    # ---- faults ----

    def choose(self) -> str:
        """The next fault; a host that was left by a worker is soon started again."""
        if self.left:
            return "supervisor"
        return self.random.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]

    def strike(self, fault: str) -> None:
        """One fault, and the run's way back. Late: it did not come back."""
        ranks, pick = self.ranks(), self.random
        part, pause_s = pick.random(), pick.uniform(0.0, 0.4)
        if not ranks:
            return
        pid = ranks[int(part * len(ranks))]
        victim = aim(pid)
        match fault:
            case "kill":
                self._back(fault, lambda: victim(signal.SIGKILL))
            case "twice":
                self._back(fault, lambda: self._twice(victim, pause_s, part))
            case "all":
                everybody = [aim(pid) for pid in self.workers()]
                self._back(fault, lambda: [fire(signal.SIGKILL) for fire in everybody])
            case "spare":
                for spare in [p for p, name in self.workers().items() if name == "ready"][:1]:
                    aim(spare)(signal.SIGKILL)
                    self._goes_on(fault)
            case "short stop":
                victim(signal.SIGSTOP)
                time.sleep(0.1 + 3 * pause_s)
                victim(signal.SIGCONT)
                self._goes_on(fault)
            case "long stop":
                self._back(fault, lambda: victim(signal.SIGSTOP))
                victim(signal.SIGCONT)
            case "leave" if len(ranks) > 1:
                self.left = next((h for h in self.hosts if pid in children(h.pid)), None)
                self._back(fault, lambda: victim(signal.SIGTERM))
            case "supervisor":
                self._behead(self.left or self.hosts[int(part * len(self.hosts))])
                self.left = None

    def _twice(self, first: Callable[[int], None], pause_s: float, part: float) -> None:
        first(signal.SIGKILL)
        time.sleep(pause_s)
        if left := sorted(pid for pid, name in self.workers().items() if name):
            aim(left[int(part * len(left))])(signal.SIGKILL)

    def _behead(self, host: subprocess.Popen[bytes]) -> None:
        """Kills a supervisor; with other hosts only when all are whole, so that they can go on, or
        when it is the one that was left."""
        if self.wanted > 1 and host is not self.left and not self.whole():
            return
        below = children(host.pid)
        self.pids |= {host.pid, *below}

        def kill() -> None:
            host.kill()
            host.wait()
            end_s = time.monotonic() + GONE_S
            while any(map(lives, below)):
                if time.monotonic() > end_s:
                    raise Late(f"workers outlive their supervisor: {below}")
                time.sleep(0.005)
            self.hosts.remove(host)
            if not self.hosts:
                self.raise_host()

        self._back("supervisor" if self.wanted == 1 else "host", kill)
        if len(self.hosts) < self.wanted:
            self.raise_host()

    def _back(self, fault: str, strike: Callable[[], object]) -> None:
        """A fault after which there is a new generation, which then gets further than the last: a
        third failure before that is taken for a crash that repeats."""
        furthest = max(self.run.rows, default=0)
        first_s, _ = self.run.recovery(strike, 1, BACK_S)
        self.back_s.setdefault(fault, []).append(first_s)
        self.run.until(lambda: max(self.run.rows) > furthest, BACK_S, f"progress after {fault}")

    def _goes_on(self, fault: str) -> None:
        """A fault that may change nothing: the next row must come."""
        self.run.look()
        began_s, before = time.monotonic(), self.run.last
        self.run.until(lambda: self.run.last is not before, BACK_S, f"a step after {fault}", 0.002)
        self.back_s.setdefault(fault, []).append(time.monotonic() - began_s)

    # ---- the whole ----

    def storm(self, steps: int, minutes: float, pause_s: float) -> None:
        """Faults until 90 % of the steps are done or twice the time is over."""
        end_s = time.monotonic() + 120 * minutes
        while len(self.hosts) < self.wanted:
            self.raise_host()
            self.run.until(lambda: len(self.run.rows) > 5, BACK_S, "the first steps")
        while True:
            wait_s = min(self.random.expovariate(1 / pause_s), 4 * pause_s)
            until_s = time.monotonic() + wait_s
            while time.monotonic() < until_s:
                self.run.look()
                self.check_hosts()
                time.sleep(0.02)
            if max(self.run.rows, default=0) > 0.9 * steps or time.monotonic() > end_s:
                return
            fault = self.choose()
            print(f"step {max(self.run.rows):6d}  {fault}", file=sys.stderr, flush=True)
            self.strike(fault)


def left_behind(soak: Soak) -> list[str]:
    """Whatever of the run is still there."""
    found = [f"process {pid}" for pid in children(os.getpid())]
    if soak.place and listens(soak.place):
        found.append(f"somebody listens on {soak.place}")
    names = [path.name for path in soak.temporary.rglob("*")]
    found += [f"file {name}" for name in names if not name.startswith("torchinductor_")]
    pids = set(map(str, soak.pids))
    shared = [path.name for path in Path("/dev/shm").iterdir()]
    words = {name: set(name.replace("-", "_").split("_")) for name in shared}
    return found + [f"shared memory {name}" for name in shared if pids & words[name]]


def verdict(soak: Soak, clean: str, steps: int) -> list[str]:
    """What is wrong with the run at its end; nothing, if all is well."""
    wrong = []
    for host in soak.hosts:
        if host.wait(30):
            wrong.append(f"a supervisor left with exit code {host.returncode}")
    folder = soak.run.folder
    if ending(soak.run) != clean:
        wrong.append("the digest is not that of the run without faults")
    soak.run.look()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    if [json.loads(line)["step"] for line in lines] != list(range(1, steps + 1)):
        wrong.append("the rows are not one a step")
    ledger = subprocess.run(
        [sys.executable, "-m", "cordee", "data", "ledger", str(folder), "--json"],
        capture_output=True, text=True,
    )  # fmt: skip
    if ledger.returncode:
        wrong.append(f"the ledger does not prove exactly-once: {ledger.stdout}{ledger.stderr}")
    soak.pids |= {int(m["pid"]) for e in events(folder) for m in e.get("members", ())}
    return [*wrong, *left_behind(soak)]


def clean_run(home: Path, words: list[str]) -> tuple[str, float]:
    """The digest without faults, and the median step in seconds."""
    folder = home / f"clean-{len(list(home.iterdir()))}"
    folder.mkdir()
    with Watched(folder, home / "clean.log") as run:
        run.start(command(folder, *words, "fault.spares=0"))
        run.until(lambda: run.started[0].poll() is not None, 7200, "the run without faults")
        found = ending(run)
        run.look()
        return found, median(float(row["step_s"]) for row in run.rows.values())


@contextmanager
def home_of(keep: str) -> Iterator[str]:
    """A new folder that is removed at the end, or the one that is to be kept."""
    if keep:
        Path(keep).mkdir(parents=True)
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix="cordee-soak-") as home:
        yield home


def report(soak: Soak) -> None:
    """A table of faults and ways back."""
    print(f"{'fault':12s}  times  seconds to the next step: median (smallest - largest)")
    for fault, each in sorted(soak.back_s.items()):
        told = f"{median(each):.2f} ({min(each):.2f} - {max(each):.2f})"
        print(f"{fault:12s}  {len(each):5d}  {told}")


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
    asked = parser.parse_args()
    if asked.digest and not asked.steps:
        parser.error("--digest is that of a number of steps: give --steps too")
    os.environ.setdefault("PYTHONPATH", str(Path(__file__).resolve().parent.parent))
    wrong: list[str] = []
    with home_of(asked.keep) as home, household():
        words = [f"launch.processes={asked.workers}", f"fault.silence_s={SILENCE_S}"]
        steps = asked.steps
        if not steps:  # recoveries take about a quarter of the time
            _, step_s = clean_run(Path(home), [*words, "run.steps=100"])
            steps = max(100, int(asked.minutes * 60 * 0.75 / step_s))
        words.append(f"run.steps={steps}")
        again = (
            f"python -m benchmarks.soak --minutes {asked.minutes:g} --seed {asked.seed}"
            f" --hosts {asked.hosts} --workers {asked.workers} --pause {asked.pause:g}"
            f" --steps {steps}"
        )
        print(again, flush=True)
        clean = asked.digest or clean_run(Path(home), words)[0]
        print(f"digest without faults: {clean}", flush=True)
        folder = Path(home) / "run"
        folder.mkdir()
        with Watched(folder, Path(home) / "run.log") as run:
            soak = Soak(run, words, asked.hosts, asked.seed)
            try:
                soak.storm(steps, asked.minutes, asked.pause)
                run.until(
                    lambda: all(h.poll() is not None for h in soak.hosts),
                    120 * asked.minutes + 120, "the end of the run", 0.05,
                )  # fmt: skip
                wrong = verdict(soak, clean, steps)
            except Late as error:
                wrong = [str(error)]
            report(soak)
    for each in wrong:
        print(f"WRONG: {each}")
    print(f"{'failed' if wrong else 'passed'}: {again}")
    if asked.json:
        print(json.dumps({"wrong": wrong, "back_s": soak.back_s, "steps": steps}))
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
