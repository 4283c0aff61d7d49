"""State from live peers on real ranks, against the slow and obvious: whole tensors, cut by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from cordee.checkpoint.deal import (
    ROUND_BYTES,
    SLICE_BYTES,
    Offer,
    Part,
    Slice,
    Told,
    cells,
    cut,
    deal,
    rounds,
)
from cordee.checkpoint.peer import Filled, Kept, fill
from cordee.checkpoint.state import Holding, holdings
from cordee.dist.start import World
from cordee.errors import CheckpointError
from cordee.layout.boxes import Box, Place, first_fault, shape_of, volume, whole
from cordee.testing import launch
from tests.conftest import boxes, partitions
from tests.metal.crew import (
    ALL,
    DTYPES,
    MODEL,
    Held,
    Shapes,
    check,
    crew,
    empty,
    halves,
    hold,
    meta,
)

torch.set_num_threads(1)

SHAPES = ((), (7,), (5, 6), (3, 4, 5), (0, 3), (1, 9))


def go(world: World, wanted: Sequence[Holding], kept: Sequence[Kept]) -> Filled | None:
    group = dist.group.WORLD if world.size > 1 else None
    return fill(wanted, kept, group, world.rank, world.size)


def a_newcomer(world: World) -> tuple[Filled | None, int]:
    """Ranks 0 and 1 survived, rank 2 is new: its bytes, by what the donors did not receive."""
    held = [] if world.rank == 2 else hold(ALL, 7, MODEL)
    wanted = held or empty(ALL, MODEL)
    before = [item.part.data_ptr() for item in wanted]
    filled = go(world, wanted, [Kept(7, meta(7), held)] if held else [])
    check(wanted, 7, MODEL)
    assert before == [item.part.data_ptr() for item in wanted]
    return filled, sum(item.part.nbytes for item in wanted)


def test_a_newcomer_is_filled_by_all_and_survivors_move_nothing() -> None:
    for filled, size_bytes in launch(a_newcomer, ranks=3):
        assert filled == Filled(7, meta(7), 2, 1, size_bytes)


def one_behind(world: World) -> None:
    """Rank 0 has committed step 5, rank 1 was interrupted before: filled in place."""
    held = hold(ALL, 5 - world.rank, MODEL)
    filled = go(world, held, [Kept(5 - world.rank, meta(5 - world.rank), held)])
    assert filled is not None and filled.step == 5 and filled.meta == meta(5)
    assert (filled.donors, filled.receivers) == (1, 1)
    check(held, 5, MODEL)


def test_a_rank_that_is_one_step_behind_is_filled() -> None:
    launch(one_behind, ranks=2)


def relayouts(world: World) -> None:
    """shard 2 -> 1, 1 -> 2, dim 0 -> dim 1, in fresh memory."""
    rank = world.rank
    everything: list[Held] = [ALL, ALL]
    layouts = (everything, halves(0), halves(1))
    for number, before in enumerate(layouts):
        for after in layouts:
            held = hold(before[rank], 3, MODEL)
            wanted = empty(after[rank], MODEL)
            filled = go(world, wanted, [Kept(3, meta(3), held)])
            assert filled is not None and filled.step == 3
            assert (filled.bytes > 0) == (before is not after and before is not everything)
            check(wanted, 3, MODEL)
            check(held, 3, MODEL)
        # One survivor of two, the other new: covered only if the survivor has everything.
        wanted = empty(before[rank], MODEL)
        kept = [] if rank else [Kept(3, meta(3), hold(before[rank], 3, MODEL))]
        assert (go(world, wanted, kept) is None) == (number > 0)


def test_layouts_change() -> None:
    launch(relayouts, ranks=2)


def same_memory(world: World) -> None:
    """Rows 0-3 and 2-5 change places in the memory where they are: what a rank has of its own would
    be overwritten by what comes, and what it sends too (more than a round)."""
    shapes: Shapes = {"w": ((6, 1 << 21), torch.float32)}
    lines = [((0, 4), (0, 1 << 21)), ((2, 6), (0, 1 << 21))]
    held = hold([("w", lines[world.rank])], 2, shapes)
    wanted = [Holding("w", held[0].part, Place(lines[1 - world.rank], shapes["w"][0]))]
    filled = go(world, wanted, [Kept(2, meta(2), held)])
    assert filled is not None and filled.bytes == 4 << 23
    check(wanted, 2, shapes)


@pytest.mark.slow
def test_layouts_change_in_the_same_memory() -> None:
    launch(same_memory, ranks=2)


def several(world: World) -> None:
    """Steps 9 and 8 are covered in parts only, 6 by two halves, 4 whole on one rank."""
    rank, half = world.rank, halves(0)
    offers = ([(9, half[0]), (6, half[0]), (4, ALL)], [(8, half[1]), (6, half[1])], [])[rank]
    wanted = empty(ALL, MODEL)
    kept = [Kept(step, meta(step), hold(held, step, MODEL)) for step, held in offers]
    filled = go(world, wanted, kept)
    assert filled is not None and filled.step == 6 and filled.meta == meta(6)
    check(wanted, 6, MODEL)
    kept = [moment for moment in kept if moment.step != 6]
    filled = go(world, wanted, kept)
    assert filled is not None and (filled.step, filled.donors, filled.receivers) == (4, 1, 2)
    check(wanted, 4, MODEL)
    assert go(world, wanted, [moment for moment in kept if moment.step != 4]) is None
    check(wanted, 4, MODEL)
    assert go(world, wanted, []) is None


def test_the_highest_step_that_all_cover_is_taken() -> None:
    launch(several, ranks=3)


def mismatched(world: World) -> None:
    box = ((0, 4),)
    for other, dtype in (((5,), torch.float32), ((4,), torch.float64)):
        there = Holding("w", torch.zeros(other, dtype=dtype), Place(((0, other[0]),), other))
        wanted = [Holding("w", torch.zeros(4), Place(box, (4,)))]
        with pytest.raises(CheckpointError, match="another tensor") as caught:
            go(world, wanted, [Kept(1, {}, [there])] if world.rank else [])
        assert caught.value.values["tensor"] == "w" and caught.value.values["rank"] == 1


@pytest.mark.slow
def test_other_shapes_and_dtypes_are_refused_by_all() -> None:
    launch(mismatched, ranks=2)


@dataclass
class Scene:
    """What ranks hold, `offers[rank]` = [(step, held)], and want; `reuse`: in the same memory."""

    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]]
    offers: list[list[tuple[int, Held]]]
    wanted: list[Held]
    reuse: list[bool]
    steps: set[int] = field(default_factory=set)

    def expected(self) -> int | None:
        """The highest step of which all wanted elements are held, counted one by one."""
        steps = sorted({step for offers in self.offers for step, _ in offers}, reverse=True)
        return next((step for step in steps if self._covered(step)), None)

    def _covered(self, step: int) -> bool:
        there = {name: torch.zeros(s, dtype=torch.bool) for name, (s, _) in self.shapes.items()}
        for held in (held for offers in self.offers for at, held in offers if at == step):
            for name, box in held:
                there[name][tuple(slice(*span) for span in box)] = True
        wanted = (pair for held in self.wanted for pair in held)
        return all(bool(there[n][tuple(slice(*s) for s in box)].all()) for n, box in wanted)


@st.composite
def scenes(draw: st.DrawFn, ranks: int) -> Scene:
    shapes = {
        name: (draw(st.sampled_from(SHAPES)), draw(st.sampled_from(DTYPES))) for name in ("a", "bb")
    }
    offers: list[list[tuple[int, Held]]] = [[] for _ in range(ranks)]
    for step in range(1, draw(st.integers(2, 4))):
        held: list[list[tuple[str, Box]]] = [[] for _ in range(ranks)]
        for name, (shape, _) in shapes.items():
            for box in draw(partitions(shape)):
                for rank in draw(st.lists(st.integers(0, ranks - 1), min_size=1, max_size=2)):
                    held[rank].append((name, box))
        lost = draw(st.integers(0, 2 * ranks))  # sometimes a rank that holds something is gone
        for rank in range(ranks):
            if rank != lost:
                offers[rank].append((step, held[rank]))
    wanted = [
        [(name, draw(st.one_of(boxes(shape), st.just(whole(shape))))) for name, (shape, _) in
         shapes.items()] for _ in range(ranks)
    ]  # fmt: skip
    return Scene(shapes, offers, wanted, [draw(st.booleans()) for _ in range(ranks)])


def play(world: World, scene: Scene) -> None:
    rank, shapes = world.rank, scene.shapes
    kept = [Kept(s, meta(s), hold(held, s, shapes)) for s, held in scene.offers[rank]]
    wanted = empty(scene.wanted[rank], shapes)
    if scene.reuse[rank] and kept:
        # The first elements of the memory of a tensor that is kept, whatever box it was.
        memory = {item.name: item.part for item in kept[-1].held}
        for number, item in enumerate(wanted):
            old, size = memory.get(item.name), volume(item.place.box)
            if old is not None and old.is_contiguous() and old.numel() >= size:
                part = old.view(-1)[:size].view(shape_of(item.place.box))
                wanted[number] = Holding(item.name, part, item.place)
    filled = go(world, wanted, kept)
    expected = scene.expected()
    assert (filled and filled.step) == expected, (filled, expected)
    if filled is not None:
        check(wanted, filled.step, shapes)


def any_boxes(world: World, examples: int) -> int:
    """Every rank draws the same scenes: hypothesis is told to leave chance out."""
    seen: list[int | None] = []

    @settings(
        max_examples=examples, derandomize=True, database=None, deadline=None,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(scenes(world.size))
    def run(scene: Scene) -> None:
        seen.append(scene.expected())
        play(world, scene)

    run()
    return sum(step is not None for step in seen)


@pytest.mark.parametrize("ranks", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_any_boxes_against_whole_tensors(ranks: int) -> None:
    filled = launch(any_boxes, 150, ranks=ranks)
    assert min(filled) > 30, "scenes that can be filled"


@given(partitions((5, 7)), boxes((5, 7)), st.integers(1, 40))
def test_cells_and_cuts_tile(parts: list[Box], box: Box, limit: int) -> None:
    held = {part: (number,) for number, part in enumerate(parts) if volume(part)}
    found = cells(box, held)
    if volume(box):
        assert sum(volume(region) for region, _ in found) == volume(box)
        assert all(len(who) == 1 for _, who in found)
    small = list(cut(whole((5, 7)), 4, limit))
    assert first_fault(small, (5, 7)) is None
    assert max(map(volume, small)) <= max(1, limit // 4)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(1, SLICE_BYTES))))
def test_rounds_are_bounded(drawn: list[tuple[int, int, int]]) -> None:
    slices = [Slice(a, b, n, "w", (), size) for n, (a, b, size) in enumerate(drawn) if a != b]
    made = rounds(slices)
    assert sorted(p.index for r in made for p in r) == sorted(p.index for p in slices)
    for one in made:
        for rank in range(4):
            assert sum(p.padded_bytes for p in one if p.giver == rank) <= ROUND_BYTES
            assert sum(p.padded_bytes for p in one if p.taker == rank) <= ROUND_BYTES
    most = max((sum(p.padded_bytes for p in slices if p.giver == r) for r in range(4)), default=0)
    assert len(made) >= math.ceil(most / ROUND_BYTES)


def test_what_is_uncut_is_listed_on_every_rank() -> None:
    place = Place(((3, 6), (0, 2)), (6, 2), ("island",), 1, 2)
    parameters = {"w": nn.Parameter(torch.ones(3, 2))}
    state = {"matrices/w/exp_avg": torch.ones(3, 2), "matrices/w/step": torch.tensor(4.0)}
    assert len(holdings(parameters, state, {"w": place})) == 2
    found = holdings(parameters, state, {"w": place}, everything=True)
    assert [(h.name, h.place.shape) for h in found][-1] == ("optim/matrices/w/step", ())


@pytest.mark.parametrize("donors", [1, 2, 3, 5])
def test_donors_share_the_load(donors: int) -> None:
    parts = [Part("w", "F32", (300, 1000), whole((300, 1000)))]
    parts += [Part(f"v{n}", "BF16", (n, 64), whole((n, 64))) for n in range(1, 40)]
    told = [Told(parts, [Offer(1, {}, parts)]) for _ in range(donors)]
    slices = deal([*told, Told(parts, []), Told(parts, [])], 1)
    loads = [sum(p.bytes for p in slices if p.giver == r != p.taker) for r in range(donors)]
    assert sum(loads) == 2 * (300 * 1000 * 4 + sum(range(40)) * 128)
    assert max(loads) <= 1.2 * min(loads)


BIG: Shapes = {**MODEL, "big": ((2560, 4096), torch.float32)}
"""More than one round of messages."""
BIG_ALL: Held = [(name, whole(shape)) for name, (shape, _) in BIG.items()]


def filling(join: Any, point: Any, world: World, new: bool) -> tuple[int, int]:
    """Ranks 0 and 2 give to rank 1, which is a step behind; somebody dies meanwhile."""
    rank = world.rank
    held = hold(BIG_ALL, 6 if rank != 1 else 5, BIG)
    step = 6 if rank != 1 else 5
    if new:
        kept = []
        held = empty(BIG_ALL, BIG)
    else:
        join(1)
        with pytest.raises(RuntimeError):
            fill(held, [Kept(step, meta(step), held)], dist.group.WORLD, rank, 3, point)
        check(held, step, BIG)  # donors and receivers alike: nothing was written
        dist.destroy_process_group()
        kept = [Kept(step, meta(step), held)]
    join(2)
    filled = fill(held, kept, dist.group.WORLD, rank, 3)
    assert filled is not None
    check(held, 6, BIG)
    return filled.step, filled.receivers


MOMENTS = [(0, 0), (1, 1)]
MORE = [pytest.param(*pair, marks=pytest.mark.slow) for pair in ((1, 0), (0, 1), (2, 2), (1, 2))]


@pytest.mark.parametrize(("victim", "moment"), [*MOMENTS, *MORE])
def test_a_peer_dies_while_it_fills(victim: int, moment: int, tmp_path: Path) -> None:
    """At its first round, its second, or after: what the others keep is intact; done again."""
    found = crew(filling, tmp_path / "c", victim, moment)
    assert set(found.values()) == {(6, 1 if victim == 1 else 2)}
