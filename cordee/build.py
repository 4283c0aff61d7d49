"""Plan -> live RunState: every choice of a part is made here, once, in one `match` or one line.

Not here: when anything happens (`train.py`). Parts that a library user brings ready-made
(`parts.py`) are taken as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from cordee.checkpoint.neighbour import Neighbour
from cordee.checkpoint.save import Saver
from cordee.checkpoint.state import Holding, Progress, holdings
from cordee.config.run import Run
from cordee.data.loader import Loader
from cordee.data.manifest import DatasetInfo
from cordee.data.order import Order
from cordee.data.samples import SampleLoader, Samples
from cordee.data.source import TokenSource, open_dataset
from cordee.dist.mesh import WORKERS, Mesh, make_mesh, places
from cordee.dist.start import World
from cordee.fault.guard import Guard
from cordee.fault.inject import Drill, make_drill
from cordee.layout.axes import INSIDE
from cordee.layout.boxes import Place
from cordee.layout.legal import gathers_cast
from cordee.layout.shares import Balance
from cordee.layout.split import shard_rows
from cordee.layout.stages import Stages
from cordee.layout.tensors import TensorSpec
from cordee.model.precision import autocast_dtype
from cordee.optim.clip import Totals, global_norm
from cordee.optim.groups import Optimizers, make_optimizer, split_groups
from cordee.optim.muon import Gather, Matrix
from cordee.optim.scale import LEAST, LossScale
from cordee.parallel.apply import Live, make_live, place_of
from cordee.parallel.engine import Engine, Microbatches, Work
from cordee.parallel.foreign import guard, make_hub, take, whole_copy, whole_hub
from cordee.parallel.shard import Sharding, whole_rows
from cordee.parallel.sums import IslandTotals
from cordee.parts import Parts
from cordee.plan.plan import Plan
from cordee.sync.codecs import make_codec
from cordee.sync.protocol import AllReduce, Alone, ByExchange, Compared, Sync


@dataclass
class RunState:
    """A live run on this rank. What survives a restart is listed in checkpoint/state.py.

    `parameters` are this rank's parts, plain tensors in model order; `spoken` says whose word
    counts for which microbatch's loss (see `gather_tally`); `epoch_rows` are the samples of a pass
    over the data; `balance` is None where shares stay as they are; `brought` is the type of a model
    that the caller brought; `arithmetic` names what computes, where bits are promised.
    """

    run: Run
    plan: Plan
    world: World
    mesh: Mesh
    data: DatasetInfo
    live: Live
    parameters: dict[str, Tensor]
    groups: dict[str, list[tuple[str, Tensor]]]
    engine: Engine
    sync: Sync
    optimizer: Optimizers
    guard: Guard
    scale: LossScale
    drill: Drill
    saver: Saver
    spoken: list[range]
    totals: Totals | None
    held_out: TokenSource | Samples | None
    epoch_rows: int
    balance: Balance | None = None
    brought: str = ""
    arithmetic: Mapping[str, str] = field(default_factory=dict)
    neighbour: Neighbour | None = None
    progress: Progress = field(default_factory=Progress)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.run.run.dir)

    @property
    def step_rows(self) -> int:
        """Samples of one step, over all ranks."""
        return self.run.batch.microbatches * self.run.batch.microbatch

    @property
    def step_tokens(self) -> int:
        """Training tokens of one step, over all ranks."""
        foreign = self.live.loss is not None
        return self.step_rows if foreign else self.step_rows * self.run.data.sequence

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes of text a target stands for; None where it stands for an image or a sample."""
        foreign = self.run.model.classifies or self.live.loss is not None
        return None if foreign else self.data.bytes_per_token

    def held(self, everything: bool = False) -> list[Holding]:
        """The tensors that survive and that this rank answers for; or all that it has."""
        return holdings(self.tensors, self.optimizer.tensors(), self.places, everything)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """This rank's parts of what the model is: parameters, and buffers that survive."""
        return {**self.parameters, **self.engine.buffers}

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """The whole model's tensors: parameters, and buffers that survive."""
        return {**self.live.every, **self.live.kept}

    @property
    def places(self) -> dict[str, Place]:
        """What this rank holds of each of its parameters, and who else holds the same."""
        specs = self.specs
        return {name: place_of(specs[name], self.mesh) for name in self.tensors}

    @property
    def microbatch_tokens(self) -> int:
        """Targets of one microbatch: its tokens, images or samples."""
        return self.engine.work.tokens // self.engine.work.total

    def speaks(self, losses: Sequence[Tensor]) -> list[float]:
        """This rank's losses, if its word counts."""
        return [float(loss) for loss in losses] if self.spoken[self.world.rank] else []

    def loaded(self) -> list[int]:
        """Digests of the samples that this rank loaded for the losses that it speaks of."""
        return [self.engine.digests[index] for index in self.spoken[self.world.rank]]

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """Global norm of the step's gradient, 0-d; by rows whenever its order must not matter."""
        named = dict(zip(self.parameters, gradients, strict=True))
        only_shards = self.mesh.size(*INSIDE) == self.mesh.size("shard") > 1
        by_rows = only_shards and not any(spec.stacked for spec in self.live.specs.values())
        if self.engine.work.sharding.canonical or by_rows:
            whole = self._whole_rows if self.mesh.size("shard") > 1 else None
            return global_norm(named, True, whole)
        return global_norm(named, False, totals=self.totals)

    def named_gradients(self, gradients: Sequence[Tensor]) -> list[tuple[str, Tensor, Tensor]]:
        """(name, parameter, this rank's part of its gradient), in parameter order."""
        pairs = zip(self.parameters.items(), gradients, strict=True)
        return [(name, parameter, gradient) for (name, parameter), gradient in pairs]

    def _whole_rows(self, part: Tensor) -> Tensor:
        shards = self.mesh.size("shard")
        rows = [spec.shape[0] for spec in self.live.specs.values()]
        per_tensor = [[len(shard_rows(n, shards, index)) for n in rows] for index in range(shards)]
        group = self.mesh.group("shard")
        assert group is not None
        gathered = whole_rows(part, [sum(counts) for counts in per_tensor], group)
        by_shard = torch.split(gathered, [sum(counts) for counts in per_tensor])
        cut = [torch.split(vector, c) for vector, c in zip(by_shard, per_tensor, strict=True)]
        return torch.cat([cut[s][t] for t in range(len(cut[0])) for s in range(shards)])


