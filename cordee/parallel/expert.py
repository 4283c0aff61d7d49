"""Expert parallelism: tokens go to the rank that holds their expert, and come back.

Rank r of n holds experts [r E/n, (r+1) E/n) of every mixture. Counts travel first, then rows, by
all-to-all (Lepikhin et al. 2020); what arrives is sorted by (expert, source rank), so an expert
sees the rows of all ranks in the order of their concatenated microbatches. Traded away: sending
while experts compute; the exchange waits for the counts.

Shape suffixes as in model/moe.py; R ranks, L experts held here, A arrived rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cordee.dist.wire import Wire
from cordee.model.moe import Compute, inverse, mixtures, pick_rows


def deal_experts(model: nn.Module, experts: Wire, sequence: Wire) -> None:
    """Sets the seams of a model whose mixtures hold this rank's experts.

    `experts`: the ranks that share the experts; `sequence`: those that split a sequence (axes
    context and tensor), whose tokens one balance loss counts.
    """
    deal = Deal(experts)
    for moe in mixtures(model):
        moe.total = sequence.total
        if experts.group is not None:
            moe.deal = deal


class Deal:
    """The seam `deal` of a mixture whose experts lie on the ranks of `wire`."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire

    def __call__(self, rows_SD: Tensor, sizes_E: Tensor, compute: Compute) -> Tensor:
        """Outputs of rows sorted by expert, in their order, wherever their experts are."""
        ranks = self.wire.size
        sent_RL = sizes_E.view(ranks, -1)
        came_RL = self.wire.exchange_now(sent_RL, [1] * ranks, [1] * ranks)
        sent, came = torch.stack((sent_RL.sum(1), came_RL.sum(1))).tolist()
        arrived_AD = self.wire.exchange(rows_SD, sent, came)
        order_A = by_expert(came_RL, len(arrived_AD))
        back_A = inverse(order_A, len(order_A))
        done_AD = compute(pick_rows(arrived_AD, order_A, back_A), came_RL.sum(0))
        return self.wire.exchange(pick_rows(done_AD, back_A, order_A), came, sent)


def by_expert(came_RL: Tensor, rows: int) -> Tensor:
    """Order [rows] that sorts rows that lie by (source rank, expert) by (expert, source rank)."""
    numbers_RL = torch.arange(came_RL.shape[1], device=came_RL.device).expand_as(came_RL)
    experts_A = numbers_RL.flatten().repeat_interleave(came_RL.flatten(), output_size=rows)
    return experts_A.sort(stable=True).indices
