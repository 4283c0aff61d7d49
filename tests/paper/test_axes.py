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
from cordee.layout.axes import AXES, MODEL_AXES, Layout
from cordee.layout.counts import count_model_tensors, count_tensors
from cordee.layout.stages import Stages, make_stages
from cordee.layout.tensors import TensorSpec, count_parameters, group_axes, tensor_specs
from cordee.layout.validate import violation_texts
from cordee.planner.activations import backward_points, bubble_ratio, in_flight_microbatches
from cordee.planner.cluster import gpu_cluster
from cordee.planner.compute_cost import all_layers, block_counts, microbatch_cost
from cordee.planner.memory import SyncChoice, rank_memory, rank_state_bytes
from cordee.planner.network import choose_sync
from cordee.planner.plan import Plan, make_plan
from cordee.planner.report import rank_text, view_rank
from cordee.planner.search import search
from cordee.planner.traffic import axis_bytes, context_layer_bytes, fsdp_bytes, pipeline_axis_bytes

MOE = ("model.moe.experts=6", "model.moe.width=48", "model.moe.dense_layers=1")
LLAMA_405B = (
    "model.layers=126", "model.width=16384", "model.heads=128", "model.kv_heads=8",
    "model.ffn=53248", "model.mlp=gated", "model.logit_cap=0", "data.sequence=8192",
    "batch.microbatch=1", "batch.microbatches=2048", "optim.name=adamw", "memory.recompute=full",
)  # fmt: skip


def run_of(*overrides: str) -> Run:
    return load(None, ("run.precision=bf16", *overrides)).run


def specs_of(run: Run, vocabulary: int = 256) -> tuple[TensorSpec, ...]:
    return tuple(tensor_specs(run.model, vocabulary))


def stages_of(run: Run, layout: Layout, vocabulary: int = 256) -> Stages:
    return make_stages(run.model, vocabulary, run.layout, layout.pipeline)


def box_volume(box: tuple[tuple[int, int], ...]) -> int:
    return math.prod(stop - start for start, stop in box)


@pytest.mark.parametrize("preset", ["tiny", "micro-moe"])
def test_every_set_of_axes_that_is_summed_over_has_a_group(preset: str) -> None:
    specs = specs_of(run_of(f"model.preset={preset}"))
    for degrees in itertools.product([1, 2], repeat=len(AXES)):
        layout = Layout(*degrees)
        groups = {
            tuple(axis for axis in axes if getattr(layout, axis) > 1) for axes in group_axes()
        }
        for spec in specs:
            assert spec.grad_reduce_axes(layout) in groups | {()}
            if spec.group == "matrices":
                cut_axes = {axis for axis, _ in spec.cuts(layout)} - {"expert"}
                sharing_axes = [axis for axis in AXES if axis in cut_axes]
                assert tuple(sharing_axes or spec.replicated_axes(layout)) in groups | {()}


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
    tensor_boxes: dict[str, set[tuple[tuple[int, int], ...]]] = {spec.name: set() for spec in specs}
    copied_elements = dict.fromkeys(tensor_boxes, 0)
    for rank in range(layout.size):
        coords = layout.coordinates(rank)
        local_specs = [s for s in specs if stages.rank_of_layer(s.layer) == coords["pipeline"]]
        state = rank_state_bytes(run, specs, layout, stages, coords)
        sizes = {s.name: box_volume(s.box(layout, coords)) for s in local_specs}
        assert state["parameters"] == state["gradients"] == 4 * sum(sizes.values())
        rule_bytes = {"adamw": 8, "muon": 8, "momentum": 4, "sgd": 0}
        moments = (
            4 if rule == "muon" and s.group == "matrices" else rule_bytes[rule] for s in local_specs
        )
        assert state["optimiser"] == sum(
            e * sizes[s.name] for e, s in zip(moments, local_specs, strict=True)
        )
        for spec in local_specs:
            tensor_boxes[spec.name].add(spec.box(layout, coords))
            copied_elements[spec.name] += sizes[spec.name]
    for spec in specs:
        nonempty_boxes = [box for box in tensor_boxes[spec.name] if box_volume(box)]
        assert sum(map(box_volume, nonempty_boxes)) == spec.elements
        for a, b in itertools.combinations(nonempty_boxes, 2):
            assert any(s >= t or u >= e for (s, e), (u, t) in zip(a, b, strict=True)), "overlap"
        replica_count = math.prod(getattr(layout, axis) for axis in spec.replicated_axes(layout))
        assert copied_elements[spec.name] == spec.elements * replica_count