def build(
    run: Run, plan: Plan, world: World, data: DatasetInfo, parts: Parts,
    before: RunState | None = None, drill: Drill | None = None,
) -> RunState:  # fmt: skip
    """Initialise, distribute the data, distribute the model: in that order, on every rank.

    `before`: this rank's state of the generation before. Where a rank is an island by itself,
    nothing of its model and optimiser knows of groups, and both are taken on as they are.
    """
    offload = run.memory.offload != "none"
    mesh = make_mesh(plan.layout, world.rank, world.device, offload)
    canonical = is_canonical(run, plan)
    lower = autocast_dtype(run.run.precision) if gathers_cast(run, plan.zero) else None
    sharding = Sharding(plan.zero, canonical, offload, lower, parts.model is not None)
    before = before if mesh.size(*INSIDE) == 1 else None
    if before is not None:
        live, whole, loader = before.live, None, before.engine.loader
    else:
        live, whole = make_model(run, plan, mesh, data, world, sharding, parts)
        loader = parts.loader or make_loader(run, data, world.device, parts.data)
    given = (live, loader, mesh, make_work(run, plan, mesh, sharding, world, live))
    engine = make_engine(given, run, plan)
    if before is None and (parts.model is not None or run.model.hub):
        guard(engine, whole, run)
    drill = drill or make_drill(run.fault.kills[0], run.fault, world.rank)
    optimizer = make_rule(run, plan, mesh, live, engine.parameters)
    if before is not None:
        optimizer.adopt(before.optimizer)
    return RunState(
        run=run,
        plan=plan,
        world=world,
        mesh=mesh,
        data=data,
        live=live,
        parameters=engine.parameters,
        groups=split_groups(engine.parameters.items()),
        engine=engine,
        sync=make_sync(run, plan, mesh, canonical),
        optimizer=optimizer,
        guard=Guard(run.guard.in_a_row),
        scale=LossScale(
            dynamic=run.run.precision == "fp16" and not run.run.loss_scale,
            fixed=run.run.loss_scale or LEAST,
        ),
        drill=drill,
        saver=Saver(
            Path(run.run.dir) / "checkpoints",
            world.rank,
            world.size,
            run.checkpoint.keep,
            drill.point,
        ),
        spoken=speakers(run, plan, live.stages),
        totals=None if mesh.size(*INSIDE) == 1 else IslandTotals(mesh, live.specs, live.every),
        held_out=open_held_out(data, parts.held_out) if before is None else before.held_out,
        epoch_rows=data.rows("train", run.data.sequence) if parts.data is None else len(parts.data),
        balance=make_balance(run, plan),
        brought=parts.model_name,
    )


