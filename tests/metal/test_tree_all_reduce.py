"""The exchange on real ranks against the slow, obvious sum: every leaf in one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from cordee.dist.codecs import make_codec
from cordee.dist.process_group import RankProcess
from cordee.dist.tree_all_reduce import TreeAllReduce
from cordee.launcher.run_ranks import launch
from cordee.layout.microbatches import Node, TreeSum, fold, split_evenly


def leaf_gradient(index: int, size: int) -> torch.Tensor:
    """The gradient of microbatch `index`: over many magnitudes, so that order shows in the bits."""
    generator = torch.Generator().manual_seed(index)
    scale = 10.0 ** torch.randint(-6, 6, (size,), generator=generator)
    return torch.randn(size, generator=generator) * scale


def run_all_reduce(
    process: RankProcess, cases: list[tuple[int, int, str]]
) -> list[tuple[torch.Tensor, int]]:
    """What each case gives on this rank, and the bytes it counted."""
    results = []
    for microbatches, size, codec in cases:
        ranges = split_evenly(microbatches, process.size)
        group = dist.group.WORLD if process.size > 1 else None
        tree_all_reduce = TreeAllReduce(group, ranges, make_codec(codec))
        tree, partial_sums = (
            TreeSum(ranges[process.rank], microbatches),
            list[tuple[Node, torch.Tensor]](),
        )
        for index in ranges[process.rank]:
            tree.feed(partial_sums, index, leaf_gradient(index, size), torch.Tensor.add_)
        results.append(
            (tree_all_reduce.all_reduce(partial_sums).clone(), tree_all_reduce.bytes_sent)
        )
    return results


CASES = [(m, size, codec) for m in (4, 5, 12) for size in (1, 7, 1000) for codec in ("identity",)]


def expected_total(microbatches: int, size: int) -> torch.Tensor:
    """The canonical tree over leaves, in this process."""
    leaves = {(i, i + 1): leaf_gradient(i, size) for i in range(microbatches)}
    return fold((0, microbatches), leaves, torch.add)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_same_bits_on_any_number_of_ranks(ranks: int) -> None:
    results_by_rank = launch(run_all_reduce, CASES, ranks=ranks)
    for results in results_by_rank:
        for (microbatches, size, _), (total, sent_bytes) in zip(CASES, results, strict=True):
            assert torch.equal(total, expected_total(microbatches, size))
            assert (sent_bytes > 0) == (ranks > 1)


@pytest.mark.parametrize("ranks", [2, 3])
def test_bf16_is_near_and_alike_everywhere(ranks: int) -> None:
    cases = [(6, 1000, "bf16"), (6, 1000, "identity")]
    results_by_rank = launch(run_all_reduce, cases, ranks=ranks)
    for (bf16_total, bf16_bytes), (fp32_total, fp32_bytes) in results_by_rank:
        assert torch.equal(bf16_total, results_by_rank[0][0][0])
        assert 2 * bf16_bytes == fp32_bytes
        # Each leaf's sum is rounded once on the way and once on the way back: 2^-8 each.
        magnitude_sum = torch.stack([leaf_gradient(i, 1000).abs() for i in range(6)]).sum(0)
        assert bool(((bf16_total - fp32_total).abs() <= 2 * 2.0**-8 * magnitude_sum + 1e-30).all())


def test_the_order_of_plain_sums_would_show() -> None:
    """The leaves are such that another order gives other bits: the tests above can fail."""
    leaves = [leaf_gradient(index, 1000) for index in range(12)]
    assert not torch.equal(torch.stack(leaves).sum(0), expected_total(12, 1000))
    sequential_sum = leaves[0].clone()
    for gradient in leaves[1:]:
        sequential_sum += gradient
    assert not torch.equal(sequential_sum, expected_total(12, 1000))
