"""Plan -> the parts of a Trainer: every choice of a part is made here, in one `match` or one line.

Parts that a library user brings ready-made (`user_parts.py`) are taken as they are. torch's
pipelining is imported where there are stages only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from cordee.config.run import Run
from cordee.data.dataset import TokenDataset, open_dataset
from cordee.data.loader import MapDataset, SampleLoader, TokenLoader
from cordee.data.manifest import DatasetInfo
from cordee.data.order import SampleOrder
from cordee.dist.codecs import make_codec
from cordee.dist.gradient_sync import AllReduceSync, NoSync, ReplicaCheck, Sync, TreeSync
from cordee.dist.mesh import Mesh, axis_coordinates
from cordee.dist.process_group import RankProcess
from cordee.layout.axes import DATA_AXES, MODEL_AXES
from cordee.layout.load_balance import LoadBalancer
from cordee.layout.microbatches import shard_rows
from cordee.layout.stages import Stages
from cordee.layout.tensors import TensorSpec
from cordee.layout.validate import gathers_param_dtype
from cordee.model.layers import autocast_dtype
from cordee.optim.clip import NormSums, global_norm
from cordee.optim.muon import MatrixSpec, RankGroup
from cordee.optim.optimizer import MIN_SCALE, LossScaler, Optimizers, make_optimizer
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
from cordee.parallel.parallelize import LocalModel, make_local_model
from cordee.planner.plan import Plan
from cordee.training.user_parts import Parts

HeldOut = TokenDataset | MapDataset | None
"""What an evaluation reads."""


def build_engine(
    run: Run, plan: Plan, process: RankProcess, mesh: Mesh, data: DatasetInfo, parts: Parts,
    previous: Engine | None,
) -> Engine:  # fmt: skip
    """The model's part on this rank, its data, and what computes the one from the other. A model
    that is not built here is checked first. `previous`: of the generation before, whose model and
    loader go on as they are."""
    sharding, full_model = make_sharding(run, plan, parts.model is not None), None
    if previous is not None:
        model, loader = previous.local_model, previous.loader
    else:
        model, full_model = make_model(run, plan, mesh, data, process, sharding, parts)
        loader = parts.loader or make_loader(run, data, process.device, parts.data)
    step_spec = make_step_spec(run, plan, mesh, sharding, process, model)
    if plan.layout.pipeline == 1:
        engine = Engine(model, loader, mesh, step_spec)
    else:
        from cordee.parallel.pipeline import PipelineEngine

        engine = PipelineEngine(model, loader, mesh, step_spec, run)
    if previous is None and (parts.model is not None or run.model.hub):
        check_equivalence(engine, full_model, run)
    return engine


def count_epoch_rows(run: Run, data: DatasetInfo, samples: MapDataset | None) -> int:
    """Samples of a pass over the data."""
    return data.rows("train", run.data.sequence) if samples is None else len(samples)


def open_held_out(data: DatasetInfo, samples: MapDataset | None) -> HeldOut:
    """What an evaluation reads; None when nothing is held out."""
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


def make_sharding(run: Run, plan: Plan, has_user_model: bool) -> Sharding:
    """How shards are gathered and their gradients summed."""
    gather_dtype = (
        autocast_dtype(run.run.precision) if gathers_param_dtype(run, plan.zero) else None
    )
    canonical = uses_canonical_order(run, plan)
    offload = run.memory.offload != "none"
    return Sharding(plan.zero, canonical, offload, gather_dtype, has_user_model)


def make_loss_scaler(run: Run) -> LossScaler:
    """The factor on the loss: fp16 finds it, unless it is given."""
    is_dynamic = run.run.precision == "fp16" and not run.run.loss_scale
    return LossScaler(is_dynamic, fixed_scale=run.run.loss_scale or MIN_SCALE)


def make_norm_reducer(mesh: Mesh, model: LocalModel) -> NormReducer | None:
    """What completes norms of this rank's parts over its island; None where they are whole."""
    is_cut = mesh.size(*MODEL_AXES) > 1
    return NormReducer(mesh, model.specs, model.all_specs) if is_cut else None


def make_gradient_norm(
    mesh: Mesh, model: LocalModel, canonical: bool, norm_sums: NormSums | None
) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """A function from this rank's gradients by name to their global norm, 0-d; by rows whenever
    the order of its sum must not matter."""
    shard_count = mesh.size("shard")
    is_only_sharded = mesh.size(*MODEL_AXES) == shard_count > 1
    specs = list(model.specs.values())
    if not (canonical or (is_only_sharded and not any(spec.is_stacked for spec in specs))):
        return lambda gradients: global_norm(gradients, False, norm_sums=norm_sums)
    if shard_count == 1:
        return lambda gradients: global_norm(gradients, True, None)
    counts_by_shard = [
        [len(shard_rows(spec.shape[0], shard_count, index)) for spec in specs]
        for index in range(shard_count)
    ]
    group = mesh.group("shard")
    assert group is not None

    def gather_row_values(local_rows: Tensor) -> Tensor:
        """The rows of all shards in the order of the whole tensors."""
        row_counts = [sum(counts) for counts in counts_by_shard]
        by_shard = torch.split(all_gather_uneven(local_rows, row_counts, group), row_counts)
        by_tensor = [
            torch.split(rows, counts)
            for rows, counts in zip(by_shard, counts_by_shard, strict=True)
        ]
        return torch.cat([parts[t] for t in range(len(specs)) for parts in by_tensor])

    return lambda gradients: global_norm(gradients, True, gather_row_values)


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
