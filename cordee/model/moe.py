"""A mixture of experts in place of a block's MLP: router, experts, and their load balance.

Tokens are sorted by expert, each expert's MLP gets its contiguous rows, and the weighted outputs
are added (Shazeer et al. 2017). Rows move by gathers alone, forward and backward, so the same input
gives the same bits on every device. How many rows an expert gets is known only when it is computed.

Shape suffixes: N tokens, E experts, K experts of a token, S rows sorted by expert, P assignments
in token order (N x K), D width, F hidden width of an expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cordee.config.model import ModelSettings
from cordee.model.layers import MLP, ActivationHook, activation, compute_dtype, identity

ExpertFn = Callable[[Tensor, Tensor], Tensor]
"""Rows [S, D], sorted by expert, and how many each expert has [E], to the experts' outputs."""

GROUPED_MM: Callable[..., Tensor] | None = getattr(F, "grouped_mm", None)
"""One product per group of rows, all in one kernel, where torch has it."""

WIDTH_ALIGNMENT = 8
"""Widths that the grouped kernel takes are multiples of this (16 bytes of bf16)."""

ROW_ALIGNMENT = 32
"""On a CPU in bf16, numbers of rows that an expert computes are multiples of this."""


class MoE(nn.Module):
    """settings.moe as a module; parameters as in `layout/tensors.py`, of all experts or of those
    that this rank holds.

    `aux_scale` is the gradient of the balance loss: the factor of the summed cross-entropy before
    its backward (one over the step's tokens, times the loss scale). The reported loss does not
    contain the balance loss. `expert_load` counts the assignments of the backwards since
    `reset_expert_load`. A layout replaces these hooks: `dispatch` computes rows on the ranks that
    hold their experts, `sum_over_sequence` sums over the ranks that split a sequence,
    `gather_sequence` and `scatter_sum` stand around the shared experts.
    """

    bias: Tensor | None
    expert_load: Tensor

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        experts, hidden, width = settings.moe.experts, settings.expert_width, settings.width
        self.settings = settings.moe
        self.aux_scale = 1.0
        self.dispatch: Callable[[Tensor, Tensor, ExpertFn], Tensor] = run_local_experts
        self.sum_over_sequence: ActivationHook = identity
        self.gather_sequence: ActivationHook = identity
        self.scatter_sum: ActivationHook = identity
        is_gated = settings.mlp == "gated"
        self.up = nn.Parameter(torch.empty(experts, hidden, width))
        self.gate = nn.Parameter(torch.empty(experts, hidden, width)) if is_gated else None
        self.down = nn.Parameter(torch.empty(experts, width, hidden))
        self.router = nn.Linear(width, experts, bias=False)
        shared_width = settings.moe.shared * hidden
        self.shared = MLP(settings, shared_width) if shared_width else None
        has_bias = settings.moe.balance == "bias"
        self.register_buffer("bias", torch.zeros(experts) if has_bias else None)
        self.register_buffer(
            "expert_load", torch.zeros(experts, dtype=torch.int64), persistent=False
        )

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        top_k = self.settings.active
        x_ND = x_BTD.flatten(0, 1)
        scores_NE = self._router_scores(x_ND)
        expert_ids_NK, weights_NK = self._route(scores_NE)
        order_S, counts_E, sizes_E = self._sort_by_expert(expert_ids_NK, weights_NK)
        inverse_P, may_drop = (
            inverse_permutation(order_S, expert_ids_NK.numel()),
            self.settings.capacity > 0,
        )
        rows_SD = permute_rows(x_ND, order_S // top_k, inverse_P, may_drop)
        expert_out_SD = self.dispatch(rows_SD, sizes_E, self.run_experts)
        expert_out_NKD = permute_rows(expert_out_SD, inverse_P, order_S, may_drop).view(
            len(x_ND), top_k, -1
        )
        out_ND = (expert_out_NKD * weights_NK.to(expert_out_NKD.dtype).unsqueeze(-1)).sum(1)
        out_BTD = out_ND.view(x_BTD.shape)
        if self.shared is not None:
            shared_BTD: Tensor = self.shared(self.gather_sequence(x_BTD))
            out_BTD = out_BTD + self.scatter_sum(shared_BTD)
        if not (self.training and torch.is_grad_enabled()):
            return out_BTD
        aux = self._aux_loss(scores_NE, counts_E) if self.settings.balance == "loss" else None
        return attach_aux_loss(out_BTD, aux, self.aux_scale, self.expert_load, counts_E)

    def run_experts(self, rows_SD: Tensor, sizes_E: Tensor) -> Tensor:
        """The outputs [S, D] of rows sorted by expert, `sizes_E` rows for each expert held here."""
        if self._can_use_grouped_mm(rows_SD):
            return self.run_experts_grouped(rows_SD.bfloat16(), sizes_E)
        rows = torch.split(rows_SD, sizes_E.tolist())
        gates = [None] * len(self.up) if self.gate is None else self.gate.unbind()
        # An expert without rows multiplies an empty matrix, so that its parameters have gradients.
        matrices = zip(rows, self.up.unbind(), gates, self.down.unbind(), strict=True)
        return torch.cat([_expert_mlp(*operands) for operands in matrices])

    def run_experts_grouped(self, rows_SD: Tensor, sizes_E: Tensor) -> Tensor:
        """`run_experts` with one kernel per matrix, in the rows' type; `sizes_E` stays on the
        device, so the host does not wait."""
        assert GROUPED_MM is not None
        ends_E = sizes_E.cumsum(0, dtype=torch.int32)

        def grouped_product(x: Tensor, weight: Tensor) -> Tensor:
            return GROUPED_MM(x, weight.to(x.dtype).transpose(-2, -1), offs=ends_E)

        up_SF = grouped_product(rows_SD, self.up)
        gate_SF = None if self.gate is None else grouped_product(rows_SD, self.gate)
        return grouped_product(activation(up_SF, gate_SF), self.down)

    def _can_use_grouped_mm(self, rows_SD: Tensor) -> bool:
        """Whether the kernel takes these rows: bf16 on CUDA, aligned widths, at least one."""
        if rows_SD.device.type != "cuda" or GROUPED_MM is None or len(rows_SD) == 0:
            return False
        if self.up.shape[1] % WIDTH_ALIGNMENT or self.up.shape[2] % WIDTH_ALIGNMENT:
            return False
        is_bf16 = torch.get_autocast_dtype("cuda") == torch.bfloat16
        return is_bf16 and torch.is_autocast_enabled("cuda")

    def reset_balance(self) -> None:
        """Zeros bias and load; needed after `to_empty`, which leaves them uninitialised."""
        self.expert_load.zero_()
        if self.bias is not None:
            self.bias.zero_()

    def _router_scores(self, x_ND: Tensor) -> Tensor:
        """Scores in [0, 1]; fp32 whatever the precision, as rounding could change the choice of
        experts (Fedus et al. 2021)."""
        with torch.autocast(x_ND.device.type, enabled=False):
            logits_NE = F.linear(x_ND.float(), self.router.weight.float())
            softmax = self.settings.router == "softmax"
            return logits_NE.softmax(-1) if softmax else logits_NE.sigmoid()

    def _route(self, scores_NE: Tensor) -> tuple[Tensor, Tensor]:
        """(experts of each token, their weights), both [N, K]; the bias affects only the choice.

        Weights sum to 1, except for a single expert: its weight is its score, as a constant would
        give the router no gradient (Fedus et al. 2021).
        """
        biased_scores_NE = scores_NE.detach()
        if self.bias is not None:
            biased_scores_NE = biased_scores_NE + self.bias
        expert_ids_NK = biased_scores_NE.topk(self.settings.active).indices
        weights_NK = scores_NE.gather(-1, expert_ids_NK)
        if self.settings.active > 1:
            weights_NK = weights_NK / (weights_NK.sum(-1, keepdim=True) + 1e-20)
        return expert_ids_NK, weights_NK

    def _sort_by_expert(
        self, expert_ids_NK: Tensor, weights_NK: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(assignments sorted by expert [S], how many each expert got, how many it computes).

        Within an expert by token; with a capacity by falling weight, and those beyond it dropped.
        """
        limit = self.capacity(len(expert_ids_NK))
        experts_P = expert_ids_NK.flatten()
        expert_ids_E = torch.arange(self.settings.experts, device=experts_P.device)
        if not limit:
            sorted_experts_P, order_P = experts_P.sort(stable=True)
            counts_E = _count_ids(sorted_experts_P, expert_ids_E)
            return order_P, counts_E, counts_E
        by_weight_P = weights_NK.detach().flatten().sort(stable=True, descending=True).indices
        sorted_experts_P, by_expert_P = experts_P[by_weight_P].sort(stable=True)
        counts_E = _count_ids(sorted_experts_P, expert_ids_E)
        # Each assignment's rank in its expert's queue, the largest weight first.
        starts_E = counts_E.cumsum(0) - counts_E
        queue_index_P = (
            torch.arange(len(sorted_experts_P), device=sorted_experts_P.device)
            - starts_E[sorted_experts_P]
        )
        return by_weight_P[by_expert_P][queue_index_P < limit], counts_E, counts_E.clamp(max=limit)

    def capacity(self, tokens: int) -> int:
        """Assignments that an expert computes of a microbatch of `tokens`; 0: all."""
        assignments = self.settings.capacity * tokens * self.settings.active
        return math.ceil(assignments / self.settings.experts)

    def _aux_loss(self, scores_NE: Tensor, counts_E: Tensor) -> Tensor:
        """This rank's part of the balance loss of a microbatch times its tokens.

        rate x E x sum_e f_e P_e (Fedus et al. 2021): f_e is the part of all assignments that e got,
        P_e its mean probability over tokens. Only f needs other ranks' tokens, because tokens x P_e
        is a sum over tokens.
        """
        counts_E = self.sum_over_sequence(counts_E)
        fractions_E = counts_E / counts_E.sum()
        probabilities_NE = scores_NE
        if self.settings.router == "sigmoid":
            probabilities_NE = scores_NE / (scores_NE.sum(-1, keepdim=True) + 1e-20)
        weight = self.settings.balance_rate * self.settings.experts
        return weight * (fractions_E * probabilities_NE.sum(0)).sum()


class _AttachAuxLoss(torch.autograd.Function):
    """Returns `out`; the backward gives `aux` the gradient `scale` and adds `counts` to `load`.

    Counting in the backward counts each microbatch once: under activation checkpointing a block
    runs its forward twice and its backward once, and evaluation runs no backward.
    """

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, aux: Tensor | None, scale: float, load: Tensor, counts: Tensor
    ) -> Tensor:
        ctx.load, ctx.counts = load, counts
        ctx.scale = None if aux is None else scale
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        ctx.load.add_(ctx.counts)
        if ctx.scale is None:
            return grad, None, None, None, None
        return grad, torch.full((), ctx.scale, device=grad.device), None, None, None


attach_aux_loss: Callable[[Tensor, Tensor | None, float, Tensor, Tensor], Tensor] = (
    _AttachAuxLoss.apply
)
"""(out, aux, scale, load, counts) to out; see `_AttachAuxLoss`."""


class _PermuteRows(torch.autograd.Function):
    """Rows by index, with a gradient by gathers: an index_add would add with atomics, in an order
    that changes from run to run."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, has_missing: bool) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.rows, ctx.missing = len(x), has_missing
        return _select_rows(x, index, has_missing)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        copies = _select_rows(grad, inverse, ctx.missing)
        if len(inverse) > ctx.rows:  # each row of x was copied K times: its gradient is their sum
            copies = copies.view(ctx.rows, -1, *grad.shape[1:]).sum(1)
        return copies, None, None, None


def permute_rows(x: Tensor, index: Tensor, inverse: Tensor, has_missing: bool = False) -> Tensor:
    """Rows x[index] of x [n, ...], with a gradient made of gathers alone.

    Row i of x is in rows inverse[i K] ... inverse[i K + K - 1] of the result, K = len(inverse) / n.
    `has_missing`: an index one beyond the end may occur and stands for a row of zeros.
    """
    apply: Any = _PermuteRows.apply
    rows: Tensor = apply(x, index, inverse, has_missing)
    return rows


def inverse_permutation(order_S: Tensor, size: int) -> Tensor:
    """The position of each of 0 ... size - 1 in `order_S`; len(order_S) where it is missing."""
    inverse_P = torch.full((size,), len(order_S), dtype=order_S.dtype, device=order_S.device)
    inverse_P[order_S] = torch.arange(len(order_S), device=order_S.device)
    return inverse_P


def run_local_experts(rows_SD: Tensor, sizes_E: Tensor, compute: ExpertFn) -> Tensor:
    return compute(rows_SD, sizes_E)


def moe_layers(model: nn.Module) -> Iterator[MoE]:
    return (module for module in model.modules() if isinstance(module, MoE))


def reset_expert_load(model: nn.Module) -> None:
    """Called at the start of every step."""
    for moe in moe_layers(model):
        moe.expert_load.zero_()


def sum_expert_load(
    layers: Iterable[MoE], sum_over_ranks: Callable[[Tensor], Tensor]
) -> Tensor | None:
    """The step's loads, a row [E] for each module with a bias; None if none has.

    `sum_over_ranks` sums an int64 tensor over all ranks with other samples or positions; it is
    called at most once.
    """
    loads = [moe.expert_load for moe in layers if moe.bias is not None]
    return sum_over_ranks(torch.stack(loads)) if loads else None


@torch.no_grad()
def update_router_bias(layers: Iterable[MoE], loads: Tensor | None, rate: float) -> None:
    """With a committed step: bias += rate x sign(mean load - load) (Wang et al. 2024).

    `loads` is `sum_expert_load` of the same modules; their counts are set to zero.
    """
    if loads is None:
        return
    layers_and_biases = [(moe, moe.bias) for moe in layers if moe.bias is not None]
    # In whole numbers: mean - load has the sign of sum - E x load.
    signs = (loads.sum(-1, keepdim=True) - loads.shape[-1] * loads).sign()
    for (moe, bias), sign_E in zip(layers_and_biases, signs, strict=True):
        bias.add_(sign_E, alpha=rate)
        moe.expert_load.zero_()


def _expert_mlp(rows_SD: Tensor, up_FD: Tensor, gate_FD: Tensor | None, down_DF: Tensor) -> Tensor:
    rows = len(rows_SD)
    # In bf16 a CPU compiles a kernel for every number of rows and caches it. Padding with zeros to
    # a multiple leaves few numbers: five steps of tiny-moe take 107 MiB instead of 564.
    if rows_SD.device.type == "cpu" and compute_dtype(rows_SD) == torch.bfloat16:
        rows_SD = F.pad(rows_SD, (0, 0, 0, -rows % ROW_ALIGNMENT))
    up_SF = F.linear(rows_SD, up_FD)
    gate_SF = None if gate_FD is None else F.linear(rows_SD, gate_FD)
    return F.linear(activation(up_SF, gate_SF), down_DF)[:rows]


def _count_ids(sorted_ids_P: Tensor, ids_E: Tensor) -> Tensor:
    """How often each id occurs; unlike bincount, it does not wait for the device."""
    ends_E = torch.searchsorted(sorted_ids_P, ids_E, right=True)
    return ends_E.diff(prepend=ends_E.new_zeros(1))


def _select_rows(x: Tensor, index: Tensor, has_missing: bool) -> Tensor:
    if has_missing:
        x = torch.cat((x, x.new_zeros(1, *x.shape[1:])))
    return x.index_select(0, index)
