"""All axes on paper: who holds what adds up, bytes by hand, schedules as torch has them, search."""

from __future__ import annotations

import itertools
import json
import math
import time
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cordee.cli.plan import run as plan_command
from cordee.config.load import load
from cordee.config.run import LayoutSettings, Run
from cordee.errors import ConfigError, LayoutError
from cordee.layout.axes import INSIDE, Layout
from cordee.layout.census import census, model_census
from cordee.layout.legal import problems
from cordee.layout.stages import Stages, make_stages
from cordee.layout.tensors import TensorSpec, parameters, tensors
from cordee.layout.traffic import context_bytes
from cordee.plan.activations import stage_moments
from cordee.plan.cluster import gpu_cluster
from cordee.plan.costs import block_counts, microbatch_work, whole
from cordee.plan.memory import Wire, rank_memory, rank_state_bytes
from cordee.plan.network import choose_wire
from cordee.plan.pipeline import bubble, in_flight
from cordee.plan.plan import Plan, make_plan
from cordee.plan.rank import view_rank
from cordee.plan.report import rank_text
from cordee.plan.search import search
from cordee.plan.wires import axis_bytes, pipeline_bytes, shard_bytes

MOE = ("model.moe.experts=6", "model.moe.width=48", "model.moe.dense_layers=1")
LLAMA_405B = (
    "model.layers=126", "model.width=16384", "model.heads=128", "model.kv_heads=8",
    "model.ffn=53248", "model.mlp=gated", "model.logit_cap=0", "data.sequence=8192",
    "batch.microbatch=1", "batch.microbatches=2048", "optim.name=adamw", "memory.recompute=full",
)  # fmt: skip


def run_of(*overrides: str) -> Run:
    return load(None, ("run.precision=bf16", *overrides)).run


def specs_of(run: Run, vocabulary: int = 256) -> tuple[TensorSpec, ...]:
    return tuple(tensors(run.model, vocabulary))


def stages_of(run: Run, layout: Layout, vocabulary: int = 256) -> Stages:
    return make_stages(run.model, vocabulary, run.layout, layout.pipeline)


def volume(box: tuple[tuple[int, int], ...]) -> int:
    return math.prod(stop - start for start, stop in box)


LAYOUTS = st.builds(
    Layout,
    island=st.sampled_from([1, 2]),
    pipeline=st.sampled_from([1, 2, 3]),
    context=st.sampled_from([1, 2]),
    expert=st.sampled_from([1, 2, 3]),
    shard=st.sampled_from([1, 2, 4, 12]),
    tensor=st.sampled_from([1, 2, 4]),
)
MODELS = st.sampled_from([(), MOE, ("model.mlp=gated", "model.kv_heads=4"), (*MOE,
                          "model.moe.shared=1", "model.qk_gain=true")])  # fmt: skip


# ---- who holds what ------------------------------------------------------------------------------


@given(LAYOUTS, MODELS, st.sampled_from(["adamw", "muon", "momentum", "sgd"]))
@settings(max_examples=40, deadline=None)
def test_parts_tile_every_tensor_and_bytes_add_up(
    layout: Layout, model: tuple[str, ...], rule: str
) -> None:
    run = run_of("model.layers=3", "model.width=96", *model, f"optim.name={rule}")
    specs, stages = specs_of(run), stages_of(run, layout)
    held: dict[str, set[tuple[tuple[int, int], ...]]] = {spec.name: set() for spec in specs}
    copies = dict.fromkeys(held, 0)
    for rank in range(layout.size):
        at = layout.coordinates(rank)
        mine = [s for s in specs if stages.home(s.layer) == at["pipeline"]]
        told = rank_state_bytes(run, specs, layout, stages, at)
        sizes = {s.name: volume(s.box(layout, at)) for s in mine}
        assert told["parameters"] == told["gradients"] == 4 * sum(sizes.values())
        of = {"adamw": 8, "muon": 8, "momentum": 4, "sgd": 0}
        each = (4 if rule == "muon" and s.group == "matrices" else of[rule] for s in mine)
        assert told["optimiser"] == sum(e * sizes[s.name] for e, s in zip(each, mine, strict=True))
        for spec in mine:
            held[spec.name].add(spec.box(layout, at))
            copies[spec.name] += sizes[spec.name]
    for spec in specs:
        boxes = [box for box in held[spec.name] if volume(box)]
        assert sum(map(volume, boxes)) == spec.elements
        for a, b in itertools.combinations(boxes, 2):
            assert any(s >= t or u >= e for (s, e), (u, t) in zip(a, b, strict=True)), "overlap"
        shared = math.prod(getattr(layout, axis) for axis in spec.shared(layout))
        assert copies[spec.name] == spec.elements * shared


