"""Hosts that die, freeze, part and return: what must never be, how soon it goes on, who waits."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cordee.config.load import load
from cordee.elastic.failure_detector import AdaptiveTimeout, Timeouts
from cordee.elastic.membership import Member
from cordee.elastic.register import MemoryRegister, RegisterAnswer, RegisterRequest, ask_register
from cordee.elastic.views import Evicted, Left, View, ViewHalted, ViewInstalled
from cordee.errors import RunError
from cordee.launcher.rendezvous import make_timeouts
from tests.paper.membership_simulation import (
    InvariantViolation,
    SimulatedHost,
    Simulation,
    pairs_between,
    run_schedule,
)

FAST_SEEDS, ALL_SEEDS, SEEDS_PER_CASE = 1000, 4000, 250


def run_schedules(first_seed: int) -> dict[str, int]:
    outcome_counts: dict[str, int] = {}
    for seed in range(first_seed, first_seed + SEEDS_PER_CASE):
        try:
            _, outcome = run_schedule(seed)
        except InvariantViolation as error:
            pytest.fail(f"{error}\n  python -m tests.paper.membership_simulation --seed {seed}")
        outcome_counts[outcome] = outcome_counts.get(outcome, 0) + 1
    return outcome_counts


@pytest.mark.parametrize("first_seed", range(0, FAST_SEEDS, SEEDS_PER_CASE))
def test_seeded_schedules(first_seed: int) -> None:
    # Most schedules leave a legitimate set of hosts alive; then steps must be committed again.
    assert run_schedules(first_seed)["on"] > 0.7 * SEEDS_PER_CASE


@pytest.mark.nightly
@pytest.mark.parametrize("first_seed", range(FAST_SEEDS, ALL_SEEDS, SEEDS_PER_CASE))
def test_more_seeded_schedules(first_seed: int) -> None:
    assert run_schedules(first_seed)["on"] > 0.7 * SEEDS_PER_CASE


def start_simulation(host_count: int, **options: object) -> Simulation:
    """A run of `host_count` that works, all in."""
    simulation = Simulation(1, host_count, **options)  # type: ignore[arg-type]
    assert simulation.run(20.0, lambda: is_view_complete(simulation, host_count)), simulation.log
    simulation.run(simulation.now + 5.0)
    assert is_view_complete(simulation, host_count)
    return simulation


def is_view_complete(simulation: Simulation, host_count: int) -> bool:
    views = [host.view for host in simulation.live_hosts()]
    return all(view and view == views[0] and len(view.hosts) == host_count for view in views)


def recovery_s(simulation: Simulation, fault: Callable[[], None], limit_s: float) -> float:
    """Virtual seconds from the fault to the next step committed by a new generation."""
    start_s, generation = simulation.now, simulation.commits[-1][1]
    fault()
    has_recovered = simulation.run(
        start_s + limit_s, lambda: simulation.commits[-1][1] > generation
    )
    assert has_recovered, "\n".join(simulation.log[-20:])
    return simulation.now - start_s


@pytest.mark.parametrize("notice_rate", [0.0, 1.0])
@pytest.mark.parametrize("victim", [0, 2])
def test_a_death_is_over_in_three_seconds(victim: int, notice_rate: float) -> None:
    for seed in range(5):
        simulation = start_simulation(
            3 + seed % 3, timeouts=Timeouts(max_silence_s=2.0), notice_rate=notice_rate
        )
        duration_s = recovery_s(
            simulation, lambda simulation=simulation: simulation.kill(victim), 3.0
        )
        assert duration_s < (1.0 if notice_rate else 3.0)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_freeze_is_over_within_the_limit_and_the_zombie_is_fenced(victim: int) -> None:
    simulation = start_simulation(3)
    zombie = simulation.nodes[victim]
    assert recovery_s(simulation, lambda: simulation.freeze(victim), 5.5) < 5.5
    simulation.run(simulation.now + 10.0)
    view_count = len(simulation.views)
    simulation.wake(zombie)
    assert simulation.run(
        simulation.now + 2.0, lambda: any("Evicted" in line for line in simulation.log)
    )
    assert "goes on without this host" in str(zombie.member_end)
    assert simulation.run(simulation.now + 10.0, lambda: is_view_complete(simulation, 3)), (
        "it comes back as a new member"
    )
    assert len(simulation.views) <= view_count + 2


def test_a_short_freeze_is_nobodys_death() -> None:
    simulation = start_simulation(4)
    views = dict(simulation.views)
    simulation.freeze(0)
    simulation.call_later(0.8, lambda: simulation.wake(simulation.nodes[0]))
    simulation.run(simulation.now + 20.0)
    assert simulation.views == views


@pytest.mark.parametrize("victim", [0, 1])
def test_two_hosts_of_which_one_dies(victim: int) -> None:
    simulation = start_simulation(2)
    survivor, generation = simulation.nodes[1 - victim], simulation.commits[-1][1]
    simulation.kill(victim)
    simulation.run(simulation.now + 20.0)
    assert simulation.commits[-1][1] > generation and survivor.view is not None
    assert survivor.view.hosts == (survivor.name,)


@pytest.mark.parametrize("heal_s", [3.0, 30.0])
def test_a_partition_leaves_one_side_working(heal_s: float) -> None:
    simulation = start_simulation(5)
    generation = simulation.commits[-1][1]
    simulation.cut_links(pairs_between([0, 1], [2, 3, 4]), heal_s)
    simulation.run(simulation.now + heal_s)
    working_hosts = [
        host for host in simulation.live_hosts() if host.view and host.view.number > generation
    ]
    assert {host.node for host in working_hosts} in [{2, 3, 4}, {0, 1}]
    assert simulation.run(simulation.now + 15.0, lambda: is_view_complete(simulation, 5)), (
        "\n".join(simulation.log[-20:])
    )


def test_of_three_that_cannot_see_each_other_one_goes_on() -> None:
    simulation = start_simulation(3)
    simulation.cut_links(pairs_between([0], [1, 2]) + pairs_between([1], [2]), 30.0)
    simulation.run(simulation.now + 29.0)
    assert sum(host.view is not None for host in simulation.live_hosts()) == 1
    assert simulation.commits[-1][0] > simulation.now - 1.0
    assert simulation.run(simulation.now + 15.0, lambda: is_view_complete(simulation, 3))


def test_a_register_that_is_away_stops_no_step_and_changes_wait() -> None:
    simulation = start_simulation(3)
    follower, generation = simulation.nodes[2], simulation.commits[-1][1]
    simulation.register.is_away = True
    simulation.start_host(3, "h0")
    follower.member.request_view({"event": "worker_ready", "host": follower.name}, follower.now)
    follower.flush()
    commit_count = len(simulation.commits)
    simulation.run(simulation.now + 20.0)
    assert len(simulation.commits) > commit_count + 20
    assert simulation.commits[-1][1] == generation
    assert simulation.nodes[0].member.register_problem == "away"
    simulation.kill(1)
    simulation.run(simulation.now + 10.0)
    assert simulation.commits[-1][1] == generation
    simulation.register.is_away = False
    assert simulation.run(simulation.now + 3.0, lambda: simulation.commits[-1][1] > generation)
    assert simulation.run(simulation.now + 3.0, lambda: is_view_complete(simulation, 3))
    assert {host.node for host in simulation.live_hosts()} == {0, 2, 3}


def test_who_is_out_learns_it_from_the_register_alone() -> None:
    simulation = start_simulation(3)
    lonely = simulation.nodes[2]
    simulation.cut_links(pairs_between([2], [0, 1]), None)
    assert simulation.run(simulation.now + 10.0, lambda: not lonely.is_alive)
    assert "goes on without this host" in str(lonely.member_end)


@pytest.mark.parametrize("is_candidate_killed", [False, True])
def test_a_swap_that_was_done_though_nobody_was_told(is_candidate_killed: bool) -> None:
    simulation = start_simulation(3)
    generation = simulation.commits[-1][1]
    answer = simulation.register._answer

    def lose_answer(host: SimulatedHost, request: RegisterRequest, *result: Any) -> None:
        if request.view and request.view.number == generation + 1:
            if is_candidate_killed:
                simulation.kill(host.node)
            result = ("timed out",)
        answer(host, request, *result)

    simulation.register._answer = lose_answer  # type: ignore[method-assign]
    leader = simulation.nodes[0]
    leader.member.request_view({"event": "worker_died", "host": leader.name}, leader.now)
    leader.flush()
    assert simulation.run(simulation.now + 6.0, lambda: simulation.commits[-1][1] > generation)
    assert generation + 1 in simulation.register.history


@pytest.mark.parametrize("pair", [(0, 1), (1, 0), (1, 2)])
def test_a_one_way_cut_does_not_hold_the_others_up(pair: tuple[int, int]) -> None:
    simulation = start_simulation(4)
    assert recovery_s(simulation, lambda: simulation.cut_links([pair], None), 5.0) < 5.0
    view_count = len(simulation.views)
    simulation.run(simulation.now + 30.0)
    assert len(simulation.views) <= view_count + 1, (
        "one who is half cut off is not let in again and again"
    )
    assert simulation.commits[-1][0] > simulation.now - 1.0


def test_nothing_happens_in_ten_quiet_minutes() -> None:
    for host_count in (2, 5):
        simulation = start_simulation(host_count, loss=0.01)
        views = dict(simulation.views)
        simulation.run(simulation.now + 600.0)
        assert simulation.views == views


@pytest.mark.parametrize("leaver", [0, 1])
def test_two_hosts_can_part(leaver: int) -> None:
    simulation = start_simulation(2)
    host, other_host = simulation.nodes[leaver], simulation.nodes[1 - leaver]
    start_s = simulation.now
    host.member.leave(host.now)
    host.flush()
    assert simulation.run(start_s + 3.0, lambda: not host.is_alive)
    assert host.member_end == Left()
    assert other_host.view is not None and other_host.view.hosts == (other_host.name,)
    assert [verdict["event"] for verdict in other_host.view.events] == ["host_left"]
    other_host.member.leave(other_host.now)
    other_host.flush()
    assert not other_host.is_alive and other_host.member_end == Left()


def test_a_call_of_a_follower_is_a_new_view_at_once_with_its_verdict() -> None:
    simulation = start_simulation(3, delay_s=(0.001, 0.002), loss=0.0)
    follower, start_s = simulation.nodes[2], simulation.now
    verdict = {"event": "worker_died", "host": follower.name, "who": "x", "done": "y", "says": "z"}
    follower.member.request_view(verdict, follower.now)
    follower.flush()
    view_number = max(simulation.views)
    assert simulation.run(
        start_s + 0.02,
        lambda: is_view_complete(simulation, 3) and max(simulation.views) > view_number,
    )
    assert simulation.views[max(simulation.views)].events == (verdict,)
    simulation.run(start_s + 5.0)
    assert max(simulation.views) == view_number + 1, "a call is answered once"


def test_verdicts_say_who_and_how_long() -> None:
    simulation = start_simulation(3, notice_rate=0.0)
    recovery_s(simulation, lambda: simulation.kill(2), 5.0)
    (verdict,) = simulation.views[max(simulation.views)].events
    assert (verdict["event"], verdict["host"], verdict["who"]) == ("host_silent", "h2#0", "h0#0")
    assert "silent for" in verdict["says"] and "deadline" in verdict["says"]
    assert "goes on without it" in verdict["done"]


def answer_requests(member: Member, register: MemoryRegister, now_s: float) -> None:
    while requests := member.take_requests():
        for request in requests:
            member.on_register_answer(ask_register(register, request), now_s)


def single_member(
    register: MemoryRegister, own_id: str = "a#0", last_generation: int = 0
) -> Member:
    member = Member(
        own_id,
        Timeouts(),
        assign=lambda reports: dict(reports),
        report=list,
        last_generation=last_generation,
    )
    member.bootstrap(5.0)
    answer_requests(member, register, 5.0)
    return member


def test_one_host_needs_nobody() -> None:
    register = MemoryRegister()
    member = single_member(register)
    (event,) = member.take_changes()
    assert event == ViewInstalled(member.view) and member.view.number == 1  # type: ignore[arg-type, union-attr]
    assert member.view.assignment == {"a#0": []}  # type: ignore[union-attr]
    member.request_view({"event": "worker_died"}, 5.1)
    answer_requests(member, register, 5.1)
    assert [type(change) for change in member.take_changes()] == [ViewHalted, ViewInstalled]
    assert not member.take_outbox()
    member.leave(6.0)
    assert [type(change) for change in member.take_changes()] == [ViewHalted, Left]


def test_a_founder_goes_on_from_what_the_register_holds_and_the_run_knows() -> None:
    register = MemoryRegister()
    register.view = View(9, "b#0", ("b#0",))
    first = single_member(register, last_generation=4).view
    assert first and (first.number, first.hosts, first.events) == (10, ("a#0",), ())
    second = single_member(register, "c#0", last_generation=20).view
    assert second and (second.number, second.hosts) == (21, ("c#0",))


def test_a_founder_waits_for_the_register() -> None:
    member, register = Member("a#0", Timeouts(), assign=dict, report=list), MemoryRegister()
    member.bootstrap(5.0)
    (request,) = member.take_requests()
    member.on_register_answer(RegisterAnswer(request, error="no route"), 5.0)
    assert member.register_problem == "no route"
    member.tick(5.1)
    assert not member.take_requests(), "not in a hurry"
    member.tick(5.6)
    answer_requests(member, register, 5.6)
    assert member.view and member.register_problem == ""


def test_a_message_that_cannot_be_read_is_refused() -> None:
    member = single_member(MemoryRegister())
    for message in ({}, {"kind": "boo"}, {"kind": "enter", "view": {}}, {"kind": "beat"}):
        with pytest.raises(RunError):
            member.receive("b#0", message, 6.0)


def test_who_has_another_register_is_not_let_in() -> None:
    founder, register = single_member(MemoryRegister()), MemoryRegister()
    register.identity = "another"  # type: ignore[misc]
    joiner = Member("b#0", Timeouts(), assign=dict, report=list)
    joiner.join("a", 1.0)
    answer_requests(joiner, register, 1.0)
    for _, heartbeat in joiner.take_outbox():
        founder.receive("b#0", heartbeat, 5.1)
    for target, message in founder.take_outbox():
        assert target == "b#0"
        joiner.receive("a#0", message, 1.1)
    assert "its register is another, this run's is memory" in joiner.join_refusal


@pytest.mark.parametrize(
    ("held", "identity", "reason"),
    [
        (View(3, "a#0", ("a#0",)), "memory", "went back from generation 5 to 3"),
        (None, "memory", "went back from generation 5 to 0"),
        (View(5, "b#0", ("b#0",)), "memory", "holds a generation 5 that is not this run's"),
        (View(6, "b#0", ("b#0",)), "another", "is another one (another; this run's is memory)"),
    ],
)
def test_a_register_that_is_not_to_be_believed_changes_nothing(
    held: View | None, identity: str, reason: str
) -> None:
    register = MemoryRegister()
    member = single_member(register, last_generation=4)
    member.take_changes()
    register.view, register.identity = held, identity  # type: ignore[misc]
    member.request_view({"event": "worker_ready"}, 5.1)
    answer_requests(member, register, 5.1)
    assert reason in member.register_problem and "refused" in member.register_problem
    assert not member.take_changes() and member.view and register.view == held


def test_an_answer_that_was_overtaken_is_no_step_back() -> None:
    """The question was asked before this host heard of the newer generation."""
    member = single_member(MemoryRegister())
    member.request_view({"event": "worker_ready"}, 5.1)
    (request,) = member.take_requests()
    old_view, new_view = member.view, View(2, "b#0", ("a#0", "b#0"))
    member.receive("b#0", {"kind": "enter", "view": new_view.to_json()}, 5.2)
    assert member.view == new_view
    member.on_register_answer(RegisterAnswer(request, "memory", old_view), 5.3)
    assert member.view == new_view and not member.register_problem


def test_silence_of_the_register_is_told() -> None:
    member = single_member(MemoryRegister())
    member.request_view({"event": "worker_ready"}, 5.1)
    assert len(member.take_requests()) == 1
    for tick in range(30):
        member.tick(5.2 + tick / 10)
    assert member.register_problem == "it has not answered for 1 s" and member.view is not None


@given(st.lists(st.floats(0.15, 0.25), min_size=40, max_size=64), st.floats(1.0, 1e6))
def test_outliers_do_not_move_a_deadline_far(gaps: list[float], outlier: float) -> None:
    timeout = AdaptiveTimeout(0.0)
    for gap in [*gaps, *[outlier] * 12]:
        timeout.add_sample(gap)
    assert timeout.deadline_s is not None and timeout.deadline_s < 0.25 + 10 * 1.4826 * 0.1


def test_deadlines_have_a_floor_and_a_top_and_need_five() -> None:
    timeout = AdaptiveTimeout(1.0, 5.0)
    for _ in range(4):
        timeout.add_sample(0.2)
    assert timeout.deadline_s is None
    timeout.add_sample(0.2)
    assert timeout.deadline_s == 1.0
    for _ in range(64):
        timeout.add_sample(30.0)
    assert timeout.deadline_s == 5.0


def test_a_host_that_is_late_and_lives_is_waited_for_longer() -> None:
    timeout = AdaptiveTimeout(1.0, 5.0, longest_factor=2.0)
    for gap in [0.2] * 60 + [1.4, 0.3]:
        timeout.add_sample(gap)
    assert timeout.deadline_s == 2.8


def test_deadlines_between_hosts_follow_the_keys() -> None:
    for overrides, min_s, max_s in (
        ((), 3.0, 5.0), (("fault.silence_s=2",), 2.0, 2.0), (("fault.silence_s=60",), 3.0, 60.0),
        (("fault.host_silence_s=20",), 20.0, 20.0), (("fault.host_silence_s=1",), 1.0, 5.0),
    ):  # fmt: skip
        timeouts = make_timeouts(load(None, list(overrides)).run)
        assert (timeouts.min_silence_s, timeouts.max_silence_s) == (min_s, max_s), overrides


def test_views_are_read_strictly() -> None:
    view = View(3, "a", ("a", "b"), {"x": 1}, ({"event": "e"},))
    assert View.from_json(view.to_json()) == view
    fields = view.to_json()
    for bad_fields in (
        {"number": "3"},
        {"leader": "c"},
        {"hosts": ["a", "a"]},
        {"orders": []},
        {"z": 1},
    ):
        with pytest.raises(RunError):
            View.from_json(fields | bad_fields)


def test_membership_imports_no_torch() -> None:
    code = (
        "import sys, cordee.elastic.membership, cordee.elastic.register;"
        " assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


def test_an_eviction_has_a_sentence() -> None:
    assert Evicted("fenced: generation 9 goes on without this host").reason.startswith("fenced")


def test_who_has_ended_a_generation_never_works_in_it_again() -> None:
    member = single_member(MemoryRegister())
    view = View(2, "b#0", ("a#0", "b#0"))
    enter = {"kind": "enter", "view": view.to_json()}
    member.receive("b#0", enter, 5.2)
    member.request_view({"event": "worker_died"}, 5.3)
    halt = {"kind": "halt", "number": 3, "attempt": 1, "hosts": ["b#0", "a#0"], "leavers": []}
    member.receive("b#0", halt, 5.4)
    assert member.view is None
    member.receive("b#0", enter, 5.5)
    assert member.view is None
    member.receive("b#0", {"kind": "enter", "view": view.to_json() | {"number": 3}}, 5.6)
    assert member.view and member.view.number == 3