def make_engine(given: tuple[Live, Microbatches, Mesh, Work], run: Run, plan: Plan) -> Engine:
    """The engine of the layout; torch's pipelining is imported where there are stages only."""
    if plan.layout.pipeline == 1:
        return Engine(*given)
    from cordee.parallel.pipeline import PipelineEngine

    return PipelineEngine(*given, run)


def open_held_out(data: DatasetInfo, brought: Samples | None) -> TokenSource | Samples | None:
    """What evaluation reads; None when nothing is held out."""
    if brought is not None:
        return brought
    return open_dataset(data.folder, "held_out") if data.held_out else None


def make_model(
    run: Run, plan: Plan, mesh: Mesh, data: DatasetInfo, world: World, sharding: Sharding,
    parts: Parts,
) -> tuple[Live, nn.Module | None]:  # fmt: skip
    """The model's part on this rank, and of a foreign one the whole (the guard compares them)."""
    if parts.model is not None:
        whole = whole_copy(parts.model)
        live = take(parts.model, parts.loss, run, mesh, world.device, sharding)
        return live, None if whole is None else whole.to(world.device)
    if run.model.hub:
        live = make_hub(run, mesh, data.vocabulary, world.device, sharding)
        return live, whole_hub(run, world.device)
    stages = Stages(plan.stages, plan.layout.pipeline, run.layout.schedule)
    return make_live(run, stages, mesh, data.vocabulary, world.device, sharding), None


def is_canonical(run: Run, plan: Plan) -> bool:
    """Whether whole gradients of microbatches are added in the order of the tree."""
    inside = plan.layout.size // plan.layout.island // plan.layout.shard
    return run.run.exact or (plan.protocol == "exchange" and inside == 1)


def speakers(run: Run, plan: Plan, stages: Stages) -> list[range]:
    """For each rank, the microbatches whose losses it tells: it has the last stage, and is the
    first of the ranks that know the same."""
    home, told = stages.rank_of(stages.last), []
    for rank in range(plan.layout.size):
        at = plan.layout.coordinates(rank)
        speaks = at["pipeline"] == home and at["tensor"] == 0
        if run.data.placement == "replicate":
            speaks = speaks and at["island"] == 0
        told.append(range(*plan.splits[plan.layout.worker(rank)]) if speaks else range(0))
    return told


def make_balance(run: Run, plan: Plan) -> Balance | None:
    """What watches the islands' speeds; None where no share can move."""
    layout = plan.layout
    fixed = layout.island == 1 or layout.pipeline > 1 or run.data.placement == "replicate"
    if fixed or not run.layout.balance:
        return None
    unit = layout.workers // layout.island
    # Ranks of an island step together: one that is cut is not tried with an empty share.
    return Balance(plan.shares, unit, least=0 if layout.size == layout.island else unit)