@given(LAYOUTS, MODELS)
@settings(max_examples=30, deadline=None)
def test_the_first_rank_of_a_stage_holds_most(layout: Layout, model: tuple[str, ...]) -> None:
    run = run_of("model.layers=3", "model.width=96", *model)
    counts, stages = count_model_tensors(run.model, 256), stages_of(run, layout)
    assert count_tensors(counts) is counts and counts.parameters == count_parameters(run.model, 256)
    for rank in range(layout.size):
        coords = layout.coordinates(rank)
        first_coords = {**dict.fromkeys(coords, 0), "pipeline": coords["pipeline"]}
        rank_bytes, first_rank_bytes = (
            rank_state_bytes(run, counts, layout, stages, a) for a in (coords, first_coords)
        )
        assert all(rank_bytes[item] <= first_rank_bytes[item] for item in first_rank_bytes)


def test_dp_rank_order_is_island_expert_shard() -> None:
    layout = Layout(island=2, pipeline=2, context=2, expert=3, shard=2, tensor=2)
    assert layout.dp_size == 12
    for rank in range(layout.size):
        coords = layout.coordinates(rank)
        assert (
            layout.dp_rank(rank) == (coords["island"] * 3 + coords["expert"]) * 2 + coords["shard"]
        )
        for axis in ("island", *MODEL_AXES):
            if coords[axis] + 1 < getattr(layout, axis):
                next_rank = layout.rank({**coords, axis: coords[axis] + 1})
                assert next_rank - rank == layout.stride(axis)


# ---- bytes ---------------------------------------------------------------------------------------


