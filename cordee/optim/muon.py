"""Muon (Jordan et al. 2024): momentum, then the nearest semi-orthogonal matrix, dealt over ranks.

`prepare` sends all messages and changes nothing that survives; `step` is this rank's own work. Not
here: embeddings and vectors (AdamW's, see `groups.py`). The bits of an update do not depend on who
computes it: every matrix is orthogonalised by itself, from a fresh contiguous copy, by the same
products. Traded away: batched products of equal shapes, whose bits would depend on the batch.

The library's `torch.optim.Muon` gives the same bits for whole parameters in bf16 (a test holds the
two equal); it neither shares the work nor takes shards.
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

from cordee.dist.flat import gather_flat, outward
from cordee.errors import LayoutError
from cordee.optim.rules import State, UpdateRule

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b, c of X <- aX + b(XX^T)X + c(XX^T)^2 X: chosen by Jordan et al. for slope at zero."""

STEPS = 5
"""Newton-Schulz steps: singular values from 0.01 to 1 end between about 0.7 and 1.2."""

EPS = 1e-7
"""Least norm by which a matrix is divided."""


@dataclass(frozen=True)
class Gather:
    """Ranks that hold the same parameters and momentum, and so may share the work."""

    group: dist.ProcessGroup | None
    rank: int
    size: int


ALONE = Gather(None, 0, 1)
"""Nobody to share with."""


def product_dtype(device: torch.device) -> torch.dtype:
    """bf16 where `device` multiplies it natively (accelerators, CPUs that say so), else fp32.

    The iteration forgives bf16 (Jordan et al. use it), but a CPU without it takes many times as
    long. PyTorch before 2.12 does not tell; fp32 then.
    """
    if device.type != "cpu":
        return torch.bfloat16
    known: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    native = any(has is True for name, has in known.items() if "bf16" in name)
    return torch.bfloat16 if native else torch.float32


Part = tuple[tuple[int, int], tuple[int, int]]
"""(start, stop) of rows and of columns."""


@dataclass(frozen=True)
class Matrix:
    """How a parameter is one matrix, or several stacked in dim 0, and who has which part of it.

    `ranks` share the work: they hold the same (`parts` is empty), or rank i holds `parts[i]` of
    each [rows, columns] matrix.
    """

    rows: int
    columns: int
    stacked: bool = False
    ranks: Gather = ALONE
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True)
class _Job:
    """One matrix: this rank's part of parameter, momentum and gradient."""

    parameter: Tensor
    momentum: Tensor
    grad: Tensor
    matrix: Matrix

    @property
    def cost(self) -> int:
        return cost(self.matrix.rows, self.matrix.columns)


@dataclass(frozen=True)
class Update:
    """What `Muon.prepare` found for some matrices of a param group: this rank's parts of their
    orthogonalised updates, in the optimiser's dtype."""

    group: dict[str, Any]
    jobs: list[_Job]
    results: list[Tensor]


def orthogonalise(update: Tensor, dtype: torch.dtype) -> Tensor:
    """U V^T of update = U S V^T, roughly, by Newton-Schulz in `dtype`; [rows, columns], contiguous.

    Works on the wide orientation, so that the Gram matrix has the smaller side. One thread, fp32 /
    bf16: 192 x 192 2.2 / 1.3 ms, 768 x 192 3.9 / 3.5 ms, products being 95 % of it; a step of 16
    of the first and 8 of the second 76 / 57 ms (torch.optim.Muon, bf16 only: 54 ms).
    """
    tall = update.shape[0] > update.shape[1]
    wide = (update.T if tall else update).to(dtype).clone(memory_format=torch.contiguous_format)
    wide.div_(wide.norm().clamp(min=EPS))
    if dtype == torch.float32 and 2 * wide.shape[0] <= wide.shape[1]:
        wide = _by_gram(wide)
    else:
        wide = _by_products(wide)
    return wide.T.contiguous() if tall else wide


def _by_products(x: Tensor) -> Tensor:
    """The iteration as written, operation by operation as in torch.optim.Muon."""
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _by_gram(x: Tensor) -> Tensor:
    """The same iteration on R = XX^T alone: X_5 = P_5...P_1 X_0 with P = aI + bR + cR^2, R <- PRP.

    For 192 x 768 it takes 25 units of 2 x 192^3 operations and not 45 (3.9 ms, not 6.6). Off from
    fp64 by 4e-5 at worst (singular values over 8 decades), where bf16 products are off by 4e-2.
    For fp32 only: rounded to bf16, R has eigenvalues below zero, and they grow.
    """
    a, b, c = COEFFICIENTS
    gram = x @ x.T
    product: Tensor | None = None
    for step in range(STEPS):
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal().add_(a)
        product = factor if product is None else factor @ product
        if step < STEPS - 1:
            gram = factor @ gram @ factor
    return x if product is None else product @ x


