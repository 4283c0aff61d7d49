"""The engine of a model whose layers are on several ranks, by torch's pipeline schedules.

The first stage gets tokens, the last one targets, and each stage the key of its microbatch's
dropout; activations travel in fp32. Forwards without gradients (evaluation, samples) go through the
stages one after another, without overlap.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)

from cordee.config.run import Run
from cordee.dist.mesh import Mesh
from cordee.dist.tree_all_reduce import PartialSums, do_nothing
from cordee.parallel.engine import Engine, MicrobatchLoader, StepSpec
from cordee.parallel.parallelize import LocalModel


class PipelineEngine(Engine):
    """Forward and backward of this rank's stages."""

    def __init__(
        self,
        local_model: LocalModel,
        loader: MicrobatchLoader,
        mesh: Mesh,
        step_spec: StepSpec,
        run: Run,
    ) -> None:
        super().__init__(local_model, loader, mesh, step_spec)
        self.width = run.model.width
        self.microbatch_rows = run.batch.microbatch
        self.pipeline_group = mesh.group("pipeline")
        self.stage_indices = local_model.stages.rank_stages(mesh.coords["pipeline"])
        self._loss_scale = 1.0
        positions = run.data.sequence // mesh.size("context")
        self._stream_shape = (self.microbatch_rows, positions // mesh.size("tensor"), self.width)
        self._schedule = self._make_schedule(run.layout.schedule, positions)
        local_model.stage_modules[0].register_forward_hook(self._after_forward)

    @property
    def has_end_stages(self) -> tuple[bool, bool]:
        """Whether this rank has the first stage, and the last one."""
        return 0 in self.stage_indices, self.local_model.stages.last_stage in self.stage_indices

    def forward_backward(
        self, step: int, scale: float = 1.0, on_forward: Callable[[], None] = do_nothing
    ) -> tuple[list[Tensor], PartialSums]:
        """As in `Engine`; only ranks with the last stage return losses."""
        self.begin_step(step, scale)
        self._on_forward = on_forward
        self._loss_scale = scale / self.step_spec.step_tokens
        has_first, has_last = self.has_end_stages
        microbatches = self.step_spec.microbatches
        dropout_keys = torch.tensor(
            [self.dropout_key(step, index) for index in microbatches], dtype=torch.int64
        )
        schedule_arguments: dict[str, Any] = {"key": dropout_keys}
        inputs: tuple[Tensor, ...] = ()
        losses: list[Tensor] = []
        if has_first or has_last:
            tokens = torch.cat([self.load_tokens(step, index) for index in microbatches])
            inputs = (self.select_positions(tokens[:, :-1]),) if has_first else ()
            if has_last:
                schedule_arguments["targets_BT"] = self.select_positions(tokens[:, 1:])
        target = torch.zeros(len(microbatches)) if has_last else None
        self._schedule.step(
            *inputs,
            target=target,
            losses=losses if has_last else None,
            return_outputs=False,
            **schedule_arguments,
        )
        self._count_bytes(len(microbatches))
        return [loss.detach() / self._loss_scale for loss in losses], self.reduce_in_island()

    def infer(self, inputs: Tensor, targets: Tensor | None) -> Tensor:
        """Forward through all stages; the result is on every rank of the pipeline."""
        stages, pipeline_index = self.local_model.stages, self.mesh.coords["pipeline"]
        rows, positions = inputs.shape
        stream_shape = (rows, positions // self.mesh.size("tensor"), self.width)
        # Not by the schedule, whose number and shape of microbatches are fixed.
        x = inputs
        for stage in range(stages.last_stage + 1):
            if stages.rank_of(stage) != pipeline_index:
                continue
            previous_rank = stages.rank_of(stage - 1) if stage else pipeline_index
            if previous_rank != pipeline_index:
                x = torch.empty(stream_shape, device=self.device)
                dist.recv(x, group=self.pipeline_group, group_src=previous_rank)
            stage_module = self.local_model.stage_modules[self.stage_indices.index(stage)]
            x = stage_module(x, targets) if stage == stages.last_stage else stage_module(x)
            next_rank = stages.rank_of(stage + 1) if stage < stages.last_stage else pipeline_index
            if next_rank != pipeline_index:
                dist.send(x, group=self.pipeline_group, group_dst=next_rank)
        return self._broadcast_output(x, inputs, targets, stages.rank_of(stages.last_stage))

    def _broadcast_output(
        self, stage_output: Tensor, inputs: Tensor, targets: Tensor | None, owner: int
    ) -> Tensor:
        vocabulary = self.local_model.all_specs["embed.weight"].shape[0] // self.mesh.size("tensor")
        shape = () if targets is not None else (*inputs.shape, vocabulary)
        output = (
            stage_output
            if owner == self.mesh.coords["pipeline"]
            else torch.empty(shape, device=self.device)
        )
        dist.broadcast(output, group=self.pipeline_group, group_src=owner)
        return output

    def _make_schedule(self, schedule_name: str, positions: int) -> Any:
        stages = [
            self._make_stage(stage_module, stage, positions)
            for stage_module, stage in zip(
                self.local_model.stage_modules, self.stage_indices, strict=True
            )
        ]
        # The loss is summed and divided by the step's tokens: nothing is left to scale.
        schedule_arguments: dict[str, Any] = {"loss_fn": self._scaled_loss, "scale_grads": False}
        microbatch_count = len(self.step_spec.microbatches)
        match schedule_name:
            case "gpipe":
                return ScheduleGPipe(stages[0], microbatch_count, **schedule_arguments)
            case "1f1b":
                return Schedule1F1B(stages[0], microbatch_count, **schedule_arguments)
            case "interleaved":
                return ScheduleInterleaved1F1B(list(stages), microbatch_count, **schedule_arguments)
            case _:
                return ScheduleZBVZeroBubble(list(stages), microbatch_count, **schedule_arguments)

    def _make_stage(self, stage_module: Any, stage: int, positions: int) -> PipelineStage:
        last = self.local_model.stages.last_stage
        stream = torch.empty(self._stream_shape, device="meta", requires_grad=True)
        tokens = torch.empty(self.microbatch_rows, positions, dtype=torch.int64, device="meta")
        loss = torch.empty((), device="meta", requires_grad=True)
        return PipelineStage(
            stage_module,
            stage,
            last + 1,
            self.device,
            input_args=(tokens if stage == 0 else stream,),
            output_args=(loss if stage == last else stream,),
            group=self.pipeline_group,
        )

    def _after_forward(self, *_: object) -> None:
        if self._is_training:
            self._on_forward()

    def _scaled_loss(self, loss: Tensor, _: Tensor) -> Tensor:
        return loss * self._loss_scale

    def _count_bytes(self, microbatches: int) -> None:
        """Activations sent to the next stage, and gradients sent back."""
        stages, pipeline_index = self.local_model.stages, self.mesh.coords["pipeline"]
        remote_neighbours = [
            neighbour
            for stage in self.stage_indices
            for neighbour in (stage - 1, stage + 1)
            if 0 <= neighbour <= stages.last_stage and stages.rank_of(neighbour) != pipeline_index
        ]
        rows, positions, width = self._stream_shape
        self.pipeline_bytes += len(remote_neighbours) * microbatches * rows * positions * width * 4
