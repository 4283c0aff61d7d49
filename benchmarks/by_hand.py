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
from cordee.data.dataset import open_dataset
from cordee.dist.process_group import RankProcess
from cordee.model.attention import causal_attention, rope_table
from cordee.model.init_weights import init_weights
from cordee.model.loss import soft_cap
from cordee.model.moe import moe_layers
from cordee.model.transformer import Transformer

# torch renames its collectives; the old names do the same.
warnings.simplefilter("ignore", FutureWarning)

AXIS_ORDER = ("islands", "pipeline", "context", "expert", "shard", "tensor")
"""Axes from far to near, as in the house."""


class HandwrittenModel(nn.Module):
    """Some of the house's blocks, with embedding and head where they belong, called as modules."""

    def __init__(self, run: Run, layer_range: range, positions: Tensor | None = None) -> None:
        super().__init__()
        full_model = Transformer(run.model, 256)
        init_weights(full_model, run.initial, run.run.seed, run.model.layers)
        is_last_stage = layer_range.stop == run.model.layers
        self.embed = full_model.embed if layer_range.start == 0 else None
        self.blocks = nn.ModuleList(full_model.blocks[str(layer)] for layer in layer_range)
        self.norm, self.head = (full_model.norm, full_model.head) if is_last_stage else (None, None)
        self.logit_cap = run.model.logit_cap
        self.bf16 = run.run.precision == "bf16"
        rope = rope_table(
            run.data.sequence, run.model.width_per_head, run.model.rope_base, torch.device("cpu")
        )
        self.rope = rope if positions is None else rope[positions]

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """Tokens or a stream to a stream, logits, or (with targets) the summed loss."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            x = x if self.embed is None else self.embed(x)
            for block in self.blocks:
                x = block(x, self.rope)
            if self.norm is None or self.head is None:
                return x
            logits = soft_cap(self.head(self.norm(x)).float(), self.logit_cap)
            return logits if targets is None else cross_entropy_sum(logits, targets)


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


class HandwrittenLayout:
    """The loop of one layout; `degrees` are its axes, of which one or two are not 1."""

    def __init__(
        self, run: Run, process: RankProcess, degrees: dict[str, int], sync_each: bool
    ) -> None:
        """`sync_each`: sharded gradients are reduced in every microbatch, as ZeRO-2 and 3 want;
        else in the last one alone."""
        self.run, self.degrees, self.sync_each = run, degrees, sync_each
        active_axes = [axis for axis in AXIS_ORDER if degrees.get(axis, 1) > 1]
        sizes = tuple(degrees[axis] for axis in active_axes)
        self.mesh = init_device_mesh("cpu", sizes, mesh_dim_names=tuple(active_axes))
        data_axes = [axis for axis in ("islands", "expert", "shard") if axis in active_axes]
        self.worker_count = 1
        worker_index = 0
        for axis in data_axes:
            worker_index = worker_index * degrees[axis] + self.mesh[axis].get_local_rank()
            self.worker_count *= degrees[axis]
        self.local_microbatches = run.batch.microbatches // self.worker_count
        rows = run.batch.microbatches * run.batch.microbatch
        self.tokens = rows * run.data.sequence
        self.rng = np.random.default_rng(worker_index)
        self.dataset = open_dataset(Path(run.run.dir) / "data", "train").read_tokens(0, 4_000_000)
        self.log_file = open(Path(run.run.dir) / f"by-hand-{process.rank}.jsonl", "a")  # noqa: SIM115
        self.before_microbatch: Callable[[bool], None] = lambda is_last: None
        self.after_backward: Callable[[], None] = lambda: None
        self.positions: Tensor | None = None
        self.schedule: Any = None
        self.model = self._build_model()
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self.step_count = 0

    def steps(self, count: int) -> None:
        """Runs `count` steps: accumulate, reduce, clip, update, log."""
        for _ in range(count):
            start_s = time.perf_counter()
            batches = [self._batch() for _ in range(self.local_microbatches)]
            loss = self._run_pipeline(batches) if self.schedule else self._run_accumulation(batches)
            self.after_backward()
            grad_norm = self._clip()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            dist.all_reduce(loss)
            loss /= self._averaging_ranks() * self.degrees.get("tensor", 1)
            self.step_count += 1
            row = {
                "step": self.step_count, "loss": float(loss), "grad_norm": float(grad_norm),
                "step_s": time.perf_counter() - start_s,
            }  # fmt: skip
            self.log_file.write(json.dumps(row) + "\n")
            self.log_file.flush()

    # ---- a step ----

    def _batch(self) -> tuple[Tensor, Tensor]:
        length, rows = self.run.data.sequence, self.run.batch.microbatch
        starts = self.rng.integers(0, len(self.dataset) - length - 1, rows)
        windows = np.stack([self.dataset[s : s + length + 1] for s in starts]).astype(np.int64)
        x, y = torch.from_numpy(windows[:, :-1]), torch.from_numpy(windows[:, 1:])
        return (x, y) if self.positions is None else (x[:, self.positions], y[:, self.positions])

    def _run_accumulation(self, batches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        loss_sum = torch.zeros(())
        # The library averages over ranks where it reduces; the loss is that of all.
        scale = self._averaging_ranks() / self.tokens
        for index, (x, y) in enumerate(batches):
            self.before_microbatch(index == len(batches) - 1)
            if "tensor" in self.degrees:
                with loss_parallel():
                    loss = self.model(x, y) * scale
                    loss.backward()
            else:
                loss = self.model(x, y) * scale
                loss.backward()
            loss_sum += full_tensor(loss.detach())
        return loss_sum

    def _averaging_ranks(self) -> int:
        rank_count = 1
        for axis in ("islands", "shard", "context"):
            rank_count *= self.degrees.get(axis, 1)
        return rank_count

    def _run_pipeline(self, batches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        x, y = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
        stage, stage_count = self.mesh["pipeline"].get_local_rank(), self.degrees["pipeline"]
        losses: list[Tensor] = []
        inputs = (x,) if stage == 0 else ()
        is_last_stage = stage == stage_count - 1
        self.schedule.step(
            *inputs, target=y if is_last_stage else None, losses=losses if is_last_stage else None
        )
        return torch.stack(losses).sum().detach() if is_last_stage else torch.zeros(())

    def _clip(self) -> Tensor:
        if "pipeline" not in self.degrees and "expert" not in self.degrees:
            return full_tensor(nn.utils.clip_grad_norm_(self.parameters, 1.0))
        grads = [p.grad for p in self.parameters if p.grad is not None]
        if "pipeline" in self.degrees:
            squared_norm = full_tensor(nn.utils.get_total_norm(grads)).square()
            dist.all_reduce(squared_norm, group=self.mesh.get_group("pipeline"))
        else:
            expert_ids = {id(p) for p in self.experts}
            expert_grads = [
                p.grad for p in self.parameters if id(p) in expert_ids and p.grad is not None
            ]
            other_grads = [
                p.grad for p in self.parameters if id(p) not in expert_ids and p.grad is not None
            ]
            squared_norm = nn.utils.get_total_norm(expert_grads).square()
            dist.all_reduce(squared_norm, group=self.mesh.get_group("expert"))
            squared_norm = squared_norm + nn.utils.get_total_norm(other_grads).square()
        norm = squared_norm.sqrt()
        nn.utils.clip_grads_with_norm_(self.parameters, 1.0, norm)
        return norm

    # ---- a layout ----

    def _build_model(self) -> nn.Module:
        degrees, layers = self.degrees, self.run.model.layers
        layer_range = range(layers)
        if "pipeline" in degrees:
            stage, stage_count = self.mesh["pipeline"].get_local_rank(), degrees["pipeline"]
            layer_range = range(layers * stage // stage_count, layers * (stage + 1) // stage_count)
        if "context" in degrees:
            self.positions = self._context_positions(self.mesh["context"])
        net: nn.Module = HandwrittenModel(self.run, layer_range, self.positions)
        if "tensor" in degrees:
            self._apply_tensor_parallel(
                net, self.mesh["tensor"], gather_logits="pipeline" in degrees
            )
        if "pipeline" in degrees:
            self._make_schedule(net)
        elif "expert" in degrees:
            self._apply_expert_parallel(net, self.mesh["expert"])
        elif "context" in degrees:
            for block in net.blocks:
                block.attention.attend = self._gather_attention(self.mesh["context"])
            net = self._wrap_ddp(net, self.mesh["context"])
        elif "shard" in degrees:
            is_hybrid = "islands" in degrees
            self._apply_fsdp(
                net, self.mesh["islands", "shard"] if is_hybrid else self.mesh["shard"]
            )
        elif "islands" in degrees:
            net = self._wrap_ddp(net, self.mesh["islands"])
        return net

    def _wrap_ddp(self, net: nn.Module, mesh: DeviceMesh) -> nn.Module:
        ddp_model = DistributedDataParallel(net, process_group=mesh.get_group())

        def set_grad_sync(is_last: bool) -> None:
            ddp_model.require_backward_grad_sync = is_last

        self.before_microbatch = set_grad_sync
        return ddp_model

    def _apply_fsdp(self, net: Any, mesh: DeviceMesh) -> None:
        keeps_parameters = self.run.layout.zero != 3
        for module in (*net.blocks, net):
            # The rest is needed last in a forward and first in a backward.
            fully_shard(
                module, mesh=mesh, reshard_after_forward=not keeps_parameters and module is not net
            )

        def set_grad_sync(is_last: bool) -> None:
            net.set_requires_gradient_sync(is_last or self.sync_each)
            net.set_is_last_backward(is_last)
            net.set_reshard_after_backward(is_last or not keeps_parameters)

        self.before_microbatch = set_grad_sync

    def _apply_tensor_parallel(self, net: Any, mesh: DeviceMesh, gather_logits: bool) -> None:
        styles: dict[str, Any] = {
            "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
            "norm": SequenceParallel(),
            "head": ColwiseParallel(
                input_layouts=Shard(1),
                output_layouts=Replicate() if gather_logits else Shard(-1),
                use_local_output=gather_logits,
            ),
        }
        present_styles = {
            name: style for name, style in styles.items() if getattr(net, name) is not None
        }
        parallelize_module(net, mesh, present_styles)
        gather_layouts = {"input_layouts": (Shard(1),), "desired_input_layouts": (Replicate(),)}
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
                "mlp": PrepareModuleInput(**gather_layouts),
                "mlp.up": ColwiseParallel(),
                "mlp.down": RowwiseParallel(output_layouts=Shard(1)),
            })  # fmt: skip

    def _make_schedule(self, net: nn.Module) -> None:
        mesh = self.mesh["pipeline"]
        stage = PipelineStage(
            net, mesh.get_local_rank(), mesh.size(), torch.device("cpu"), group=mesh.get_group()
        )

        def scaled_loss(logits: Tensor, targets: Tensor) -> Tensor:
            return cross_entropy_sum(logits, targets) / self.tokens

        self.schedule = Schedule1F1B(
            stage, self.local_microbatches, loss_fn=scaled_loss, scale_grads=False
        )

    def _context_positions(self, mesh: DeviceMesh) -> Tensor:
        """An early chunk and the late one that evens out the work."""
        index, rank_count = mesh.get_local_rank(), mesh.size()
        chunks = torch.arange(self.run.data.sequence).chunk(2 * rank_count)
        return torch.cat((chunks[index], chunks[2 * rank_count - 1 - index]))

    def _gather_attention(self, mesh: DeviceMesh) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        group, index, rank_count = mesh.get_group(), mesh.get_local_rank(), mesh.size()
        window = self.run.model.window

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            length = q.shape[1] // 2
            keys_values = torch.stack((k, v))
            all_keys_values = collectives.all_gather_tensor_autograd(keys_values, 0, group)
            early_chunks, late_chunks = all_keys_values.view(rank_count, *keys_values.shape).chunk(
                2, 3
            )
            k, v = torch.cat([*early_chunks.unbind(), *reversed(late_chunks.unbind())], 2)
            outputs = []
            for chunk, chunk_index in zip(
                q.chunk(2, 1), (index, 2 * rank_count - 1 - index), strict=True
            ):
                stop = (chunk_index + 1) * length
                outputs.append(causal_attention(chunk, k[:, :stop], v[:, :stop], window))
            return torch.cat(outputs, 1)

        return attend

    def _apply_expert_parallel(self, net: nn.Module, mesh: DeviceMesh) -> None:
        group, index, rank_count = mesh.get_group(), mesh.get_local_rank(), mesh.size()
        self.experts: list[nn.Parameter] = []
        for moe in moe_layers(net):
            moe.aux_scale = 1.0 / self.tokens
            for name in ("up", "down"):
                local_weights = getattr(moe, name).detach().chunk(rank_count)[index].clone()
                setattr(moe, name, nn.Parameter(local_weights))
                self.experts.append(getattr(moe, name))
            moe.dispatch = token_dispatcher(group, rank_count)
        expert_ids = {id(p) for p in self.experts}
        other_parameters = [p for p in net.parameters() if id(p) not in expert_ids]

        def reduce_other_grads() -> None:
            grads = [p.grad for p in other_parameters if p.grad is not None]
            flat_grads = torch._utils._flatten_dense_tensors(grads)
            dist.all_reduce(flat_grads, group=group)
            torch._foreach_copy_(grads, torch._utils._unflatten_dense_tensors(flat_grads, grads))

        self.after_backward = reduce_other_grads


def token_dispatcher(group: dist.ProcessGroup, rank_count: int) -> Callable[..., Tensor]:
    """Rows to the ranks of their experts and back, around the experts' own computation."""

    def dispatch(
        rows: Tensor, expert_counts: Tensor, compute: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        send_counts = expert_counts.view(rank_count, -1)
        receive_counts = torch.empty_like(send_counts)
        dist.all_to_all_single(receive_counts, send_counts.contiguous(), group=group)
        receive_splits, send_splits = receive_counts.sum(1).tolist(), send_counts.sum(1).tolist()
        local_rows = all_to_all_single(
            rows.new_empty(sum(receive_splits), rows.shape[1]),
            rows,
            receive_splits,
            send_splits,
            group=group,
        )
        expert_ids = (
            torch.arange(send_counts.shape[1])
            .repeat(rank_count)
            .repeat_interleave(receive_counts.flatten())
        )
        order = expert_ids.argsort(stable=True)
        outputs = compute(local_rows[order], receive_counts.sum(0))
        rank_order_outputs = outputs[order.argsort()]
        return all_to_all_single(
            outputs.new_empty(len(rows), outputs.shape[1]),
            rank_order_outputs,
            send_splits,
            receive_splits,
            group=group,
        )

    return dispatch


def full_tensor(tensor: Tensor) -> Tensor:
    """A number that DTensor may hold in parts."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
