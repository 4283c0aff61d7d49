"""Groups of a run on devices of two kinds, made here with a CPU in the accelerator's place.

Rank by rank they are made as there: an accelerator's rank can send over them from host memory
alone, and does so by copies, a CPU's as ever. What is left out is the accelerator itself
(tests/gpu). The oracle is the same run over plain groups: the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from cordee.checkpoint.peer_restore import StateSnapshot, restore_from_peers
from cordee.dist.collectives import to_transport_device
from cordee.dist.mesh import make_mesh
from cordee.dist.process_group import RankProcess
from cordee.dist.tree_all_reduce import all_gather_rows
from cordee.hardware.devices import BACKENDS, HOST_GLOO
from cordee.launcher.run_ranks import launch
from cordee.layout.axes import AXES, Layout
from tests.metal.layouts import DENSE, Curve, train_curve
from tests.metal.standing_worlds import (
    ALL_BOXES,
    MODEL,
    check_tensors,
    make_empty_tensors,
    make_local_tensors,
    meta,
)

STEPS = 3
MOE = (
    *DENSE, "model.moe.experts=4", "model.moe.active=2", "model.moe.width=32",
    "model.moe.router=sigmoid", "model.moe.balance=bias",
)  # fmt: skip
MUON = (*DENSE, "optim.name=muon")


def join_with_backend(process: RankProcess, folder: str, accelerated_ranks: Sequence[int]) -> None:
    """Leaves the group of all and makes another, as ranks on different devices make it."""
    dist.destroy_process_group()
    store = dist.FileStore(f"{folder}/store-{len(accelerated_ranks)}", process.size)  # type: ignore[attr-defined]
    backend = HOST_GLOO if process.rank in accelerated_ranks else BACKENDS["cpu"]
    dist.init_process_group(backend, store=store, rank=process.rank, world_size=process.size)


def train_both(
    process: RankProcess, folder: str, jobs: list[tuple[str, ...]], accelerated_ranks: Sequence[int]
) -> list[tuple[Curve, Curve]]:
    """Each job's curve over plain groups, and over those of two kinds of device."""
    plain_curves = [train_curve(process, folder, overrides, STEPS) for overrides in jobs]
    join_with_backend(process, folder, accelerated_ranks)
    mixed_curves = [train_curve(process, folder, overrides, STEPS) for overrides in jobs]
    return list(zip(plain_curves, mixed_curves, strict=True))


def check_same_bits(pairs: list[tuple[Curve, Curve]]) -> None:
    for plain_curve, mixed_curve in pairs:
        assert mixed_curve.losses == plain_curve.losses
        assert mixed_curve.norms == plain_curve.norms
        for name, tensor in mixed_curve.parameters.items():
            assert torch.equal(tensor, plain_curve.parameters[name]), name


@pytest.mark.parametrize("accelerated_ranks", [[0], [1]])
def test_two_islands(accelerated_ranks: list[int], tmp_path: Path) -> None:
    jobs: list[tuple[str, ...]] = [
        (*DENSE, "sync.protocol=allreduce"),
        (*DENSE, "sync.protocol=exchange", "sync.codec=bf16"),
        (*DENSE, "run.exact=true", "batch.microbatches=6"),
        MUON,
        MOE,
    ]
    for pairs in launch(train_both, str(tmp_path), jobs, accelerated_ranks, ranks=2):
        check_same_bits(pairs)


def test_islands_of_two_ranks(tmp_path: Path) -> None:
    jobs: list[tuple[str, ...]] = [
        (*DENSE, "layout.islands=2", "layout.shard=2", "sync.protocol=exchange"),
        (*MUON, "layout.islands=2", "layout.tensor=2", "sync.protocol=allreduce"),
    ]
    for pairs in launch(train_both, str(tmp_path), jobs, [2, 3], ranks=4):
        check_same_bits(pairs)


def inspect_groups(process: RankProcess, folder: str) -> dict[str, tuple[bool, bool]]:
    """Of some groups of islands of two: whether they carry host memory only, and whether what
    is sent over them is a copy."""
    join_with_backend(process, folder, [2, 3])
    mesh = make_mesh(Layout(island=2, shard=2), process.rank, "cpu")
    properties = {}
    for axes in (("shard",), ("island",), AXES):
        group, tensor = mesh.group(*axes), torch.tensor([process.rank])
        rows = all_gather_rows(tensor, group, mesh.size(*axes))
        assert rows[mesh.index(*axes)].tolist() == [process.rank]
        is_copied = to_transport_device(tensor, group).data_ptr() != tensor.data_ptr()
        properties[" ".join(axes[:1])] = (dist.get_backend_config(group) == HOST_GLOO, is_copied)
    return properties


def test_only_what_crosses_islands_goes_by_host_memory(tmp_path: Path) -> None:
    same_device = (False, False)
    for rank, properties in enumerate(launch(inspect_groups, str(tmp_path), ranks=4)):
        cross_device = (True, True) if rank in (2, 3) else same_device
        assert properties == {"shard": same_device, "island": cross_device, AXES[0]: cross_device}


def restore_newcomer(process: RankProcess, folder: str) -> int:
    """Rank 1 is filled by rank 0."""
    join_with_backend(process, folder, [process.size - 1])
    local_tensors = make_local_tensors(ALL_BOXES, 4, MODEL) if process.is_first else []
    targets = local_tensors or make_empty_tensors(ALL_BOXES, MODEL)
    snapshots = [StateSnapshot(4, meta(4), local_tensors)] if process.is_first else []
    stats = restore_from_peers(targets, snapshots, dist.group.WORLD, process.rank, process.size)
    check_tensors(targets, 4, MODEL)
    assert stats is not None
    return stats.receivers


def test_a_newcomer_of_another_kind_is_filled(tmp_path: Path) -> None:
    assert launch(restore_newcomer, str(tmp_path), ranks=2) == [1, 1]
