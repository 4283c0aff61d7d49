"""Training loops that a careful person writes with torch alone: one for each layout.

The blocks are the house's own, so that both sides of `layouts.py` run the same kernels; all that
stands between ranks is torch's: DDP, FSDP2, DTensor's parallelize_module, PipelineStage with 1F1B,
functional collectives. Not here: islands that are uneven, resuming, records of more than a line.
Traded away: order and bits; windows are random, and sums are added as the library likes.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.nn.functional import all_to_all_single
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from cordee import Run
from cordee.data.source import open_dataset
from cordee.dist.start import World
from cordee.model.attention import causal_attention, rotary_turns
from cordee.model.initial import initialise
from cordee.model.loss import soft_cap
from cordee.model.moe import mixtures
from cordee.model.transformer import Transformer

# torch renames its collectives; the old names do the same.
warnings.simplefilter("ignore", FutureWarning)

ORDER = ("islands", "pipeline", "context", "expert", "shard", "tensor")
"""Axes from far to near, as in the house."""


class Net(nn.Module):
    """Some of the house's blocks, with embedding and head where they belong, called as modules."""

    def __init__(self, run: Run, part: range, positions: Tensor | None = None) -> None:
        super().__init__()
        whole = Transformer(run.model, 256)
        initialise(whole, run.initial, run.run.seed, run.model.layers)
        last = part.stop == run.model.layers
        self.embed = whole.embed if part.start == 0 else None
        self.blocks = nn.ModuleList(whole.blocks[str(layer)] for layer in part)
        self.norm, self.head = (whole.norm, whole.head) if last else (None, None)
        self.cap = run.model.logit_cap
        self.bf16 = run.run.precision == "bf16"
        turns = rotary_turns(
            run.data.sequence, run.model.per_head, run.model.rope_base, torch.device("cpu")
        )
        self.turns = turns if positions is None else turns[positions]

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """Tokens or a stream to a stream, logits, or (with targets) the summed loss."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            x = x if self.embed is None else self.embed(x)
            for block in self.blocks:
                x = block(x, self.turns)
            if self.norm is None or self.head is None:
                return x
            logits = soft_cap(self.head(self.norm(x)).float(), self.cap)
            return logits if targets is None else summed(logits, targets)


def summed(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


class ByHand:
    """The loop of one layout; `degrees` are its axes, of which one or two are not 1."""

    def __init__(self, run: Run, world: World, degrees: dict[str, int], sync_each: bool) -> None:
        """`sync_each`: sharded gradients are reduced in every microbatch, as ZeRO-2 and 3 want;
        else in the last one alone."""
        self.run, self.degrees, self.sync_each = run, degrees, sync_each
        named = [axis for axis in ORDER if degrees.get(axis, 1) > 1]
        sizes = tuple(degrees[axis] for axis in named)
        self.mesh = init_device_mesh("cpu", sizes, mesh_dim_names=tuple(named))
        dealt = [axis for axis in ("islands", "expert", "shard") if axis in named]
        self.workers = 1
        worker = 0
        for axis in dealt:
            worker = worker * degrees[axis] + self.mesh[axis].get_local_rank()
            self.workers *= degrees[axis]
        self.mine = run.batch.microbatches // self.workers
        rows = run.batch.microbatches * run.batch.microbatch
        self.tokens = rows * run.data.sequence
        self.random = np.random.default_rng(worker)
        self.source = open_dataset(Path(run.run.dir) / "data", "train").slice(0, 4_000_000)
        self.log = open(Path(run.run.dir) / f"by-hand-{world.rank}.jsonl", "a")  # noqa: SIM115
        self.before: Callable[[bool], None] = lambda last: None
        self.after: Callable[[], None] = lambda: None
        self.positions: Tensor | None = None
        self.schedule: Any = None
        self.model = self._make()
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self.number = 0

    def steps(self, count: int) -> None:
        """Runs `count` steps: accumulate, reduce, clip, update, log."""
        for _ in range(count):
            began = time.perf_counter()
            batches = [self._batch() for _ in range(self.mine)]
            loss = self._pipelined(batches) if self.schedule else self._accumulated(batches)
            self.after()
            norm = self._clip()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            dist.all_reduce(loss)
            loss /= self._averaged() * self.degrees.get("tensor", 1)
            self.number += 1
            row = {
                "step": self.number, "loss": float(loss), "grad_norm": float(norm),
                "step_s": time.perf_counter() - began,
            }  # fmt: skip
            self.log.write(json.dumps(row) + "\n")
            self.log.flush()

    # ---- a step ----

    def _batch(self) -> tuple[Tensor, Tensor]:
        length, rows = self.run.data.sequence, self.run.batch.microbatch
        starts = self.random.integers(0, len(self.source) - length - 1, rows)
        windows = np.stack([self.source[s : s + length + 1] for s in starts]).astype(np.int64)
        x, y = torch.from_numpy(windows[:, :-1]), torch.from_numpy(windows[:, 1:])
        return (x, y) if self.positions is None else (x[:, self.positions], y[:, self.positions])

    def _accumulated(self, batches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        total = torch.zeros(())
        # The library averages over ranks where it reduces; the loss is that of all.
        scale = self._averaged() / self.tokens
        for index, (x, y) in enumerate(batches):
            self.before(index == len(batches) - 1)
            if "tensor" in self.degrees:
                with loss_parallel():
                    loss = self.model(x, y) * scale
                    loss.backward()
            else:
                loss = self.model(x, y) * scale
                loss.backward()
            total += whole(loss.detach())
        return total

    def _averaged(self) -> int:
        found = 1
        for axis in ("islands", "shard", "context"):
            found *= self.degrees.get(axis, 1)
        return found

    def _pipelined(self, batches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        x, y = (torch.cat(some) for some in zip(*batches, strict=True))
        stage, stages = self.mesh["pipeline"].get_local_rank(), self.degrees["pipeline"]
        losses: list[Tensor] = []
        given = (x,) if stage == 0 else ()
        last = stage == stages - 1
        self.schedule.step(*given, target=y if last else None, losses=losses if last else None)
        return torch.stack(losses).sum().detach() if last else torch.zeros(())

    def _clip(self) -> Tensor:
        if "pipeline" not in self.degrees and "expert" not in self.degrees:
            return whole(nn.utils.clip_grad_norm_(self.parameters, 1.0))
        grads = [p.grad for p in self.parameters if p.grad is not None]
        if "pipeline" in self.degrees:
            square = whole(nn.utils.get_total_norm(grads)).square()
            dist.all_reduce(square, group=self.mesh.get_group("pipeline"))
        else:
            kept = {id(p) for p in self.experts}
            own = [p.grad for p in self.parameters if id(p) in kept and p.grad is not None]
            rest = [p.grad for p in self.parameters if id(p) not in kept and p.grad is not None]
            square = nn.utils.get_total_norm(own).square()
            dist.all_reduce(square, group=self.mesh.get_group("expert"))
            square = square + nn.utils.get_total_norm(rest).square()
        norm = square.sqrt()
        nn.utils.clip_grads_with_norm_(self.parameters, 1.0, norm)
        return norm

    # ---- a layout ----

    def _make(self) -> nn.Module:
        degrees, layers = self.degrees, self.run.model.layers
        part = range(layers)
        if "pipeline" in degrees:
            stage, stages = self.mesh["pipeline"].get_local_rank(), degrees["pipeline"]
            part = range(layers * stage // stages, layers * (stage + 1) // stages)
        if "context" in degrees:
            self.positions = self._positions(self.mesh["context"])
        net: nn.Module = Net(self.run, part, self.positions)
        if "tensor" in degrees:
            self._tensor(net, self.mesh["tensor"], whole_logits="pipeline" in degrees)
        if "pipeline" in degrees:
            self._pipeline(net)
        elif "expert" in degrees:
            self._expert(net, self.mesh["expert"])
        elif "context" in degrees:
            for block in net.blocks:
                block.attention.attend = self._gathered(self.mesh["context"])
            net = self._ddp(net, self.mesh["context"])
        elif "shard" in degrees:
            hybrid = "islands" in degrees
            self._shard(net, self.mesh["islands", "shard"] if hybrid else self.mesh["shard"])
        elif "islands" in degrees:
            net = self._ddp(net, self.mesh["islands"])
        return net

    def _ddp(self, net: nn.Module, mesh: DeviceMesh) -> nn.Module:
        wrapped = DistributedDataParallel(net, process_group=mesh.get_group())

        def before(last: bool) -> None:
            wrapped.require_backward_grad_sync = last

        self.before = before
        return wrapped

    def _shard(self, net: Any, mesh: DeviceMesh) -> None:
        keep = self.run.layout.zero != 3
        for unit in (*net.blocks, net):
            # The rest is needed last in a forward and first in a backward.
            fully_shard(unit, mesh=mesh, reshard_after_forward=not keep and unit is not net)

        def before(last: bool) -> None:
            net.set_requires_gradient_sync(last or self.sync_each)
            net.set_is_last_backward(last)
            net.set_reshard_after_backward(last or not keep)

        self.before = before

    def _tensor(self, net: Any, mesh: DeviceMesh, whole_logits: bool) -> None:
        plan: dict[str, Any] = {
            "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
            "norm": SequenceParallel(),
            "head": ColwiseParallel(
                input_layouts=Shard(1),
                output_layouts=Replicate() if whole_logits else Shard(-1),
                use_local_output=whole_logits,
            ),
        }
        here = {name: way for name, way in plan.items() if getattr(net, name) is not None}
        parallelize_module(net, mesh, here)
        gathered = {"input_layouts": (Shard(1),), "desired_input_layouts": (Replicate(),)}
        for block in net.blocks:
            parallelize_module(block, mesh, {
                "attention_norm": SequenceParallel(),
                "attention": PrepareModuleInput(
                    input_layouts=(Shard(1), None), desired_input_layouts=(Replicate(), None)
                ),
                "attention.query": ColwiseParallel(),
                "attention.key": ColwiseParallel(),
                "attention.value": ColwiseParallel(),
                "attention.out": RowwiseParallel(output_layouts=Shard(1)),
                "mlp_norm": SequenceParallel(),
                "mlp": PrepareModuleInput(**gathered),
                "mlp.up": ColwiseParallel(),
                "mlp.down": RowwiseParallel(output_layouts=Shard(1)),
            })  # fmt: skip

    def _pipeline(self, net: nn.Module) -> None:
        mesh = self.mesh["pipeline"]
        stage = PipelineStage(
            net, mesh.get_local_rank(), mesh.size(), torch.device("cpu"), group=mesh.get_group()
        )

        def loss(logits: Tensor, targets: Tensor) -> Tensor:
            return summed(logits, targets) / self.tokens

        self.schedule = Schedule1F1B(stage, self.mine, loss_fn=loss, scale_grads=False)

    def _positions(self, mesh: DeviceMesh) -> Tensor:
        """An early chunk and the late one that evens out the work."""
        index, parts = mesh.get_local_rank(), mesh.size()
        chunks = torch.arange(self.run.data.sequence).chunk(2 * parts)
        return torch.cat((chunks[index], chunks[2 * parts - 1 - index]))

    def _gathered(self, mesh: DeviceMesh) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        group, index, parts = mesh.get_group(), mesh.get_local_rank(), mesh.size()
        window = self.run.model.window

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            length = q.shape[1] // 2
            both = torch.stack((k, v))
            gathered = collectives.all_gather_tensor_autograd(both, 0, group)
            early, late = gathered.view(parts, *both.shape).chunk(2, 3)
            k, v = torch.cat([*early.unbind(), *reversed(late.unbind())], 2)
            out = []
            for chunk, place in zip(q.chunk(2, 1), (index, 2 * parts - 1 - index), strict=True):
                stop = (place + 1) * length
                out.append(causal_attention(chunk, k[:, :stop], v[:, :stop], window))
            return torch.cat(out, 1)

        return attend

    def _expert(self, net: nn.Module, mesh: DeviceMesh) -> None:
        group, index, parts = mesh.get_group(), mesh.get_local_rank(), mesh.size()
        self.experts: list[nn.Parameter] = []
        for moe in mixtures(net):
            moe.aux_scale = 1.0 / self.tokens
            for name in ("up", "down"):
                rows = getattr(moe, name).detach().chunk(parts)[index].clone()
                setattr(moe, name, nn.Parameter(rows))
                self.experts.append(getattr(moe, name))
            moe.deal = dealt(group, parts)
        kept = {id(p) for p in self.experts}
        rest = [p for p in net.parameters() if id(p) not in kept]

        def after() -> None:
            grads = [p.grad for p in rest if p.grad is not None]
            flat = torch._utils._flatten_dense_tensors(grads)
            dist.all_reduce(flat, group=group)
            torch._foreach_copy_(grads, torch._utils._unflatten_dense_tensors(flat, grads))

        self.after = after


def dealt(group: dist.ProcessGroup, parts: int) -> Callable[..., Tensor]:
    """Rows to the ranks of their experts and back, around the experts' own computation."""

    def deal(rows: Tensor, sizes: Tensor, compute: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        sent = sizes.view(parts, -1)
        came = torch.empty_like(sent)
        dist.all_to_all_single(came, sent.contiguous(), group=group)
        out, back = came.sum(1).tolist(), sent.sum(1).tolist()
        arrived = all_to_all_single(
            rows.new_empty(sum(out), rows.shape[1]), rows, out, back, group=group
        )
        numbers = torch.arange(sent.shape[1]).repeat(parts).repeat_interleave(came.flatten())
        order = numbers.argsort(stable=True)
        done = compute(arrived[order], came.sum(0))
        unsorted = done[order.argsort()]
        return all_to_all_single(
            done.new_empty(len(rows), done.shape[1]), unsorted, back, out, group=group
        )

    return deal


def whole(number: Tensor) -> Tensor:
    """A number that DTensor may hold in parts."""
    return number.full_tensor() if isinstance(number, DTensor) else number
