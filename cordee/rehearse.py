"""One rank of any plan built on this machine: its real modules, on meta, among ranks that are not.

A real run's mesh, recipe (`apply.on_meta`) and update rule (`build.make_rule`) under torch's fake
process group, whose collectives send nothing; every tensor's bytes are held against the plan's. Not
here: memory, values, a step, and compilation, which changes no parameter. Traded away: models that
are not the house's own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch.distributed as dist
from torch import Tensor

from cordee.build import make_rule
from cordee.config.run import Run
from cordee.dist.mesh import make_mesh
from cordee.errors import RunError
from cordee.layout.stages import Stages
from cordee.optim.groups import Optimizers
from cordee.parallel.apply import Live, on_meta
from cordee.parallel.shard import Sharding, local
from cordee.plan.memory import rank_state_bytes
from cordee.plan.plan import Plan

ITEMS = ("parameters", "optimiser")
"""Of `rank_state_bytes`, what exists before a step."""


def rehearse(run: Run, plan: Plan, rank: int, vocabulary: int) -> dict[str, float]:
    """Builds rank `rank` of `plan` on meta: its parameters, bytes (with the optimiser's), tensors
    and modules, and the seconds it took.

    Raises LayoutError when there is no such rank, RunError when a tensor is not what the plan says.
    """
    began = time.perf_counter()
    # exact: no fused kernels, whose state is the same and which refuse the meta device.
    run = replace(run, run=replace(run.run, compile="none", exact=True))
    offload = run.memory.offload != "none"
    stages = Stages(plan.stages, plan.layout.pipeline, run.layout.schedule)
    plan.layout.coordinates(rank)
    with _alone_as(rank, plan.layout.size):
        mesh = make_mesh(plan.layout, rank, "cpu", offload)
        live = on_meta(run, stages, mesh, vocabulary, Sharding(plan.zero, offload=offload))
        held = {name: local(p.detach()) for name, p in live.modules().items()}
        built = state_bytes(held, make_rule(run, plan, mesh, live, held))
        agree(run, plan, rank, live, built)
        return {
            "parameters": sum(tensor.numel() for tensor in held.values()),
            "bytes": sum(sum(items.values()) for items in built.values()),
            "tensors": sum(bool(tensor.numel()) for tensor in held.values()),
            "modules": sum(len(list(chunk.modules())) for chunk in live.chunks),
            "seconds": time.perf_counter() - began,
        }


def state_bytes(held: Mapping[str, Tensor], rule: Optimizers) -> dict[str, dict[str, int]]:
    """Bytes of each of ITEMS by tensor: this rank's parameters, and what their update rule keeps
    but counters of steps."""
    built = {name: dict.fromkeys(ITEMS, 0) for name in held}
    for name, tensor in held.items():
        built[name]["parameters"] = tensor.nbytes
    for key, state in rule.tensors().items():
        if state.ndim:
            built[key.split("/")[1]]["optimiser"] += state.nbytes
    return built


def agree(
    run: Run, plan: Plan, rank: int, live: Live, built: Mapping[str, Mapping[str, int]]
) -> None:
    """Holds what was built equal to what the plan counts, tensor by tensor and in sum."""
    at, nothing = plan.layout.coordinates(rank), dict.fromkeys(ITEMS, 0)
    total = dict(nothing)
    for name, spec in live.every.items():
        paper = rank_state_bytes(run, [spec], plan.layout, live.stages, at)
        for item in ITEMS:
            found = built.get(name, nothing)[item]
            total[item] += found
            if found != paper[item]:
                values = {"rank": rank, "tensor": name, "built": found, "planned": paper[item]}
                raise _unlike(f"{item} of a tensor", values)
    whole = rank_state_bytes(run, tuple(live.every.values()), plan.layout, live.stages, at)
    for item in ITEMS:
        if total[item] != whole[item]:
            raise _unlike(
                f"{item} in sum", {"rank": rank, "built": total[item], "planned": whole[item]}
            )


def _unlike(what: str, values: Mapping[str, object]) -> RunError:
    return RunError(
        f"the modules of a rank are not what the plan says: bytes of {what}",
        values=values,
        fix="report it: layout/tensors.py and the model have drifted apart",
    )


@contextmanager
def _alone_as(rank: int, size: int) -> Iterator[None]:
    """This process as rank `rank` of `size` that are not there; nothing is sent or waited for."""
    dist.init_process_group("fake", rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()