@given(LAYOUTS, MODELS)
@settings(max_examples=30, deadline=None)
def test_the_first_rank_of_a_stage_holds_most(layout: Layout, model: tuple[str, ...]) -> None:
    run = run_of("model.layers=3", "model.width=96", *model)
    counted, stages = model_census(run.model, 256), stages_of(run, layout)
    assert census(counted) is counted and counted.parameters == parameters(run.model, 256)
    for rank in range(layout.size):
        at = layout.coordinates(rank)
        first = {**dict.fromkeys(at, 0), "pipeline": at["pipeline"]}
        mine, most = (rank_state_bytes(run, counted, layout, stages, a) for a in (at, first))
        assert all(mine[item] <= most[item] for item in most)


def test_workers_are_dealt_by_island_expert_shard() -> None:
    layout = Layout(island=2, pipeline=2, context=2, expert=3, shard=2, tensor=2)
    assert layout.workers == 12
    for rank in range(layout.size):
        at = layout.coordinates(rank)
        assert layout.worker(rank) == (at["island"] * 3 + at["expert"]) * 2 + at["shard"]
        for axis in ("island", *INSIDE):
            if at[axis] + 1 < getattr(layout, axis):
                after = layout.rank({**at, axis: at[axis] + 1})
                assert after - rank == layout.stride(axis)


# ---- bytes ---------------------------------------------------------------------------------------


