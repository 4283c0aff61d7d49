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
from cordee.errors import RunError
from cordee.fault.members import Member
from cordee.fault.pace import Pace, Rules
from cordee.fault.views import Acceptor, Entered, Fenced, Halted, Left, Promise, View, obstacle
from cordee.fault.witness import FileWitness
from cordee.rendezvous import rules_of
from tests.paper.simulated import World, Wrong, pairs_between, schedule

FAST, ALL, CHUNK = 300, 1500, 100


def play(first: int) -> dict[str, int]:
    ends: dict[str, int] = {}
    for seed in range(first, first + CHUNK):
        try:
            _, end = schedule(seed)
        except Wrong as error:
            pytest.fail(f"{error}\n  python -m tests.paper.simulated --seed {seed}")
        ends[end] = ends.get(end, 0) + 1
    return ends


@pytest.mark.parametrize("first", range(0, FAST, CHUNK))
def test_seeded_schedules(first: int) -> None:
    # Most schedules leave a legitimate set of hosts alive; then steps must be committed again.
    assert play(first)["on"] > 0.7 * CHUNK


@pytest.mark.nightly
@pytest.mark.parametrize("first", range(FAST, ALL, CHUNK))
def test_more_seeded_schedules(first: int) -> None:
    assert play(first)["on"] > 0.7 * CHUNK


def settled(hosts: int, **settings: object) -> World:
    """A run of `hosts` that works, all in."""
    world = World(1, hosts, **settings)  # type: ignore[arg-type]
    assert world.run(20.0, lambda: in_view(world, hosts)), world.log
    world.run(world.now + 5.0)
    assert in_view(world, hosts)
    return world


def in_view(world: World, hosts: int) -> bool:
    views = [host.view for host in world.alive()]
    return all(view and view == views[0] and len(view.hosts) == hosts for view in views)


def recovery_s(world: World, fault: Callable[[], None], limit_s: float) -> float:
    """Virtual seconds from the fault to the next step committed by a new generation."""
    began, generation = world.now, world.commits[-1][1]
    fault()
    again = world.run(began + limit_s, lambda: world.commits[-1][1] > generation)
    assert again, "\n".join(world.log[-20:])
    return world.now - began


@pytest.mark.parametrize("told", [0.0, 1.0])
@pytest.mark.parametrize("victim", [0, 2])
def test_a_death_is_over_in_three_seconds(victim: int, told: float) -> None:
    for seed in range(5):
        world = settled(3 + seed % 3, rules=Rules(silence_s=2.0), told=told)
        took = recovery_s(world, lambda world=world: world.kill(victim), 3.0)
        assert took < (1.0 if told else 3.0)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_freeze_is_over_within_the_limit_and_the_zombie_is_fenced(victim: int) -> None:
    world = settled(3)
    zombie = world.places[victim]
    assert recovery_s(world, lambda: world.freeze(victim), 5.5) < 5.5
    world.run(world.now + 10.0)
    views = len(world.views)
    world.wake(zombie)
    assert world.run(world.now + 2.0, lambda: any("Fenced" in line for line in world.log))
    assert "goes on without this host" in zombie.member.says
    assert world.run(world.now + 10.0, lambda: in_view(world, 3)), "it comes back as a new member"
    assert len(world.views) <= views + 2


def test_a_short_freeze_is_nobodys_death() -> None:
    world = settled(4)
    views = dict(world.views)
    world.freeze(0)
    world.after(0.8, lambda: world.wake(world.places[0]))
    world.run(world.now + 20.0)
    assert world.views == views


@pytest.mark.parametrize("witness", [False, True])
@pytest.mark.parametrize("victim", [0, 1])
def test_two_hosts_of_which_one_dies(victim: int, witness: bool) -> None:
    world = settled(2, witness=witness)
    other, generation = world.places[1 - victim], world.commits[-1][1]
    world.kill(victim)
    world.run(world.now + 20.0)
    if witness or victim == 1:
        assert world.commits[-1][1] > generation and other.view is not None
        assert other.view.hosts == (other.name,)
    else:
        assert world.commits[-1][1] == generation
        assert "waiting for a majority: 1 of 2 hosts answers" in other.member.says
        assert f"silent: h{victim}#0" in other.member.says


@pytest.mark.parametrize("witness", [False, True])
@pytest.mark.parametrize("heal_s", [3.0, 30.0])
def test_a_partition_leaves_one_side_working(heal_s: float, witness: bool) -> None:
    world = settled(5, witness=witness)
    generation = world.commits[-1][1]
    world.cut(pairs_between([0, 1], [2, 3, 4]), heal_s)
    world.run(world.now + heal_s)
    working = [host for host in world.alive() if host.view and host.view.number > generation]
    sides = [{2, 3, 4}, {0, 1}] if witness else [{2, 3, 4}]
    assert {host.place for host in working} in sides
    assert world.run(world.now + 15.0, lambda: in_view(world, 5)), "\n".join(world.log[-20:])


