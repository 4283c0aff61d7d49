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

from cordee.checkpoint.peer import Kept, fill
from cordee.devices import BACKENDS, HOST_ONLY
from cordee.dist.exchange import gather_rows
from cordee.dist.flat import outward
from cordee.dist.mesh import make_mesh
from cordee.dist.start import World
from cordee.layout.axes import AXES, Layout
from cordee.testing import launch
from tests.metal.crew import ALL, MODEL, check, empty, hold, meta
from tests.metal.layouts import DENSE, Curve, curve

STEPS = 3
MOE = (
    *DENSE, "model.moe.experts=4", "model.moe.active=2", "model.moe.width=32",
    "model.moe.router=sigmoid", "model.moe.balance=bias",
)  # fmt: skip
MUON = (*DENSE, "optim.name=muon")


def join_as(world: World, folder: str, accelerated: Sequence[int]) -> None:
    """Leaves the group of all and makes another, as ranks on different devices make it."""
    dist.destroy_process_group()
    store = dist.FileStore(f"{folder}/store-{len(accelerated)}", world.size)  # type: ignore[attr-defined]
    backend = HOST_ONLY if world.rank in accelerated else BACKENDS["cpu"]
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size)


def both(
    world: World, folder: str, jobs: list[tuple[str, ...]], accelerated: Sequence[int]
) -> list[tuple[Curve, Curve]]:
    """Each job's curve over plain groups, and over those of two kinds of device."""
    plain = [curve(world, folder, words, STEPS) for words in jobs]
    join_as(world, folder, accelerated)
    mixed = [curve(world, folder, words, STEPS) for words in jobs]
    return list(zip(plain, mixed, strict=True))


def same_bits(pairs: list[tuple[Curve, Curve]]) -> None:
    for plain, mixed in pairs:
        assert mixed.losses == plain.losses
        assert mixed.norms == plain.norms
        for name, found in mixed.parameters.items():
            assert torch.equal(found, plain.parameters[name]), name


@pytest.mark.parametrize("accelerated", [[0], [1]])
def test_two_islands(accelerated: list[int], tmp_path: Path) -> None:
    jobs: list[tuple[str, ...]] = [
        (*DENSE, "sync.protocol=allreduce"),
        (*DENSE, "sync.protocol=exchange", "sync.codec=bf16"),
        (*DENSE, "run.exact=true", "batch.microbatches=6"),
        MUON,
        MOE,
    ]
    for found in launch(both, str(tmp_path), jobs, accelerated, ranks=2):
        same_bits(found)


def test_islands_of_two_ranks(tmp_path: Path) -> None:
    jobs: list[tuple[str, ...]] = [
        (*DENSE, "layout.islands=2", "layout.shard=2", "sync.protocol=exchange"),
        (*MUON, "layout.islands=2", "layout.tensor=2", "sync.protocol=allreduce"),
    ]
    for found in launch(both, str(tmp_path), jobs, [2, 3], ranks=4):
        same_bits(found)


def groups(world: World, folder: str) -> dict[str, tuple[bool, bool]]:
    """Of some groups of islands of two: whether they carry host memory only, and whether what
    is sent over them is a copy."""
    join_as(world, folder, [2, 3])
    mesh = make_mesh(Layout(island=2, shard=2), world.rank, "cpu")
    found = {}
    for axes in (("shard",), ("island",), AXES):
        group, tensor = mesh.group(*axes), torch.tensor([world.rank])
        rows = gather_rows(tensor, group, mesh.size(*axes))
        assert rows[mesh.index(*axes)].tolist() == [world.rank]
        copied = outward(tensor, group).data_ptr() != tensor.data_ptr()
        found[" ".join(axes[:1])] = (dist.get_backend_config(group) == HOST_ONLY, copied)
    return found


def test_only_what_crosses_islands_goes_by_host_memory(tmp_path: Path) -> None:
    alike = (False, False)
    for rank, found in enumerate(launch(groups, str(tmp_path), ranks=4)):
        across = (True, True) if rank in (2, 3) else alike
        assert found == {"shard": alike, "island": across, AXES[0]: across}


def filled(world: World, folder: str) -> int:
    """Rank 1 is filled by rank 0."""
    join_as(world, folder, [world.size - 1])
    held = hold(ALL, 4, MODEL) if world.first else []
    wanted = held or empty(ALL, MODEL)
    kept = [Kept(4, meta(4), held)] if world.first else []
    found = fill(wanted, kept, dist.group.WORLD, world.rank, world.size)
    check(wanted, 4, MODEL)
    assert found is not None
    return found.receivers


def test_a_newcomer_of_another_kind_is_filled(tmp_path: Path) -> None:
    assert launch(filled, str(tmp_path), ranks=2) == [1, 1]
