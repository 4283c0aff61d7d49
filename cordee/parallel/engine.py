"""Runs a step's microbatches on this rank: forward, backward, and sums in the order asked for.

Two ways to add: plain (into `.grad`, as a hand-written loop does) and canonical (a tree over
microbatch index, layout/split.py), which the exchange needs. The loss is divided by the global
token count before backward, so every sum is already the mean. Not here: pipelines (`pipeline.py`
gives this interface its second member).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cordee.data.ledger import digest_of
from cordee.devices import DEVICES
from cordee.dist.exchange import Partial, gather_rows, nothing
from cordee.dist.mesh import Mesh
from cordee.errors import ConfigError
from cordee.layout.axes import AXES
from cordee.layout.split import TreeSum
from cordee.model.folder import cut
from cordee.model.initial import seeded
from cordee.model.moe import forget_load, mixtures, move_bias, total_loads
from cordee.model.precision import casting
from cordee.parallel import shard
from cordee.parallel.apply import Live
from cordee.parallel.shard import Sharding, local
from cordee.parallel.sums import GradientSums

Batch = tuple[Tensor, ...]


class Microbatches(Protocol):
    """Where the engine's work comes from (data/loader.py is one)."""

    def begin(self, step: int, indices: range) -> None:
        """Announces the microbatches of `step` that this rank computes."""
        ...

    def microbatch(self, step: int, index: int) -> Tensor | Batch:
        """Token ids (rows, sequence + 1), int64, or a batch of the run's own loss."""
        ...

    def ids(self, step: int, index: int) -> NDArray[np.int64]:
        """Ids of the samples of which `microbatch` handed over the content."""
        ...


@dataclass(frozen=True)
class Work:
    """What an engine needs to know of a run. `tokens` are the targets of a whole step."""

    part: range
    total: int
    tokens: int
    seed: int
    keyed: bool
    autocast: torch.dtype | None
    sharding: Sharding
    device: str
    balance_rate: float = 0.0


