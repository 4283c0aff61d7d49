"""Copies in a neighbour's memory: who keeps what, what it costs, and faults at each message."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from cordee.checkpoint.neighbour import Neighbour, neighbours
from cordee.checkpoint.peer import Kept, fill
from cordee.checkpoint.state import Holding
from cordee.dist.start import World
from cordee.testing import launch
from tests.metal.crew import ALL, MODEL, by_hand, check, crew, empty, halves, hold, meta

torch.set_num_threads(1)


def shards(rank: int, step: int, ranks: int) -> list[Holding]:
    """A rank's rows of everything; the 0-d step is what all hold."""
    held = hold(halves(0, ranks)[rank], step, MODEL)
    return [
        item if item.place.box else replace(item, place=replace(item.place, copies=ranks))
        for item in held
    ]


def advance(held: Sequence[Holding], step: int) -> None:
    """The tensors as a step leaves them, in place."""
    for item in held:
        item.part.copy_(by_hand(item.name, step, item.place.box, MODEL))


@given(st.lists(st.sampled_from("abc"), min_size=2, max_size=12))
def test_the_neighbour_is_on_another_host(hosts: list[str]) -> None:
    found = neighbours(len(hosts), hosts)
    if len(set(hosts)) == 1:
        assert found == [*range(1, len(hosts)), 0]
        return
    assert all(hosts[rank] != hosts[to] for rank, to in enumerate(found))
    counts = {hosts.count(host) for host in hosts}
    if len(counts) == 1:
        assert sorted(found) == list(range(len(hosts))), "each keeps one copy"


def a_host_goes(world: World) -> None:
    """Ranks 0 and 1 are a host, 2 and 3 another: the first is lost after a copy at step 4."""
    rank, hosts = world.rank, ["a", "a", "b", "b"]
    made = Neighbour(2, dist.group.WORLD, rank, 4, hosts)
    assert [step for step in range(1, 7) if made.due(step)] == [2, 4, 6]
    assert not Neighbour(0, dist.group.WORLD, rank, 4).due(2)
    live = shards(rank, 2, 4)
    own_bytes = sum(item.part.nbytes for item in live)
    for step in (2, 4):
        advance(live, step)
        assert made.copy(step, meta(step), live)
        assert {kept.step for kept in made.kept()} == {step} and len(made.kept()) == 2
    assert 2 * own_bytes <= made.bytes_held <= 2.1 * own_bytes + 4096, "one moment, two ranks'"
    assert 2 * own_bytes - 8 <= made.bytes_sent <= 2.1 * own_bytes + 8192, "twice what is its own"
    assert made.seconds > 0
    advance(live, 5)
    if rank < 2:
        made, live = Neighbour(2, dist.group.WORLD, rank, 4, hosts), shards(rank, 1, 4)
    kept = [] if rank < 2 else [Kept(5, meta(5), live), *made.kept()]
    filled = fill(live, kept, dist.group.WORLD, rank, 4)
    assert filled is not None and filled.step == 4 and filled.meta == meta(4)
    check(live, 4, MODEL)
    # Another layout, from the copies alone.
    wanted = empty(ALL, MODEL)
    assert fill(wanted, made.kept(), dist.group.WORLD, rank, 4) is not None
    check(wanted, 4, MODEL)
    made.back_to(3)
    assert not made.kept() and made.bytes_held == 0


@pytest.mark.slow
def test_a_host_goes_and_the_other_has_its_part() -> None:
    launch(a_host_goes, ranks=4)


def replicas(world: World) -> None:
    held = [
        replace(item, place=replace(item.place, copies=2, copy=world.rank))
        for item in hold(ALL, 1, MODEL)
    ]
    made = Neighbour(1, dist.group.WORLD, world.rank, 2)
    assert not made.copy(1, meta(1), held)
    assert [kept.step for kept in made.kept()] == [1] and made.bytes_sent == 0
    # One tensor that only rank 1 has is enough: then rank 1 sends.
    if world.rank:
        held[0] = replace(held[0], place=replace(held[0].place, copies=1))
    assert made.copy(1, meta(1), held)
    came = [len(kept.held) for kept in made.kept()]
    assert came == ([len(held), 0] if world.rank else [len(held), 1])


def test_what_others_hold_anyway_is_not_sent() -> None:
    launch(replicas, ranks=2)


def copying(join: Any, point: Any, world: World, new: bool) -> tuple[int, int]:
    """Copies at steps 4 and 8; somebody dies in the second. Then all go on, and copy again."""
    armed = False

    def from_the_second(name: str, step: int) -> None:
        if armed:
            point(name, step)

    rank, size = world.rank, world.size
    live, kept = shards(rank, 1, size), list[Kept]()
    made = Neighbour(4, None, rank, size, point=from_the_second)
    if not new:
        join(1)
        made.rebind(dist.group.WORLD, rank, size)
        advance(live, 4)
        made.copy(4, meta(4), live)
        armed = True
        advance(live, 8)
        try:
            made.copy(8, meta(8), live)
            dist.barrier()  # the victim died after all was done
        except RuntimeError:
            pass
        armed = False
        assert len({moment.step for moment in made.kept()}) <= 2
        dist.destroy_process_group()
        kept = [Kept(8, meta(8), live), *made.kept()]
    join(2)
    filled = fill(live, kept, dist.group.WORLD, rank, size)
    assert filled is not None, "a step that all cover"
    check(live, filled.step, MODEL)
    made.rebind(dist.group.WORLD, rank, size)
    made.back_to(filled.step)
    assert made.copy(filled.step, meta(filled.step), live)
    assert {moment.step for moment in made.kept()} == {filled.step} and len(made.kept()) == 2
    return filled.step, len(made.kept())


POINTS = ("copy.begin", "copy.send", "copy.sent", "copy.end")


@pytest.mark.parametrize("moment", range(4), ids=POINTS)
@pytest.mark.parametrize("victim", [0, 2])
def test_a_fault_at_any_message_leaves_a_step_that_all_cover(
    victim: int, moment: int, tmp_path: Path
) -> None:
    found = crew(copying, tmp_path / "c", victim, moment)
    steps = {step for step, _ in found.values()}
    allowed = ({4}, {4}, {4, 8}, {8})[moment]
    assert len(steps) == 1 and steps <= allowed, (steps, POINTS[moment])


def test_ranks_that_have_all_keep_the_step_before_until_everybody_has(tmp_path: Path) -> None:
    """Ranks 2 and 3 of a ring of 5 have all messages of a copy that the death of rank 0 breaks."""
    found = crew(copying, tmp_path / "c", 0, POINTS.index("copy.send"), ranks=5)
    assert {step for step, _ in found.values()} == {4}
