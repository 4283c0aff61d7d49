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

from cordee.checkpoint.peer_restore import RestoreStats, StateSnapshot, restore_from_peers
from cordee.checkpoint.train_state import LocalTensor, collect_local_tensors
from cordee.checkpoint.transfer_plan import (
    MAX_ROUND_BYTES,
    MAX_TRANSFER_BYTES,
    RankInventory,
    SnapshotOffer,
    TensorBox,
    Transfer,
    overlaps,
    plan_transfers,
    schedule_rounds,
    split_box,
)
from cordee.dist.process_group import RankProcess
from cordee.errors import CheckpointError
from cordee.launcher.run_ranks import launch
from cordee.layout.slices import Box, LocalSlice, box_shape, first_coverage_error, full_box, volume
from tests.conftest import boxes, partitions
from tests.metal.standing_worlds import (
    ALL_BOXES,
    DTYPES,
    MODEL,
    NamedBoxes,
    Shapes,
    check_tensors,
    make_empty_tensors,
    make_local_tensors,
    meta,
    run_with_replacement,
    split_model,
)

torch.set_num_threads(1)

SHAPES = ((), (7,), (5, 6), (3, 4, 5), (0, 3), (1, 9))


def restore(
    process: RankProcess, targets: Sequence[LocalTensor], snapshots: Sequence[StateSnapshot]
) -> RestoreStats | None:
    group = dist.group.WORLD if process.size > 1 else None
    return restore_from_peers(targets, snapshots, group, process.rank, process.size)


def restore_newcomer(process: RankProcess) -> tuple[RestoreStats | None, int]:
    """Ranks 0 and 1 survived, rank 2 is new: its bytes, by what the donors did not receive."""
    local_tensors = [] if process.rank == 2 else make_local_tensors(ALL_BOXES, 7, MODEL)
    targets = local_tensors or make_empty_tensors(ALL_BOXES, MODEL)
    pointers_before = [item.tensor.data_ptr() for item in targets]
    stats = restore(
        process, targets, [StateSnapshot(7, meta(7), local_tensors)] if local_tensors else []
    )
    check_tensors(targets, 7, MODEL)
    assert pointers_before == [item.tensor.data_ptr() for item in targets]
    return stats, sum(item.tensor.nbytes for item in targets)


def test_a_newcomer_is_filled_by_all_and_survivors_move_nothing() -> None:
    for stats, size_bytes in launch(restore_newcomer, ranks=3):
        assert stats == RestoreStats(7, meta(7), 2, 1, size_bytes)


def restore_late_rank(process: RankProcess) -> None:
    """Rank 0 has committed step 5, rank 1 was interrupted before: filled in place."""
    local_tensors = make_local_tensors(ALL_BOXES, 5 - process.rank, MODEL)
    stats = restore(
        process,
        local_tensors,
        [StateSnapshot(5 - process.rank, meta(5 - process.rank), local_tensors)],
    )
    assert stats is not None and stats.step == 5 and stats.meta == meta(5)
    assert (stats.donors, stats.receivers) == (1, 1)
    check_tensors(local_tensors, 5, MODEL)


def test_a_rank_that_is_one_step_behind_is_filled() -> None:
    launch(restore_late_rank, ranks=2)


def change_layouts(process: RankProcess) -> None:
    """shard 2 -> 1, 1 -> 2, dim 0 -> dim 1, in fresh memory."""
    rank = process.rank
    full_boxes: list[NamedBoxes] = [ALL_BOXES, ALL_BOXES]
    layouts = (full_boxes, split_model(0), split_model(1))
    for number, old_boxes in enumerate(layouts):
        for new_boxes in layouts:
            local_tensors = make_local_tensors(old_boxes[rank], 3, MODEL)
            targets = make_empty_tensors(new_boxes[rank], MODEL)
            stats = restore(process, targets, [StateSnapshot(3, meta(3), local_tensors)])
            assert stats is not None and stats.step == 3
            assert (stats.bytes > 0) == (old_boxes is not new_boxes and old_boxes is not full_boxes)
            check_tensors(targets, 3, MODEL)
            check_tensors(local_tensors, 3, MODEL)
        # One survivor of two, the other new: covered only if the survivor has everything.
        targets = make_empty_tensors(old_boxes[rank], MODEL)
        snapshots = (
            []
            if rank
            else [StateSnapshot(3, meta(3), make_local_tensors(old_boxes[rank], 3, MODEL))]
        )
        assert (restore(process, targets, snapshots) is None) == (number > 0)


