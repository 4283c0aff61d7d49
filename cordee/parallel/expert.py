"""Expert parallelism: tokens go to the rank that holds their expert, and come back.

Rank r of n holds experts [r E/n, (r+1) E/n) of every mixture. Counts travel first, then rows, by
all-to-all (Lepikhin et al. 2020). Rows that arrive are sorted by (expert, source rank), so an
expert sees the rows of all ranks in the order of their concatenated microbatches.

Shape suffixes as in model/moe.py; R ranks, L experts held here, A arrived rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cordee.dist.autograd_collectives import AxisComm
from cordee.model.moe import ExpertFn, inverse_permutation, moe_layers, permute_rows


def set_expert_dispatch(model: nn.Module, expert_comm: AxisComm, sequence_comm: AxisComm) -> None:
    """Sets the hooks of a model whose mixtures hold this rank's experts.

    `expert_comm`: the ranks that share the experts; `sequence_comm`: those that split a sequence
    (axes context and tensor), whose tokens belong to one balance loss.
    """
    dispatcher = TokenDispatcher(expert_comm)
    for moe in moe_layers(model):
        moe.sum_over_sequence = sequence_comm.all_reduce_forward
        if expert_comm.group is not None:
            moe.dispatch = dispatcher


class TokenDispatcher:
    """`MoE.dispatch` where the experts are spread over the ranks of `comm`."""

    def __init__(self, comm: AxisComm) -> None:
        self.comm = comm

    def __call__(self, rows_SD: Tensor, sizes_E: Tensor, compute: ExpertFn) -> Tensor:
        """The experts' outputs of rows sorted by expert, in the same order."""
        rank_count = self.comm.size
        send_counts_RL = sizes_E.view(rank_count, -1)
        receive_counts_RL = self.comm.all_to_all_no_grad(
            send_counts_RL, [1] * rank_count, [1] * rank_count
        )
        send_rows, receive_rows = torch.stack(
            (send_counts_RL.sum(1), receive_counts_RL.sum(1))
        ).tolist()
        input_AD = self.comm.all_to_all(rows_SD, send_rows, receive_rows)
        order_A = order_by_expert(receive_counts_RL, len(input_AD))
        inverse_order_A = inverse_permutation(order_A, len(order_A))
        output_AD = compute(
            permute_rows(input_AD, order_A, inverse_order_A), receive_counts_RL.sum(0)
        )
        return self.comm.all_to_all(
            permute_rows(output_AD, inverse_order_A, order_A), receive_rows, send_rows
        )


def order_by_expert(receive_counts_RL: Tensor, row_count: int) -> Tensor:
    """The order [rows] that sorts rows by (expert, source rank), given (source rank, expert)."""
    expert_ids_RL = torch.arange(
        receive_counts_RL.shape[1], device=receive_counts_RL.device
    ).expand_as(receive_counts_RL)
    experts_A = expert_ids_RL.flatten().repeat_interleave(
        receive_counts_RL.flatten(), output_size=row_count
    )
    return experts_A.sort(stable=True).indices
