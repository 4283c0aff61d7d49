"""Plan -> live RunState: every choice of a part is made here, once, in one `match` or one line.

Not here: when anything happens (`train.py`). Parts that a library user brings ready-made
(`make_parts.py`) are taken as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from cordee.checkpoint.peer_backup import PeerBackup
from cordee.checkpoint.train_state import LocalTensor, Progress, collect_local_tensors
from cordee.config.run import Run
from cordee.data.dataset import TokenDataset, open_dataset
from cordee.data.loader import MapDataset, SampleLoader, TokenLoader
from cordee.data.manifest import DatasetInfo
from cordee.data.order import SampleOrder
from cordee.dist.codecs import make_codec
from cordee.dist.gradient_sync import AllReduceSync, NoSync, ReplicaCheck, Sync, TreeSync
from cordee.dist.mesh import Mesh, axis_coordinates, make_mesh
from cordee.dist.process_group import RankProcess
from cordee.layout.axes import DATA_AXES, MODEL_AXES
from cordee.layout.load_balance import LoadBalancer
from cordee.layout.microbatches import shard_rows
from cordee.layout.slices import LocalSlice
from cordee.layout.stages import Stages
from cordee.layout.tensors import TensorSpec
from cordee.layout.validate import gathers_param_dtype
from cordee.model.layers import autocast_dtype
from cordee.optim.clip import NormSums, global_norm
from cordee.optim.muon import MatrixSpec, RankGroup
from cordee.optim.optimizer import MIN_SCALE, LossScaler, Optimizers, make_optimizer, split_groups
from cordee.parallel.engine import Engine, MicrobatchLoader, StepSpec
from cordee.parallel.external import (
    check_equivalence,
    copy_full_model,
    make_full_hf_model,
    make_hf_model,
    wrap_user_module,
)
from cordee.parallel.fsdp import Sharding, all_gather_uneven
from cordee.parallel.grad_reduce import NormReducer
from cordee.parallel.parallelize import LocalModel, make_local_model, make_local_slice
from cordee.planner.plan import Plan
from cordee.training.fault_injection import FaultInjector, make_fault_injector
from cordee.training.step_guard import StepGuard
from cordee.training.user_parts import Parts


@dataclass
class RunState:
    """A live run on this rank. What survives a restart is listed in checkpoint/train_state.py.

    `parameters` are this rank's parts, plain tensors in model order; `spoken` says whose word
    counts for which microbatch's loss (see `gather_tally`); `epoch_rows` are the samples of a pass
    over the data; `balance` is None where shares stay as they are; `brought` is the type of a model
    that the caller brought; `arithmetic` names what computes, where bits are promised.
    """

    run: Run
    plan: Plan
    process: RankProcess
    mesh: Mesh
    data: DatasetInfo
    model: LocalModel
    parameters: dict[str, Tensor]
    parameter_groups: dict[str, list[tuple[str, Tensor]]]
    engine: Engine
    sync: Sync
    optimizer: Optimizers
    guard: StepGuard
    loss_scale: LossScaler
    drill: FaultInjector
    loss_owners: list[range]
    norm_reducer: NormSums | None
    held_out: TokenDataset | MapDataset | None
    epoch_rows: int
    load_balancer: LoadBalancer | None = None
    user_model_name: str = ""
    arithmetic: Mapping[str, str] = field(default_factory=dict)
    peer_backup: PeerBackup | None = None
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
        has_user_loss = self.model.loss_function is not None
        return self.step_rows if has_user_loss else self.step_rows * self.run.data.sequence

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes of text a target stands for; None where it stands for a sample."""
        return None if self.model.loss_function is not None else self.data.bytes_per_token

    def state_tensors(self, include_replicas: bool = False) -> list[LocalTensor]:
        """The tensors that survive and that this rank answers for; or all that it has."""
        return collect_local_tensors(
            self.model_tensors, self.optimizer.state_tensors(), self.local_slices, include_replicas
        )

    @property
    def model_tensors(self) -> dict[str, Tensor]:
        """This rank's parts of what the model is: parameters, and buffers that survive."""
        return {**self.parameters, **self.engine.buffers}

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """The whole model's tensors: parameters, and buffers that survive."""
        return {**self.model.all_specs, **self.model.buffer_specs}

    @property
    def local_slices(self) -> dict[str, LocalSlice]:
        """What this rank holds of each of its parameters, and who else holds the same."""
        specs = self.specs
        return {name: make_local_slice(specs[name], self.mesh) for name in self.model_tensors}

    @property
    def microbatch_tokens(self) -> int:
        """Targets of one microbatch: its tokens or samples."""
        return self.engine.step_spec.step_tokens // self.engine.step_spec.total_microbatches

    def reported_losses(self, losses: Sequence[Tensor]) -> list[float]:
        """This rank's losses, if its word counts."""
        return [float(loss) for loss in losses] if self.loss_owners[self.process.rank] else []

    def sample_digests(self) -> list[int]:
        """Digests of the samples that this rank loaded for the losses that it speaks of."""
        return [self.engine.sample_digests[index] for index in self.loss_owners[self.process.rank]]

    def gradient_norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """Global norm of the step's gradient, 0-d; by rows whenever its order must not matter."""
        gradients_by_name = dict(zip(self.parameters, gradients, strict=True))
        is_only_sharded = self.mesh.size(*MODEL_AXES) == self.mesh.size("shard") > 1
        sums_by_rows = is_only_sharded and not any(
            spec.is_stacked for spec in self.model.specs.values()
        )
        if self.engine.step_spec.sharding.canonical or sums_by_rows:
            row_gather = self._gather_row_values if self.mesh.size("shard") > 1 else None
            return global_norm(gradients_by_name, True, row_gather)
        return global_norm(gradients_by_name, False, norm_sums=self.norm_reducer)

    def named_gradients(self, gradients: Sequence[Tensor]) -> list[tuple[str, Tensor, Tensor]]:
        """(name, parameter, this rank's part of its gradient), in parameter order."""
        pairs = zip(self.parameters.items(), gradients, strict=True)
        return [(name, parameter, gradient) for (name, parameter), gradient in pairs]

    def _gather_row_values(self, local_rows: Tensor) -> Tensor:
        shard_count = self.mesh.size("shard")
        row_counts = [spec.shape[0] for spec in self.model.specs.values()]
        counts_by_shard = [
            [len(shard_rows(n, shard_count, index)) for n in row_counts]
            for index in range(shard_count)
        ]
        group = self.mesh.group("shard")
        assert group is not None
        all_rows = all_gather_uneven(local_rows, [sum(counts) for counts in counts_by_shard], group)
        by_shard = torch.split(all_rows, [sum(counts) for counts in counts_by_shard])
        rows_by_tensor = [
            torch.split(vector, c) for vector, c in zip(by_shard, counts_by_shard, strict=True)
        ]
        return torch.cat(
            [
                rows_by_tensor[s][t]
                for t in range(len(rows_by_tensor[0]))
                for s in range(shard_count)
            ]
        )


