"""The two flat collectives against the slow, obvious sums and copies."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from cordee.dist.flat import DIRECT_BYTES, gather_flat, scatter_flat
from cordee.dist.start import World
from cordee.testing import launch

LIMIT = DIRECT_BYTES // 4
SIZES = (0, 1, 7, LIMIT, LIMIT + 1)


def made(rank: int, count: int) -> torch.Tensor:
    """Vector that rank `rank` brings; anyone can make it."""
    return torch.randn(count, generator=torch.Generator().manual_seed(rank))


def both(world: World) -> None:
    group, ranks = dist.group.WORLD, range(world.size)
    for count in SIZES:
        for in_place in (False, True):
            whole = torch.full((world.size * count,), -1.0)
            part = whole[world.rank * count :][:count] if in_place else torch.empty(count)
            part.copy_(made(world.rank, count))
            assert gather_flat(whole, part, group) is None
            assert torch.equal(whole, torch.cat([made(rank, count) for rank in ranks]))
        mine = torch.full((count,), -1.0)
        assert scatter_flat(mine, made(world.rank, world.size * count), group) is None
        place = slice(world.rank * count, (world.rank + 1) * count)
        obvious = torch.zeros(count)
        for rank in ranks:  # in rank order: the same bits
            obvious += made(rank, world.size * count)[place]
        assert torch.equal(mine, obvious)
        scatter_flat(mine, made(world.rank, world.size * count), group, op=dist.ReduceOp.MAX)
        theirs = [made(rank, world.size * count)[place] for rank in ranks]
        assert torch.equal(mine, torch.stack(theirs).amax(0))


@pytest.mark.parametrize("ranks", [2, 3])
def test_they_are_copies_and_sums_in_rank_order(ranks: int) -> None:
    launch(both, ranks=ranks, deadline_s=60)
