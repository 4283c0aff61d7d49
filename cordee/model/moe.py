"""A mixture of experts in place of a block's MLP: router, experts, and what keeps them busy.

Tokens are sorted by expert, each expert's MLP sees its contiguous rows, and their weighted sum goes
back (Shazeer et al. 2017). Rows move by gathers alone, forward and backward, so the same input
gives the same bits on every device. Not here: experts on other ranks (`parallel/expert.py` sets the
seams). Traded away: a fixed shape; the number of rows of an expert is known when it is computed.

Shape suffixes: N tokens, E experts, K experts of a token, S rows sorted by expert, P places of a
token's rows before sorting (N x K), D width, F hidden width of an expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cordee.config.model import ModelSettings
from cordee.model.attention import compute_dtype
from cordee.model.mlp import MLP, bent
from cordee.model.span import Seam, same

Compute = Callable[[Tensor, Tensor], Tensor]
"""Rows [S, D], sorted by expert, and how many each expert has [E], to the experts' outputs."""

GROUPED: Callable[..., Tensor] | None = getattr(F, "grouped_mm", None)
"""One product per group of rows in one kernel, where torch has it."""

ALIGNED = 8
"""Widths that the grouped kernel takes are multiples of this (16 bytes of bf16)."""

FILLED = 32
"""On a CPU in bf16, numbers of rows that an expert computes are multiples of this."""


