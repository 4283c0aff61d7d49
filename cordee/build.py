"""Plan -> live RunState: every choice of a part is made here, once, in one `match` or one line.

Not here: when anything happens (`train.py`). Parts that a library user brings ready-made (`Parts`)
are taken as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from cordee.checkpoint.save import Saver
from cordee.checkpoint.state import Holding, Progress, holdings
from cordee.config.run import MemorySettings, Run
from cordee.data.loader import Loader
from cordee.data.order import Order
from cordee.data.source import DatasetInfo, TokenSource, open_dataset
from cordee.dist.exchange import gather_rows
from cordee.dist.mesh import Mesh, make_mesh
from cordee.dist.start import World
from cordee.errors import ConfigError
from cordee.fault.guard import Guard
from cordee.fault.inject import Drill, make_drill
from cordee.layout.split import shard_rows
from cordee.model.initial import initialise
from cordee.model.precision import autocast_dtype
from cordee.model.transformer import Transformer
from cordee.optim.groups import Optimizers, make_optimizer, split_groups
from cordee.optim.muon import Gather
from cordee.optim.scale import LossScale
from cordee.parallel.apply import apply
from cordee.parallel.engine import Engine, Microbatches, Work
from cordee.parallel.shard import local, whole_rows
from cordee.plan.plan import Plan
from cordee.sync.codecs import make_codec
from cordee.sync.protocol import AllReduce, Alone, ByExchange, Compared, Sync


@dataclass(frozen=True)
class Parts:
    """Parts of a run that a caller brings ready-made; None means that the house builds it.

    `model(tokens, targets)` must return the summed loss in nats; `loader` gives microbatches of
    token ids. Every rank must bring the same.
    """

    model: nn.Module | None = None
    loader: Microbatches | None = None

    def check(self, run: Run) -> None:
        """ConfigError for what `run` asks of a part that is not the house's own."""
        if self.model is not None and run.memory != MemorySettings():
            raise ConfigError(
                "memory.* is for the built-in model",
                values={"model": type(self.model).__name__, **asdict(run.memory)},
                fix="leave memory.* out, and checkpoint inside your module",
            )
        if self.model is not None and (run.run.compile != "none" or run.run.precision == "fp8"):
            raise ConfigError(
                "run.compile and fp8 are for the blocks of the built-in model",
                values={
                    "model": type(self.model).__name__,
                    "run.compile": run.run.compile,
                    "run.precision": run.run.precision,
                },
                fix="run.compile=none run.precision=bf16, and compile inside your module",
            )


@dataclass
class RunState:
    """A live run on this rank. What survives a restart is listed in checkpoint/state.py."""

    run: Run
    plan: Plan
    world: World
    mesh: Mesh
    data: DatasetInfo
    model: nn.Module
    parameters: dict[str, nn.Parameter]
    groups: dict[str, list[tuple[str, nn.Parameter]]]
    engine: Engine
    sync: Sync
    optimizer: Optimizers
    guard: Guard
    scale: LossScale
    drill: Drill
    saver: Saver
    ranges: list[range]
    held_out: TokenSource | None
    progress: Progress = field(default_factory=Progress)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.run.run.dir)

    @property
    def step_tokens(self) -> int:
        """Training tokens of one step, over all ranks."""
        return self.engine.work.tokens

    def held(self) -> list[Holding]:
        """All tensors of this rank that survive."""
        return holdings(self.parameters, self.optimizer.tensors(), local, self.plan.layout.shard)

    @property
    def microbatch_tokens(self) -> int:
        """Training tokens of one microbatch."""
        return self.run.batch.microbatch * self.run.data.sequence

    @property
    def by_rows(self) -> bool:
        """Whether the gradient norm is summed by rows: whenever its order must not matter."""
        return self.engine.work.canonical or self.mesh.shards is not None

    @property
    def whole_rows(self) -> Callable[[Tensor], Tensor] | None:
        """Puts the shards' vectors of rows into unsharded order (see `optim.clip.global_norm`)."""
        return None if self.mesh.shards is None else self._whole_rows

    @property
    def total_squares(self) -> Callable[[Tensor], Tensor] | None:
        """Adds vectors of squared norms over the shards of this island."""
        return None if self.mesh.shards is None else self._total_squares

    def named_gradients(
        self, gradients: Sequence[Tensor]
    ) -> list[tuple[str, nn.Parameter, Tensor]]:
        """(name, parameter, this rank's part of its gradient), in parameter order."""
        pairs = zip(self.parameters.items(), gradients, strict=True)
        return [(name, parameter, gradient) for (name, parameter), gradient in pairs]

    def _total_squares(self, part: Tensor) -> Tensor:
        return gather_rows(part, self.mesh.shards, self.plan.layout.shard).sum(0)

    def _whole_rows(self, part: Tensor) -> Tensor:
        shards = self.plan.layout.shard
        per_tensor = [
            [len(shard_rows(len(p), shards, index)) for p in self.parameters.values()]
            for index in range(shards)
        ]
        assert self.mesh.shards is not None
        gathered = whole_rows(part, [sum(counts) for counts in per_tensor], self.mesh.shards)
        by_shard = torch.split(gathered, [sum(counts) for counts in per_tensor])
        cut = [torch.split(vector, c) for vector, c in zip(by_shard, per_tensor, strict=True)]
        return torch.cat([cut[s][t] for t in range(len(cut[0])) for s in range(shards)])


