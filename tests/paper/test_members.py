"""Hosts that die, freeze, part and return: what must never be, how soon it goes on, who waits."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cordee.config.load import load
from cordee.elastic.failure_detector import AdaptiveTimeout, Timeouts
from cordee.elastic.membership import Member
from cordee.elastic.views import (
    Acceptor,
    Evicted,
    Left,
    Promise,
    View,
    ViewHalted,
    ViewInstalled,
    blocking_view,
)
from cordee.elastic.witness import FileWitness
from cordee.errors import RunError
from cordee.launcher.rendezvous import make_timeouts
from tests.paper.membership_simulation import (
    InvariantViolation,
    Simulation,
    pairs_between,
    run_schedule,
)

FAST_SEEDS, ALL_SEEDS, SEEDS_PER_CASE = 300, 1500, 100


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
    assert "goes on without this host" in zombie.member.status
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


@pytest.mark.parametrize("has_witness", [False, True])
@pytest.mark.parametrize("victim", [0, 1])
def test_two_hosts_of_which_one_dies(victim: int, has_witness: bool) -> None:
    simulation = start_simulation(2, has_witness=has_witness)
    survivor, generation = simulation.nodes[1 - victim], simulation.commits[-1][1]
    simulation.kill(victim)
    simulation.run(simulation.now + 20.0)
    if has_witness or victim == 1:
        assert simulation.commits[-1][1] > generation and survivor.view is not None
        assert survivor.view.hosts == (survivor.name,)
    else:
        assert simulation.commits[-1][1] == generation
        assert "waiting for a majority: 1 of 2 hosts answers" in survivor.member.status
        assert f"silent: h{victim}#0" in survivor.member.status


@pytest.mark.parametrize("has_witness", [False, True])
@pytest.mark.parametrize("heal_s", [3.0, 30.0])
def test_a_partition_leaves_one_side_working(heal_s: float, has_witness: bool) -> None:
    simulation = start_simulation(5, has_witness=has_witness)
    generation = simulation.commits[-1][1]
    simulation.cut_links(pairs_between([0, 1], [2, 3, 4]), heal_s)
    simulation.run(simulation.now + heal_s)
    working_hosts = [
        host for host in simulation.live_hosts() if host.view and host.view.number > generation
    ]
    sides = [{2, 3, 4}, {0, 1}] if has_witness else [{2, 3, 4}]
    assert {host.node for host in working_hosts} in sides
    assert simulation.run(simulation.now + 15.0, lambda: is_view_complete(simulation, 5)), (
        "\n".join(simulation.log[-20:])
    )


def test_without_a_majority_all_wait_and_go_on_by_themselves() -> None:
    simulation = start_simulation(3)
    simulation.cut_links(pairs_between([0], [1, 2]) + pairs_between([1], [2]), 30.0)
    simulation.run(simulation.now + 29.0)
    commit_count = len(simulation.commits)
    statuses = [host.member.status for host in simulation.live_hosts()]
    assert all("waiting for a majority: 1 of 3 hosts answers" in status for status in statuses), (
        statuses
    )
    assert simulation.run(simulation.now + 5.0, lambda: len(simulation.commits) > commit_count + 3)


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
    assert host.member.status.startswith("left") or "goes on without" in host.member.status
    assert other_host.view is not None and other_host.view.hosts == (other_host.name,)
    assert [verdict["event"] for verdict in other_host.view.events] == ["host_left"]
    other_host.member.leave(other_host.now)
    other_host.flush()
    assert not other_host.is_alive and other_host.member.status.startswith("left")


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


def single_member(witness: FileWitness | None = None, own_id: str = "a#0") -> Member:
    member = Member(
        own_id, Timeouts(), assign=lambda reports: dict(reports), report=list, witness=witness
    )
    member.bootstrap(5.0)
    return member


def test_one_host_needs_nobody() -> None:
    member = single_member()
    (event,) = member.take_changes()
    assert event == ViewInstalled(member.view) and member.view.number == 1  # type: ignore[arg-type, union-attr]
    assert member.view.assignment == {"a#0": []} and member.status == "working in generation 1"  # type: ignore[union-attr]
    member.request_view({"event": "worker_died"}, 5.1)
    assert [type(change) for change in member.take_changes()] == [ViewHalted, ViewInstalled]
    assert not member.take_outbox()
    member.leave(6.0)
    assert [type(change) for change in member.take_changes()] == [ViewHalted, Left]


def test_a_message_that_cannot_be_read_is_refused() -> None:
    member = single_member()
    for message in ({}, {"kind": "boo"}, {"kind": "enter", "view": {}}, {"kind": "beat"}):
        with pytest.raises(RunError):
            member.receive("b#0", message, 6.0)


def test_who_has_no_witness_is_not_let_into_a_run_with_one(tmp_path: Path) -> None:
    founder = single_member(FileWitness(tmp_path / "witness"))
    joiner = Member("b#0", Timeouts(), assign=dict, report=list)
    joiner.join("a", 1.0)
    ((_, join_request),) = joiner.take_outbox()
    founder.receive("b#0", join_request, 5.1)
    for target, message in founder.take_outbox():
        assert target == "b#0"
        joiner.receive("a#0", message, 1.1)
    assert "witness" in joiner.status


def test_the_file_witness_remembers_and_refuses(tmp_path: Path) -> None:
    path = tmp_path / "witness.json"
    member = single_member(FileWitness(path))
    assert member.view is not None
    second_witness = FileWitness(path)
    reply = second_witness.promise(9, "c#0", ["c#0"])
    assert reply is not None and not reply.is_granted and reply.view == member.view
    reply = second_witness.promise(9, "a#0", ["a#0", "b#0"])
    assert reply is not None and reply.is_granted
    assert not second_witness.accept(View(8, "a#0", ("a#0",)))
    assert second_witness.accept(View(9, "a#0", ("a#0", "b#0")))
    second_reply = second_witness.promise(9, "b#0", ["b#0"])
    assert second_reply is not None and not second_reply.is_granted and second_reply.number == 9
    other_member = single_member(FileWitness(path), "d#0")
    assert other_member.view is None and "holds generation 9 of a#0, b#0" in other_member.status
    second_witness.clear_view()
    other_member.tick(7.0)
    other_member.tick(7.5)
    other_member.tick(8.0)
    assert other_member.view is not None and other_member.view.number > 9


def test_a_witness_that_cannot_be_reached_promises_nothing(tmp_path: Path) -> None:
    path = tmp_path / "witness.json"
    witness = FileWitness(path)
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert witness.promise(1, "a#0", ["a#0"]) is None and "locked" in witness.failure
    path.write_text("{")
    assert witness.promise(1, "a#0", ["a#0"]) is None and not witness.accept(View(0, "a", ("a",)))
    path.unlink()
    assert FileWitness(tmp_path / "no" / "w").promise(1, "a#0", ["a#0"]) is None
    path.mkdir()
    assert not FileWitness(path).accept(View(0, "a", ("a",)))


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


def promise(installed_view: View, *accepted_views: View) -> Promise:
    return Promise(installed_view, accepted_views, None, ())


def test_a_view_that_may_be_active_counts_and_one_that_cannot_be_does_not() -> None:
    base = View(1, "a", ("a", "b", "c"))
    subset, superset = View(5, "a", ("a", "b")), View(5, "a", ("a", "b", "j", "k", "l"))
    assert blocking_view({"b": promise(base), "c": promise(base)}) is None
    assert blocking_view({"a": promise(base, subset)}) == base, (
        "what only a accepted does not free it"
    )
    assert blocking_view({"b": promise(base, subset), "c": promise(base)}) == subset, (
        "a may be in it"
    )
    assert blocking_view({"a": promise(base, subset), "c": promise(base)}) is None, (
        "half with leader"
    )
    assert blocking_view({"b": promise(base), "a": promise(base, subset)}) is None, (
        "void: b never did"
    )
    assert blocking_view({host: promise(base, superset) for host in ("j", "k", "l")}) == base
    assert blocking_view({"b": promise(subset)}) == subset, "half without the leader"
    with pytest.raises(RunError):
        blocking_view({"j": Promise(None, (), None, ())})


def test_a_number_is_promised_once_and_nothing_lower_is_accepted_after() -> None:
    acceptor, view = Acceptor(3), View(5, "a", ("a", "b"))
    assert not acceptor.may_promise(3, "a") and acceptor.may_promise(5, "a")
    acceptor.promise(5, "a")
    assert acceptor.may_promise(5, "a") and not acceptor.may_promise(5, "b")
    assert not acceptor.accept(view, None, "b") and acceptor.accept(view, View(1, "a", ("a",)), "a")
    assert acceptor.installed_number == 1 and list(acceptor.accepted_views.values()) == [view]
    acceptor.promise(6, "b")
    assert not acceptor.accept(view, None, "a")
    acceptor.learn(view)
    assert acceptor.installed_view == view and not acceptor.accepted_views


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
        "import sys, cordee.elastic.membership, cordee.elastic.witness as w;"
        " assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


def test_an_eviction_has_a_sentence() -> None:
    assert Evicted("fenced: generation 9 goes on without this host").reason.startswith("fenced")