def test_without_a_majority_all_wait_and_go_on_by_themselves() -> None:
    world = settled(3)
    world.cut(pairs_between([0], [1, 2]) + pairs_between([1], [2]), 30.0)
    world.run(world.now + 29.0)
    commits = len(world.commits)
    says = [host.member.says for host in world.alive()]
    assert all("waiting for a majority: 1 of 3 hosts answers" in said for said in says), says
    assert world.run(world.now + 5.0, lambda: len(world.commits) > commits + 3)


@pytest.mark.parametrize("pair", [(0, 1), (1, 0), (1, 2)])
def test_a_one_way_cut_does_not_hold_the_others_up(pair: tuple[int, int]) -> None:
    world = settled(4)
    assert recovery_s(world, lambda: world.cut([pair], None), 5.0) < 5.0
    views = len(world.views)
    world.run(world.now + 30.0)
    assert len(world.views) <= views + 1, "one who is half cut off is not let in again and again"
    assert world.commits[-1][0] > world.now - 1.0


def test_nothing_happens_in_ten_quiet_minutes() -> None:
    for hosts in (2, 5):
        world = settled(hosts, loss=0.01)
        views = dict(world.views)
        world.run(world.now + 600.0)
        assert world.views == views


@pytest.mark.parametrize("leaver", [0, 1])
def test_two_hosts_can_part(leaver: int) -> None:
    world = settled(2)
    host, other = world.places[leaver], world.places[1 - leaver]
    began = world.now
    host.member.leave(host.now)
    host.flush()
    assert world.run(began + 3.0, lambda: not host.alive)
    assert host.member.says.startswith("left") or "goes on without" in host.member.says
    assert other.view is not None and other.view.hosts == (other.name,)
    assert [why["event"] for why in other.view.why] == ["host_left"]
    other.member.leave(other.now)
    other.flush()
    assert not other.alive and other.member.says.startswith("left")


def test_a_call_of_a_follower_is_a_new_view_at_once_with_its_verdict() -> None:
    world = settled(3, delay_s=(0.001, 0.002), loss=0.0)
    follower, began = world.places[2], world.now
    why = {"event": "worker_died", "host": follower.name, "who": "x", "done": "y", "says": "z"}
    follower.member.call(why, follower.now)
    follower.flush()
    number = max(world.views)
    assert world.run(began + 0.02, lambda: in_view(world, 3) and max(world.views) > number)
    assert world.views[max(world.views)].why == (why,)
    world.run(began + 5.0)
    assert max(world.views) == number + 1, "a call is answered once"


def test_verdicts_say_who_and_how_long() -> None:
    world = settled(3, told=0.0)
    recovery_s(world, lambda: world.kill(2), 5.0)
    (why,) = world.views[max(world.views)].why
    assert (why["event"], why["host"], why["who"]) == ("host_silent", "h2#0", "h0#0")
    assert "silent for" in why["says"] and "deadline" in why["says"]
    assert "goes on without it" in why["done"]


def alone(witness: FileWitness | None = None, me: str = "a#0") -> Member:
    member = Member(me, Rules(), assign=lambda reports: dict(reports), report=list, witness=witness)
    member.found(5.0)
    return member


def test_one_host_needs_nobody() -> None:
    member = alone()
    (entered,) = member.take_changes()
    assert entered == Entered(member.view) and member.view.number == 1  # type: ignore[arg-type, union-attr]
    assert member.view.orders == {"a#0": []} and member.says == "working in generation 1"  # type: ignore[union-attr]
    member.call({"event": "worker_died"}, 5.1)
    assert [type(change) for change in member.take_changes()] == [Halted, Entered]
    assert not member.take_outbox()
    member.leave(6.0)
    assert [type(change) for change in member.take_changes()] == [Halted, Left]


def test_a_message_that_cannot_be_read_is_refused() -> None:
    member = alone()
    for message in ({}, {"kind": "boo"}, {"kind": "enter", "view": {}}, {"kind": "beat"}):
        with pytest.raises(RunError):
            member.hear("b#0", message, 6.0)


def test_who_has_no_witness_is_not_let_into_a_run_with_one(tmp_path: Path) -> None:
    first = alone(FileWitness(tmp_path / "witness"))
    second = Member("b#0", Rules(), assign=dict, report=list)
    second.join("a", 1.0)
    ((_, asked),) = second.take_outbox()
    first.hear("b#0", asked, 5.1)
    for to, message in first.take_outbox():
        assert to == "b#0"
        second.hear("a#0", message, 1.1)
    assert "witness" in second.says


