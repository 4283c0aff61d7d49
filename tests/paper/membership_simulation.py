"""A run of several hosts in virtual time: a bad network, hosts that die, freeze, leave and return.

One seed gives one schedule. `python -m tests.paper.membership_simulation --seed N` replays it and
tells what happened. The workers are the obvious thing: a generation commits a step when all its
hosts have voted for it while in it. Every event is checked against what must never be.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from cordee.elastic.failure_detector import Timeouts
from cordee.elastic.membership import Member
from cordee.elastic.register import RegisterAnswer, RegisterRequest
from cordee.elastic.views import Evicted, Left, View, ViewHalted, ViewInstalled

RECOVERY_BOUND_S = 15.0
"""How long a whole network with a legitimate set of hosts may take to commit again."""

MAX_EVENTS = 200_000


class InvariantViolation(AssertionError):
    """An invariant broke."""


@dataclass
class SimulatedHost:
    """A place in the network and the process that lives there now."""

    simulation: Simulation
    node: int
    nonce: int
    join_address: str
    start_s: float
    member: Member = field(init=False)
    is_alive: bool = True
    is_frozen: bool = False
    pending_actions: list[Callable[[], None]] = field(default_factory=list)
    step: int | None = None
    view: View | None = None
    voters: set[str] = field(default_factory=set)
    member_end: Evicted | Left | None = None

    def __post_init__(self) -> None:
        self.name = f"h{self.node}#{self.nonce}"
        self.clock_offset_s = self.simulation.random.uniform(0.0, 1e5)
        self.member = Member(
            self.name, self.simulation.timeouts, assign=assign, report=lambda: self.step
        )

    @property
    def now(self) -> float:
        """The host's own clock, unlike all others."""
        return self.simulation.now + self.clock_offset_s

    def flush(self) -> None:
        """Sends what the member wants sent and obeys its changes."""
        for target, message in self.member.take_outbox():
            self.simulation.send(self, target, json.loads(json.dumps(message)))
        for request in self.member.take_requests():
            self.simulation.register.ask(self, request)
        for change in self.member.take_changes():
            self.simulation.log_line(f"{self.name} {change}")
            if isinstance(change, ViewInstalled):
                self.simulation.on_view_installed(self, change.view)
                self.view, self.voters = change.view, set()
                self.vote()
            elif isinstance(change, ViewHalted):
                self.view = None
            else:
                self.simulation.on_member_out(self, change)

    def vote(self) -> None:
        """Votes for the next step, or asks for the state when it has not got it."""
        if self.view is None or "none" in self.view.assignment:
            return
        base_step = self.view.assignment["step"]
        kind = "vote"
        if self.step is None or self.step < base_step:
            kind, voted_step = "need", base_step
        else:
            voted_step = self.step + 1
            self.simulation.on_vote(self, self.view, voted_step)
            self.voters.add(self.name)
        message = {"kind": kind, "generation": self.view.number, "step": voted_step}
        for target in self.view.hosts:
            if target == self.name:
                continue
            self.simulation.send(self, target, message)
        self._commit_if_voted()

    def receive(self, sender: str, message: Mapping[str, Any]) -> None:
        """A message between workers; those of other generations are refused."""
        if self.view is None or message["generation"] != self.view.number:
            return
        if message["kind"] == "state":
            if self.step is None or self.step < message["step"]:
                self.step, self.voters = message["step"], set()
                self.vote()
        elif self.step is None:
            return
        elif message["kind"] == "need":
            if self.step >= message["step"]:
                self.simulation.send(self, sender, {**message, "kind": "state"})
        elif message["step"] == self.step + 1:
            self.voters.add(sender)
            self._commit_if_voted()
        elif message["step"] <= self.step and message["kind"] == "vote":
            self.simulation.send(self, sender, {**message, "kind": "again"})

    def _commit_if_voted(self) -> None:
        assert self.view is not None
        base_step = self.view.assignment.get("step")
        has_base = self.step is not None and base_step is not None and self.step >= base_step
        if has_base and self.voters >= set(self.view.hosts):
            assert self.step is not None
            self.step += 1
            self.voters = set()
            self.simulation.on_step_learned(self)


