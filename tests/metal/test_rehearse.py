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

from cordee.build import make_rule
from cordee.config.load import load
from cordee.config.presets import model_presets
from cordee.config.run import Run
from cordee.dist.mesh import make_mesh
from cordee.dist.start import World
from cordee.errors import LayoutError, RunError
from cordee.layout.axes import Layout
from cordee.layout.stages import Stages, make_stages
from cordee.layout.tensors import buffers, tensors
from cordee.optim.groups import make_optimizer
from cordee.parallel.apply import make_live, make_stage, on_meta, surviving_buffers
from cordee.parallel.shard import Sharding, local
from cordee.plan.cluster import gpu_cluster
from cordee.plan.memory import rank_state_bytes
from cordee.plan.plan import Plan, make_plan
from cordee.rehearse import agree, rehearse, state_bytes
from cordee.testing import launch
from tests.conftest import clean_environment, cordee

ROOT = Path(__file__).resolve().parent.parent.parent
GIB = 2**30


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def run_of(*words: str) -> Run:
    return load(None, ("run.precision=bf16", *words)).run


def plan_of(run: Run, hosts: int = 1) -> Plan:
    return make_plan(run, gpu_cluster("H100", 8, hosts=hosts), 60)


# ---- every preset --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", model_presets())
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_preset_is_what_the_table_says(name: str, ranks: int) -> None:
    """Names, shapes and order of parameters, and the buffers that survive, in one stage or two."""
    model = model_presets()[name]
    if ranks > 1 and (model.classifies or model.tied):
        pytest.skip("one stage: the layout is illegal")
    run = replace(run_of(), model=model)
    stages = make_stages(model, 256, run.layout, ranks)
    built: list[tuple[str, tuple[int, ...]]] = []
    kept: dict[str, tuple[int, ...]] = {}
    for part in stages.parts:
        with torch.device("meta"):
            module = make_stage(run, 256, range(*part))
        built += [(n, tuple(p.shape)) for n, p in module.named_parameters()]
        kept |= {n: tuple(b.shape) for n, b in surviving_buffers(module).items()}
    assert built == [(spec.name, spec.shape) for spec in tensors(model, 256)]
    assert kept == {spec.name: spec.shape for spec in buffers(model)}


# ---- against real ranks --------------------------------------------------------------------------

DENSE = ("model.preset=micro", "model.heads=4", "batch.microbatches=8", "data.sequence=32")
MIXED = ("model.preset=micro-moe", "batch.microbatches=8", "data.sequence=32")
REAL = [
    (*DENSE, "layout.shard=2", "layout.tensor=2", "optim.name=adamw"),
    (*DENSE, "layout.pipeline=2", "layout.context=2", "optim.name=momentum"),
    (*DENSE, "layout.shard=4", "layout.zero=3", "optim.name=sgd"),
    (*DENSE, "layout.islands=2", "layout.pipeline=2", "layout.schedule=zero_bubble",
     "model.layers=4"),
    (*MIXED, "layout.expert=2", "layout.shard=2"),
    (*MIXED, "layout.expert=2", "layout.tensor=2"),
    ("model.preset=shapes-conv", "batch.microbatches=8", "layout.islands=2", "layout.shard=2"),
]  # fmt: skip

Told = list[tuple[int, int, int, int]]


def real(world: World, jobs: Sequence[tuple[str, ...]]) -> Told:
    """(parameters, bytes with the optimiser's, tensors, modules) of this rank in each job's run."""
    found = []
    for job in jobs:
        run = run_of(*job)
        plan = plan_of(run)
        mesh = make_mesh(plan.layout, world.rank, "cpu")
        stages = Stages(plan.stages, plan.layout.pipeline, run.layout.schedule)
        live = make_live(run, stages, mesh, 60, "cpu", Sharding(plan.zero))
        held = {n: local(p.detach()) for n, p in live.modules().items()}
        assert all(tensor.device.type == "cpu" for tensor in held.values())
        built = state_bytes(held, make_rule(run, plan, mesh, live, held))
        sizes = [sum(items.values()) for items in built.values()]
        modules = sum(len(list(chunk.modules())) for chunk in live.chunks)
        there = [tensor.numel() for tensor in held.values() if tensor.numel()]
        found.append((sum(there), sum(sizes), len(there), modules))
    return found


def test_a_rehearsal_counts_what_real_ranks_hold() -> None:
    told = launch(real, REAL, ranks=4)
    for place, job in enumerate(REAL):
        run = run_of(*job)
        for rank in range(4):
            built = rehearse(run, plan_of(run), rank, 60)
            names = ("parameters", "bytes", "tensors", "modules")
            assert tuple(built[name] for name in names) == told[rank][place], (job, rank)


# ---- against paper -------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["sgd", "momentum", "adam", "adamw", "adafactor", "muon"])
def test_every_rules_bytes_are_the_plans(rule: str) -> None:
    axes = () if rule == "adafactor" else ("layout.shard=3", "layout.tensor=2")
    run = run_of(*DENSE, f"optim.name={rule}", "batch.microbatches=9", *axes)
    plan = make_plan(run, gpu_cluster("H100", 8), 60, None if axes else 2)
    specs = tuple(tensors(run.model, 60))
    stages = make_stages(run.model, 60, run.layout, 1)
    for rank in range(plan.layout.size):
        at = plan.layout.coordinates(rank)
        paper = rank_state_bytes(run, specs, plan.layout, stages, at)
        built = rehearse(run, plan, rank, 60)
        assert built["bytes"] == paper["parameters"] + paper["optimiser"]