def test_layouts_change() -> None:
    launch(change_layouts, ranks=2)


def restore_in_place(process: RankProcess) -> None:
    """Rows 0-3 and 2-5 change places in the memory where they are: what a rank has of its own would
    be overwritten by what comes, and what it sends too (more than a round)."""
    shapes: Shapes = {"w": ((6, 1 << 21), torch.float32)}
    row_boxes = [((0, 4), (0, 1 << 21)), ((2, 6), (0, 1 << 21))]
    local_tensors = make_local_tensors([("w", row_boxes[process.rank])], 2, shapes)
    targets = [
        LocalTensor(
            "w", local_tensors[0].tensor, LocalSlice(row_boxes[1 - process.rank], shapes["w"][0])
        )
    ]
    stats = restore(process, targets, [StateSnapshot(2, meta(2), local_tensors)])
    assert stats is not None and stats.bytes == 4 << 23
    check_tensors(targets, 2, shapes)


@pytest.mark.slow
def test_layouts_change_in_the_same_memory() -> None:
    launch(restore_in_place, ranks=2)


def restore_best_step(process: RankProcess) -> None:
    """Steps 9 and 8 are covered in parts only, 6 by two halves, 4 whole on one rank."""
    rank, half_boxes = process.rank, split_model(0)
    offers = (
        [(9, half_boxes[0]), (6, half_boxes[0]), (4, ALL_BOXES)],
        [(8, half_boxes[1]), (6, half_boxes[1])],
        [],
    )[rank]
    targets = make_empty_tensors(ALL_BOXES, MODEL)
    snapshots = [
        StateSnapshot(step, meta(step), make_local_tensors(named_boxes, step, MODEL))
        for step, named_boxes in offers
    ]
    stats = restore(process, targets, snapshots)
    assert stats is not None and stats.step == 6 and stats.meta == meta(6)
    check_tensors(targets, 6, MODEL)
    snapshots = [snapshot for snapshot in snapshots if snapshot.step != 6]
    stats = restore(process, targets, snapshots)
    assert stats is not None and (stats.step, stats.donors, stats.receivers) == (4, 1, 2)
    check_tensors(targets, 4, MODEL)
    assert (
        restore(process, targets, [snapshot for snapshot in snapshots if snapshot.step != 4])
        is None
    )
    check_tensors(targets, 4, MODEL)
    assert restore(process, targets, []) is None


def test_the_highest_step_that_all_cover_is_taken() -> None:
    launch(restore_best_step, ranks=3)


def restore_mismatched(process: RankProcess) -> None:
    box = ((0, 4),)
    for other_shape, dtype in (((5,), torch.float32), ((4,), torch.float64)):
        other_tensor = LocalTensor(
            "w",
            torch.zeros(other_shape, dtype=dtype),
            LocalSlice(((0, other_shape[0]),), other_shape),
        )
        targets = [LocalTensor("w", torch.zeros(4), LocalSlice(box, (4,)))]
        with pytest.raises(CheckpointError, match="another tensor") as error_info:
            restore(
                process, targets, [StateSnapshot(1, {}, [other_tensor])] if process.rank else []
            )
        assert error_info.value.values["tensor"] == "w" and error_info.value.values["rank"] == 1


@pytest.mark.slow
def test_other_shapes_and_dtypes_are_refused_by_all() -> None:
    launch(restore_mismatched, ranks=2)


@dataclass
class Scene:
    """What ranks hold, `offers[rank]` = [(step, held)], and want; `reuses_memory`: in the same
    memory."""

    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]]
    offers: list[list[tuple[int, NamedBoxes]]]
    wanted_boxes: list[NamedBoxes]
    reuses_memory: list[bool]
    steps: set[int] = field(default_factory=set)

    def expected_step(self) -> int | None:
        """The highest step of which all wanted elements are held, counted one by one."""
        steps = sorted({step for offers in self.offers for step, _ in offers}, reverse=True)
        return next((step for step in steps if self._is_covered(step)), None)

    def _is_covered(self, step: int) -> bool:
        coverage = {name: torch.zeros(s, dtype=torch.bool) for name, (s, _) in self.shapes.items()}
        for named_boxes in (
            named_boxes
            for offers in self.offers
            for offer_step, named_boxes in offers
            if offer_step == step
        ):
            for name, box in named_boxes:
                coverage[name][tuple(slice(*span) for span in box)] = True
        name_boxes = (pair for named_boxes in self.wanted_boxes for pair in named_boxes)
        return all(bool(coverage[n][tuple(slice(*s) for s in box)].all()) for n, box in name_boxes)


