"""Muon (Jordan et al. 2024): momentum, then the nearest semi-orthogonal matrix, shared over ranks.

`prepare` sends all messages and changes nothing that survives; `step` is this rank's own work. The
bits of an update do not depend on who computes it: every matrix is orthogonalised by itself (not in
a batch of equal shapes), from a fresh contiguous copy, by the same products. `torch.optim.Muon`
gives the same bits for whole parameters in bf16, but neither shares the work nor takes shards.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cordee.dist.collectives import all_gather_flat, to_transport_device
from cordee.errors import LayoutError
from cordee.optim.update_rules import Optimizer, OptimizerState

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b, c of X <- aX + b(XX^T)X + c(XX^T)^2 X: chosen by Jordan et al. for slope at zero."""

NEWTON_SCHULZ_STEPS = 5
"""Newton-Schulz steps: singular values from 0.01 to 1 end between about 0.7 and 1.2."""

MIN_NORM = 1e-7
"""Least norm by which a matrix is divided."""


@dataclass(frozen=True)
class RankGroup:
    """Ranks that hold the same parameters and momentum, and so may share the work."""

    group: dist.ProcessGroup | None
    rank: int
    size: int


SINGLE_RANK_GROUP = RankGroup(None, 0, 1)


def product_dtype(device: torch.device) -> torch.dtype:
    """bf16 where `device` multiplies it natively (accelerators, CPUs that say so), else fp32: the
    iteration forgives bf16, but a CPU without it takes many times as long."""
    if device.type != "cpu":
        return torch.bfloat16
    # Before PyTorch 2.12 there is no such function.
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    has_bf16 = any(value is True for name, value in capabilities.items() if "bf16" in name)
    return torch.bfloat16 if has_bf16 else torch.float32


MatrixSlice = tuple[tuple[int, int], tuple[int, int]]
"""(start, stop) of rows and of columns."""


@dataclass(frozen=True)
class MatrixSpec:
    """How a parameter is one matrix, or several stacked in dim 0, and who has which part of it.

    `ranks` share the work: all hold the whole (`slices` is empty), or rank i holds `slices[i]` of
    each [rows, columns] matrix.
    """

    rows: int
    columns: int
    is_stacked: bool = False
    ranks: RankGroup = SINGLE_RANK_GROUP
    slices: tuple[MatrixSlice, ...] = ()


@dataclass(frozen=True)
class _MatrixTask:
    """This rank's part of one matrix: parameter, momentum and gradient."""

    parameter: Tensor
    momentum: Tensor
    grad: Tensor
    matrix: MatrixSpec

    @property
    def cost(self) -> int:
        return orthogonalise_cost(self.matrix.rows, self.matrix.columns)


@dataclass(frozen=True)
class MuonUpdate:
    """This rank's parts of the orthogonalised updates of some matrices of a param group, in the
    optimiser's dtype."""

    group: dict[str, Any]
    tasks: list[_MatrixTask]
    results: list[Tensor]


def orthogonalise(update: Tensor, dtype: torch.dtype) -> Tensor:
    """U V^T of update = U S V^T, roughly, by Newton-Schulz in `dtype`; [rows, columns], contiguous.

    Works on the wide orientation, so that the Gram matrix has the smaller side. One thread, fp32 /
    bf16: 192 x 192 2.2 / 1.3 ms, 768 x 192 3.9 / 3.5 ms, products being 95 % of it; a step of 16
    of the first and 8 of the second 76 / 57 ms (torch.optim.Muon, bf16 only: 54 ms).
    """
    is_tall = update.shape[0] > update.shape[1]
    wide = (update.T if is_tall else update).to(dtype)
    matrix = wide.clone(memory_format=torch.contiguous_format)
    matrix.div_(matrix.norm().clamp(min=MIN_NORM))
    if dtype == torch.float32 and 2 * matrix.shape[0] <= matrix.shape[1]:
        matrix = _newton_schulz_by_gram(matrix)
    else:
        matrix = _newton_schulz(matrix)
    return matrix.T.contiguous() if is_tall else matrix


def _newton_schulz(x: Tensor) -> Tensor:
    """The iteration as written, operation by operation as in torch.optim.Muon."""
    a, b, c = COEFFICIENTS
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _newton_schulz_by_gram(x: Tensor) -> Tensor:
    """The same iteration on R = XX^T alone: X_5 = P_5...P_1 X_0 with P = aI + bR + cR^2, R <- PRP.

    For 192 x 768 it takes 25 units of 2 x 192^3 operations and not 45 (3.9 ms, not 6.6). Off from
    fp64 by 4e-5 at worst (singular values over 8 decades), where bf16 products are off by 4e-2.
    For fp32 only: rounded to bf16, R has eigenvalues below zero, and they grow.
    """
    a, b, c = COEFFICIENTS
    gram = x @ x.T
    product: Tensor | None = None
    for step in range(NEWTON_SCHULZ_STEPS):
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal().add_(a)
        product = factor if product is None else factor @ product
        if step < NEWTON_SCHULZ_STEPS - 1:
            gram = factor @ gram @ factor
    return x if product is None else product @ x