def assign(reports: Mapping[str, Any]) -> dict[str, Any]:
    """The orders: from which step to go on; nothing when nobody has the state."""
    steps = [step for step in reports.values() if step is not None]
    return {"step": max(steps)} if steps else {"none": True}


@dataclass
class SimulatedRegister:
    """The register in virtual time: late, away for some or for all, its answers lost; what it was
    asked may still be done when the asker has given up, or is dead."""

    simulation: Simulation
    view: View | None = None
    history: dict[int, View] = field(default_factory=dict)
    ended: dict[str, int] = field(default_factory=dict)
    """For each host that has swapped a generation for the next: the newest that it has ended."""
    is_away: bool = False
    loss: float = 0.02

    def ask(self, host: SimulatedHost, request: RegisterRequest) -> None:
        """A request on its way there and back."""
        simulation, rng = self.simulation, self.simulation.random
        delay_s = rng.uniform(*simulation.register_delay_s)
        if self.is_away or host.node in simulation.blind_nodes:
            wait_s = rng.choice([0.001, 1.0])
            simulation.call_later(wait_s, lambda: self._answer(host, request, "away"))
        elif rng.random() < self.loss:
            simulation.call_later(rng.uniform(0.0, 4.0), lambda: self._execute(host, request))
            simulation.call_later(1.0, lambda: self._answer(host, request, "timed out"))
        else:

            def execute() -> None:
                self._execute(host, request)
                view = self.view
                simulation.call_later(delay_s / 2, lambda: self._answer(host, request, "", view))

            simulation.call_later(delay_s / 2, execute)

    def _execute(self, host: SimulatedHost, request: RegisterRequest) -> None:
        """(4) A view is swapped only by a host of it that is out of it for good."""
        if request.view is None or self.view != request.previous:
            return
        if request.previous and host.name not in request.previous.hosts:
            self.simulation.fail(f"{host.name} ends {request.previous} without being in it")
        if request.previous and host.is_alive and host.view == request.previous:
            self.simulation.fail(f"{host.name} ends {request.previous} while it works in it")
        if request.view.number <= (self.view.number if self.view else 0):
            self.simulation.fail(f"{request.view} comes after {self.view}")
        self.ended[host.name] = request.view.number - 1
        self.view = self.history[request.view.number] = request.view
        self.simulation.log_line(f"{host.name} installs {request.view.number}")

    def _answer(
        self, host: SimulatedHost, request: RegisterRequest, error: str, view: View | None = None
    ) -> None:
        answer = RegisterAnswer(request, "simulated", view, error)

        def deliver() -> None:
            host.member.on_register_answer(answer, host.now)
            host.flush()

        self.simulation._deliver(host, deliver)