def test_bytes_by_hand() -> None:
    run = run_of("model.width=64", "model.heads=4", "model.kv_heads=2", "model.layers=4",
                 "batch.microbatch=3", "batch.microbatches=8", "data.sequence=32",
                 "run.precision=bf16")  # fmt: skip
    layout = Layout(island=2, pipeline=2, context=2, shard=2, tensor=2)
    specs, stages = specs_of(run), stages_of(run, layout)
    part = 3 * 32 // 2 // 2 * 64
    for rank in range(layout.size):
        at = layout.coordinates(rank)
        first = at["pipeline"] == 0
        sent = axis_bytes(run, specs, layout, stages, at, zero=1)
        # Two blocks; a bf16 seam before and behind attention and MLP, mirrored backward.
        tensor = 2 * 8 * part * 2
        # Embedding in fp32; head in bf16, and for each position a largest logit and two sums.
        tensor += 2 * part * 4 if first else 2 * part * 2 + 3 * 4 * (3 * 32 // 2)
        assert sent["tensor"] == 2 * tensor
        assert sent["pipeline"] == 2 * part * 4
        # Keys and values: 16 of 32 wide here, half of the sequence, forward and backward.
        assert sent["context"] == 2 * 2 * 2 * (2 * (3 * 16) * 16 * 2)
        ours = [s for s in specs if stages.home(s.layer) == at["pipeline"]]
        total = {axes: 0 for axes in (("context",), ("context", "tensor"))}
        for spec in ours:
            total[spec.summed(layout)] += 4 * volume(spec.box(layout, at))
        assert sent["sums"] == total["context",] + 2 * 3 * total["context", "tensor"] // 4
        whole_bytes = 4 * sum(volume(s.box(layout, {**at, "shard": 0})) for s in ours)
        assert sent["shard"] == whole_bytes * 2


def test_context_bytes_by_messages() -> None:
    for parts, element in itertools.product((2, 3, 4), (2, 4)):
        tokens, width = 24 * parts, 8
        block = 2 * 24 * width
        ring = sum(block * element for _ in range(parts - 1))
        back = sum(block * element + block * 4 for _ in range(parts - 1))
        assert context_bytes("ring", tokens, width, element, parts) == ring + back
        gathered = context_bytes("gather", tokens, width, element, parts, forwards=2)
        assert gathered == 3 * ring


def test_a_v_turns_on_the_last_rank() -> None:
    run = run_of("model.layers=8", "layout.schedule=zero_bubble", "batch.microbatch=1")
    layout = Layout(pipeline=4)
    stages, stream = stages_of(run, layout), 4 * 256 * 128
    sent = [pipeline_bytes(run, layout, stages, rank) // stream for rank in range(4)]
    assert sent == [2, 4, 4, 2]
    looped = run_of("model.layers=8", "layout.schedule=interleaved", "batch.microbatch=1")
    stages = stages_of(looped, layout)
    assert [pipeline_bytes(looped, layout, stages, r) // stream for r in range(4)] == [3, 4, 4, 3]


def test_islands_of_several_axes_exchange_their_sums() -> None:
    run = run_of("batch.microbatches=8", "sync.codec=bf16")
    assert choose_wire(run, Layout(island=2, shard=2)) == Wire("exchange", "bf16", True)
    assert choose_wire(run, Layout(island=2, tensor=2)) == Wire("exchange", "bf16", False)
    assert choose_wire(run, Layout(tensor=2)) == Wire("none", "bf16", False)
    plan = make_plan(run_of("batch.microbatches=6", "sync.codec=bf16", "layout.tensor=2",
                            "layout.islands=3"), gpu_cluster("H100", 8))  # fmt: skip
    specs, layout = specs_of(run), plan.layout
    mine = sum(volume(s.box(layout, layout.coordinates(0))) for s in specs)
    assert plan.predicted.bytes_sent == 2 * 2 * -(-mine // 3) * 2


# ---- schedules -----------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["interleaved", "zero_bubble"])
def test_microbatches_in_flight_are_those_of_torchs_tables(schedule: str) -> None:
    schedules: Any = pytest.importorskip("torch.distributed.pipelining.schedules")
    made = {"interleaved": schedules.ScheduleInterleaved1F1B,
            "zero_bubble": schedules.ScheduleZBVZeroBubble}[schedule]  # fmt: skip
    for ranks, m, chunks in itertools.product((2, 3, 4), range(1, 14), (2, 3)):
        rounds = max(1, m // ranks)
        if schedule == "interleaved" and m % rounds:
            continue
        chunks = 2 if schedule == "zero_bubble" else chunks
        table = object.__new__(made)
        table.pp_group_size, table.n_local_stages, table._n_microbatches = ranks, chunks, m
        table.num_stages, table.microbatches_per_round = chunks * ranks, m // rounds
        for rank in range(ranks):
            held = most = 0
            for action in table._calculate_single_rank_operations(rank):
                if action is not None:
                    kind = action.computation_type.name
                    held += (kind == "FORWARD") - (kind in ("FULL_BACKWARD", "BACKWARD_WEIGHT"))
                    most = max(most, held)
            told = in_flight(LayoutSettings(schedule=schedule, chunks=chunks), ranks, rank, m)  # type: ignore[arg-type]
            assert len(told) == chunks and sum(told) == most, (ranks, m, chunks, rank)


def test_schedules_by_hand() -> None:
    def of(schedule: str) -> LayoutSettings:
        return LayoutSettings(schedule=schedule, chunks=2)  # type: ignore[arg-type]

    assert [in_flight(of("1f1b"), 4, rank, 6) for rank in range(4)] == [[4], [3], [2], [1]]
    assert in_flight(of("gpipe"), 4, 3, 6) == [6]
    assert bubble(of("1f1b"), 4, 6) == bubble(of("gpipe"), 4, 6) == 0.5
    assert bubble(of("interleaved"), 4, 6) == 0.25
    assert bubble(of("zero_bubble"), 4, 6) < 0.25


@given(st.integers(1, 9), st.integers(0, 9), st.integers(1, 4), st.integers(1, 4))
@settings(deadline=None)
def test_blocks_are_counted_by_kind(layers: int, dense: int, every: int, cut: int) -> None:
    run = run_of(f"model.layers={layers}", "model.moe.experts=4", "memory.recompute=full",
                 f"model.moe.dense_layers={dense}", f"memory.recompute_every={every}")  # fmt: skip
    stages = make_stages(run.model, 64, run.layout, min(cut, layers))
    for rank in range(stages.ranks):
        parts = stages.held(rank)
        mine = [layer for part in parts for layer in range(part.start, part.stop)]
        slow = []
        for moe in (False, True):
            kind = [layer for layer in mine if run.model.is_moe(layer) == moe]
            slow += [(moe, len(kind), sum(map(run.memory.recomputes, kind)))] if kind else []
        assert block_counts(run, parts) == slow


# ---- memory and time -----------------------------------------------------------------------------


def test_every_axis_lightens_what_it_cuts() -> None:
    run = run_of("model.preset=small", "batch.microbatches=64", "data.sequence=2048", *MOE,
                 "model.moe.width=1536", "optim.name=adamw")  # fmt: skip
    specs, none = specs_of(run), Wire("none", "identity", False)
    alone = rank_memory(run, specs, Layout(), none, "cuda")
    for axis in INSIDE:
        cut = rank_memory(run, specs, Layout(**{axis: 2}), none, "cuda")
        assert cut.total_bytes < alone.total_bytes, axis
    plain = stage_moments(run, "cuda", Layout(), whole(run))[0].held_bytes
    for axis, low, high in (("tensor", 0.5, 0.8), ("context", 0.49, 0.8), ("expert", 1.0, 1.0)):
        held = stage_moments(run, "cuda", Layout(**{axis: 2}), whole(run))[0].held_bytes
        assert low <= held / plain <= high, axis
    work = microbatch_work(run, 256, "cuda")
    for axis in ("tensor", "context"):
        half = microbatch_work(run, 256, "cuda", Layout(**{axis: 2}))
        assert half.matrix_flops == pytest.approx(work.matrix_flops / 2)
        assert half.attention_flops == pytest.approx(work.attention_flops / 2)
    parts = [make_stages(run.model, 256, run.layout, 3).held(rank) for rank in range(3)]
    staged = [microbatch_work(run, 256, "cuda", Layout(pipeline=3), part) for part in parts]
    assert sum(part.flops for part in staged) == pytest.approx(work.flops)


def test_shards_keep_less_at_each_level_and_auto_takes_the_first_that_fits() -> None:
    run = run_of("model.preset=xl", "optim.name=adamw", "batch.microbatches=32", "layout.shard=8")
    cluster = gpu_cluster("H100", 8)
    levels = [make_plan(replace(run, layout=replace(run.layout, zero=zero)), cluster)
              for zero in (1, 2, 3)]  # type: ignore[arg-type]  # fmt: skip
    assert [plan.zero for plan in levels] == [1, 2, 3]
    memory = [plan.predicted.memory_bytes for plan in levels]
    assert memory == sorted(memory, reverse=True) and len(set(memory)) == 3
    for plan in levels:
        room = (plan.predicted.memory_bytes + plan.predicted.overhead_bytes) / 0.9
        tight = replace(cluster, memory_bytes=int(room) + 1)
        assert make_plan(run, tight).zero == plan.zero
    asked = make_plan(run_of("layout.zero=3", "batch.microbatches=8"), cluster, processes=4)
    assert asked.zero == 3 and asked.layout.shard > 1


def test_seventy_billion_parameters_fit_by_shards_alone() -> None:
    """On 128 devices of 80 GB: with the fewest levers, and no cast of the island beside the
    shards."""
    words = ("model.preset=llama3-70b", "optim.name=adamw", "batch.microbatches=128",
             "batch.microbatch=1", "data.sequence=4096", "memory.recompute=full")  # fmt: skip
    cluster = gpu_cluster("H100", 8, hosts=16)
    for precision in ("bf16", "fp16", "fp8"):
        run = run_of(*words, "layout.shard=128", f"run.precision={precision}")
        plan = make_plan(run, cluster, 128256)
        assert (plan.layout, plan.zero) == (Layout(shard=128), 3)
        assert "bf16 weights" not in plan.predicted.memory_items
        assert 30e9 < plan.predicted.memory_bytes < 60e9
    # Gathers in fp32 are twice as large: two blocks and the rest.
    wide = make_plan(run_of(*words, "layout.shard=128", "run.precision=fp32"), cluster, 128256)
    pairs = [made.predicted.memory_items["gathered parameters"] for made in (wide, plan)]
    assert pairs[0] == 2 * pairs[1]
    # Islands of fewer devices than a host has do not hold it.
    with pytest.raises(LayoutError, match="does not fit"):
        make_plan(run_of(*words, "layout.shard=4", "layout.islands=32"), cluster, 128256)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_gathers_of_bf16_cost_half_from_zero_2_on(zero: int) -> None:
    layout, words = Layout(shard=4), ("batch.microbatches=8", "model.layers=3")
    wide, half = (run_of(*words, f"run.precision={kind}") for kind in ("fp32", "bf16"))
    specs, part = specs_of(wide), [whole(wide)]
    gathered, reduced, units = shard_bytes(wide, specs, layout, part, zero)
    divisor = 1 if zero == 1 else 2
    assert shard_bytes(half, specs, layout, part, zero) == (gathered // divisor, reduced, units)
    none = Wire("none", "identity", False)
    items = [rank_memory(run, specs, layout, none, "cuda", zero).phases["backward"]
             for run in (wide, half)]  # fmt: skip
    assert items[0]["gathered parameters"] == divisor * items[1]["gathered parameters"]
    assert (items[1]["bf16 weights"] > 0) == (zero == 1)


# ---- search --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("preset", "words"), [("tiny", ()), ("tiny", MOE), ("large", ())])
def test_everything_ranked_is_legal_and_whole(preset: str, words: tuple[str, ...]) -> None:
    run = run_of(f"model.preset={preset}", "batch.microbatches=24", "data.sequence=1024", *words)
    ranking = search(run, gpu_cluster("H100", 8, hosts=3))
    axes = {axis for c in ranking.ranked for axis in INSIDE if getattr(c.layout, axis) > 1}
    assert axes == {*INSIDE} - (set() if words else {"expert"})
    assert len({c.layout for c in ranking.ranked}) == len(ranking.ranked) > 50
    for made in ranking.ranked:
        assert problems(run, made.layout) == []
        assert made.predicted.step_s > 0 and made.layout.size <= 24
        assert made.fitting.stages.ranks == made.layout.pipeline


def test_given_degrees_are_kept_and_others_are_one() -> None:
    run = run_of("layout.tensor=2", "layout.pipeline=2", "batch.microbatches=8")
    plan = make_plan(run, gpu_cluster("H100", 8), processes=8)
    assert plan.layout == Layout(island=2, pipeline=2, tensor=2)
    assert plan.stages == ((0, 3), (3, 5)) and plan.splits == ((0, 4), (4, 8))
    assert Plan.from_json(plan.to_json()) == plan
    ranked = search(run, gpu_cluster("H100", 8)).ranked
    assert {(c.layout.tensor, c.layout.pipeline, c.layout.shard) for c in ranked} == {(2, 2, 1)}


@pytest.mark.parametrize("hosts", [1, 128, 2048])
def test_405_billion_parameters_are_planned_in_seconds(hosts: int) -> None:
    run, cluster = run_of(*LLAMA_405B), gpu_cluster("H200", 8, hosts=hosts)
    began = time.process_time()
    try:
        plan = make_plan(run, cluster, vocabulary=128256)
    except ConfigError as error:
        assert hosts == 1 and "more devices" in str(error.fix)
        return
    finally:
        assert time.process_time() - began < 5
    assert plan.processes == 8 * hosts
    # Shards alone hold it, where there is a microbatch for each of them.
    assert plan.layout.tensor > 1 or plan.layout.shard == plan.processes <= 2048
    assert problems(run, plan.layout, 128256) == []
    specs = model_census(run.model, 128256)
    assert specs.parameters == pytest.approx(405e9, rel=0.01)
    views = [view_rank(run, plan, rank, specs) for rank in (0, 8 * hosts - 1)]
    for view in views:
        assert view.state_bytes["parameters"] == 4 * view.parameters
        assert f"rank {view.rank} of {8 * hosts}" in rank_text(view)


def test_one_rank_of_a_plan(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.toml"
    path.write_text('kind = "H100"\ndevices = 8\nhosts = 2\n')
    words = ["tiny", "batch.microbatches=8", "layout.tensor=2", "layout.pipeline=2",
             "layout.shard=2", "--cluster", str(path), "--dry-run"]  # fmt: skip
    assert plan_command([*words, "--rank", "5", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["rank"]
    layout = Layout(pipeline=2, shard=2, tensor=2)
    at = layout.coordinates(5)
    assert told["coordinates"] == at and told["ranks"] == 8 and told["layers"] == [[3, 5]]
    assert told["groups"] == {"pipeline": [1, 5], "shard": [5, 7], "tensor": [4, 5]}
    run = run_of("model.preset=tiny")
    mine = [s for s in specs_of(run) if s.layer >= 3]
    assert told["parameters"] == sum(volume(s.box(layout, at)) for s in mine)
    assert told["tensors"] == len(mine)
    assert plan_command([*words, "--rank", "5"]) == 0
    shown = capsys.readouterr().out
    assert "built on meta" in shown and "(as above)" in shown
    view = view_rank(run, make_plan(run, gpu_cluster("H100", 1), processes=1), 0, specs_of(run))
    built = {"parameters": 5, "bytes": 20, "modules": 3, "seconds": 0.25, "memory": 1 << 20}
    assert "above: 1,049,984" in rank_text(view, built) and "250 ms" in rank_text(view, built)
    for wrong in ([*words, "--rank", "8"], [*words, "--rank", "-1"], [*words[:-1], "--rank", "1"]):
        with pytest.raises(ConfigError):
            plan_command(wrong)
