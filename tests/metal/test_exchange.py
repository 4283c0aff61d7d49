"""The exchange on real ranks against the slow, obvious sum: every leaf in one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from cordee.dist.exchange import Exchange
from cordee.dist.start import World
from cordee.layout.split import Node, TreeSum, fold, split_evenly
from cordee.sync.codecs import make_codec
from cordee.testing import launch


def leaf(index: int, size: int) -> torch.Tensor:
    """The gradient of microbatch `index`: over many magnitudes, so that order shows in the bits."""
    made = torch.Generator().manual_seed(index)
    scale = 10.0 ** torch.randint(-6, 6, (size,), generator=made)
    return torch.randn(size, generator=made) * scale


def exchange(world: World, cases: list[tuple[int, int, str]]) -> list[tuple[torch.Tensor, int]]:
    """What each case gives on this rank, and the bytes it counted."""
    found = []
    for microbatches, size, codec in cases:
        ranges = split_evenly(microbatches, world.size)
        group = dist.group.WORLD if world.size > 1 else None
        made = Exchange(group, ranges, make_codec(codec))
        tree, partial = TreeSum(ranges[world.rank], microbatches), list[tuple[Node, torch.Tensor]]()
        for index in ranges[world.rank]:
            tree.feed(partial, index, leaf(index, size), torch.Tensor.add_)
        found.append((made.add(partial).clone(), made.bytes_sent))
    return found


CASES = [(m, size, codec) for m in (4, 5, 12) for size in (1, 7, 1000) for codec in ("identity",)]


def by_hand(microbatches: int, size: int) -> torch.Tensor:
    """The canonical tree over leaves, in this process."""
    leaves = {(i, i + 1): leaf(i, size) for i in range(microbatches)}
    return fold((0, microbatches), leaves, torch.add)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_same_bits_on_any_number_of_ranks(ranks: int) -> None:
    everybody = launch(exchange, CASES, ranks=ranks)
    for results in everybody:
        for (microbatches, size, _), (total, sent) in zip(CASES, results, strict=True):
            assert torch.equal(total, by_hand(microbatches, size))
            assert (sent > 0) == (ranks > 1)


@pytest.mark.parametrize("ranks", [2, 3])
def test_bf16_is_near_and_alike_everywhere(ranks: int) -> None:
    cases = [(6, 1000, "bf16"), (6, 1000, "identity")]
    everybody = launch(exchange, cases, ranks=ranks)
    for (near, half), (exact, whole) in everybody:
        assert torch.equal(near, everybody[0][0][0])
        assert 2 * half == whole
        # Each leaf's sum is rounded once on the way and once on the way back: 2^-8 each.
        largest = torch.stack([leaf(i, 1000).abs() for i in range(6)]).sum(0)
        assert bool(((near - exact).abs() <= 2 * 2.0**-8 * largest + 1e-30).all())


def test_the_order_of_plain_sums_would_show() -> None:
    """The leaves are such that another order gives other bits: the tests above can fail."""
    leaves = [leaf(index, 1000) for index in range(12)]
    assert not torch.equal(torch.stack(leaves).sum(0), by_hand(12, 1000))
    forward = leaves[0].clone()
    for other in leaves[1:]:
        forward += other
    assert not torch.equal(forward, by_hand(12, 1000))