@dataclass
class Simulation:
    """The network, the clock and what must hold."""

    seed: int
    host_count: int
    timeouts: Timeouts = field(default_factory=Timeouts)
    delay_s: tuple[float, float] = (0.001, 0.05)
    loss: float = 0.01
    duplicate_rate: float = 0.01
    notice_rate: float = 0.5
    register_delay_s: tuple[float, float] = (0.001, 0.01)
    is_verbose: bool = False
    now: float = 0.0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.register = SimulatedRegister(self)
        self.event_queue: list[tuple[float, int, Callable[[], None]]] = []
        self.event_count = 0
        self.nodes: dict[int, SimulatedHost] = {}
        self.blind_nodes: set[int] = set()
        self.cut_counts: dict[tuple[int, int], int] = {}
        self.views: dict[int, View] = {}
        self.votes: dict[tuple[int, int], set[str]] = {}
        self.commits: list[tuple[float, int, int]] = []
        self.late_vote_count = 0
        self.log: list[str] = []
        self.start_host(0, "").step = 0
        self.nodes[0].member.bootstrap(self.nodes[0].now)
        self.nodes[0].flush()
        for node in range(1, self.host_count):
            self.start_host(node, "h0")

    # Time.

    def call_later(self, delay_s: float, action: Callable[[], None]) -> None:
        """Does `action` in `delay_s`."""
        self.event_count += 1
        heapq.heappush(self.event_queue, (self.now + delay_s, self.event_count, action))

    def run(self, end_s: float, stop: Callable[[], bool] = lambda: False) -> bool:
        """Goes on until then, or until `stop`; whether it stopped."""
        while self.event_queue and self.event_queue[0][0] <= end_s:
            self.now, _, action = heapq.heappop(self.event_queue)
            action()
            if self.event_count > MAX_EVENTS:
                self.fail("a storm: hosts answer each other without end")
            if stop():
                return True
        self.now = end_s
        return False

    def log_line(self, line: str) -> None:
        """Remembers a line of the story."""
        self.log.append(f"{self.now:8.3f} {line}")
        if self.is_verbose:
            print(self.log[-1])

    # Hosts.

    def start_host(self, node: int, join_address: str) -> SimulatedHost:
        """A new process at `node`."""
        nonce = self.nodes[node].nonce + 1 if node in self.nodes else 0
        host = self.nodes[node] = SimulatedHost(self, node, nonce, join_address, self.now)
        if join_address:
            self.log_line(f"{host.name} starts, joins through {join_address}")
            host.member.join(join_address, host.now)
            host.flush()
        self.call_later(self.random.uniform(0, 0.1), lambda: self.tick(host))
        return host

    def tick(self, host: SimulatedHost) -> None:
        """A host's own loop."""
        if not host.is_alive:
            return
        if host.is_frozen:
            host.pending_actions.insert(0, lambda: self.tick(host))
            return
        host.member.tick(host.now)
        host.flush()
        if self.random.random() < 0.4:
            host.vote()
        self.call_later(self.timeouts.heartbeat_interval_s / 2, lambda: self.tick(host))

    def kill(self, node: int) -> None:
        """The process is gone; some of the others' transports notice."""
        host = self.nodes[node]
        if not host.is_alive:
            return
        self.log_line(f"{host.name} dies")
        host.is_alive, host.view = False, None
        for other in self.nodes.values():
            if other.is_alive and self.random.random() < self.notice_rate:
                self._notify_lost(other, host)

    def _notify_lost(self, host: SimulatedHost, lost_host: SimulatedHost) -> None:
        if (lost_host.node, host.node) in self.cut_counts or (
            host.node,
            lost_host.node,
        ) in self.cut_counts:
            return

        def notify() -> None:
            host.member.on_connection_lost(lost_host.name, host.now)
            host.flush()

        # A connection's end comes after what was sent on it.
        self.call_later(self.delay_s[1], lambda: self._deliver(host, notify))

    def freeze(self, node: int) -> None:
        """The process stands still."""
        self.log_line(f"{self.nodes[node].name} freezes")
        self.nodes[node].is_frozen = True

    def wake(self, host: SimulatedHost) -> None:
        """The process goes on, with all that came meanwhile."""
        if not host.is_frozen or not host.is_alive:
            return
        self.log_line(f"{host.name} wakes")
        host.is_frozen = False
        pending_actions, host.pending_actions = host.pending_actions, []
        if self.random.random() < 0.5:
            pending_actions = pending_actions[1:] + pending_actions[:1]
        for action in pending_actions:
            action()

    def on_member_out(self, host: SimulatedHost, change: Evicted | Left) -> None:
        """A member that is out; a fenced one comes back as a new one."""
        host.is_alive, host.view, host.member_end = False, None, change
        if isinstance(change, Evicted):
            self.call_later(self.random.uniform(0.2, 1.0), lambda: self.restart(host.node))

    def restart(self, node: int) -> None:
        """A new process there, which asks some other place to be let in."""
        if self.nodes[node].is_alive:
            return
        other_nodes = [
            other_node
            for other_node, host in self.nodes.items()
            if other_node != node and host.is_alive
        ]
        if other_nodes:
            host = self.start_host(node, f"h{self.random.choice(other_nodes)}")
            self.call_later(4.0, lambda: self.retry_join(host))

    def retry_join(self, host: SimulatedHost) -> None:
        """A supervisor that is not let in asks somebody else, as a new member."""
        if (
            host.is_alive
            and not host.is_frozen
            and host.member.view is None
            and host.member._join_address
        ):
            host.is_alive = False
            self.restart(host.node)

    # The network.

    def _deliver(self, host: SimulatedHost, action: Callable[[], None]) -> None:
        if host.is_alive and host.is_frozen:
            host.pending_actions.append(lambda: self._deliver(host, action))
        elif host.is_alive:
            action()

    def send(self, sender: SimulatedHost, target: str, message: dict[str, Any]) -> None:
        """A message on its way: late, lost, doubled or stopped by a cut."""
        node = int(target[1:].partition("#")[0])
        if (sender.node, node) in self.cut_counts or self.random.random() < self.loss:
            return
        for _ in range(1 + (self.random.random() < self.duplicate_rate)):
            delay = self.random.uniform(*self.delay_s)
            self.call_later(delay, lambda: self.arrive(sender, target, node, message))

    def arrive(
        self, sender: SimulatedHost, target: str, node: int, message: dict[str, Any]
    ) -> None:
        """Takes a message in where it was sent to."""
        host = self.nodes[node]
        if (sender.node, node) in self.cut_counts:
            return
        if not host.is_alive or ("#" in target and host.name != target):
            if sender.is_alive and self.random.random() < self.notice_rate:
                lost_host = host if host.name == target else None
                if lost_host:
                    self._notify_lost(sender, lost_host)
            return

        def deliver() -> None:
            if "generation" in message:
                host.receive(sender.name, message)
            else:
                host.member.receive(sender.name, message, host.now)
                host.flush()

        self._deliver(host, deliver)

    def cut_links(self, pairs: list[tuple[int, int]], for_s: float | None) -> None:
        """Stops all messages from the first of each pair to the second."""
        self.log_line(f"cut {pairs} for {for_s} s")
        for pair in pairs:
            self.cut_counts[pair] = self.cut_counts.get(pair, 0) + 1
        if for_s is not None:
            self.call_later(for_s, lambda: self.heal(pairs))

    def heal(self, pairs: list[tuple[int, int]]) -> None:
        """Takes a cut back."""
        for pair in pairs:
            cut_count = self.cut_counts.get(pair, 0) - 1
            if cut_count > 0:
                self.cut_counts[pair] = cut_count
            else:
                self.cut_counts.pop(pair, None)

    # What must hold.

    def fail(self, problem: str) -> None:
        """Stops the run: an invariant broke."""
        raise InvariantViolation(f"seed {self.seed}, {self.now:.3f} s: {problem}")

    def on_view_installed(self, host: SimulatedHost, view: View) -> None:
        """(3) An active view's number is its own, and was in the register; who enters is in it."""
        first_view = self.views.setdefault(view.number, view)
        if first_view != view:
            self.fail(f"two views of one number: {first_view} and {view}")
        if host.name not in view.hosts:
            self.fail(f"{host.name} entered {view} without being in it")
        if self.register.history.get(view.number) != view:
            self.fail(f"{host.name} entered {view}, which the register never held")
        if view.number <= self.register.ended.get(host.name, 0):
            self.fail(f"{host.name} entered {view}, which it has ended")

    def on_vote(self, host: SimulatedHost, view: View, step: int) -> None:
        """(1, 2) When the last host has voted: commits are in order of generation and step.

        A host that was frozen may add the last vote to those that the others gave before they went
        on: it alone learns, for a second time, a step that the younger generation has done again.
        """
        votes = self.votes.setdefault((view.number, step), set())
        if host.name in votes:
            return
        votes.add(host.name)
        if votes != set(view.hosts):
            return
        _, generation, last_step = self.commits[-1] if self.commits else (0.0, 0, 0)
        if view.number < generation and step <= last_step and not self.is_view_working(view):
            self.late_vote_count += 1
            return
        if view.number < generation:
            self.fail(
                f"generation {view.number} commits step {step} after {generation} did {last_step}"
            )
        is_repeated = step == last_step and view.number > generation
        if step != last_step + 1 and not is_repeated:
            self.fail(f"generation {view.number} commits step {step} after step {last_step}")
        self.commits.append((self.now, view.number, step))

    def is_view_working(self, view: View) -> bool:
        """Whether every host of `view` is alive and works in it now."""
        hosts = [self.nodes[int(name[1:].partition("#")[0])] for name in view.hosts]
        return all(
            host.is_alive and host.name in view.hosts and host.view == view for host in hosts
        )

    def on_step_learned(self, host: SimulatedHost) -> None:
        """Nobody knows a step that was not committed."""
        assert host.step is not None
        if not self.commits or host.step > self.commits[-1][2]:
            self.fail(f"{host.name} learned step {host.step}, which is not committed")

    # How it ends.

    def live_hosts(self) -> list[SimulatedHost]:
        """Hosts whose process runs and is awake."""
        return [host for host in self.nodes.values() if host.is_alive and not host.is_frozen]

    def can_go_on(self) -> bool:
        """Whether those alive are a legitimate set and one of them has the state."""
        hosts_by_name = {host.name: host for host in self.live_hosts()}
        last_step = self.commits[-1][2] if self.commits else 0
        steps = [host.step for host in hosts_by_name.values() if host.step is not None]
        if max(steps, default=-1) < last_step - 1:
            return False
        view = self.register.view
        return view is not None and bool(set(view.hosts) & set(hosts_by_name))


