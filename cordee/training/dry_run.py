"""One rank of any plan built on this machine: its real modules, on meta, among ranks that are not.

A real run's mesh, recipe (`parallelize.build_on_meta`) and update rule (`build.build_optimizer`)
under torch's fake process group, which sends nothing; every tensor's bytes are held against the
plan's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch.distributed as dist
from torch import Tensor

from cordee.config.run import Run
from cordee.dist.mesh import make_mesh
from cordee.errors import RunError
from cordee.layout.stages import Stages
from cordee.optim.optimizer import Optimizers
from cordee.parallel.fsdp import Sharding, local_tensor
from cordee.parallel.parallelize import LocalModel, build_on_meta
from cordee.planner.memory import rank_state_bytes
from cordee.planner.plan import Plan
from cordee.training.build import build_optimizer

STATE_ITEMS = ("parameters", "optimiser")
"""Of `rank_state_bytes`, what exists before a step."""


def dry_run(run: Run, plan: Plan, rank: int, vocabulary: int) -> dict[str, float]:
    """Builds rank `rank` of `plan` on meta: its parameters, bytes (with the optimiser's), tensors
    and modules, and the seconds it took.

    Raises LayoutError when there is no such rank, RunError when a tensor is not what the plan says.
    """
    start_s = time.perf_counter()
    # exact: no fused kernels, whose state is the same and which refuse the meta device.
    run = replace(run, run=replace(run.run, compile="none", exact=True))
    offload = run.memory.offload != "none"
    stages = Stages(plan.stages, plan.layout.pipeline, run.layout.schedule)
    plan.layout.coordinates(rank)
    with _fake_process_group(rank, plan.layout.size):
        mesh = make_mesh(plan.layout, rank, "cpu", offload)
        model = build_on_meta(run, stages, mesh, vocabulary, Sharding(plan.zero, offload=offload))
        parameters = {
            name: local_tensor(p.detach()) for name, p in model.module_parameters().items()
        }
        bytes_by_tensor = state_bytes(
            parameters, build_optimizer(run, plan, mesh, model, parameters)
        )
        check_against_plan(run, plan, rank, model, bytes_by_tensor)
        return {
            "parameters": sum(tensor.numel() for tensor in parameters.values()),
            "bytes": sum(sum(items.values()) for items in bytes_by_tensor.values()),
            "tensors": sum(bool(tensor.numel()) for tensor in parameters.values()),
            "modules": sum(len(list(chunk.modules())) for chunk in model.stage_modules),
            "seconds": time.perf_counter() - start_s,
        }


def state_bytes(
    parameters: Mapping[str, Tensor], optimizer: Optimizers
) -> dict[str, dict[str, int]]:
    """Bytes of each of ITEMS by tensor: this rank's parameters, and what their update rule keeps
    but counters of steps."""
    bytes_by_tensor = {name: dict.fromkeys(STATE_ITEMS, 0) for name in parameters}
    for name, tensor in parameters.items():
        bytes_by_tensor[name]["parameters"] = tensor.nbytes
    for key, state in optimizer.state_tensors().items():
        if state.ndim:
            bytes_by_tensor[key.split("/")[1]]["optimiser"] += state.nbytes
    return bytes_by_tensor


def check_against_plan(
    run: Run,
    plan: Plan,
    rank: int,
    model: LocalModel,
    bytes_by_tensor: Mapping[str, Mapping[str, int]],
) -> None:
    """Holds what was built equal to what the plan counts, tensor by tensor and in sum."""
    coords, zero_bytes = plan.layout.coordinates(rank), dict.fromkeys(STATE_ITEMS, 0)
    built_total = dict(zero_bytes)
    for name, spec in model.all_specs.items():
        planned_bytes = rank_state_bytes(run, [spec], plan.layout, model.stages, coords)
        for item in STATE_ITEMS:
            built_bytes = bytes_by_tensor.get(name, zero_bytes)[item]
            built_total[item] += built_bytes
            if built_bytes != planned_bytes[item]:
                values = {
                    "rank": rank,
                    "tensor": name,
                    "built": built_bytes,
                    "planned": planned_bytes[item],
                }
                raise _mismatch_error(f"{item} of a tensor", values)
    planned_total = rank_state_bytes(
        run, tuple(model.all_specs.values()), plan.layout, model.stages, coords
    )
    for item in STATE_ITEMS:
        if built_total[item] != planned_total[item]:
            raise _mismatch_error(
                f"{item} in sum",
                {"rank": rank, "built": built_total[item], "planned": planned_total[item]},
            )


def _mismatch_error(subject: str, values: Mapping[str, object]) -> RunError:
    return RunError(
        f"the modules of a rank are not what the plan says: bytes of {subject}",
        values=values,
        fix="report it: layout/tensors.py and the model have drifted apart",
    )


@contextmanager
def _fake_process_group(rank: int, size: int) -> Iterator[None]:
    """This process as rank `rank` of `size` that are not there; nothing is sent or waited for."""
    dist.init_process_group("fake", rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()