def test_the_file_witness_remembers_and_refuses(tmp_path: Path) -> None:
    path = tmp_path / "witness.json"
    member = alone(FileWitness(path))
    assert member.view is not None
    again = FileWitness(path)
    vow = again.promise(9, "c#0", ["c#0"])
    assert vow is not None and not vow.granted and vow.view == member.view
    vow = again.promise(9, "a#0", ["a#0", "b#0"])
    assert vow is not None and vow.granted
    assert not again.accept(View(8, "a#0", ("a#0",)))
    assert again.accept(View(9, "a#0", ("a#0", "b#0")))
    lower = again.promise(9, "b#0", ["b#0"])
    assert lower is not None and not lower.granted and lower.number == 9
    other = alone(FileWitness(path), "d#0")
    assert other.view is None and "holds generation 9 of a#0, b#0" in other.says
    again.forget()
    other.tick(7.0)
    other.tick(7.5)
    other.tick(8.0)
    assert other.view is not None and other.view.number > 9


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
    pace = Pace(0.0)
    for gap in [*gaps, *[outlier] * 12]:
        pace.feed(gap)
    assert pace.deadline_s is not None and pace.deadline_s < 0.25 + 10 * 1.4826 * 0.1


def test_deadlines_have_a_floor_and_a_top_and_need_five() -> None:
    pace = Pace(1.0, 5.0)
    for _ in range(4):
        pace.feed(0.2)
    assert pace.deadline_s is None
    pace.feed(0.2)
    assert pace.deadline_s == 1.0
    for _ in range(64):
        pace.feed(30.0)
    assert pace.deadline_s == 5.0


def test_a_host_that_is_late_and_lives_is_waited_for_longer() -> None:
    pace = Pace(1.0, 5.0, longest=2.0)
    for gap in [0.2] * 60 + [1.4, 0.3]:
        pace.feed(gap)
    assert pace.deadline_s == 2.8


def test_deadlines_between_hosts_follow_the_keys() -> None:
    for words, least_s, most_s in (
        ((), 3.0, 5.0), (("fault.silence_s=2",), 2.0, 2.0), (("fault.silence_s=60",), 3.0, 60.0),
        (("fault.host_silence_s=20",), 20.0, 20.0), (("fault.host_silence_s=1",), 1.0, 5.0),
    ):  # fmt: skip
        rules = rules_of(load(None, list(words)).run)
        assert (rules.least_s, rules.silence_s) == (least_s, most_s), words


def promise(formed: View, *attempts: View) -> Promise:
    return Promise(formed, attempts, None, ())


def test_a_view_that_may_be_active_counts_and_one_that_cannot_be_does_not() -> None:
    base = View(1, "a", ("a", "b", "c"))
    smaller, larger = View(5, "a", ("a", "b")), View(5, "a", ("a", "b", "j", "k", "l"))
    assert obstacle({"b": promise(base), "c": promise(base)}) is None
    assert obstacle({"a": promise(base, smaller)}) == base, "what only a accepted does not free it"
    assert obstacle({"b": promise(base, smaller), "c": promise(base)}) == smaller, "a may be in it"
    assert obstacle({"a": promise(base, smaller), "c": promise(base)}) is None, "half with leader"
    assert obstacle({"b": promise(base), "a": promise(base, smaller)}) is None, "void: b never did"
    assert obstacle({h: promise(base, larger) for h in ("j", "k", "l")}) == base
    assert obstacle({"b": promise(smaller)}) == smaller, "half without the leader"
    with pytest.raises(RunError):
        obstacle({"j": Promise(None, (), None, ())})


def test_a_number_is_promised_once_and_nothing_lower_is_accepted_after() -> None:
    votes, view = Acceptor(3), View(5, "a", ("a", "b"))
    assert not votes.may_promise(3, "a") and votes.may_promise(5, "a")
    votes.promise(5, "a")
    assert votes.may_promise(5, "a") and not votes.may_promise(5, "b")
    assert not votes.accept(view, None, "b") and votes.accept(view, View(1, "a", ("a",)), "a")
    assert votes.formed_number == 1 and list(votes.attempts.values()) == [view]
    votes.promise(6, "b")
    assert not votes.accept(view, None, "a")
    votes.learn(view)
    assert votes.formed == view and not votes.attempts


def test_views_are_read_strictly() -> None:
    view = View(3, "a", ("a", "b"), {"x": 1}, ({"event": "e"},))
    assert View.from_json(view.to_json()) == view
    good = view.to_json()
    for bad in ({"number": "3"}, {"leader": "c"}, {"hosts": ["a", "a"]}, {"orders": []}, {"z": 1}):
        with pytest.raises(RunError):
            View.from_json(good | bad)


def test_members_is_light() -> None:
    code = (
        "import sys, cordee.fault.members, cordee.fault.witness as w;"
        " assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


def test_a_fence_is_a_sentence() -> None:
    assert Fenced("fenced: generation 9 goes on without this host").sentence.startswith("fenced")