def test_bytes_by_hand() -> None:
    run = run_of("model.width=64", "model.heads=4", "model.kv_heads=2", "model.layers=4",
                 "batch.microbatch=3", "batch.microbatches=8", "data.sequence=32",
                 "run.precision=bf16")  # fmt: skip
    layout = Layout(island=2, pipeline=2, context=2, shard=2, tensor=2)
    specs, stages = specs_of(run), stages_of(run, layout)
    stream_elements = 3 * 32 // 2 // 2 * 64
    for rank in range(layout.size):
        coords = layout.coordinates(rank)
        is_first_stage = coords["pipeline"] == 0
        sent_bytes = axis_bytes(run, specs, layout, stages, coords, zero=1)
        # Two blocks; a bf16 seam before and behind attention and MLP, mirrored backward.
        tensor_bytes = 2 * 8 * stream_elements * 2
        # Embedding in fp32; head in bf16, and for each position a largest logit and two sums.
        tensor_bytes += (
            2 * stream_elements * 4
            if is_first_stage
            else 2 * stream_elements * 2 + 3 * 4 * (3 * 32 // 2)
        )
        assert sent_bytes["tensor"] == 2 * tensor_bytes
        assert sent_bytes["pipeline"] == 2 * stream_elements * 4
        # Keys and values: 16 of 32 wide here, half of the sequence, forward and backward.
        assert sent_bytes["context"] == 2 * 2 * 2 * (2 * (3 * 16) * 16 * 2)
        stage_specs = [s for s in specs if stages.rank_of_layer(s.layer) == coords["pipeline"]]
        sum_bytes = {axes: 0 for axes in (("context",), ("context", "tensor"))}
        for spec in stage_specs:
            sum_bytes[spec.grad_reduce_axes(layout)] += 4 * box_volume(spec.box(layout, coords))
        assert (
            sent_bytes["sums"]
            == sum_bytes["context",] + 2 * 3 * sum_bytes["context", "tensor"] // 4
        )
        unsharded_bytes = 4 * sum(
            box_volume(s.box(layout, {**coords, "shard": 0})) for s in stage_specs
        )
        assert sent_bytes["shard"] == unsharded_bytes * 2


def test_context_bytes_by_messages() -> None:
    for parts, element_bytes in itertools.product((2, 3, 4), (2, 4)):
        tokens, width = 24 * parts, 8
        block_elements = 2 * 24 * width
        ring_bytes = sum(block_elements * element_bytes for _ in range(parts - 1))
        backward_bytes = sum(
            block_elements * element_bytes + block_elements * 4 for _ in range(parts - 1)
        )
        assert (
            context_layer_bytes("ring", tokens, width, element_bytes, parts)
            == ring_bytes + backward_bytes
        )
        gather_bytes = context_layer_bytes(
            "gather", tokens, width, element_bytes, parts, forwards=2
        )
        assert gather_bytes == 3 * ring_bytes


def test_v_schedule_turns_on_the_last_rank() -> None:
    run = run_of("model.layers=8", "layout.schedule=zero_bubble", "batch.microbatch=1")
    layout = Layout(pipeline=4)
    stages, stream_bytes = stages_of(run, layout), 4 * 256 * 128
    sent_streams = [
        pipeline_axis_bytes(run, layout, stages, rank) // stream_bytes for rank in range(4)
    ]
    assert sent_streams == [2, 4, 4, 2]
    interleaved_run = run_of("model.layers=8", "layout.schedule=interleaved", "batch.microbatch=1")
    stages = stages_of(interleaved_run, layout)
    assert [
        pipeline_axis_bytes(interleaved_run, layout, stages, r) // stream_bytes for r in range(4)
    ] == [3, 4, 4, 3]


def test_islands_of_several_axes_exchange_their_sums() -> None:
    run = run_of("batch.microbatches=8", "sync.codec=bf16")
    assert choose_sync(run, Layout(island=2, shard=2)) == SyncChoice("exchange", "bf16", True)
    assert choose_sync(run, Layout(island=2, tensor=2)) == SyncChoice("exchange", "bf16", False)
    assert choose_sync(run, Layout(tensor=2)) == SyncChoice("none", "bf16", False)
    plan = make_plan(run_of("batch.microbatches=6", "sync.codec=bf16", "layout.tensor=2",
                            "layout.islands=3"), gpu_cluster("H100", 8))  # fmt: skip
    specs, layout = specs_of(run), plan.layout
    rank_elements = sum(box_volume(s.box(layout, layout.coordinates(0))) for s in specs)
    assert plan.predicted.bytes_sent == 2 * 2 * -(-rank_elements // 3) * 2


# ---- schedules -----------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["interleaved", "zero_bubble"])
def test_microbatches_in_flight_are_those_of_torchs_tables(schedule: str) -> None:
    schedules: Any = pytest.importorskip("torch.distributed.pipelining.schedules")
    schedule_class = {"interleaved": schedules.ScheduleInterleaved1F1B,
            "zero_bubble": schedules.ScheduleZBVZeroBubble}[schedule]  # fmt: skip
    for ranks, m, chunks in itertools.product((2, 3, 4), range(1, 14), (2, 3)):
        rounds = max(1, m // ranks)
        if schedule == "interleaved" and m % rounds:
            continue
        chunks = 2 if schedule == "zero_bubble" else chunks
        table = object.__new__(schedule_class)
        table.pp_group_size, table.n_local_stages, table._n_microbatches = ranks, chunks, m
        table.num_stages, table.microbatches_per_round = chunks * ranks, m // rounds
        for rank in range(ranks):
            live_count = max_live = 0
            for action in table._calculate_single_rank_operations(rank):
                if action is not None:
                    operation = action.computation_type.name
                    live_count += (operation == "FORWARD") - (
                        operation in ("FULL_BACKWARD", "BACKWARD_WEIGHT")
                    )
                    max_live = max(max_live, live_count)
            counts = in_flight_microbatches(
                LayoutSettings(schedule=schedule, chunks=chunks), ranks, rank, m
            )  # type: ignore[arg-type]
            assert len(counts) == chunks and sum(counts) == max_live, (ranks, m, chunks, rank)


def test_schedules_by_hand() -> None:
    def layout_settings(schedule: str) -> LayoutSettings:
        return LayoutSettings(schedule=schedule, chunks=2)  # type: ignore[arg-type]

    assert [in_flight_microbatches(layout_settings("1f1b"), 4, rank, 6) for rank in range(4)] == [
        [4],
        [3],
        [2],
        [1],
    ]
    assert in_flight_microbatches(layout_settings("gpipe"), 4, 3, 6) == [6]
    assert (
        bubble_ratio(layout_settings("1f1b"), 4, 6)
        == bubble_ratio(layout_settings("gpipe"), 4, 6)
        == 0.5
    )
    assert bubble_ratio(layout_settings("interleaved"), 4, 6) == 0.25
    assert bubble_ratio(layout_settings("zero_bubble"), 4, 6) < 0.25


@given(st.integers(1, 9), st.integers(0, 9), st.integers(1, 4), st.integers(1, 4))
@settings(deadline=None)
def test_blocks_are_counted_by_kind(layers: int, dense: int, period: int, stage_ranks: int) -> None:
    run = run_of(f"model.layers={layers}", "model.moe.experts=4", "memory.recompute=full",
                 f"model.moe.dense_layers={dense}", f"memory.recompute_every={period}")  # fmt: skip
    stages = make_stages(run.model, 64, run.layout, min(stage_ranks, layers))
    for rank in range(stages.ranks):
        parts = stages.layer_ranges(rank)
        local_layers = [layer for part in parts for layer in range(part.start, part.stop)]
        expected = []
        for is_moe in (False, True):
            kind_layers = [layer for layer in local_layers if run.model.is_moe(layer) == is_moe]
            expected += (
                [(is_moe, len(kind_layers), sum(map(run.memory.recomputes, kind_layers)))]
                if kind_layers
                else []
            )
        assert block_counts(run, parts) == expected


# ---- memory and time -----------------------------------------------------------------------------


def test_every_axis_lightens_what_it_cuts() -> None:
    run = run_of("model.preset=small", "batch.microbatches=64", "data.sequence=2048", *MOE,
                 "model.moe.width=1536", "optim.name=adamw")  # fmt: skip
    specs, no_sync = specs_of(run), SyncChoice("none", "identity", False)
    base_memory = rank_memory(run, specs, Layout(), no_sync, "cuda")
    for axis in MODEL_AXES:
        split_memory = rank_memory(run, specs, Layout(**{axis: 2}), no_sync, "cuda")
        assert split_memory.total_bytes < base_memory.total_bytes, axis
    base_bytes = backward_points(run, "cuda", Layout(), all_layers(run))[0].live_bytes
    for axis, min_ratio, max_ratio in (
        ("tensor", 0.5, 0.8),
        ("context", 0.49, 0.8),
        ("expert", 1.0, 1.0),
    ):
        split_bytes = backward_points(run, "cuda", Layout(**{axis: 2}), all_layers(run))[
            0
        ].live_bytes
        assert min_ratio <= split_bytes / base_bytes <= max_ratio, axis
    cost = microbatch_cost(run, 256, "cuda")
    for axis in ("tensor", "context"):
        half_cost = microbatch_cost(run, 256, "cuda", Layout(**{axis: 2}))
        assert half_cost.matrix_flops == pytest.approx(cost.matrix_flops / 2)
        assert half_cost.attention_flops == pytest.approx(cost.attention_flops / 2)
    parts = [make_stages(run.model, 256, run.layout, 3).layer_ranges(rank) for rank in range(3)]
    stage_costs = [microbatch_cost(run, 256, "cuda", Layout(pipeline=3), part) for part in parts]
    assert sum(part.flops for part in stage_costs) == pytest.approx(cost.flops)


def test_shards_keep_less_at_each_level_and_auto_takes_the_first_that_fits() -> None:
    run = run_of("model.preset=xl", "optim.name=adamw", "batch.microbatches=32", "layout.shard=8")
    cluster = gpu_cluster("H100", 8)
    plans = [make_plan(replace(run, layout=replace(run.layout, zero=zero)), cluster)
              for zero in (1, 2, 3)]  # type: ignore[arg-type]  # fmt: skip
    assert [plan.zero for plan in plans] == [1, 2, 3]
    memory_bytes = [plan.predicted.memory_bytes for plan in plans]
    assert memory_bytes == sorted(memory_bytes, reverse=True) and len(set(memory_bytes)) == 3
    for plan in plans:
        capacity_bytes = (plan.predicted.memory_bytes + plan.predicted.overhead_bytes) / 0.9
        small_cluster = replace(cluster, memory_bytes=int(capacity_bytes) + 1)
        assert make_plan(run, small_cluster).zero == plan.zero
    zero3_plan = make_plan(run_of("layout.zero=3", "batch.microbatches=8"), cluster, processes=4)
    assert zero3_plan.zero == 3 and zero3_plan.layout.shard > 1


def test_seventy_billion_parameters_fit_by_shards_alone() -> None:
    """On 128 devices of 80 GB: with the fewest levers, and no cast of the island beside the
    shards."""
    overrides = ("model.preset=llama3-70b", "optim.name=adamw", "batch.microbatches=128",
             "batch.microbatch=1", "data.sequence=4096", "memory.recompute=full")  # fmt: skip
    cluster = gpu_cluster("H100", 8, hosts=16)
    for precision in ("bf16", "fp16", "fp8"):
        run = run_of(*overrides, "layout.shard=128", f"run.precision={precision}")
        plan = make_plan(run, cluster, 128256)
        assert (plan.layout, plan.zero) == (Layout(shard=128), 3)
        assert "bf16 weights" not in plan.predicted.memory_items
        assert 30e9 < plan.predicted.memory_bytes < 60e9
    # Gathers in fp32 are twice as large: two blocks and the rest.
    fp32_plan = make_plan(
        run_of(*overrides, "layout.shard=128", "run.precision=fp32"), cluster, 128256
    )
    gather_bytes = [
        candidate.predicted.memory_items["gathered parameters"] for candidate in (fp32_plan, plan)
    ]
    assert gather_bytes[0] == 2 * gather_bytes[1]
    # Islands of fewer devices than a host has do not hold it.
    with pytest.raises(LayoutError, match="does not fit"):
        make_plan(run_of(*overrides, "layout.shard=4", "layout.islands=32"), cluster, 128256)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_gathers_of_bf16_cost_half_from_zero_2_on(zero: int) -> None:
    layout, overrides = Layout(shard=4), ("batch.microbatches=8", "model.layers=3")
    fp32_run, bf16_run = (
        run_of(*overrides, f"run.precision={precision}") for precision in ("fp32", "bf16")
    )
    specs, parts = specs_of(fp32_run), [all_layers(fp32_run)]
    gather_bytes, reduce_bytes, units = fsdp_bytes(fp32_run, specs, layout, parts, zero)
    divisor = 1 if zero == 1 else 2
    assert fsdp_bytes(bf16_run, specs, layout, parts, zero) == (
        gather_bytes // divisor,
        reduce_bytes,
        units,
    )
    no_sync = SyncChoice("none", "identity", False)
    phase_items = [rank_memory(run, specs, layout, no_sync, "cuda", zero).phases["backward"]
             for run in (fp32_run, bf16_run)]  # fmt: skip
    assert phase_items[0]["gathered parameters"] == divisor * phase_items[1]["gathered parameters"]
    assert (phase_items[1]["bf16 weights"] > 0) == (zero == 1)


# ---- search --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("preset", "overrides"), [("tiny", ()), ("tiny", MOE), ("large", ())])
def test_everything_ranked_is_legal_and_whole(preset: str, overrides: tuple[str, ...]) -> None:
    run = run_of(
        f"model.preset={preset}", "batch.microbatches=24", "data.sequence=1024", *overrides
    )
    ranking = search(run, gpu_cluster("H100", 8, hosts=3))
    axes = {axis for c in ranking.candidates for axis in MODEL_AXES if getattr(c.layout, axis) > 1}
    assert axes == {*MODEL_AXES} - (set() if overrides else {"expert"})
    assert len({c.layout for c in ranking.candidates}) == len(ranking.candidates) > 50
    for candidate in ranking.candidates:
        assert violation_texts(run, candidate.layout) == []
        assert candidate.prediction.step_s > 0 and candidate.layout.size <= 24
        assert candidate.fit_result.stages.ranks == candidate.layout.pipeline


def test_given_degrees_are_kept_and_others_are_one() -> None:
    run = run_of("layout.tensor=2", "layout.pipeline=2", "batch.microbatches=8")
    plan = make_plan(run, gpu_cluster("H100", 8), processes=8)
    assert plan.layout == Layout(island=2, pipeline=2, tensor=2)
    assert plan.stages == ((0, 3), (3, 5)) and plan.splits == ((0, 4), (4, 8))
    assert Plan.from_json(plan.to_json()) == plan
    candidates = search(run, gpu_cluster("H100", 8)).candidates
    assert {(c.layout.tensor, c.layout.pipeline, c.layout.shard) for c in candidates} == {(2, 2, 1)}


@pytest.mark.parametrize("hosts", [1, 128, 2048])
def test_405_billion_parameters_are_planned_in_seconds(hosts: int) -> None:
    run, cluster = run_of(*LLAMA_405B), gpu_cluster("H200", 8, hosts=hosts)
    start_s = time.process_time()
    try:
        plan = make_plan(run, cluster, vocabulary=128256)
    except ConfigError as error:
        assert hosts == 1 and "more devices" in str(error.fix)
        return
    finally:
        assert time.process_time() - start_s < 5
    assert plan.processes == 8 * hosts
    # Shards alone hold it, where there is a microbatch for each of them.
    assert plan.layout.tensor > 1 or plan.layout.shard == plan.processes <= 2048
    assert violation_texts(run, plan.layout, 128256) == []
    specs = count_model_tensors(run.model, 128256)
    assert specs.parameters == pytest.approx(405e9, rel=0.01)
    views = [view_rank(run, plan, rank, specs) for rank in (0, 8 * hosts - 1)]
    for view in views:
        assert view.state_bytes["parameters"] == 4 * view.parameters
        assert f"rank {view.rank} of {8 * hosts}" in rank_text(view)


def test_one_rank_of_a_plan(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.toml"
    path.write_text('kind = "H100"\ndevices = 8\nhosts = 2\n')
    arguments = ["tiny", "batch.microbatches=8", "layout.tensor=2", "layout.pipeline=2",
             "layout.shard=2", "--cluster", str(path), "--dry-run"]  # fmt: skip
    assert plan_command([*arguments, "--rank", "5", "--json"]) == 0
    rank_info = json.loads(capsys.readouterr().out)["rank"]
    layout = Layout(pipeline=2, shard=2, tensor=2)
    coords = layout.coordinates(5)
    assert (
        rank_info["coordinates"] == coords
        and rank_info["ranks"] == 8
        and rank_info["layers"] == [[3, 5]]
    )
    assert rank_info["groups"] == {"pipeline": [1, 5], "shard": [5, 7], "tensor": [4, 5]}
    run = run_of("model.preset=tiny")
    local_specs = [s for s in specs_of(run) if s.layer >= 3]
    assert rank_info["parameters"] == sum(box_volume(s.box(layout, coords)) for s in local_specs)
    assert rank_info["tensors"] == len(local_specs)
    assert plan_command([*arguments, "--rank", "5"]) == 0
    output = capsys.readouterr().out
    assert "built on meta" in output and "(as above)" in output
    view = view_rank(run, make_plan(run, gpu_cluster("H100", 1), processes=1), 0, specs_of(run))
    build_stats = {"parameters": 5, "bytes": 20, "modules": 3, "seconds": 0.25, "memory": 1 << 20}
    assert "above: 1,049,984" in rank_text(view, build_stats) and "250 ms" in rank_text(
        view, build_stats
    )
    for bad_arguments in (
        [*arguments, "--rank", "8"],
        [*arguments, "--rank", "-1"],
        [*arguments[:-1], "--rank", "1"],
    ):
        with pytest.raises(ConfigError):
            plan_command(bad_arguments)