def build_run_state(
    run: Run, plan: Plan, process: RankProcess, data: DatasetInfo, parts: Parts,
    previous: RunState | None = None, drill: FaultInjector | None = None,
) -> RunState:  # fmt: skip
    """Initialise, distribute the data, distribute the model: in that order, on every rank.

    `previous`: this rank's state of the generation before. Where a rank is an island by itself,
    nothing of its model and optimiser knows of groups, and both are taken on as they are.
    """
    offload = run.memory.offload != "none"
    mesh = make_mesh(plan.layout, process.rank, process.device, offload)
    canonical_order = uses_canonical_order(run, plan)
    gather_dtype = (
        autocast_dtype(run.run.precision) if gathers_param_dtype(run, plan.zero) else None
    )
    sharding = Sharding(plan.zero, canonical_order, offload, gather_dtype, parts.model is not None)
    previous = previous if mesh.size(*MODEL_AXES) == 1 else None
    if previous is not None:
        model, full_model, loader = previous.model, None, previous.engine.loader
    else:
        model, full_model = make_model(run, plan, mesh, data, process, sharding, parts)
        loader = parts.loader or make_loader(run, data, process.device, parts.data)
    engine_args = (model, loader, mesh, make_step_spec(run, plan, mesh, sharding, process, model))
    engine = make_engine(engine_args, run, plan)
    if previous is None and (parts.model is not None or run.model.hub):
        check_equivalence(engine, full_model, run)
    drill = drill or make_fault_injector(run.fault.kill_specs[0], run.fault, process.rank)
    optimizer = build_optimizer(run, plan, mesh, model, engine.parameters)
    if previous is not None:
        optimizer.adopt_state(previous.optimizer)
    return RunState(
        run=run,
        plan=plan,
        process=process,
        mesh=mesh,
        data=data,
        model=model,
        parameters=engine.parameters,
        parameter_groups=split_groups(engine.parameters.items()),
        engine=engine,
        sync=make_sync(run, plan, mesh, canonical_order),
        optimizer=optimizer,
        guard=StepGuard(run.guard.in_a_row),
        loss_scale=LossScaler(
            is_dynamic=run.run.precision == "fp16" and not run.run.loss_scale,
            fixed_scale=run.run.loss_scale or MIN_SCALE,
        ),
        drill=drill,
        loss_owners=find_loss_owners(run, plan, model.stages),
        norm_reducer=None
        if mesh.size(*MODEL_AXES) == 1
        else NormReducer(mesh, model.specs, model.all_specs),
        held_out=open_held_out(data, parts.held_out) if previous is None else previous.held_out,
        epoch_rows=data.rows("train", run.data.sequence) if parts.data is None else len(parts.data),
        load_balancer=make_load_balancer(run, plan),
        user_model_name=parts.model_name,
    )


