"""One rank built on meta among ranks that are not there: against real ranks and paper."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from cordee.config.load import load
from cordee.config.presets import model_presets
from cordee.config.run import Run
from cordee.config.update_rules import UPDATE_RULES
from cordee.dist.mesh import make_mesh
from cordee.dist.process_group import RankProcess
from cordee.errors import LayoutError, RunError
from cordee.launcher.run_ranks import launch
from cordee.layout.axes import Layout
from cordee.layout.stages import Stages, make_stages
from cordee.layout.tensors import router_bias_specs, tensor_specs
from cordee.optim.optimizer import make_optimizer
from cordee.parallel.fsdp import Sharding, local_tensor
from cordee.parallel.parallelize import (
    build_on_meta,
    make_local_model,
    make_stage_module,
    persistent_buffers,
)
from cordee.planner.cluster import gpu_cluster
from cordee.planner.memory import rank_state_bytes
from cordee.planner.plan import Plan, make_plan
from cordee.training.build import build_optimizer
from cordee.training.dry_run import check_against_plan, dry_run, state_bytes
from tests.conftest import clean_environment, run_cordee

ROOT = Path(__file__).resolve().parent.parent.parent
GIB = 2**30


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def make_run(*overrides: str) -> Run:
    return load(None, ("run.precision=bf16", *overrides)).run


def make_gpu_plan(run: Run, hosts: int = 1) -> Plan:
    return make_plan(run, gpu_cluster("H100", 8, hosts=hosts), 60)


# ---- every preset --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", model_presets())
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_preset_is_what_the_table_says(name: str, ranks: int) -> None:
    """Names, shapes and order of parameters, and the buffers that survive, in one stage or two."""
    model = model_presets()[name]
    if ranks > 1 and model.tied:
        pytest.skip("one stage: the layout is illegal")
    run = replace(make_run(), model=model)
    stages = make_stages(model, 256, run.layout, ranks)
    name_shapes: list[tuple[str, tuple[int, ...]]] = []
    buffer_shapes: dict[str, tuple[int, ...]] = {}
    for stage_range in stages.block_ranges:
        with torch.device("meta"):
            module = make_stage_module(run, 256, range(*stage_range))
        name_shapes += [(n, tuple(p.shape)) for n, p in module.named_parameters()]
        buffer_shapes |= {n: tuple(b.shape) for n, b in persistent_buffers(module).items()}
    assert name_shapes == [(spec.name, spec.shape) for spec in tensor_specs(model, 256)]
    assert buffer_shapes == {spec.name: spec.shape for spec in router_bias_specs(model)}


# ---- against real ranks --------------------------------------------------------------------------

DENSE = ("model.preset=micro", "model.heads=4", "batch.microbatches=8", "data.sequence=32")
MOE_OVERRIDES = ("model.preset=micro-moe", "batch.microbatches=8", "data.sequence=32")
RANK_JOBS = [
    (*DENSE, "layout.shard=2", "layout.tensor=2", "optim.name=adamw"),
    (*DENSE, "layout.pipeline=2", "layout.context=2", "optim.name=momentum"),
    (*DENSE, "layout.shard=4", "layout.zero=3", "optim.name=sgd"),
    (*DENSE, "layout.islands=2", "layout.pipeline=2", "layout.schedule=zero_bubble",
     "model.layers=4"),
    (*MOE_OVERRIDES, "layout.expert=2", "layout.shard=2"),
    (*MOE_OVERRIDES, "layout.expert=2", "layout.tensor=2"),
    (*DENSE, "layout.islands=2", "layout.shard=2"),
]  # fmt: skip

RankCounts = list[tuple[int, int, int, int]]


def count_real_ranks(process: RankProcess, jobs: Sequence[tuple[str, ...]]) -> RankCounts:
    """(parameters, bytes with the optimiser's, tensors, modules) of this rank in each job's run."""
    counts = []
    for job in jobs:
        run = make_run(*job)
        plan = make_gpu_plan(run)
        mesh = make_mesh(plan.layout, process.rank, "cpu")
        stages = Stages(plan.stages, plan.layout.pipeline, run.layout.schedule)
        local_model = make_local_model(run, stages, mesh, 60, "cpu", Sharding(plan.zero))
        parameters = {
            n: local_tensor(p.detach()) for n, p in local_model.module_parameters().items()
        }
        assert all(tensor.device.type == "cpu" for tensor in parameters.values())
        bytes_by_tensor = state_bytes(
            parameters, build_optimizer(run, plan, mesh, local_model, parameters)
        )
        byte_sums = [sum(items.values()) for items in bytes_by_tensor.values()]
        modules = sum(len(list(chunk.modules())) for chunk in local_model.stage_modules)
        element_counts = [tensor.numel() for tensor in parameters.values() if tensor.numel()]
        counts.append((sum(element_counts), sum(byte_sums), len(element_counts), modules))
    return counts


def test_a_rehearsal_counts_what_real_ranks_hold() -> None:
    counts_by_rank = launch(count_real_ranks, RANK_JOBS, ranks=4)
    for job_index, job in enumerate(RANK_JOBS):
        run = make_run(*job)
        for rank in range(4):
            dry_run_counts = dry_run(run, make_gpu_plan(run), rank, 60)
            count_names = ("parameters", "bytes", "tensors", "modules")
            assert (
                tuple(dry_run_counts[name] for name in count_names)
                == counts_by_rank[rank][job_index]
            ), (job, rank)


# ---- against paper -------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", UPDATE_RULES)
def test_every_rules_bytes_are_the_plans(rule: str) -> None:
    is_cut = not UPDATE_RULES[rule].whole_matrix_reason
    axes = ("layout.shard=3", "layout.tensor=2") if is_cut else ()
    run = make_run(*DENSE, f"optim.name={rule}", "batch.microbatches=9", *axes)
    plan = make_plan(run, gpu_cluster("H100", 8), 60, None if axes else 2)
    specs = tuple(tensor_specs(run.model, 60))
    stages = make_stages(run.model, 60, run.layout, 1)
    for rank in range(plan.layout.size):
        coords = plan.layout.coordinates(rank)
        planned_bytes = rank_state_bytes(run, specs, plan.layout, stages, coords)
        dry_run_counts = dry_run(run, plan, rank, 60)
        assert dry_run_counts["bytes"] == planned_bytes["parameters"] + planned_bytes["optimiser"]


@pytest.mark.parametrize(
    "overrides",
    [
        ("run.precision=fp8", "run.compile=blocks", "layout.tensor=2", "layout.shard=2"),
        ("memory.offload=parameters", "layout.shard=2"),
        ("memory.offload=parameters", "memory.recompute=selective"),
        ("layout.context=2", "layout.attention=ring", "layout.shard=4", "layout.zero=2"),
        ("layout.islands=2", "layout.pipeline=2", "layout.schedule=interleaved", "layout.chunks=2",
         "layout.tensor=2", "model.layers=8"),
    ],
)  # fmt: skip
def test_levers_change_no_parameter(overrides: tuple[str, ...]) -> None:
    run = make_run("model.preset=small", "batch.microbatches=16", *overrides)
    plan = make_gpu_plan(run, hosts=4)
    for rank in {0, plan.layout.size // 2, plan.layout.size - 1}:
        dry_run(run, plan, rank, 60)


def test_a_difference_names_the_tensor() -> None:
    run = make_run(*DENSE, "optim.name=adamw", "layout.islands=1")
    plan = make_gpu_plan(run)
    stages = Stages(plan.stages, 1, run.layout.schedule)
    local_model = build_on_meta(run, stages, make_mesh(Layout(), 0, "cpu"), 60, Sharding())
    parameters = {name: p.detach() for name, p in local_model.module_parameters().items()}
    optimizer = make_optimizer(run.optim, parameters.items(), fused=False)
    check_against_plan(run, plan, 0, local_model, state_bytes(parameters, optimizer))
    name = "blocks.1.mlp.up.weight"
    wrong_parameters: list[dict[str, torch.Tensor]] = [
        {**parameters, name: parameters[name][1:]},
        {n: t for n, t in parameters.items() if n != name},
    ]
    for rank_parameters in wrong_parameters:
        with pytest.raises(RunError, match="planned") as error_info:
            optimizer = make_optimizer(run.optim, rank_parameters.items(), fused=False)
            check_against_plan(run, plan, 0, local_model, state_bytes(rank_parameters, optimizer))
        assert error_info.value.exit_code == 1 and error_info.value.values["tensor"] == name


def test_nothing_is_left_behind() -> None:
    run = make_run(*DENSE, "layout.shard=2", "layout.tensor=2")
    environment_before = dict(os.environ)
    for rank in (1, 3, 1):
        assert dry_run(run, make_gpu_plan(run), rank, 60)["parameters"] > 0
        assert not dist.is_initialized()
    with pytest.raises(LayoutError):
        dry_run(run, make_gpu_plan(run), 4, 60)
    assert not dist.is_initialized() and dict(os.environ) == environment_before


# ---- as a user types it --------------------------------------------------------------------------

BIG_ARGUMENTS = (
    str(ROOT / "recipes/llama3-405b.toml"),
    "--cluster",
    str(ROOT / "recipes/h100-16384.toml"),
)
AXES_405B = ("layout.islands=4", "layout.pipeline=16", "layout.shard=32", "layout.tensor=8")
MOE_235B = (
    "model.preset=qwen3-235b-a22b", "batch.microbatches=8192", "layout.islands=4",
    "layout.pipeline=8", "layout.expert=16", "layout.shard=8", "layout.tensor=4",
)  # fmt: skip


@pytest.mark.parametrize(("axes", "rank"), [(AXES_405B, 9000), (MOE_235B, 16383)])
def test_one_rank_of_16384(axes: tuple[str, ...], rank: int) -> None:
    arguments = ("plan", *BIG_ARGUMENTS, *axes, "--dry-run", "--rank", str(rank), "--json")
    result = run_cordee(*arguments, deadline_s=60)
    assert result.returncode == 0, result.stderr[-3000:]
    rank_answer = json.loads(result.stdout)["rank"]
    assert rank_answer["ranks"] == 16384
    rehearsal, planned_bytes = rank_answer["rehearsal"], rank_answer["state_bytes"]
    assert rehearsal["memory"] < 4 * GIB
    assert (
        rehearsal["parameters"] == rank_answer["parameters"]
        and rehearsal["tensors"] == rank_answer["tensors"]
    )
    assert rehearsal["bytes"] == planned_bytes["parameters"] + planned_bytes["optimiser"]


def test_refusals_come_before_torch(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 64, "num_hidden_layers": 2}))
    cluster = ["--cluster", str(ROOT / "recipes/h100-16384.toml")]
    arguments = ["tiny", "batch.microbatches=8", "layout.shard=4", *cluster, "--dry-run"]
    commands_by_fix = {
        "rank 3": [*arguments, "--rank", "4"],
        "rank 0": [*arguments, "--rank", "-1"],
        "--dry-run --rank 0": arguments,
        "--dry-run --rank 2": [*arguments[:-1], "--rank", "2"],
        "layout.tensor=2": [*arguments, "layout.tensor=3", "--rank", "0"],
        "cordee plan --models": [*arguments[1:], f"model.hub={tmp_path}", "--rank", "0"],
    }
    code = (
        "import sys, json; from cordee.cli.main import main\n"
        "for words in json.loads(sys.argv[1]): print(main(['plan', *words]))\n"
        "assert 'torch' not in sys.modules"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, json.dumps(list(commands_by_fix.values()))],
        env=clean_environment(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["2"] * len(commands_by_fix)
    fixes = [line.split("fix: ")[1] for line in result.stderr.splitlines() if "fix: " in line]
    assert all(
        fix in printed_fix for fix, printed_fix in zip(commands_by_fix, fixes, strict=True)
    ), fixes