def pairs_between(nodes: Collection[int], other_nodes: Collection[int]) -> list[tuple[int, int]]:
    """Both directions between two sets of places."""
    return [(node, other_node) for node in nodes for other_node in other_nodes] + [
        (other_node, node) for node in nodes for other_node in other_nodes
    ]


def inject_fault(simulation: Simulation) -> None:
    """One fault, at random."""
    rng = simulation.random
    nodes = list(simulation.nodes)
    node = rng.choice(nodes)
    host = simulation.nodes[node]
    fault_kind = rng.choice(
        ["kill", "kill", "freeze", "freeze", "split", "split", "one way", "leave", "call", "call",
         "reset", "restart", "blind", "away", "kill leader", "storm"]
    )  # fmt: skip
    if fault_kind == "kill leader":
        leaders = [h.node for h in simulation.live_hosts() if h.view and h.view.leader == h.name]
        node, fault_kind = (leaders or [node])[0], "kill"
    if fault_kind == "kill":
        simulation.kill(node)
        if rng.random() < 0.7:
            simulation.call_later(rng.choice([0.05, 1.0, 5.0]), lambda: simulation.restart(node))
    elif fault_kind == "freeze" and host.is_alive:
        simulation.freeze(node)
        simulation.call_later(rng.choice([0.3, 1.2, 3.0, 8.0, 20.0]), lambda: simulation.wake(host))
    elif fault_kind == "split":
        group = rng.sample(nodes, rng.randint(1, max(1, len(nodes) - 1)))
        other_nodes = [p for p in nodes if p not in group]
        simulation.cut_links(pairs_between(group, other_nodes), rng.choice([0.5, 3.0, 3.0, 30.0]))
    elif fault_kind == "one way":
        pairs = [p for p in pairs_between(nodes, nodes) if p[0] != p[1] and rng.random() < 0.2]
        simulation.cut_links(list(dict.fromkeys(pairs)), rng.choice([0.5, 3.0, 30.0]))
    elif fault_kind == "leave" and host.is_alive and not host.is_frozen:
        state_holders = [
            h for h in simulation.live_hosts() if h.step is not None and h is not host and h.view
        ]
        if state_holders:
            simulation.log_line(f"{host.name} wants to leave")
            host.member.leave(host.now)
            host.flush()
            simulation.call_later(rng.choice([3.0, 9.0]), lambda: simulation.restart(node))
    elif fault_kind == "call" and host.is_alive and not host.is_frozen:
        host.member.request_view({"event": "worker_died", "host": host.name}, host.now)
        host.flush()
    elif fault_kind == "reset":
        for other in simulation.live_hosts():
            if other is not host and rng.random() < 0.5:
                simulation._notify_lost(other, host)
    elif fault_kind == "restart":
        simulation.restart(node)
    elif fault_kind == "blind":
        simulation.blind_nodes.add(node)
        simulation.call_later(rng.choice([1.0, 10.0]), lambda: simulation.blind_nodes.discard(node))
    elif fault_kind == "away":
        simulation.register.is_away = True
        time_s = rng.choice([0.3, 3.0, 10.0])
        simulation.call_later(time_s, lambda: setattr(simulation.register, "is_away", False))
    elif fault_kind == "storm":
        previous_loss, simulation.loss = simulation.loss, 0.3
        simulation.call_later(3.0, lambda: setattr(simulation, "loss", min(previous_loss, 0.05)))