def make_engine(
    engine_args: tuple[LocalModel, MicrobatchLoader, Mesh, StepSpec], run: Run, plan: Plan
) -> Engine:
    """The engine of the layout; torch's pipelining is imported where there are stages only."""
    if plan.layout.pipeline == 1:
        return Engine(*engine_args)
    from cordee.parallel.pipeline import PipelineEngine

    return PipelineEngine(*engine_args, run)


def open_held_out(
    data: DatasetInfo, samples: MapDataset | None
) -> TokenDataset | MapDataset | None:
    """What evaluation reads; None when nothing is held out."""
    if samples is not None:
        return samples
    return open_dataset(data.folder, "held_out") if data.held_out else None


def make_model(
    run: Run, plan: Plan, mesh: Mesh, data: DatasetInfo, process: RankProcess, sharding: Sharding,
    parts: Parts,
) -> tuple[LocalModel, nn.Module | None]:  # fmt: skip
    """The model's part on this rank, and of a foreign one the whole (the guard compares them)."""
    if parts.model is not None:
        full_model = copy_full_model(parts.model)
        model = wrap_user_module(parts.model, parts.loss, run, mesh, process.device, sharding)
        return model, None if full_model is None else full_model.to(process.device)
    if run.model.hub:
        model = make_hf_model(run, mesh, data.vocabulary, process.device, sharding)
        return model, make_full_hf_model(run, process.device)
    stages = Stages(plan.stages, plan.layout.pipeline, run.layout.schedule)
    return make_local_model(run, stages, mesh, data.vocabulary, process.device, sharding), None


def uses_canonical_order(run: Run, plan: Plan) -> bool:
    """Whether whole gradients of microbatches are added in the order of the tree."""
    sharing_ranks = plan.layout.size // plan.layout.island // plan.layout.shard
    return run.run.exact or (plan.protocol == "exchange" and sharing_ranks == 1)


def find_loss_owners(run: Run, plan: Plan, stages: Stages) -> list[range]:
    """For each rank, the microbatches whose losses it tells: it has the last stage, and is the
    first of the ranks that know the same."""
    last_stage_rank, owners = stages.rank_of(stages.last_stage), []
    for rank in range(plan.layout.size):
        coords = plan.layout.coordinates(rank)
        is_owner = coords["pipeline"] == last_stage_rank and coords["tensor"] == 0
        if run.data.placement == "replicate":
            is_owner = is_owner and coords["island"] == 0
        owners.append(range(*plan.splits[plan.layout.dp_rank(rank)]) if is_owner else range(0))
    return owners


def make_load_balancer(run: Run, plan: Plan) -> LoadBalancer | None:
    """What watches the islands' speeds; None where no share can move."""
    layout = plan.layout
    is_fixed = layout.island == 1 or layout.pipeline > 1 or run.data.placement == "replicate"
    if is_fixed or not run.layout.balance:
        return None
    workers_per_island = layout.dp_size // layout.island
    # Ranks of an island step together: one that is cut is not tried with an empty share.
    return LoadBalancer(
        plan.island_microbatches,
        workers_per_island,
        min_share=0 if layout.size == layout.island else workers_per_island,
    )


