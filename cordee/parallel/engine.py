"""Runs a step's microbatches on this rank: forward, backward, and sums of gradients.

Gradients are added plainly (into `.grad`) or in canonical order (a tree over microbatch indices,
layout/microbatches.py). The loss is divided by the global token count before the backward, so every
sum is already the mean. Pipelines have an engine of their own in `pipeline.py`.
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

from cordee.data.ledger import microbatch_digest
from cordee.dist.mesh import Mesh
from cordee.dist.tree_all_reduce import PartialSums, all_gather_rows, do_nothing
from cordee.errors import ConfigError
from cordee.hardware.devices import DEVICES
from cordee.hf.safetensors_io import slice_box
from cordee.layout.axes import STAGE_AXES
from cordee.layout.microbatches import TreeSum
from cordee.model.init_weights import seeded_rng
from cordee.model.layers import autocast_to
from cordee.model.moe import moe_layers, reset_expert_load, sum_expert_load, update_router_bias
from cordee.parallel import fsdp
from cordee.parallel.fsdp import Sharding, local_tensor
from cordee.parallel.grad_reduce import GradientReducer
from cordee.parallel.parallelize import LocalModel

Batch = tuple[Tensor, ...]


class MicrobatchLoader(Protocol):
    """What the engine reads microbatches from; data/loader.py has one."""

    def begin(self, step: int, indices: range) -> None:
        """Announces the microbatches of `step` that this rank computes."""
        ...

    def microbatch(self, step: int, index: int) -> Tensor | Batch:
        """Token ids (rows, sequence + 1), int64, or a batch of the run's own loss."""
        ...

    def ids(self, step: int, index: int) -> NDArray[np.int64]:
        """Ids of the samples of `microbatch(step, index)`."""
        ...


@dataclass(frozen=True)
class StepSpec:
    """What an engine needs to know of a run. `step_tokens` counts targets of a whole step."""

    microbatches: range
    total_microbatches: int
    step_tokens: int
    seed: int
    takes_dropout_key: bool
    autocast: torch.dtype | None
    sharding: Sharding
    device: str
    balance_rate: float = 0.0