def run_schedule(seed: int, is_verbose: bool = False) -> tuple[Simulation, str]:
    """Plays the seed's schedule; how it ended: on, blocked (rightly), or Wrong is raised."""
    rng = random.Random(~seed)
    simulation = Simulation(
        seed, rng.randint(2, 7), is_verbose=is_verbose,
        register_delay_s=rng.choice([(0.0005, 0.002), (0.001, 0.05), (0.05, 0.8)]),
        delay_s=rng.choice([(0.0005, 0.002), (0.001, 0.05), (0.001, 0.3)]),
        loss=rng.choice([0.0, 0.01, 0.05]), notice_rate=rng.choice([0.0, 0.5, 1.0]),
    )  # fmt: skip
    time_s = rng.choice([0.0, 2.0, 4.0])
    for _ in range(rng.randint(1, 8)):
        time_s += rng.choice([0.02, 0.1, 0.5, 2.0, 5.0])
        simulation.call_later(time_s, lambda: inject_fault(simulation))
    simulation.run(time_s + rng.choice([1.0, 4.0, 10.0]))
    simulation.cut_counts.clear()
    simulation.blind_nodes.clear()
    simulation.register.is_away, simulation.register.loss = False, 0.0
    simulation.loss = min(simulation.loss, 0.01)
    for host in list(simulation.nodes.values()):
        simulation.wake(host)
    simulation.log_line("healed")
    commit_count = len(simulation.commits)
    simulation.random = random.Random(seed ^ 0xABCD)
    for _ in range(int(RECOVERY_BOUND_S / 0.5)):
        if simulation.run(
            simulation.now + 0.5, lambda: len(simulation.commits) >= commit_count + 4
        ):
            return simulation, "on"
        if not simulation.can_go_on():
            simulation.run(simulation.now + 3.0)
            if not simulation.can_go_on():
                return simulation, "blocked"
    statuses = {host.name: describe_member(host.member) for host in simulation.live_hosts()}
    raise InvariantViolation(
        f"seed {seed}: nothing was committed {RECOVERY_BOUND_S} s after all was whole: {statuses}"
    )


def describe_member(member: Member) -> str:
    """What a member is in, or waits for."""
    return (
        f"in {member.view and member.view.number} of {member._installed_number}, joins by"
        f" {member._join_address!r}, proposes {member._proposal}, {member.register_problem}"
    )


def main() -> None:
    """Replays one seed, or finds the first of many that fails."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--seeds", type=int, default=300)
    arguments = parser.parse_args()
    if arguments.seed is not None:
        simulation, outcome = run_schedule(arguments.seed, is_verbose=True)
        print(
            outcome, {host.name: describe_member(host.member) for host in simulation.nodes.values()}
        )
        return
    outcome_counts: dict[str, int] = {}
    for seed in range(arguments.seeds):
        try:
            outcome = run_schedule(seed)[1]
        except InvariantViolation as error:
            print(error, f"\n  python -m tests.paper.membership_simulation --seed {seed}")
            outcome = "wrong"
        outcome_counts[outcome] = outcome_counts.get(outcome, 0) + 1
    print(outcome_counts)


if __name__ == "__main__":
    main()
