"""The two flat collectives against the slow, obvious sums and copies."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from cordee.dist.collectives import MAX_DIRECT_BYTES, all_gather_flat, reduce_scatter_flat
from cordee.dist.process_group import RankProcess
from cordee.launcher.run_ranks import launch

LIMIT = MAX_DIRECT_BYTES // 4
SIZES = (0, 1, 7, LIMIT, LIMIT + 1)


def make_vector(rank: int, count: int) -> torch.Tensor:
    """Vector that rank `rank` brings; anyone can make it."""
    return torch.randn(count, generator=torch.Generator().manual_seed(rank))


def check_collectives(process: RankProcess) -> None:
    group, ranks = dist.group.WORLD, range(process.size)
    for count in SIZES:
        for in_place in (False, True):
            full_vector = torch.full((process.size * count,), -1.0)
            own_part = (
                full_vector[process.rank * count :][:count] if in_place else torch.empty(count)
            )
            own_part.copy_(make_vector(process.rank, count))
            assert all_gather_flat(full_vector, own_part, group) is None
            assert torch.equal(full_vector, torch.cat([make_vector(rank, count) for rank in ranks]))
        output = torch.full((count,), -1.0)
        assert (
            reduce_scatter_flat(output, make_vector(process.rank, process.size * count), group)
            is None
        )
        own_slice = slice(process.rank * count, (process.rank + 1) * count)
        expected_sum = torch.zeros(count)
        for rank in ranks:  # in rank order: the same bits
            expected_sum += make_vector(rank, process.size * count)[own_slice]
        assert torch.equal(output, expected_sum)
        reduce_scatter_flat(
            output, make_vector(process.rank, process.size * count), group, op=dist.ReduceOp.MAX
        )
        vector_parts = [make_vector(rank, process.size * count)[own_slice] for rank in ranks]
        assert torch.equal(output, torch.stack(vector_parts).amax(0))


@pytest.mark.parametrize("ranks", [2, 3])
def test_they_are_copies_and_sums_in_rank_order(ranks: int) -> None:
    launch(check_collectives, ranks=ranks, deadline_s=60)