@pytest.mark.parametrize(
    "words",
    [
        ("run.precision=fp8", "run.compile=blocks", "layout.tensor=2", "layout.shard=2"),
        ("memory.offload=parameters", "layout.shard=2"),
        ("memory.offload=parameters", "memory.recompute=selective"),
        ("layout.context=2", "layout.attention=ring", "layout.shard=4", "layout.zero=2"),
        ("layout.islands=2", "layout.pipeline=2", "layout.schedule=interleaved", "layout.chunks=2",
         "layout.tensor=2", "model.layers=8"),
    ],
)  # fmt: skip
def test_levers_change_no_parameter(words: tuple[str, ...]) -> None:
    run = run_of("model.preset=small", "batch.microbatches=16", *words)
    plan = plan_of(run, hosts=4)
    for rank in {0, plan.layout.size // 2, plan.layout.size - 1}:
        rehearse(run, plan, rank, 60)


def test_a_difference_names_the_tensor() -> None:
    run = run_of(*DENSE, "optim.name=adamw", "layout.islands=1")
    plan = plan_of(run)
    stages = Stages(plan.stages, 1, run.layout.schedule)
    live = on_meta(run, stages, make_mesh(Layout(), 0, "cpu"), 60, Sharding())
    held = {name: p.detach() for name, p in live.modules().items()}
    rule = make_optimizer(run.optim, held.items(), fused=False)
    agree(run, plan, 0, live, state_bytes(held, rule))
    name = "blocks.1.mlp.up.weight"
    wrong: list[dict[str, torch.Tensor]] = [
        {**held, name: held[name][1:]},
        {n: t for n, t in held.items() if n != name},
    ]
    for tensors_held in wrong:
        with pytest.raises(RunError, match="planned") as raised:
            rule = make_optimizer(run.optim, tensors_held.items(), fused=False)
            agree(run, plan, 0, live, state_bytes(tensors_held, rule))
        assert raised.value.exit_code == 1 and raised.value.values["tensor"] == name


def test_nothing_is_left_behind() -> None:
    run = run_of(*DENSE, "layout.shard=2", "layout.tensor=2")
    before = dict(os.environ)
    for rank in (1, 3, 1):
        assert rehearse(run, plan_of(run), rank, 60)["parameters"] > 0
        assert not dist.is_initialized()
    with pytest.raises(LayoutError):
        rehearse(run, plan_of(run), 4, 60)
    assert not dist.is_initialized() and dict(os.environ) == before


# ---- as a user types it --------------------------------------------------------------------------

BIG = (str(ROOT / "recipes/llama3-405b.toml"), "--cluster", str(ROOT / "recipes/h100-16384.toml"))
AXES_405B = ("layout.islands=4", "layout.pipeline=16", "layout.shard=32", "layout.tensor=8")
MIXED_235B = (
    "model.preset=qwen3-235b-a22b", "batch.microbatches=8192", "layout.islands=4",
    "layout.pipeline=8", "layout.expert=16", "layout.shard=8", "layout.tensor=4",
)  # fmt: skip


@pytest.mark.parametrize(("axes", "rank"), [(AXES_405B, 9000), (MIXED_235B, 16383)])
def test_one_rank_of_16384(axes: tuple[str, ...], rank: int) -> None:
    words = ("plan", *BIG, *axes, "--dry-run", "--rank", str(rank), "--json")
    done = cordee(*words, deadline_s=60)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)["rank"]
    assert told["ranks"] == 16384
    built, state = told["rehearsal"], told["state_bytes"]
    assert built["memory"] < 4 * GIB
    assert built["parameters"] == told["parameters"] and built["tensors"] == told["tensors"]
    assert built["bytes"] == state["parameters"] + state["optimiser"]


def test_refusals_come_before_torch(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 64, "num_hidden_layers": 2}))
    cluster = ["--cluster", str(ROOT / "recipes/h100-16384.toml")]
    words = ["tiny", "batch.microbatches=8", "layout.shard=4", *cluster, "--dry-run"]
    wrong = {
        "rank 3": [*words, "--rank", "4"],
        "rank 0": [*words, "--rank", "-1"],
        "--dry-run --rank 0": words,
        "--dry-run --rank 2": [*words[:-1], "--rank", "2"],
        "layout.tensor=2": [*words, "layout.tensor=3", "--rank", "0"],
        "cordee plan --models": [*words[1:], f"model.hub={tmp_path}", "--rank", "0"],
    }
    code = (
        "import sys, json; from cordee.cli.main import main\n"
        "for words in json.loads(sys.argv[1]): print(main(['plan', *words]))\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(list(wrong.values()))],
        env=clean_environment(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2"] * len(wrong)
    fixes = [line.split("fix: ")[1] for line in done.stderr.splitlines() if "fix: " in line]
    assert all(fix in told for fix, told in zip(wrong, fixes, strict=True)), fixes