def make_step_spec(
    run: Run, plan: Plan, mesh: Mesh, sharding: Sharding, process: RankProcess, model: LocalModel
) -> StepSpec:
    """What this rank's engine has to do."""
    targets = 1 if model.loss_function is not None else run.data.sequence
    return StepSpec(
        microbatches=range(*plan.splits[mesh.worker_index]),
        total_microbatches=run.batch.microbatches,
        step_tokens=run.batch.microbatches * run.batch.microbatch * targets,
        seed=run.run.seed,
        takes_dropout_key=model.takes_dropout_key,
        autocast=autocast_dtype(run.run.precision),
        sharding=sharding,
        device=process.device,
        balance_rate=run.model.moe.balance_rate,
    )


def make_loader(
    run: Run, data: DatasetInfo, device: str, samples: MapDataset | None
) -> MicrobatchLoader:
    """The training split, or the samples that were brought, in their global order."""
    rows = run.batch.microbatch
    if samples is not None:
        order = SampleOrder(run.run.seed, len(samples), rows, run.batch.microbatches)
        return SampleLoader(samples, order)
    source = open_dataset(data.folder, "train")
    order = source.sample_order(run.run.seed, run.data.sequence, rows, run.batch.microbatches)
    return TokenLoader(source, order, run.data.sequence, device, run.data.prefetch)


def make_sync(run: Run, plan: Plan, mesh: Mesh, canonical_order: bool) -> Sync:
    """The protocol between ranks that compute different microbatches."""
    islands = plan.layout.island
    if run.data.placement == "replicate" and islands > 1:
        return ReplicaCheck(mesh.group("island"), islands)
    if canonical_order:
        ranges = [range(start, stop) for start, stop in plan.splits]
        return TreeSync(mesh.group(*DATA_AXES), ranges, make_codec(plan.codec))
    group = mesh.group("island")
    match plan.protocol:
        case "allreduce" if group is not None:
            return AllReduceSync(group, islands)
        case "exchange":
            # Islands' own sums, added in the order of islands.
            ranges = [range(index, index + 1) for index in range(islands)]
            return TreeSync(group, ranges, make_codec(plan.codec), mesh.coords["island"])
        case _:
            return NoSync()


def build_optimizer(
    run: Run, plan: Plan, mesh: Mesh, model: LocalModel, parameters: dict[str, Tensor]
) -> Optimizers:
    """The update rule. Fused kernels round differently at the edge of a shard: not when exact."""
    # bfloat16 would turn a last-bit difference of a sum into one of 2^-8: not what fp32 promises.
    # Devices of two kinds are quick at different ones, and must send each other the same.
    muon_dtype = torch.float32 if run.run.precision == "fp32" or plan.has_mixed_devices else None
    computes_alone = run.data.placement == "replicate"
    matrices = {
        name: muon_matrix(spec, mesh, computes_alone)
        for name, spec in model.specs.items()
        if spec.group == "matrices"
    }
    return make_optimizer(
        run.optim, parameters.items(), fused=not run.run.exact, matrices=matrices,
        muon_dtype=muon_dtype,
    )  # fmt: skip


def muon_matrix(spec: TensorSpec, mesh: Mesh, computes_alone: bool) -> MatrixSpec:
    """How muon's work on a parameter is shared: over the ranks that cut it, else over those that
    hold the same (unless each computes `computes_alone`)."""
    stacked = spec.is_stacked
    rows, columns = spec.shape[1:] if stacked else (spec.shape[0], math.prod(spec.shape[1:]))
    axes = [axis for axis, dim in spec.cuts(mesh.layout) if not (stacked and dim == 0)]
    if axes:
        member_coords = [
            dict(mesh.coords) | offset for offset in axis_coordinates(mesh.layout, axes)
        ]
        boxes = [spec.box(mesh.layout, coords)[stacked:] for coords in member_coords]
        part_ranges = tuple((b[0], b[1] if len(b) == 2 else (0, columns)) for b in boxes)
    else:
        axes, part_ranges = [] if computes_alone else list(spec.replicated_axes(mesh.layout)), ()
    gather = RankGroup(mesh.group(*axes), mesh.index(*axes), mesh.size(*axes))
    return MatrixSpec(rows, columns, stacked, gather, part_ranges)
