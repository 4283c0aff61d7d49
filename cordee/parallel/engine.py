"""Runs a step's microbatches on this rank: forward, backward, and sums in the order asked for.

Two ways to add: plain (into `.grad`, as a hand-written loop does) and canonical (a tree over
microbatch index, layout/split.py), which the exchange needs. The loss is divided by the global
token count before backward, so every sum is already the mean. Not here: pipelines (a later issue
gives this interface a second member).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from cordee.dist.exchange import Partial
from cordee.dist.mesh import Mesh
from cordee.layout.split import TreeSum, shard_rows
from cordee.model.precision import casting
from cordee.parallel import shard


class Microbatches(Protocol):
    """Where the engine's work comes from (data/loader.py is one)."""

    def begin(self, step: int, indices: range) -> None:
        """Announces the microbatches of `step` that this rank computes."""
        ...

    def microbatch(self, step: int, index: int) -> Tensor:
        """Token ids (rows, sequence + 1), int64."""
        ...


@dataclass(frozen=True)
class Work:
    """What an engine needs to know of a run. `tokens` are those of a whole step; `device` computes
    (parameters may live elsewhere)."""

    part: range
    total: int
    tokens: int
    seed: int
    dropout: bool
    autocast: torch.dtype | None
    canonical: bool
    device: str


class Engine:
    """Forward and backward of this rank's microbatches."""

    def __init__(self, model: nn.Module, loader: Microbatches, mesh: Mesh, work: Work) -> None:
        self.model = model
        self.loader = loader
        self.mesh = mesh
        self.work = work
        self.sharded = mesh.shard_mesh is not None
        self.parameters: Sequence[nn.Parameter] = list(model.parameters())
        self.device = torch.device(work.device)
        self._tree = TreeSum(work.part, work.total)
        self.data_s = 0.0
        """Time of the last step that was spent on getting its tokens."""

    def forward_backward(self, step: int, scale: float = 1.0) -> tuple[list[Tensor], Partial]:
        """Runs step `step` (from 0): (summed loss of each microbatch in nats, partial sums, which
        are `scale` times the gradient)."""
        self.model.train()
        self._clear(self.parameters)
        losses: list[Tensor] = []
        partial: Partial = []
        began = time.perf_counter()
        self.loader.begin(step, self.work.part)
        self.data_s = time.perf_counter() - began
        for index in self.work.part:
            if self.sharded and not self.work.canonical:
                shard.last_microbatch(self.model, index == self.work.part.stop - 1)
            losses.append(self._microbatch(step, index, scale))
            if self.work.canonical:
                self._tree.feed(partial, index, self._take(), _add)
        if self.sharded:
            shard.reshard(self.model)
        if not self.work.canonical:
            grads = [shard.local(gradient) for gradient in _gradients(self.parameters)]
            partial = [((self.work.part.start, self.work.part.stop), grads)]
        return losses, partial

    def place(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Hands the agreed gradient to the parameters; returns this rank's parts of it."""
        mine = []
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            if self.sharded and self.work.canonical:
                part = shard_rows(len(parameter), self.mesh.layout.shard, self.mesh.shard)
                # Whole gradients are summed where they were made; offloaded rows are the host's.
                gradient = gradient[part.start : part.stop].to(shard.local(parameter).device)
            shard.place_gradient(parameter, gradient)
            mine.append(gradient)
        return mine

    def _microbatch(self, step: int, index: int, scale: float) -> Tensor:
        began = time.perf_counter()
        tokens = self.loader.microbatch(step, index).to(self.device, non_blocking=True)
        self.data_s += time.perf_counter() - began
        if self.work.dropout:
            torch.manual_seed(dropout_seed(self.work.seed, step, index))
        with casting(self.device.type, self.work.autocast):
            loss = self.model(tokens[:, :-1], tokens[:, 1:])
        (loss / self.work.tokens * scale).backward()
        detached: Tensor = loss.detach()
        return detached

    def _take(self) -> list[Tensor]:
        """This microbatch's whole gradients, taken off the parameters."""
        # While FSDP2 keeps parameters gathered, the module's parameters are the whole ones.
        parameters = list(self.model.parameters()) if self.sharded else self.parameters
        gradients = _gradients(parameters)
        self._clear(parameters)
        return gradients

    @staticmethod
    def _clear(parameters: Sequence[nn.Parameter]) -> None:
        for parameter in parameters:
            parameter.grad = None


def dropout_seed(seed: int, step: int, microbatch: int) -> int:
    """63 bits that depend on (seed, step, microbatch) and nothing else."""
    text = f"dropout {seed} {step} {microbatch}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def _gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]


def _add(a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    torch._foreach_add_(a, b)
    return a
