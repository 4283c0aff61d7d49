"""The engine of a model whose layers are on several ranks: torch's schedules, our microbatches.

A worker's microbatches are the pipeline's: the first stage gets tokens, the last one targets, and
each stage the key of its microbatch's dropout. The stream travels in fp32. Schedules come from
torch.distributed.pipelining; they leave gradients whole until the last microbatch. Not here: which
layers a stage has (`layout/stages.py`). Traded away: forwards without gradients (evaluation,
samples) go through the stages one after another, without overlap.
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
from cordee.dist.exchange import Partial, nothing
from cordee.dist.mesh import Mesh
from cordee.parallel.apply import Live
from cordee.parallel.engine import Engine, Microbatches, Work


class PipelineEngine(Engine):
    """Forward and backward of this rank's stages."""

    def __init__(self, live: Live, loader: Microbatches, mesh: Mesh, work: Work, run: Run) -> None:
        super().__init__(live, loader, mesh, work)
        self.width = run.model.width
        self.rows = run.batch.microbatch
        self.group = mesh.group("pipeline")
        self.mine = live.stages.of_rank(mesh.at["pipeline"])
        self._scale = 1.0
        positions = run.data.sequence // mesh.size("context")
        self._stream = (self.rows, positions // mesh.size("tensor"), self.width)
        self._schedule = self._make_schedule(run.layout.schedule, positions)
        live.chunks[0].register_forward_hook(self._forward)

    @property
    def ends(self) -> tuple[bool, bool]:
        """Whether this rank has the first stage, and the last one."""
        return 0 in self.mine, self.live.stages.last in self.mine

    def forward_backward(
        self, step: int, scale: float = 1.0, reached: Callable[[], None] = nothing
    ) -> tuple[list[Tensor], Partial]:
        """As `Engine.forward_backward`; only ranks with the last stage return losses."""
        self.begin(step, scale)
        self._reached = reached
        self._scale = scale / self.work.tokens
        first, last = self.ends
        part = self.work.part
        keys = torch.tensor([self.key(step, index) for index in part], dtype=torch.int64)
        given: dict[str, Any] = {"key": keys}
        inputs: tuple[Tensor, ...] = ()
        losses: list[Tensor] = []
        if first or last:
            tokens = torch.cat([self.tokens(step, index) for index in part])
            inputs = (self.split(tokens[:, :-1]),) if first else ()
            if last:
                given["targets_BT"] = self.split(tokens[:, 1:])
        target = torch.zeros(len(part)) if last else None
        self._schedule.step(
            *inputs, target=target, losses=losses if last else None, return_outputs=False, **given
        )
        self._count(len(part))
        return [loss.detach() / self._scale for loss in losses], self.collect()

    def infer(self, inputs: Tensor, targets: Tensor | None) -> Tensor:
        """Forward through all stages; the result is on every rank of the pipeline."""
        stages, me = self.live.stages, self.mesh.at["pipeline"]
        rows, positions = inputs.shape
        stream = (rows, positions // self.mesh.size("tensor"), self.width)
        x = inputs
        for stage in range(stages.last + 1):
            if stages.rank_of(stage) != me:
                continue
            before = stages.rank_of(stage - 1) if stage else me
            if before != me:
                x = torch.empty(stream, device=self.device)
                dist.recv(x, group=self.group, group_src=before)
            chunk = self.live.chunks[self.mine.index(stage)]
            x = chunk(x, targets) if stage == stages.last else chunk(x)
            after = stages.rank_of(stage + 1) if stage < stages.last else me
            if after != me:
                dist.send(x, group=self.group, group_dst=after)
        return self._tell(x, inputs, targets, stages.rank_of(stages.last))

    def _tell(self, x: Tensor, inputs: Tensor, targets: Tensor | None, owner: int) -> Tensor:
        """The last stage's result, broadcast."""
        vocabulary = self.live.every["embed.weight"].shape[0] // self.mesh.size("tensor")
        shape = () if targets is not None else (*inputs.shape, vocabulary)
        told = x if owner == self.mesh.at["pipeline"] else torch.empty(shape, device=self.device)
        dist.broadcast(told, group=self.group, group_src=owner)
        return told

    def _make_schedule(self, name: str, positions: int) -> Any:
        stages = [
            self._make_stage(chunk, stage, positions)
            for chunk, stage in zip(self.live.chunks, self.mine, strict=True)
        ]
        # The loss is summed and divided by the step's tokens: nothing is left to scale.
        given: dict[str, Any] = {"loss_fn": self._mean, "scale_grads": False}
        count = len(self.work.part)
        match name:
            case "gpipe":
                return ScheduleGPipe(stages[0], count, **given)
            case "1f1b":
                return Schedule1F1B(stages[0], count, **given)
            case "interleaved":
                return ScheduleInterleaved1F1B(list(stages), count, **given)
            case _:
                return ScheduleZBVZeroBubble(list(stages), count, **given)

    def _make_stage(self, chunk: Any, stage: int, positions: int) -> PipelineStage:
        last = self.live.stages.last
        stream = torch.empty(self._stream, device="meta", requires_grad=True)
        tokens = torch.empty(self.rows, positions, dtype=torch.int64, device="meta")
        loss = torch.empty((), device="meta", requires_grad=True)
        return PipelineStage(
            chunk,
            stage,
            last + 1,
            self.device,
            input_args=(tokens if stage == 0 else stream,),
            output_args=(loss if stage == last else stream,),
            group=self.group,
        )

    def _forward(self, *_: object) -> None:
        """A chunk has gone forward; told of training alone."""
        if self._training:
            self._reached()

    def _mean(self, loss: Tensor, _: Tensor) -> Tensor:
        return loss * self._scale

    def _count(self, microbatches: int) -> None:
        """Streams handed to other ranks: on to the next stage, and gradients back."""
        stages, me = self.live.stages, self.mesh.at["pipeline"]
        away = [
            other
            for stage in self.mine
            for other in (stage - 1, stage + 1)
            if 0 <= other <= stages.last and stages.rank_of(other) != me
        ]
        rows, positions, width = self._stream
        self.stream_bytes += len(away) * microbatches * rows * positions * width * 4