def make_work(
    run: Run, plan: Plan, mesh: Mesh, sharding: Sharding, world: World, live: Live
) -> Work:
    """What this rank's engine has to do."""
    targets = 1 if live.loss is not None else run.targets_per_row
    return Work(
        part=range(*plan.splits[mesh.worker]),
        total=run.batch.microbatches,
        tokens=run.batch.microbatches * run.batch.microbatch * targets,
        seed=run.run.seed,
        keyed=live.keyed,
        autocast=autocast_dtype(run.run.precision),
        sharding=sharding,
        device=world.device,
        balance_rate=run.model.moe.balance_rate,
    )


def make_loader(run: Run, data: DatasetInfo, device: str, brought: Samples | None) -> Microbatches:
    """The training split, or the samples that were brought, in their global order."""
    rows = run.batch.microbatch
    if brought is not None:
        order = Order(run.run.seed, len(brought), rows, run.batch.microbatches)
        return SampleLoader(brought, order)
    source = open_dataset(data.folder, "train")
    order = source.order(run.run.seed, run.data.sequence, rows, run.batch.microbatches)
    return Loader(source, order, run.data.sequence, device, run.data.prefetch)


def make_sync(run: Run, plan: Plan, mesh: Mesh, canonical: bool) -> Sync:
    """The protocol between ranks that compute different microbatches."""
    islands = plan.layout.island
    if run.data.placement == "replicate" and islands > 1:
        return Compared(mesh.group("island"), islands)
    if canonical:
        ranges = [range(start, stop) for start, stop in plan.splits]
        return ByExchange(mesh.group(*WORKERS), ranges, make_codec(plan.codec))
    group = mesh.group("island")
    match plan.protocol:
        case "allreduce" if group is not None:
            return AllReduce(group, islands)
        case "exchange":
            # Islands' own sums, added in the order of islands.
            ranges = [range(index, index + 1) for index in range(islands)]
            return ByExchange(group, ranges, make_codec(plan.codec), mesh.at["island"])
        case _:
            return Alone()


def make_rule(
    run: Run, plan: Plan, mesh: Mesh, live: Live, parameters: dict[str, Tensor]
) -> Optimizers:
    """The update rule. Fused kernels round differently at the edge of a shard: not when exact."""
    # bfloat16 would turn a last-bit difference of a sum into one of 2^-8: not what fp32 promises.
    # Devices of two kinds are quick at different ones, and must send each other the same.
    dtype = torch.float32 if run.run.precision == "fp32" or plan.mixed else None
    alone = run.data.placement == "replicate"
    matrices = {
        name: matrix_of(spec, mesh, alone)
        for name, spec in live.specs.items()
        if spec.group == "matrices"
    }
    return make_optimizer(
        run.optim, parameters.items(), fused=not run.run.exact, matrices=matrices,
        muon_dtype=dtype,
    )  # fmt: skip


def matrix_of(spec: TensorSpec, mesh: Mesh, alone: bool) -> Matrix:
    """How muon's work on a parameter is shared: over the ranks that cut it, else over those that
    hold the same (unless each computes `alone`)."""
    stacked = spec.stacked
    rows, columns = spec.shape[1:] if stacked else (spec.shape[0], math.prod(spec.shape[1:]))
    axes = [axis for axis, dim in spec.cuts(mesh.layout) if not (stacked and dim == 0)]
    if axes:
        members = [dict(mesh.at) | place for place in places(mesh.layout, axes)]
        boxes = [spec.box(mesh.layout, at)[stacked:] for at in members]
        parts = tuple((b[0], b[1] if len(b) == 2 else (0, columns)) for b in boxes)
    else:
        axes, parts = [] if alone else list(spec.shared(mesh.layout)), ()
    ranks = Gather(mesh.group(*axes), mesh.index(*axes), mesh.size(*axes))
    return Matrix(rows, columns, stacked, ranks, parts)