@st.composite
def scenes(draw: st.DrawFn, ranks: int) -> Scene:
    shapes = {
        name: (draw(st.sampled_from(SHAPES)), draw(st.sampled_from(DTYPES))) for name in ("a", "bb")
    }
    offers: list[list[tuple[int, NamedBoxes]]] = [[] for _ in range(ranks)]
    for step in range(1, draw(st.integers(2, 4))):
        boxes_by_rank: list[list[tuple[str, Box]]] = [[] for _ in range(ranks)]
        for name, (shape, _) in shapes.items():
            for box in draw(partitions(shape)):
                for rank in draw(st.lists(st.integers(0, ranks - 1), min_size=1, max_size=2)):
                    boxes_by_rank[rank].append((name, box))
        lost_rank = draw(st.integers(0, 2 * ranks))  # sometimes a rank that holds something is gone
        for rank in range(ranks):
            if rank != lost_rank:
                offers[rank].append((step, boxes_by_rank[rank]))
    wanted_boxes = [
        [(name, draw(st.one_of(boxes(shape), st.just(full_box(shape))))) for name, (shape, _) in
         shapes.items()] for _ in range(ranks)
    ]  # fmt: skip
    return Scene(shapes, offers, wanted_boxes, [draw(st.booleans()) for _ in range(ranks)])


def restore_scene(process: RankProcess, scene: Scene) -> None:
    rank, shapes = process.rank, scene.shapes
    snapshots = [
        StateSnapshot(s, meta(s), make_local_tensors(named_boxes, s, shapes))
        for s, named_boxes in scene.offers[rank]
    ]
    targets = make_empty_tensors(scene.wanted_boxes[rank], shapes)
    if scene.reuses_memory[rank] and snapshots:
        # The first elements of the memory of a tensor that is kept, whatever box it was.
        memory_by_name = {item.name: item.tensor for item in snapshots[-1].tensors}
        for number, item in enumerate(targets):
            old_tensor, size = memory_by_name.get(item.name), volume(item.local_slice.box)
            if old_tensor is not None and old_tensor.is_contiguous() and old_tensor.numel() >= size:
                tensor = old_tensor.view(-1)[:size].view(box_shape(item.local_slice.box))
                targets[number] = LocalTensor(item.name, tensor, item.local_slice)
    stats = restore(process, targets, snapshots)
    expected_step = scene.expected_step()
    assert (stats and stats.step) == expected_step, (stats, expected_step)
    if stats is not None:
        check_tensors(targets, stats.step, shapes)