class Engine:
    """Forward and backward of this rank's microbatches."""

    def __init__(
        self, local_model: LocalModel, loader: MicrobatchLoader, mesh: Mesh, step_spec: StepSpec
    ) -> None:
        self.local_model = local_model
        self.loader = loader
        self.mesh = mesh
        self.step_spec = step_spec
        self.is_sharded = mesh.shard_mesh is not None
        self.module_parameters = local_model.module_parameters()
        self.parameters = {
            n: local_tensor(p.detach()).requires_grad_() for n, p in self.module_parameters.items()
        }
        self.device = torch.device(step_spec.device)
        self.buffers = local_model.buffers()
        self._moved_buffers: dict[str, Tensor] = {}
        self._reduces_after_backward = self.is_sharded and step_spec.sharding.reduces_after_backward
        self._reduced_gradients: list[Tensor] = []
        self.gradient_reducer = GradientReducer(
            mesh, [local_model.specs[name] for name in self.parameters]
        )
        self._tree_sum = TreeSum(step_spec.microbatches, step_spec.total_microbatches)
        # Collected once: a walk through all modules in every microbatch costs 1 % of a small step.
        modules = local_model.stage_modules
        self._moe_layers = [moe for module in modules for moe in moe_layers(module)]
        self._fsdp_modules = [unit for module in modules for unit in fsdp.fsdp_modules(module)]
        self._is_training = False
        self.pipeline_bytes = 0
        """Bytes that this rank has sent between pipeline stages."""
        self.sample_digests: dict[int, int] = {}
        """By microbatch that this rank loaded in this step (data/ledger.py)."""
        self.data_s = 0.0
        """Seconds of the last step that were spent on loading its data."""
        self._start_s = 0.0
        self._device_events: list[torch.Event] = []
        self._on_forward: Callable[[], None] = do_nothing

    def forward_backward(
        self, step: int, scale: float = 1.0, on_forward: Callable[[], None] = do_nothing
    ) -> tuple[list[Tensor], PartialSums]:
        """Runs step `step` (from 0): (summed loss of each microbatch in nats, partial sums of
        `scale` times the gradient). `on_forward` is called after each forward."""
        self.begin_step(step, scale)
        self._on_forward = on_forward
        is_canonical = self.step_spec.sharding.canonical
        losses: list[Tensor] = []
        partial_sums: PartialSums = []
        old_buffers = self._copy_buffers()
        for index in self.step_spec.microbatches:
            if self.is_sharded and not self.step_spec.sharding.reduces_after_backward:
                is_last = index == self.step_spec.microbatches.stop - 1
                fsdp.set_gradient_sync(self._fsdp_modules, is_last, self.step_spec.sharding)
            losses.append(self._run_microbatch(step, index, scale))
            if is_canonical:
                self._tree_sum.feed(partial_sums, index, self.pop_full_gradients(), _add_in_place)
            elif self._reduces_after_backward and self.step_spec.sharding.zero > 1:
                self._reduce_over_shards()
            self._record_event()
        # Buffers move with `commit`, as the step may be dropped or fail.
        self._moved_buffers = self._copy_buffers()
        self._restore_buffers(old_buffers)
        # Without microbatches the tree is empty: zeros over an empty range.
        return losses, partial_sums if partial_sums else self.reduce_in_island()

    def set_microbatches(self, microbatches: range) -> None:
        """This rank computes these microbatches from now on; they may be none where an island is
        one rank."""
        self.step_spec = replace(self.step_spec, microbatches=microbatches)
        self._tree_sum = TreeSum(microbatches, self.step_spec.total_microbatches)

    @property
    def compute_s(self) -> float:
        """Seconds that this step's microbatches took, without waits for data.

        An accelerator is measured by events of its own, and waited for: it may still be busy with
        the update before, or idle while the host loads.
        """
        if self._device_events:
            self._device_events[-1].synchronize()
            pairs = zip(self._device_events[::2], self._device_events[1::2], strict=True)
            elapsed_ms: float = sum(start.elapsed_time(end) for start, end in pairs)
            return elapsed_ms / 1e3
        return time.perf_counter() - self._start_s - self.data_s

    @property
    def bytes_sent(self) -> dict[str, int]:
        """Bytes that this rank has sent inside its island so far, by axis; "sums" are gradients
        that are added over sets of axes."""
        sent_bytes = {**self.local_model.bytes_sent, "pipeline": self.pipeline_bytes}
        return {**sent_bytes, "sums": self.gradient_reducer.bytes_sent}

    def begin_step(self, step: int, scale: float) -> None:
        """Sets training mode, clears gradients, and announces the microbatches to the loader."""
        if not self._is_training:
            self.set_training(training=True)
        for stage_module in self.local_model.stage_modules:
            self._clear_gradients(stage_module.parameters())
        for moe in self._moe_layers:
            reset_expert_load(moe)
            moe.aux_scale = scale / self.step_spec.step_tokens
        self._clear_gradients([*self.module_parameters.values(), *self.parameters.values()])
        self._reduced_gradients = []
        self.sample_digests.clear()
        self._device_events.clear()
        self._start_s = time.perf_counter()
        self.loader.begin(step, self.step_spec.microbatches)
        self.data_s = time.perf_counter() - self._start_s

    def reduce_in_island(self) -> PartialSums:
        """The gradients of the backwards since `begin_step`, summed inside the island."""
        if self._reduces_after_backward and not self._reduced_gradients:
            self._reduce_over_shards()
        self._reshard()
        gradients, self._reduced_gradients = self._reduced_gradients, []
        if not self._reduces_after_backward:
            gradients = [
                torch.zeros_like(local_parameter)
                if parameter.grad is None
                else local_tensor(parameter.grad)
                for parameter, local_parameter in zip(
                    self.module_parameters.values(), self.parameters.values(), strict=True
                )
            ]
        self._clear_gradients(self.module_parameters.values())
        self.gradient_reducer.reduce(gradients)
        return [((self.step_spec.microbatches.start, self.step_spec.microbatches.stop), gradients)]

    def set_gradients(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Sets `.grad` of the optimiser's tensors to the reduced gradient; this rank's parts."""
        self._reshard()
        local_gradients = []
        for (name, parameter), gradient in zip(self.parameters.items(), gradients, strict=True):
            if self.is_sharded and self.step_spec.sharding.canonical:
                box = self.local_model.specs[name].box(self.mesh.layout, self.mesh.coords)
                # Gradients are summed on the device; offloaded parameters are on the host.
                gradient = slice_box(gradient, box).to(parameter.device)
            parameter.grad = gradient
            local_gradients.append(gradient)
        return local_gradients

    def prepare(self) -> Tensor | None:
        """What `commit` needs of other ranks (collective): this step's load of each expert."""
        return sum_expert_load(self._moe_layers, self._sum_over_ranks)

    def commit(self, loads: Tensor | None) -> None:
        """With the optimiser's step, without communication: updates the router's biases by what
        `prepare` returned, and buffers to their values after the forwards."""
        update_router_bias(self._moe_layers, loads, self.step_spec.balance_rate)
        self._restore_buffers(self._moved_buffers)

    def load_tokens(self, step: int, index: int) -> Tensor:
        (tokens,) = self._load_microbatch(step, index)
        return tokens

    def load_batch(self, step: int, index: int) -> Batch:
        """The arguments of the model, or of the run's own loss, for a microbatch."""
        if self.local_model.loss_function is not None:
            return self._load_microbatch(step, index)
        tokens = self.load_tokens(step, index)
        return self.select_positions(tokens[:, :-1]), self.select_positions(tokens[:, 1:])

    def select_positions(self, tokens_BT: Tensor) -> Tensor:
        """The columns of [B, T] at the positions from which this rank attends."""
        positions = self.local_model.sequence_shard.attention_positions(tokens_BT.shape[1])
        return tokens_BT if positions is None else tokens_BT[:, positions.to(tokens_BT.device)]

    def dropout_key(self, step: int, index: int) -> int:
        """The seed of a microbatch's dropout; 0 without dropout."""
        spec = self.step_spec
        return microbatch_key(spec.seed, step, index) if spec.takes_dropout_key else 0

    # ---- without gradients ----

    @torch.no_grad()
    def loss(self, batch: Tensor | Batch) -> Tensor:
        """Summed loss in nats of int64 [rows, sequence + 1], or of a batch of the run's own loss;
        the same on all ranks of an island."""
        model = self.local_model
        if not isinstance(batch, Tensor):
            return self.call_model(model.stage_modules[0], tuple(t.to(self.device) for t in batch))
        tokens = batch.to(self.device)
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        loss = self.infer(self.select_positions(inputs), self.select_positions(targets))
        is_split = model.sequence_shard.context_size > 1
        return model.comms["context"].all_reduce_no_grad(loss) if is_split else loss

    @torch.no_grad()
    def logits(self, tokens_BT: Tensor) -> Tensor:
        """fp32 [B, T, V] of int64 [B, T], whole on every rank; T may be anything."""
        shard, comms = self.local_model.sequence_shard, self.local_model.comms
        length = tokens_BT.shape[1]
        # Each context rank holds two chunks, and the tensor ranks split each rank's positions.
        multiple = shard.tensor_size * (2 * shard.context_size if shard.context_size > 1 else 1)
        tokens_BT = torch.nn.functional.pad(tokens_BT.to(self.device), (0, -length % multiple))
        output = self.infer(self.select_positions(tokens_BT), None)
        if shard.tensor_size > 1:
            output = comms["tensor"].all_gather_no_grad(output, 2)
        if shard.context_size > 1:
            positions = torch.arange(tokens_BT.shape[1], device=self.device)[None]
            order = comms["context"].all_gather_no_grad(self.select_positions(positions), 1)[0]
            output = comms["context"].all_gather_no_grad(output, 1)[:, order.argsort()]
        return output[:, :length]

    @torch.no_grad()
    def infer(self, inputs: Tensor, targets: Tensor | None) -> Tensor:
        """Forward of this rank's positions: the loss, or logits of its part of the vocabulary."""
        return self.call_model(self.local_model.stage_modules[0], (inputs, targets))

    def call_model(
        self, model: nn.Module, batch: tuple[Tensor | None, ...], dropout_key: int = 0
    ) -> Tensor:
        """The model, or the run's own loss, of a batch."""
        with autocast_to(self.device.type, self.step_spec.autocast):
            if self.local_model.loss_function is not None:
                output: object = self.local_model.loss_function(model, *batch)
            else:
                output = model(*batch, dropout_key) if dropout_key else model(*batch)
        sharding, is_own = self.step_spec.sharding, model is self.local_model.stage_modules[0]
        checks_order = sharding.is_user_module and not sharding.gathers_before_forward
        if self.is_sharded and checks_order and is_own:
            fsdp.check_unit_order(self.local_model.comms["shard"], -1)
        if self.local_model.is_user_module and batch[-1] is not None:
            part_name = "model" if self.local_model.loss_function is None else "loss"
            return check_summed_loss(output, part_name)
        assert isinstance(output, Tensor)
        return output

    def set_training(self, training: bool) -> None:
        self._is_training = training
        for stage_module in self.local_model.stage_modules:
            stage_module.train(training)

    # ---- inside ----

    def _copy_buffers(self) -> dict[str, Tensor]:
        """Copies of the buffers that a forward may change: those of a caller's own model."""
        user_buffers = self.buffers if self.local_model.is_user_module else {}
        return {name: buffer.clone() for name, buffer in user_buffers.items()}

    def _restore_buffers(self, copies: dict[str, Tensor]) -> None:
        for name, copy in copies.items():
            self.buffers[name].copy_(copy)

    def _load_microbatch(self, step: int, index: int) -> Batch:
        start_s = time.perf_counter()
        microbatch = self.loader.microbatch(step, index)
        self.sample_digests[index] = microbatch_digest(self.loader.ids(step, index))
        tensors = (microbatch,) if isinstance(microbatch, Tensor) else microbatch
        batch = tuple(tensor.to(self.device, non_blocking=True) for tensor in tensors)
        self.data_s += time.perf_counter() - start_s
        return batch

    def _run_microbatch(self, step: int, index: int, scale: float) -> Tensor:
        batch, dropout_key = self.load_batch(step, index), self.dropout_key(step, index)
        self._record_event()
        with self._seeded_rng(step, index):
            loss = self.call_model(self.local_model.stage_modules[0], batch, dropout_key)
        self._on_forward()
        torch.autograd.backward(loss / self.step_spec.step_tokens * scale)
        detached_loss: Tensor = loss.detach()
        return detached_loss

    def _record_event(self) -> None:
        """Records when an accelerator reaches this point; a CPU is timed by the host's clock."""
        if DEVICES[self.device.type].events:
            event = torch.Event(self.device, enable_timing=True)
            event.record()
            self._device_events.append(event)

    def _seeded_rng(self, step: int, index: int) -> AbstractContextManager[None]:
        """Seeds what a caller's own model draws by the microbatch, not by the rank."""
        if not self.local_model.is_user_module:
            return nullcontext()
        return seeded_rng(microbatch_key(self.step_spec.seed, step, index), self.device)

    def pop_full_gradients(self) -> list[Tensor]:
        """The whole gradients of the backward before, removed from the modules."""
        # While FSDP2 keeps parameters gathered, `parameters()` are the whole ones.
        parameters = list(self.local_model.stage_modules[0].parameters())
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        self._clear_gradients(parameters)
        return gradients

    def _reduce_over_shards(self) -> None:
        """Sums the whole gradients over shards and adds this rank's parts to earlier ones."""
        local_parameters = list(self.parameters.values())
        shard_gradients = fsdp.reduce_scatter_gradients(
            self.pop_full_gradients(), local_parameters, self.local_model.comms["shard"]
        )
        if self._reduced_gradients:
            _add_in_place(self._reduced_gradients, shard_gradients)
        else:
            self._reduced_gradients = shard_gradients

    def _sum_over_ranks(self, numbers: Tensor) -> Tensor:
        """Sums whole numbers over all ranks that have this rank's layers."""
        group, size = self.mesh.group(*STAGE_AXES), self.mesh.size(*STAGE_AXES)
        rows = all_gather_rows(numbers.flatten(), group, size)
        return rows.sum(0).view(numbers.shape)

    def _reshard(self) -> None:
        for fsdp_module in self._fsdp_modules:
            fsdp_module.reshard()

    @staticmethod
    def _clear_gradients(parameters: Iterable[Tensor]) -> None:
        for parameter in parameters:
            parameter.grad = None


def check_summed_loss(loss: object, part_name: str) -> Tensor:
    """What a caller's loss or model (`part_name`) returned; ConfigError when it is not one number,
    or, in training, one without a gradient."""
    problem = ""
    if not isinstance(loss, Tensor):
        problem = f"returned a {type(loss).__name__}"
    elif loss.ndim:
        problem = f"returned a tensor of shape {list(loss.shape)}"
    elif not loss.is_floating_point():
        problem = f"returned a number of {loss.dtype}"
    elif loss.is_meta:
        problem = "returned a tensor without a value (device meta)"
    elif torch.is_grad_enabled() and not loss.requires_grad:
        problem = "returned a number without a gradient (detached, or made of numbers alone)"
    if problem or not isinstance(loss, Tensor):
        raise ConfigError(
            f"the {part_name} that was brought returns no summed loss: one number, a 0-dim tensor",
            values={part_name: problem},
            fix="return a tensor as F.cross_entropy(model(x), y, reduction='sum') is one",
        )
    return loss


def microbatch_key(seed: int, step: int, microbatch: int) -> int:
    """63 bits that depend on (seed, step, microbatch) and nothing else; never 0."""
    text = f"dropout {seed} {step} {microbatch}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1 | 1


def _add_in_place(a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    torch._foreach_add_(a, b)
    return a