class Engine:
    """Forward and backward of this rank's microbatches."""

    def __init__(self, live: Live, loader: Microbatches, mesh: Mesh, work: Work) -> None:
        self.live = live
        self.loader = loader
        self.mesh = mesh
        self.work = work
        self.sharded = mesh.shard_mesh is not None
        self.modules = live.modules()
        self.parameters = {n: local(p.detach()).requires_grad_() for n, p in self.modules.items()}
        self.device = torch.device(work.device)
        self.buffers = live.buffers()
        self._moved: dict[str, Tensor] = {}
        self._sums_after = self.sharded and work.sharding.after
        self._summed: list[Tensor] = []
        self.sums = GradientSums(mesh, [live.specs[name] for name in self.parameters])
        self._tree = TreeSum(work.part, work.total)
        # Found once: to look through all modules in every microbatch costs 1 % of a small step.
        self._mixtures = [moe for chunk in live.chunks for moe in mixtures(chunk)]
        self._units = [unit for chunk in live.chunks for unit in shard.fsdp_modules(chunk)]
        self._training = False
        self.stream_bytes = 0
        """Bytes that this rank has sent from stage to stage."""
        self.digests: dict[int, int] = {}
        """Of this step's microbatches that this rank loaded, their samples' (data/ledger.py)."""
        self.data_s = 0.0
        """Time of the last step that was spent on getting its tokens."""
        self._began = 0.0
        self._marks: list[torch.Event] = []
        self._reached: Callable[[], None] = nothing

    def forward_backward(
        self, step: int, scale: float = 1.0, reached: Callable[[], None] = nothing
    ) -> tuple[list[Tensor], Partial]:
        """Runs step `step` (from 0): (summed loss of each microbatch in nats, partial sums, which
        are `scale` times the gradient). `reached` is called after each forward."""
        self.begin(step, scale)
        self._reached = reached
        canonical = self.work.sharding.canonical
        losses: list[Tensor] = []
        partial: Partial = []
        before = self._copied()
        for index in self.work.part:
            if self.sharded and not self.work.sharding.after:
                last = index == self.work.part.stop - 1
                shard.before_microbatch(self._units, last, self.work.sharding)
            losses.append(self._microbatch(step, index, scale))
            if canonical:
                self._tree.feed(partial, index, self.take(), _add)
            elif self._sums_after and self.work.sharding.zero > 1:
                self._sum_over_shards()
            self._mark()
        # A step that is dropped or fails has not moved them.
        self._moved = self._copied()
        self._put(before)
        # Without work there is nothing in the tree: zeros over no microbatch.
        return losses, partial if partial else self.collect()

    def deal(self, part: range) -> None:
        """This rank computes these microbatches from now on; without axes inside an island there
        may be none."""
        self.work = replace(self.work, part=part)
        self._tree = TreeSum(part, self.work.total)

    @property
    def compute_s(self) -> float:
        """Seconds that this step's microbatches took, waits for data left out: on an
        accelerator by its own clock (it may still be busy with the update before, or idle while
        the host loads), once it is done with them."""
        if self._marks:
            self._marks[-1].synchronize()
            pairs = zip(self._marks[::2], self._marks[1::2], strict=True)
            taken_ms: float = sum(began.elapsed_time(ended) for began, ended in pairs)
            return taken_ms / 1e3
        return time.perf_counter() - self._began - self.data_s

    @property
    def bytes_sent(self) -> dict[str, int]:
        """Bytes that this rank has sent inside its island so far, by axis; "sums" are gradients
        added over several axes at once."""
        found = {**self.live.bytes_sent, "pipeline": self.stream_bytes}
        return {**found, "sums": self.sums.bytes_sent}

    def begin(self, step: int, scale: float) -> None:
        """Training mode, no gradients, and the loader knows what is wanted."""
        if not self._training:
            self.modes(training=True)
        for chunk in self.live.chunks:
            self._clear(chunk.parameters())
        for moe in self._mixtures:
            forget_load(moe)
            moe.aux_scale = scale / self.work.tokens
        self._clear([*self.modules.values(), *self.parameters.values()])
        self._summed = []
        self.digests.clear()
        self._marks.clear()
        self._began = time.perf_counter()
        self.loader.begin(step, self.work.part)
        self.data_s = time.perf_counter() - self._began

    def collect(self) -> Partial:
        """The gradients that FSDP2 and autograd left, summed inside the island."""
        if self._sums_after and not self._summed:
            self._sum_over_shards()
        self._reshard()
        grads, self._summed = self._summed, []
        if not self._sums_after:
            grads = [
                torch.zeros_like(mine) if p.grad is None else local(p.grad)
                for p, mine in zip(self.modules.values(), self.parameters.values(), strict=True)
            ]
        self._clear(self.modules.values())
        self.sums.add(grads)
        return [((self.work.part.start, self.work.part.stop), grads)]

    def place(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Hands the agreed gradient to the optimiser's tensors; returns this rank's parts of it."""
        self._reshard()
        mine = []
        for (name, parameter), gradient in zip(self.parameters.items(), gradients, strict=True):
            if self.sharded and self.work.sharding.canonical:
                box = self.live.specs[name].box(self.mesh.layout, self.mesh.at)
                # Whole gradients are summed where they were made; offloaded rows are the host's.
                gradient = cut(gradient, box).to(parameter.device)
            parameter.grad = gradient
            mine.append(gradient)
        return mine

    def prepare(self) -> Tensor | None:
        """What `commit` needs of other ranks (collective): how busy experts were in this step."""
        return total_loads(self._mixtures, self._over_all)

    def commit(self, loads: Tensor | None) -> None:
        """With the optimiser's step, on this rank alone: moves what keeps experts balanced, by what
        `prepare` returned, and buffers to where the forwards brought them."""
        move_bias(self._mixtures, loads, self.work.balance_rate)
        self._put(self._moved)

    def tokens(self, step: int, index: int) -> Tensor:
        """A microbatch of token ids on this rank's device; its time counts as data."""
        (found,) = self._load(step, index)
        return found

    def batch(self, step: int, index: int) -> Batch:
        """What the model, or the run's own loss, is called with for a microbatch."""
        if self.live.loss is not None:
            return self._load(step, index)
        tokens = self.tokens(step, index)
        return self.split(tokens[:, :-1]), self.split(tokens[:, 1:])

    def split(self, tokens_BT: Tensor) -> Tensor:
        """The positions of [B, T] from which this rank attends."""
        positions = self.live.span.attended(tokens_BT.shape[1])
        return tokens_BT if positions is None else tokens_BT[:, positions.to(tokens_BT.device)]

    def key(self, step: int, index: int) -> int:
        """What decides which elements dropout drops in a microbatch."""
        return microbatch_key(self.work.seed, step, index) if self.work.keyed else 0

    # ---- without gradients ----

    @torch.no_grad()
    def loss(self, given: Tensor | Batch) -> Tensor:
        """Summed loss in nats of int64 [rows, sequence + 1], or of a batch of the run's own loss;
        the same on all ranks of an island."""
        if not isinstance(given, Tensor):
            return self.call(self.live.chunks[0], tuple(t.to(self.device) for t in given))
        tokens = given.to(self.device)
        found = self.infer(self.split(tokens[:, :-1]), self.split(tokens[:, 1:]))
        return found if self.live.span.context == 1 else self.live.wires["context"].total_now(found)

    @torch.no_grad()
    def logits(self, tokens_BT: Tensor) -> Tensor:
        """fp32 [B, T, V] of int64 [B, T], whole on every rank; T may be anything."""
        length = tokens_BT.shape[1]
        parts = self.live.span.context
        unit = self.live.span.tensor * (2 * parts if parts > 1 else 1)
        padded = torch.nn.functional.pad(tokens_BT.to(self.device), (0, -length % unit))
        found = self.infer(self.split(padded), None)
        if self.live.span.tensor > 1:
            found = self.live.wires["tensor"].gather_now(found, 2)
        if parts > 1:
            order = self.live.wires["context"].gather_now(
                self.split(torch.arange(padded.shape[1], device=self.device)[None]), 1
            )
            found = self.live.wires["context"].gather_now(found, 1)[:, order[0].argsort()]
        return found[:, :length]

    @torch.no_grad()
    def infer(self, inputs: Tensor, targets: Tensor | None) -> Tensor:
        """Forward of this rank's positions: the loss, or logits of its part of the vocabulary."""
        return self.call(self.live.chunks[0], (inputs, targets))

    def call(self, model: nn.Module, batch: tuple[Tensor | None, ...], key: int = 0) -> Tensor:
        """The model, or the run's own loss, of a batch."""
        with casting(self.device.type, self.work.autocast):
            if self.live.loss is not None:
                found: object = self.live.loss(model, *batch)
            else:
                found = model(*batch, key) if key else model(*batch)
        how = self.work.sharding
        if self.sharded and how.brought and not how.ahead and model is self.live.chunks[0]:
            shard.check_order(self.live.wires["shard"], -1)
        if self.live.brought and batch[-1] is not None:
            return summed_loss(found, "model" if self.live.loss is None else "loss")
        assert isinstance(found, Tensor)
        return found

    def modes(self, training: bool) -> None:
        """Sets what dropout and the like do."""
        self._training = training
        for chunk in self.live.chunks:
            chunk.train(training)

    # ---- inside ----

    def _copied(self) -> dict[str, Tensor]:
        """Copies of the buffers that a forward may move: those of a caller's own model."""
        own = self.buffers if self.live.brought else {}
        return {name: buffer.clone() for name, buffer in own.items()}

    def _put(self, copies: dict[str, Tensor]) -> None:
        for name, copy in copies.items():
            self.buffers[name].copy_(copy)

    def _load(self, step: int, index: int) -> Batch:
        began = time.perf_counter()
        found = self.loader.microbatch(step, index)
        self.digests[index] = digest_of(self.loader.ids(step, index))
        given = (found,) if isinstance(found, Tensor) else found
        batch = tuple(tensor.to(self.device, non_blocking=True) for tensor in given)
        self.data_s += time.perf_counter() - began
        return batch

    def _microbatch(self, step: int, index: int, scale: float) -> Tensor:
        batch, key = self.batch(step, index), self.key(step, index)
        self._mark()
        with self._drawing(step, index):
            loss = self.call(self.live.chunks[0], batch, key)
        self._reached()
        torch.autograd.backward(loss / self.work.tokens * scale)
        detached: Tensor = loss.detach()
        return detached

    def _mark(self) -> None:
        """Notes when the device comes here; on a CPU the host's clock says it."""
        if DEVICES[self.device.type].events:
            mark = torch.Event(self.device, enable_timing=True)
            mark.record()
            self._marks.append(mark)

    def _drawing(self, step: int, index: int) -> AbstractContextManager[None]:
        """What a caller's own model draws depends on the microbatch, not on who computes it."""
        if not self.live.brought:
            return nullcontext()
        return seeded(microbatch_key(self.work.seed, step, index), self.device)

    def take(self) -> list[Tensor]:
        """This microbatch's whole gradients (where sums are canonical), taken off the modules."""
        # While FSDP2 keeps parameters gathered, the module's parameters are the whole ones.
        parameters = list(self.live.chunks[0].parameters())
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        self._clear(parameters)
        return gradients

    def _sum_over_shards(self) -> None:
        """Adds the whole gradients that are there, summed over shards, to this rank's parts."""
        mine = list(self.parameters.values())
        parts = shard.sum_over_shards(self.take(), mine, self.live.wires["shard"])
        self._summed = _add(self._summed, parts) if self._summed else parts

    def _over_all(self, numbers: Tensor) -> Tensor:
        """Sums whole numbers over all ranks that have this rank's layers."""
        axes = [axis for axis in AXES if axis != "pipeline"]
        rows = gather_rows(numbers.flatten(), self.mesh.group(*axes), self.mesh.size(*axes))
        return rows.sum(0).view(numbers.shape)

    def _reshard(self) -> None:
        for unit in self._units:
            unit.reshard()

    @staticmethod
    def _clear(parameters: Iterable[Tensor]) -> None:
        for parameter in parameters:
            parameter.grad = None


def summed_loss(found: object, part: str) -> Tensor:
    """What a caller's `part`, the loss or the model, returned; ConfigError when it is not one
    number from which gradients flow (they do not in an evaluation)."""
    wrong = ""
    if not isinstance(found, Tensor):
        wrong = f"returned a {type(found).__name__}"
    elif found.ndim:
        wrong = f"returned a tensor of shape {list(found.shape)}"
    elif not found.is_floating_point():
        wrong = f"returned a number of {found.dtype}"
    elif found.is_meta:
        wrong = "returned a tensor without a value (device meta)"
    elif torch.is_grad_enabled() and not found.requires_grad:
        wrong = "returned a number without a gradient (detached, or made of numbers alone)"
    if wrong or not isinstance(found, Tensor):
        raise ConfigError(
            f"the {part} that was brought returns no summed loss: one number, a 0-dim tensor",
            values={part: wrong},
            fix="return a tensor as F.cross_entropy(model(x), y, reduction='sum') is one",
        )
    return found


def microbatch_key(seed: int, step: int, microbatch: int) -> int:
    """63 bits that depend on (seed, step, microbatch) and nothing else; never 0."""
    text = f"dropout {seed} {step} {microbatch}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1 | 1


def _add(a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    torch._foreach_add_(a, b)
    return a