def orthogonalise_cost(rows: int, columns: int) -> int:
    """Multiplications of one orthogonalisation, up to a factor."""
    short_side, long_side = min(rows, columns), max(rows, columns)
    return short_side * short_side * (2 * long_side + short_side)


def assign_owners(costs: Sequence[int], size: int) -> list[int]:
    """The rank that computes each task: most expensive first, to the least loaded rank, the lowest
    of equal ones."""
    rank_load, owners = [0] * size, [0] * len(costs)
    for task in sorted(range(len(costs)), key=lambda j: (-costs[j], j)):
        rank = min(range(size), key=lambda r: (rank_load[r], r))
        owners[task] = rank
        rank_load[rank] += costs[task]
    return owners


class Muon(Optimizer):
    """Muon for parameters of two or more dims (further dims count as columns).

    Update: m <- m + (1 - momentum)(g - m); u = g + momentum (m - g) (Nesterov);
    p <- p (1 - lr x weight_decay) - lr sqrt(max(1, rows / columns)) orthogonalise(u).
    `matrices[i]` says how the i-th parameter is cut; without it each is one whole matrix of this
    rank. The matrices of a group of ranks are shared out: each rank orthogonalises its own, whole,
    and sends the results back. All results wait for the step, one copy of the matrices in `dtype`;
    the new momentum is not kept but computed again. `sent_bytes` and `exchange_s` count what this
    rank sent and how long that took, waiting for others included.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.bfloat16,
        matrices: Sequence[MatrixSpec] | None = None,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype
        self.sent_bytes = 0
        self.exchange_s = 0.0
        all_parameters = [p for group in self.param_groups for p in group["params"]]
        for parameter in all_parameters:
            if parameter.ndim < 2:
                raise LayoutError(
                    "muon updates matrices only",
                    values={"shape": tuple(parameter.shape)},
                    fix="give vectors to adamw",
                )
        specs = matrices or [MatrixSpec(len(p), math.prod(p.shape[1:])) for p in all_parameters]
        self._matrices = dict(zip(all_parameters, specs, strict=True))

    @torch.no_grad()
    def prepare(self) -> list[MuonUpdate]:
        """The updates of all parameters that have a gradient. Collective when work is shared;
        changes neither parameters nor state, so that it may be called again after a fault."""
        updates = []
        for group in self.param_groups:
            full_tasks: dict[RankGroup, list[_MatrixTask]] = {}
            slice_tasks: dict[RankGroup, list[_MatrixTask]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    matrix = self._matrices[parameter]
                    tasks_by_ranks = slice_tasks if matrix.slices else full_tasks
                    tasks = self._tasks(parameter, matrix)
                    tasks_by_ranks.setdefault(matrix.ranks, []).extend(tasks)
            momentum = group["momentum"]
            for ranks, tasks in full_tasks.items():
                results = self._orthogonalise_full(tasks, momentum, ranks)
                updates.append(MuonUpdate(group, tasks, results))
            for ranks, tasks in slice_tasks.items():
                results = self._orthogonalise_slices(tasks, momentum, ranks)
                updates.append(MuonUpdate(group, tasks, results))
        return updates

    def init_state(self, parameter: Tensor) -> OptimizerState:
        return {"momentum_buffer": torch.zeros_like(parameter)}

    @torch.no_grad()
    def step(self, updates: list[MuonUpdate] | None = None) -> None:
        """One update of every parameter that has a gradient: local, of what `prepare` returned for
        these gradients (without it, it is called first)."""
        for update in self.prepare() if updates is None else updates:
            group, tasks = update.group, update.tasks
            lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
            torch._foreach_lerp_([j.momentum for j in tasks], [j.grad for j in tasks], 1 - momentum)
            for task, result in zip(tasks, update.results, strict=True):
                scale = math.sqrt(max(1.0, task.matrix.rows / task.matrix.columns))
                if decay:
                    task.parameter.mul_(1 - lr * decay)
                task.parameter.add_(result.view_as(task.parameter), alpha=-lr * scale)

    def _tasks(self, parameter: Tensor, matrix: MatrixSpec) -> list[_MatrixTask]:
        state, grad = self.state[parameter], parameter.grad
        assert grad is not None
        tensors = (parameter, state["momentum_buffer"], grad)
        if not matrix.is_stacked:
            return [_MatrixTask(*tensors, matrix)]
        return [_MatrixTask(*slices, matrix) for slices in zip(*tensors, strict=True)]

    def _nesterov_update(self, task: _MatrixTask, momentum: float) -> Tensor:
        """g + momentum (m - g) with the new momentum m, which `step` computes again in place."""
        next_momentum = task.momentum.lerp(task.grad, 1 - momentum)
        return task.grad.lerp(next_momentum, momentum).flatten(1).to(self.dtype)

    def _orthogonalise_full(
        self, tasks: list[_MatrixTask], momentum: float, ranks: RankGroup
    ) -> list[Tensor]:
        """All ranks hold every matrix; each computes its own, one gather gives all to all."""
        owners = assign_owners([job.cost for job in tasks], ranks.size)
        task_owners = list(zip(tasks, owners, strict=True))
        own_tasks = (job for job, o in task_owners if o == ranks.rank)
        own_results = [
            orthogonalise(self._nesterov_update(job, momentum), self.dtype) for job in own_tasks
        ]
        if ranks.size == 1:
            return own_results
        sizes = [[job.grad.numel() for job, o in task_owners if o == r] for r in range(ranks.size)]
        max_elements = max(sum(s) for s in sizes)
        flat = tasks[0].grad.new_zeros(max_elements, dtype=self.dtype)
        if own_results:
            torch.cat([m.flatten() for m in own_results], out=flat[: sum(sizes[ranks.rank])])
        del own_results
        start_s = time.perf_counter()
        payload = to_transport_device(flat, ranks.group)
        all_results = payload.new_empty(ranks.size * max_elements)
        # As bytes: not every backend knows bf16.
        all_gather_flat(all_results.view(torch.uint8), payload.view(torch.uint8), group=ranks.group)
        all_results = all_results.to(flat.device)
        self.exchange_s += time.perf_counter() - start_s
        self.sent_bytes += flat.nbytes * (ranks.size - 1)
        by_rank = zip(torch.split(all_results, max_elements), sizes, strict=True)
        pieces = [list(torch.split(b[: sum(s)], s)) if s else [] for b, s in by_rank]
        return [pieces[o].pop(0) for _, o in task_owners]

    def _orthogonalise_slices(
        self, tasks: list[_MatrixTask], momentum: float, ranks: RankGroup
    ) -> list[Tensor]:
        """Each rank holds a part of every matrix: parts go to the owner and come back."""
        all_ranks = range(ranks.size)
        owners = assign_owners([job.cost for job in tasks], ranks.size)
        tasks_by_owner = [[j for j, o in enumerate(owners) if o == r] for r in all_ranks]
        task_order = [j for js in tasks_by_owner for j in js]
        own_tasks = tasks_by_owner[ranks.rank]
        # Elements: `send_sizes[r]` from here to r, `slice_sizes[r][i]` of my i-th matrix from r.
        send_sizes = [sum(tasks[j].grad.numel() for j in js) for js in tasks_by_owner]
        slice_sizes = [
            [_slice_elements(tasks[j].matrix.slices[r]) for j in own_tasks] for r in all_ranks
        ]
        receive_sizes = [sum(h) for h in slice_sizes]

        flat = torch.cat([self._nesterov_update(tasks[j], momentum).flatten() for j in task_order])
        blocks = torch.split(
            self._all_to_all(flat, send_sizes, receive_sizes, ranks), receive_sizes
        )
        slices_by_rank = [
            torch.split(b, h) if h else () for b, h in zip(blocks, slice_sizes, strict=True)
        ]
        results = []
        for i, j in enumerate(own_tasks):
            matrix = tasks[j].matrix
            update = flat.new_empty(matrix.rows, matrix.columns)
            for r in all_ranks:
                (top, bottom), (left, right) = matrix.slices[r]
                target = update[top:bottom, left:right]
                target.copy_(slices_by_rank[r][i].view(target.shape))
            results.append(orthogonalise(update, self.dtype))
        result_slices = [
            result[top:bottom, left:right].flatten()
            for r in all_ranks
            for j, result in zip(own_tasks, results, strict=True)
            for (top, bottom), (left, right) in [tasks[j].matrix.slices[r]]
        ]
        flat = self._all_to_all(
            torch.cat(result_slices or [flat[:0]]), receive_sizes, send_sizes, ranks
        )
        own_slices = torch.split(flat, [tasks[j].grad.numel() for j in task_order])
        slice_of_task = dict(zip(task_order, own_slices, strict=True))
        return [slice_of_task[j] for j in range(len(tasks))]

    def _all_to_all(
        self, flat: Tensor, send_sizes: list[int], receive_sizes: list[int], ranks: RankGroup
    ) -> Tensor:
        """Block r of `flat` goes to rank r; returns the blocks of all ranks, in rank order."""
        if ranks.size == 1:
            return flat
        output = flat.new_empty(sum(receive_sizes))
        element_bytes = flat.element_size()
        start_s = time.perf_counter()
        # As bytes: not every backend knows bf16.
        dist.all_to_all_single(
            output.view(torch.uint8),
            flat.view(torch.uint8),
            [n * element_bytes for n in receive_sizes],
            [n * element_bytes for n in send_sizes],
            group=ranks.group,
        )
        self.exchange_s += time.perf_counter() - start_s
        self.sent_bytes += flat.nbytes - send_sizes[ranks.rank] * element_bytes
        return output


def _slice_elements(matrix_slice: MatrixSlice) -> int:
    (top, bottom), (left, right) = matrix_slice
    return (bottom - top) * (right - left)