def run_random_scenes(process: RankProcess, examples: int) -> int:
    """Every rank draws the same scenes: hypothesis is told to leave chance out."""
    expected_steps: list[int | None] = []

    @settings(
        max_examples=examples, derandomize=True, database=None, deadline=None,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(scenes(process.size))
    def check_scene(scene: Scene) -> None:
        expected_steps.append(scene.expected_step())
        restore_scene(process, scene)

    check_scene()
    return sum(step is not None for step in expected_steps)


@pytest.mark.parametrize("ranks", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_any_boxes_against_whole_tensors(ranks: int) -> None:
    restore_counts = launch(run_random_scenes, 150, ranks=ranks)
    assert min(restore_counts) > 30, "scenes that can be filled"


@given(partitions((5, 7)), boxes((5, 7)), st.integers(1, 40))
def test_cells_and_cuts_tile(parts: list[Box], box: Box, limit: int) -> None:
    holders = {part: (number,) for number, part in enumerate(parts) if volume(part)}
    regions = overlaps(box, holders)
    if volume(box):
        assert sum(volume(region) for region, _ in regions) == volume(box)
        assert all(len(holder_ids) == 1 for _, holder_ids in regions)
    small_boxes = list(split_box(full_box((5, 7)), 4, limit))
    assert first_coverage_error(small_boxes, (5, 7)) is None
    assert max(map(volume, small_boxes)) <= max(1, limit // 4)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(1, MAX_TRANSFER_BYTES)))
)
def test_rounds_are_bounded(random_transfers: list[tuple[int, int, int]]) -> None:
    transfers = [
        Transfer(a, b, n, "w", (), size)
        for n, (a, b, size) in enumerate(random_transfers)
        if a != b
    ]
    transfer_rounds = schedule_rounds(transfers)
    assert sorted(p.request_index for r in transfer_rounds for p in r) == sorted(
        p.request_index for p in transfers
    )
    for transfer_round in transfer_rounds:
        for rank in range(4):
            assert (
                sum(p.padded_bytes for p in transfer_round if p.src_rank == rank) <= MAX_ROUND_BYTES
            )
            assert (
                sum(p.padded_bytes for p in transfer_round if p.dst_rank == rank) <= MAX_ROUND_BYTES
            )
    max_bytes = max(
        (sum(p.padded_bytes for p in transfers if p.src_rank == r) for r in range(4)), default=0
    )
    assert len(transfer_rounds) >= math.ceil(max_bytes / MAX_ROUND_BYTES)


def test_what_is_uncut_is_listed_on_every_rank() -> None:
    local_slice = LocalSlice(((3, 6), (0, 2)), (6, 2), ("island",), 1, 2)
    parameters = {"w": nn.Parameter(torch.ones(3, 2))}
    state = {"matrices/w/exp_avg": torch.ones(3, 2), "matrices/w/step": torch.tensor(4.0)}
    assert len(collect_local_tensors(parameters, state, {"w": local_slice})) == 2
    local_tensors = collect_local_tensors(
        parameters, state, {"w": local_slice}, include_replicas=True
    )
    assert [(h.name, h.local_slice.shape) for h in local_tensors][-1] == (
        "optim/matrices/w/step",
        (),
    )


@pytest.mark.parametrize("donors", [1, 2, 3, 5])
def test_donors_share_the_load(donors: int) -> None:
    parts = [TensorBox("w", "F32", (300, 1000), full_box((300, 1000)))]
    parts += [TensorBox(f"v{n}", "BF16", (n, 64), full_box((n, 64))) for n in range(1, 40)]
    inventories = [RankInventory(parts, [SnapshotOffer(1, {}, parts)]) for _ in range(donors)]
    transfers = plan_transfers(
        [*inventories, RankInventory(parts, []), RankInventory(parts, [])], 1
    )
    loads = [
        sum(p.size_bytes for p in transfers if p.src_rank == r != p.dst_rank) for r in range(donors)
    ]
    assert sum(loads) == 2 * (300 * 1000 * 4 + sum(range(40)) * 128)
    assert max(loads) <= 1.2 * min(loads)


BIG_MODEL: Shapes = {**MODEL, "big": ((2560, 4096), torch.float32)}
"""More than one round of messages."""
BIG_BOXES: NamedBoxes = [(name, full_box(shape)) for name, (shape, _) in BIG_MODEL.items()]


def restore_with_fault(
    join_group: Any, fault_point: Any, process: RankProcess, is_new: bool
) -> tuple[int, int]:
    """Ranks 0 and 2 give to rank 1, which is a step behind; somebody dies meanwhile."""
    rank = process.rank
    local_tensors = make_local_tensors(BIG_BOXES, 6 if rank != 1 else 5, BIG_MODEL)
    step = 6 if rank != 1 else 5
    if is_new:
        snapshots = []
        local_tensors = make_empty_tensors(BIG_BOXES, BIG_MODEL)
    else:
        join_group(1)
        with pytest.raises(RuntimeError):
            restore_from_peers(
                local_tensors,
                [StateSnapshot(step, meta(step), local_tensors)],
                dist.group.WORLD,
                rank,
                3,
                fault_point,
            )
        check_tensors(
            local_tensors, step, BIG_MODEL
        )  # donors and receivers alike: nothing was written
        dist.destroy_process_group()
        snapshots = [StateSnapshot(step, meta(step), local_tensors)]
    join_group(2)
    stats = restore_from_peers(local_tensors, snapshots, dist.group.WORLD, rank, 3)
    assert stats is not None
    check_tensors(local_tensors, 6, BIG_MODEL)
    return stats.step, stats.receivers


FAULT_CASES = [(0, 0), (1, 1)]
SLOW_FAULT_CASES = [
    pytest.param(*pair, marks=pytest.mark.slow) for pair in ((1, 0), (0, 1), (2, 2), (1, 2))
]


@pytest.mark.parametrize(("victim", "fault_index"), [*FAULT_CASES, *SLOW_FAULT_CASES])
def test_a_peer_dies_while_it_fills(victim: int, fault_index: int, tmp_path: Path) -> None:
    """At its first round, its second, or after: what the others keep is intact; done again."""
    results = run_with_replacement(restore_with_fault, tmp_path / "c", victim, fault_index)
    assert set(results.values()) == {(6, 1 if victim == 1 else 2)}