def build(run: Run, plan: Plan, world: World, data: DatasetInfo, parts: Parts) -> RunState:
    """Initialise, distribute the data, distribute the model: in that order, on every rank."""
    mesh = make_mesh(plan.layout, world.rank, world.device, run.memory.offload != "none")
    ranges = [range(start, stop) for start, stop in plan.splits]
    model = parts.model or make_model(run, data.vocabulary)
    canonical = run.run.exact or plan.protocol == "exchange"
    model = apply(model, mesh, world.device, canonical, run)
    parameters = dict(model.named_parameters())
    part = ranges[mesh.worker]
    loader = parts.loader or make_loader(run, data, world.device)
    work = Work(
        part=part,
        total=run.batch.microbatches,
        tokens=run.batch.microbatches * run.batch.microbatch * run.data.sequence,
        seed=run.run.seed,
        dropout=run.model.dropout > 0,
        autocast=autocast_dtype(run.run.precision),
        canonical=canonical,
        device=world.device,
    )
    drill = make_drill(run.fault, world.rank)
    return RunState(
        run=run,
        plan=plan,
        world=world,
        mesh=mesh,
        data=data,
        model=model,
        parameters=parameters,
        groups=split_groups(parameters.items()),
        engine=Engine(model, loader, mesh, work),
        sync=make_sync(run, plan, mesh, ranges, canonical),
        optimizer=make_rule(run, mesh, parameters),
        guard=Guard(run.guard.in_a_row),
        scale=LossScale(dynamic=run.run.precision == "fp16"),
        drill=drill,
        saver=Saver(
            Path(run.run.dir) / "checkpoints",
            world.rank,
            world.size,
            run.checkpoint.keep,
            drill.point,
        ),
        ranges=ranges,
        held_out=open_dataset(data.folder, "held_out") if data.held_out else None,
    )


def make_model(run: Run, vocabulary: int) -> nn.Module:
    """The built-in model, initialised: every number depends on (seed, name) alone."""
    model = Transformer(run.model, vocabulary)
    model.memory = run.memory
    initialise(model, run.initial, run.run.seed, run.model.layers)
    return model


def make_loader(run: Run, data: DatasetInfo, device: str) -> Loader:
    """The training split in its global order."""
    source = open_dataset(data.folder, "train")
    order = Order(
        seed=run.run.seed,
        rows=source.rows(run.data.sequence),
        microbatch_rows=run.batch.microbatch,
        microbatches=run.batch.microbatches,
    )
    return Loader(source, order, run.data.sequence, device, run.data.prefetch)


def make_sync(run: Run, plan: Plan, mesh: Mesh, ranges: list[range], canonical: bool) -> Sync:
    """The protocol between ranks that compute different microbatches."""
    if run.data.placement == "replicate" and plan.layout.island > 1:
        return Compared(mesh.islands, plan.layout.island)
    if canonical:
        return ByExchange(mesh.workers, ranges, make_codec(plan.codec))
    match plan.protocol:
        case "allreduce" if mesh.islands is not None:
            return AllReduce(mesh.islands, plan.layout.island)
        case _:
            return Alone()


def make_rule(run: Run, mesh: Mesh, parameters: dict[str, nn.Parameter]) -> Optimizers:
    """The update rule. Fused kernels round differently at the edge of a shard: not when exact."""
    shared = None
    # bfloat16 would turn a last-bit difference of a sum into one of 2^-8: not what fp32 promises.
    dtype = torch.float32 if run.run.precision == "fp32" else None
    if mesh.workers is not None and run.data.placement == "partition":
        shared = Gather(group=mesh.workers, rank=mesh.rank, size=mesh.layout.size)
    return make_optimizer(
        run.optim, parameters.items(), fused=not run.run.exact, gather=shared, muon_dtype=dtype
    )