def cost(rows: int, columns: int) -> int:
    """Multiplications of one orthogonalisation, up to a factor: what the dealing weighs."""
    short, long = min(rows, columns), max(rows, columns)
    return short * short * (2 * long + short)


def deal(costs: Sequence[int], size: int) -> list[int]:
    """Who computes what: greedy, dearest first, to the least loaded rank; ties to the lowest."""
    load, owner = [0] * size, [0] * len(costs)
    for job in sorted(range(len(costs)), key=lambda j: (-costs[j], j)):
        rank = min(range(size), key=lambda r: (load[r], r))
        owner[job] = rank
        load[rank] += costs[job]
    return owner


class Muon(UpdateRule):
    """Muon for parameters of two or more dims (further dims count as columns).

    Update: m <- m + (1 - momentum)(g - m); u = g + momentum (m - g) (Nesterov);
    p <- p (1 - lr x weight_decay) - lr sqrt(max(1, rows / columns)) orthogonalise(u).
    `matrices[i]` says how the i-th parameter is held; without it each is one whole matrix, and
    nobody shares. Work is dealt over the ranks of a matrix: each orthogonalises its own, whole, and
    results go back. All results are held until the step, one copy of the matrices in `dtype`; the
    momentum that follows is not held but computed again. `sent_bytes` and `shared_s` count what
    this rank handed to the network and how long that took, waiting for others included.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.bfloat16,
        matrices: Sequence[Matrix] | None = None,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype
        self.sent_bytes = 0
        self.shared_s = 0.0
        every = [p for group in self.param_groups for p in group["params"]]
        for parameter in every:
            if parameter.ndim < 2:
                raise LayoutError(
                    "muon updates matrices only",
                    values={"shape": tuple(parameter.shape)},
                    fix="give vectors to adamw",
                )
        told = matrices or [Matrix(len(p), math.prod(p.shape[1:])) for p in every]
        self._matrices = dict(zip(every, told, strict=True))

    @torch.no_grad()
    def prepare(self) -> list[Update]:
        """The updates of all parameters that have a gradient. Collective when work is shared; what
        survives stays as it is, so that it may be called again after a fault."""
        found = []
        for group in self.param_groups:
            whole: dict[Gather, list[_Job]] = {}
            cut: dict[Gather, list[_Job]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    matrix = self._matrices[parameter]
                    jobs = (cut if matrix.parts else whole).setdefault(matrix.ranks, [])
                    jobs += self._jobs(parameter, matrix)
            momentum = group["momentum"]
            for ranks, jobs in whole.items():
                found.append(Update(group, jobs, self._share_whole(jobs, momentum, ranks)))
            for ranks, jobs in cut.items():
                found.append(Update(group, jobs, self._share_cut(jobs, momentum, ranks)))
        return found

    def fresh_state(self, parameter: Tensor) -> State:
        """The momentum."""
        return {"momentum_buffer": torch.zeros_like(parameter)}

    @torch.no_grad()
    def step(self, prepared: list[Update] | None = None) -> None:
        """One update of every parameter that has a gradient: local, of what `prepare` returned for
        these gradients (without it, it is called first)."""
        for update in self.prepare() if prepared is None else prepared:
            group, jobs = update.group, update.jobs
            lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
            torch._foreach_lerp_([j.momentum for j in jobs], [j.grad for j in jobs], 1 - momentum)
            for job, result in zip(jobs, update.results, strict=True):
                scale = math.sqrt(max(1.0, job.matrix.rows / job.matrix.columns))
                if decay:
                    job.parameter.mul_(1 - lr * decay)
                job.parameter.add_(result.view_as(job.parameter), alpha=-lr * scale)

    def _jobs(self, parameter: Tensor, matrix: Matrix) -> list[_Job]:
        state, grad = self.state[parameter], parameter.grad
        assert grad is not None
        held = (parameter, state["momentum_buffer"], grad)
        if not matrix.stacked:
            return [_Job(*held, matrix)]
        return [_Job(*parts, matrix) for parts in zip(*held, strict=True)]

    def _ahead(self, job: _Job, momentum: float) -> Tensor:
        """g + momentum (m - g) of the momentum that follows, which `step` makes again in place."""
        following = job.momentum.lerp(job.grad, 1 - momentum)
        return job.grad.lerp(following, momentum).flatten(1).to(self.dtype)

    def _share_whole(self, jobs: list[_Job], momentum: float, ranks: Gather) -> list[Tensor]:
        """Everybody holds every matrix; each computes its own, one gather gives all to all."""
        owner = deal([job.cost for job in jobs], ranks.size)
        dealt = list(zip(jobs, owner, strict=True))
        own = (job for job, o in dealt if o == ranks.rank)
        mine = [orthogonalise(self._ahead(job, momentum), self.dtype) for job in own]
        if ranks.size == 1:
            return mine
        sizes = [[job.grad.numel() for job, o in dealt if o == r] for r in range(ranks.size)]
        longest = max(sum(s) for s in sizes)
        flat = jobs[0].grad.new_zeros(longest, dtype=self.dtype)
        if mine:
            torch.cat([m.flatten() for m in mine], out=flat[: sum(sizes[ranks.rank])])
        del mine
        began = time.perf_counter()
        sent = outward(flat, ranks.group)
        everything = sent.new_empty(ranks.size * longest)
        # As bytes: not every backend knows bf16.
        gather_flat(everything.view(torch.uint8), sent.view(torch.uint8), group=ranks.group)
        everything = everything.to(flat.device)
        self.shared_s += time.perf_counter() - began
        self.sent_bytes += flat.nbytes * (ranks.size - 1)
        by_rank = zip(torch.split(everything, longest), sizes, strict=True)
        pieces = [list(torch.split(b[: sum(s)], s)) if s else [] for b, s in by_rank]
        return [pieces[o].pop(0) for _, o in dealt]

    def _share_cut(self, jobs: list[_Job], momentum: float, ranks: Gather) -> list[Tensor]:
        """Everybody holds a part of every matrix: parts go to the owner and come back."""
        everyone = range(ranks.size)
        owner = deal([job.cost for job in jobs], ranks.size)
        order = [[j for j, o in enumerate(owner) if o == r] for r in everyone]
        out = [j for js in order for j in js]
        mine = order[ranks.rank]
        # Elements that cross: `sent[r]` from here to r, `held[r][i]` of my i-th matrix from r.
        sent = [sum(jobs[j].grad.numel() for j in js) for js in order]
        held = [[_elements(jobs[j].matrix.parts[r]) for j in mine] for r in everyone]
        received = [sum(h) for h in held]

        flat = torch.cat([self._ahead(jobs[j], momentum).flatten() for j in out])
        blocks = torch.split(self._exchange(flat, sent, received, ranks), received)
        came = [torch.split(b, h) if h else () for b, h in zip(blocks, held, strict=True)]
        results = []
        for i, j in enumerate(mine):
            matrix = jobs[j].matrix
            whole = flat.new_empty(matrix.rows, matrix.columns)
            for r in everyone:
                (top, bottom), (left, right) = matrix.parts[r]
                place = whole[top:bottom, left:right]
                place.copy_(came[r][i].view(place.shape))
            results.append(orthogonalise(whole, self.dtype))
        back = [
            result[top:bottom, left:right].flatten()
            for r in everyone
            for j, result in zip(mine, results, strict=True)
            for (top, bottom), (left, right) in [jobs[j].matrix.parts[r]]
        ]
        flat = self._exchange(torch.cat(back or [flat[:0]]), received, sent, ranks)
        parts = torch.split(flat, [jobs[j].grad.numel() for j in out])
        found = dict(zip(out, parts, strict=True))
        return [found[j] for j in range(len(jobs))]

    def _exchange(
        self, flat: Tensor, sent: list[int], received: list[int], ranks: Gather
    ) -> Tensor:
        """Block r of `flat` goes to rank r; returns the blocks of all ranks, in rank order."""
        if ranks.size == 1:
            return flat
        out = flat.new_empty(sum(received))
        width = flat.element_size()
        began = time.perf_counter()
        # As bytes: not every backend knows bf16.
        dist.all_to_all_single(
            out.view(torch.uint8),
            flat.view(torch.uint8),
            [n * width for n in received],
            [n * width for n in sent],
            group=ranks.group,
        )
        self.shared_s += time.perf_counter() - began
        self.sent_bytes += flat.nbytes - sent[ranks.rank] * width
        return out


def _elements(part: Part) -> int:
    (top, bottom), (left, right) = part
    return (bottom - top) * (right - left)