class MoE(nn.Module):
    """settings.moe as a module; parameters as in `layout/tensors.py`, of all experts or of those
    that this rank holds.

    `aux_scale` is the gradient of the balance loss: what the summed cross-entropy is multiplied by
    before its backward (one over the step's tokens, times the loss scale). The loss that is
    reported never contains it. `load` counts the assignments of the backwards since
    `forget_load`. Seams: `deal` computes rows where their experts are, `total` sums over the ranks
    that split a sequence, `enter` and `leave` stand around the shared experts.
    """

    bias: Tensor | None
    load: Tensor

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        experts, hidden, width = settings.moe.experts, settings.expert_width, settings.width
        self.settings = settings.moe
        self.aux_scale = 1.0
        self.deal: Callable[[Tensor, Tensor, Compute], Tensor] = alone
        self.total: Seam = same
        self.enter: Seam = same
        self.leave: Seam = same
        gated = settings.mlp == "gated"
        self.up = nn.Parameter(torch.empty(experts, hidden, width))
        self.gate = nn.Parameter(torch.empty(experts, hidden, width)) if gated else None
        self.down = nn.Parameter(torch.empty(experts, width, hidden))
        self.router = nn.Linear(width, experts, bias=False)
        shared = settings.moe.shared * hidden
        self.shared = MLP(settings, shared) if shared else None
        moved = settings.moe.balance == "bias"
        self.register_buffer("bias", torch.zeros(experts) if moved else None)
        self.register_buffer("load", torch.zeros(experts, dtype=torch.int64), persistent=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        active = self.settings.active
        x_ND = x_BTD.flatten(0, 1)
        scores_NE = self._scores(x_ND)
        chosen_NK, weights_NK = self._choose(scores_NE)
        order_S, counts_E, sizes_E = self._sort(chosen_NK, weights_NK)
        back_P, missing = inverse(order_S, chosen_NK.numel()), self.settings.capacity > 0
        rows_SD = pick_rows(x_ND, order_S // active, back_P, missing)
        done_SD = self.deal(rows_SD, sizes_E, self.experts)
        done_NKD = pick_rows(done_SD, back_P, order_S, missing).view(len(x_ND), active, -1)
        out_ND = (done_NKD * weights_NK.to(done_NKD.dtype).unsqueeze(-1)).sum(1)
        out_BTD = out_ND.view(x_BTD.shape)
        if self.shared is not None:
            shared_BTD: Tensor = self.shared(self.enter(x_BTD))
            out_BTD = out_BTD + self.leave(shared_BTD)
        if not (self.training and torch.is_grad_enabled()):
            return out_BTD
        aux = self._aux(scores_NE, counts_E) if self.settings.balance == "loss" else None
        return noted(out_BTD, aux, self.aux_scale, self.load, counts_E)

    def experts(self, rows_SD: Tensor, sizes_E: Tensor) -> Tensor:
        """The outputs [S, D] of rows sorted by expert, `sizes_E` rows for each expert held here.

        An expert without rows takes part with none of them, so that every parameter has a gradient.
        """
        if self._grouped_here(rows_SD):
            return self.grouped(rows_SD.bfloat16(), sizes_E)
        rows = torch.split(rows_SD, sizes_E.tolist())
        gates = [None] * len(self.up) if self.gate is None else self.gate.unbind()
        matrices = zip(rows, self.up.unbind(), gates, self.down.unbind(), strict=True)
        return torch.cat([_expert(*four) for four in matrices])

    def grouped(self, rows_SD: Tensor, sizes_E: Tensor) -> Tensor:
        """`experts` in one kernel a matrix, in the rows' type, and without waiting for sizes."""
        assert GROUPED is not None
        ends_E = sizes_E.cumsum(0, dtype=torch.int32)

        def product(x: Tensor, weight: Tensor) -> Tensor:
            return GROUPED(x, weight.to(x.dtype).transpose(-2, -1), offs=ends_E)

        up_SF = product(rows_SD, self.up)
        gate_SF = None if self.gate is None else product(rows_SD, self.gate)
        return product(bent(up_SF, gate_SF), self.down)

    def _grouped_here(self, rows_SD: Tensor) -> bool:
        """Whether the kernel takes these rows: bf16 on CUDA, aligned widths, at least one row."""
        if rows_SD.device.type != "cuda" or GROUPED is None or len(rows_SD) == 0:
            return False
        if self.up.shape[1] % ALIGNED or self.up.shape[2] % ALIGNED:
            return False
        bf16 = torch.get_autocast_dtype("cuda") == torch.bfloat16
        return bf16 and torch.is_autocast_enabled("cuda")

    def forget_balance(self) -> None:
        """Bias and load at their start; needed after `to_empty`, which leaves garbage in them."""
        self.load.zero_()
        if self.bias is not None:
            self.bias.zero_()

    def _scores(self, x_ND: Tensor) -> Tensor:
        """The router's scores in [0, 1]; fp32 whatever the precision, since a choice hangs on it
        (Fedus et al. 2021)."""
        with torch.autocast(x_ND.device.type, enabled=False):
            logits_NE = F.linear(x_ND.float(), self.router.weight.float())
            softmax = self.settings.router == "softmax"
            return logits_NE.softmax(-1) if softmax else logits_NE.sigmoid()

    def _choose(self, scores_NE: Tensor) -> tuple[Tensor, Tensor]:
        """(experts of each token, their weights), both [N, K]; the bias only moves the choice.

        Weights sum to 1, but for a single expert: its weight is its score, or the router would
        learn nothing from the loss (Fedus et al. 2021).
        """
        judged_NE = scores_NE.detach()
        if self.bias is not None:
            judged_NE = judged_NE + self.bias
        chosen_NK = judged_NE.topk(self.settings.active).indices
        weights_NK = scores_NE.gather(-1, chosen_NK)
        if self.settings.active > 1:
            weights_NK = weights_NK / (weights_NK.sum(-1, keepdim=True) + 1e-20)
        return chosen_NK, weights_NK

    def _sort(self, chosen_NK: Tensor, weights_NK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(places sorted by expert [S], assignments of each expert, those that it takes).

        Within an expert by token; with a capacity by falling weight, and those beyond it are out.
        """
        limit = self.capacity(len(chosen_NK))
        experts_P = chosen_NK.flatten()
        numbers_E = torch.arange(self.settings.experts, device=experts_P.device)
        if not limit:
            sorted_P, order_P = experts_P.sort(stable=True)
            counts_E = _counts(sorted_P, numbers_E)
            return order_P, counts_E, counts_E
        first_P = weights_NK.detach().flatten().sort(stable=True, descending=True).indices
        sorted_P, places_P = experts_P[first_P].sort(stable=True)
        counts_E = _counts(sorted_P, numbers_E)
        starts_E = counts_E.cumsum(0) - counts_E
        queue_P = torch.arange(len(sorted_P), device=sorted_P.device) - starts_E[sorted_P]
        return first_P[places_P][queue_P < limit], counts_E, counts_E.clamp(max=limit)

    def capacity(self, tokens: int) -> int:
        """Assignments that an expert takes of a microbatch of `tokens`; 0: all."""
        wanted = self.settings.capacity * tokens * self.settings.active
        return math.ceil(wanted / self.settings.experts)

    def _aux(self, scores_NE: Tensor, counts_E: Tensor) -> Tensor:
        """This rank's part of the balance loss of a microbatch times its tokens.

        rate x E x sum_e f_e P_e (Fedus et al. 2021): f_e is the part of all assignments that e got,
        P_e the mean probability that tokens gave it. Only f needs other ranks' tokens, because
        tokens x P_e is a sum over tokens.
        """
        counts_E = self.total(counts_E)
        parts_E = counts_E / counts_E.sum()
        odds_NE = scores_NE
        if self.settings.router == "sigmoid":
            odds_NE = scores_NE / (scores_NE.sum(-1, keepdim=True) + 1e-20)
        weight = self.settings.balance_rate * self.settings.experts
        return weight * (parts_E * odds_NE.sum(0)).sum()


class _Noted(torch.autograd.Function):
    """The first input. Its backward gives `aux` the gradient `scale` and counts the assignments.

    So a loss that no later stage sees gets its gradient, and a microbatch is counted once: a block
    that is computed again runs its forward twice and its backward once, and evaluation has none.
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


noted: Callable[[Tensor, Tensor | None, float, Tensor, Tensor], Tensor] = _Noted.apply
"""(out, aux, scale, load, counts) to out; see `_Noted`."""


class _Pick(torch.autograd.Function):
    """Rows by index, and back by index: what an index_add would do with atomics, in one order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, back: Tensor, missing: bool) -> Tensor:
        ctx.save_for_backward(back)
        ctx.rows, ctx.missing = len(x), missing
        return _select(x, index, missing)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (back,) = ctx.saved_tensors
        copies = _select(grad, back, ctx.missing)
        if len(back) > ctx.rows:
            copies = copies.view(ctx.rows, -1, *grad.shape[1:]).sum(1)
        return copies, None, None, None


def pick_rows(x: Tensor, index: Tensor, back: Tensor, missing: bool = False) -> Tensor:
    """Rows x[index] of x [n, ...], with a gradient made of gathers alone.

    Row i of x went to the rows back[i K], ..., back[i K + K - 1] of the result, K = len(back) / n.
    `missing`: an index one beyond the end may occur and stands for a row of zeros.
    """
    rows: Tensor = _Pick.apply(x, index, back, missing)  # type: ignore[no-untyped-call]
    return rows


def inverse(order_S: Tensor, places: int) -> Tensor:
    """Where each of `places` places stands in `order_S`; len(order_S) if it does not."""
    back_P = torch.full((places,), len(order_S), dtype=order_S.dtype, device=order_S.device)
    back_P[order_S] = torch.arange(len(order_S), device=order_S.device)
    return back_P


def alone(rows_SD: Tensor, sizes_E: Tensor, compute: Compute) -> Tensor:
    """All experts are here."""
    return compute(rows_SD, sizes_E)


def mixtures(model: nn.Module) -> Iterator[MoE]:
    """Every mixture of experts in `model`, in order."""
    return (module for module in model.modules() if isinstance(module, MoE))


def forget_load(model: nn.Module) -> None:
    """Starts counting anew: at the start of every step, also of one that follows a dropped one."""
    for moe in mixtures(model):
        moe.load.zero_()


def total_loads(modules: Iterable[MoE], total: Callable[[Tensor], Tensor]) -> Tensor | None:
    """The step's loads, a row [E] for each module with a bias; None if none has.

    `total` sums an int64 tensor over all ranks that saw other samples or positions; it is called
    once, or not at all.
    """
    loads = [moe.load for moe in modules if moe.bias is not None]
    return total(torch.stack(loads)) if loads else None


@torch.no_grad()
def move_bias(modules: Iterable[MoE], loads: Tensor | None, rate: float) -> None:
    """With a committed step: bias += rate x sign(mean load - load) (Wang et al. 2024).

    `loads` are the `total_loads` of the same modules. Those without a bias are left alone. Loads
    start anew.
    """
    if loads is None:
        return
    moved = [(moe, moe.bias) for moe in modules if moe.bias is not None]
    # In whole numbers: mean - load has the sign of sum - E x load.
    signs = (loads.sum(-1, keepdim=True) - loads.shape[-1] * loads).sign()
    for (moe, bias), sign_E in zip(moved, signs, strict=True):
        bias.add_(sign_E, alpha=rate)
        moe.load.zero_()


def _expert(rows_SD: Tensor, up_FD: Tensor, gate_FD: Tensor | None, down_DF: Tensor) -> Tensor:
    """One expert's MLP. In bf16 a CPU makes a kernel for every number of rows and keeps it: five
    steps of tiny-moe held 564 MiB, and hold 107 since zeros fill rows up to few numbers."""
    rows = len(rows_SD)
    if rows_SD.device.type == "cpu" and compute_dtype(rows_SD) == torch.bfloat16:
        rows_SD = F.pad(rows_SD, (0, 0, 0, -rows % FILLED))
    up_SF = F.linear(rows_SD, up_FD)
    gate_SF = None if gate_FD is None else F.linear(rows_SD, gate_FD)
    return F.linear(bent(up_SF, gate_SF), down_DF)[:rows]


def _counts(sorted_P: Tensor, numbers_E: Tensor) -> Tensor:
    """How often each number occurs among sorted ones, without waiting for the device."""
    ends_E = torch.searchsorted(sorted_P, numbers_E, right=True)
    return ends_E.diff(prepend=ends_E.new_zeros(1))


def _select(x: Tensor, index: Tensor, missing: bool) -> Tensor:
    if missing:
        x = torch.cat((x, x.new_zeros(1, *x.shape[1:])))
    return x.index_select(0, index)
