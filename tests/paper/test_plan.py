"""The planner on paper: counts, bytes, monotonicity, scale, choices.

Machine-independent: every cluster is made here. Text, files and refusals: test_plan_text.py.
"""

from __future__ import annotations

import math
import re
import time
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cordee.config.load import load
from cordee.config.presets import model_presets
from cordee.config.run import Run
from cordee.config.update_rules import UPDATE_RULES
from cordee.errors import ConfigError, LayoutError
from cordee.layout.axes import Layout
from cordee.layout.microbatches import Node, TreeSum, split_evenly
from cordee.layout.stages import make_stages
from cordee.layout.tensors import TensorSpec, count_parameters, tensor_specs
from cordee.planner.activations import activation_bytes
from cordee.planner.cluster import Cluster, gpu_cluster
from cordee.planner.compute_cost import (
    all_layers,
    keys_per_query,
    max_rank_load,
    microbatch_cost,
    newton_schulz_flops,
)
from cordee.planner.memory import partial_sum_counts, rank_memory, rank_state_bytes
from cordee.planner.network import (
    RankLoad,
    choose_sync,
    gradient_bytes,
    step_traffic,
    subtree_count,
)
from cordee.planner.plan import make_plan
from cordee.planner.search import predict, search

CPU = Cluster(
    device="cpu",
    name="test CPU, 4 cores",
    cores=4,
    memory_bytes=16 << 30,
    flops_fp32=100e9,
    flops_bf16=200e9,
    memory_bytes_per_s=20e9,
    link_bytes_per_s=1.3e9,
    link_s=120e-6,
)


def run_of(*overrides: str) -> Run:
    return load(None, ("run.precision=bf16", *overrides)).run


def specs_of(run: Run, vocabulary: int = 256) -> tuple[TensorSpec, ...]:
    return tuple(tensor_specs(run.model, vocabulary))


def state_bytes(run: Run, specs: tuple[TensorSpec, ...], shards: int, index: int) -> dict[str, int]:
    layout = Layout(shard=shards)
    stages = make_stages(run.model, specs[0].shape[0], run.layout, 1)
    return rank_state_bytes(run, specs, layout, stages, layout.coordinates(index))


# ---- counts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "count"),
    [("micro", 131_392), ("tiny", 1_049_984), ("small", 10_818_432), ("medium", 85_347_072)],
)
def test_presets_have_these_many_parameters(preset: str, count: int) -> None:
    model = model_presets()[preset]
    w, layers = model.width, model.layers
    assert count_parameters(model, 256) == count
    assert count == 2 * 256 * w + layers * (12 * w * w + 2 * w) + w


def test_recomputation_costs_time_and_saves_memory() -> None:
    baseline = make_plan(run_of("launch.processes=1"), CPU).predicted
    for kind, period in (("full", 1), ("full", 2), ("selective", 1)):
        recompute = (f"memory.recompute={kind}", f"memory.recompute_every={period}")
        prediction = make_plan(run_of("launch.processes=1", *recompute), CPU).predicted
        assert prediction.step_s > baseline.step_s
        assert prediction.memory_bytes < baseline.memory_bytes
        assert prediction.flops == baseline.flops, "what the result needs stays the same"
    cost = microbatch_cost(run_of(), 256, "cuda")
    recompute_cost = microbatch_cost(run_of("memory.recompute=full"), 256, "cuda")
    head_flops = 6 * 512 * 256 * 128
    assert recompute_cost.matrix_flops - head_flops == (cost.matrix_flops - head_flops) * 8 / 6
    full_loss, chunked_loss = (
        make_plan(run_of("launch.processes=1", f"memory.loss_chunk={c}"), CPU, 50_000).predicted
        for c in (0, 64)
    )
    assert chunked_loss.memory_items["logits"] < full_loss.memory_items["logits"] / 2


def test_operations_by_hand() -> None:
    run = run_of("model.preset=tiny", "batch.microbatch=4")
    cost = microbatch_cost(run, 256, "cuda")
    tokens, w, layers, length = 4 * 256, 128, 5, 256
    assert cost.tokens == tokens
    assert cost.matrix_flops == 6 * tokens * (layers * 12 * w * w + 256 * w)
    assert cost.flops - cost.matrix_flops == 6 * tokens * layers * length * w
    assert cost.attention_flops == cost.flops - cost.matrix_flops
    assert newton_schulz_flops((1, 2, 3)) == 5 * (4 * 2 * 2 * 3 + 2 * 2**3)
    plan = make_plan(run, CPU)
    assert plan.predicted.flops == 4 * cost.flops
    assert plan.predicted.parameters == 1_049_984


@given(st.integers(1, 1500))
def test_keys_per_query_is_what_chunks_meet(length: int) -> None:
    key_counts = [min(length, (q // 128 + 1) * 128) for q in range(length)]
    expected = sum(key_counts) / length if length <= 1024 else length / 2
    assert math.isclose(keys_per_query(length, "cpu"), expected)
    assert keys_per_query(length, "cuda") == length / 2


@given(st.integers(1, 40), st.sampled_from(["micro", "tiny", "medium"]), st.booleans())
@settings(deadline=None, max_examples=40)
def test_muons_matrices_are_dealt_to_the_least_loaded(
    ranks: int, preset: str, is_gated: bool
) -> None:
    run = run_of(f"model.preset={preset}", f"model.mlp={'gated' if is_gated else 'relu2'}")
    shapes = [(1, *s.shape) for s in specs_of(run) if s.group == "matrices"]
    rank_flops, rank_elements = [0.0] * ranks, [0] * ranks
    for shape in sorted(shapes, key=newton_schulz_flops, reverse=True):
        target_rank = min(range(ranks), key=lambda rank: (rank_flops[rank], rank))
        rank_flops[target_rank] += newton_schulz_flops(shape)
        rank_elements[target_rank] += math.prod(shape)
    assert max_rank_load(shapes, ranks) == (max(rank_flops), max(rank_elements))


# ---- bytes ---------------------------------------------------------------------------------------


@given(
    layers=st.integers(1, 5),
    heads=st.integers(1, 4),
    half=st.integers(1, 20),
    gated=st.booleans(),
    tied=st.booleans(),
    vocabulary=st.integers(2, 700),
    shards=st.integers(1, 300),
    optimiser=st.sampled_from([r.name for r in UPDATE_RULES.values() if not r.is_factored]),
)
@settings(max_examples=150, deadline=None)
def test_shards_add_up_to_the_whole(
    layers: int,
    heads: int,
    half: int,
    gated: bool,
    tied: bool,
    vocabulary: int,
    shards: int,
    optimiser: str,
) -> None:
    run = run_of(
        f"model.layers={layers}", f"model.heads={heads}", f"model.width={2 * half * heads}",
        f"model.mlp={'gated' if gated else 'relu2'}", f"model.tied={str(tied).lower()}",
        f"optim.name={optimiser}",
    )  # fmt: skip
    specs = specs_of(run, vocabulary)
    full_bytes = state_bytes(run, specs, 1, 0)
    shard_bytes = [state_bytes(run, specs, shards, index) for index in range(shards)]
    for item, size in full_bytes.items():
        assert sum(shard[item] for shard in shard_bytes) == size
        assert shard_bytes[0][item] == max(shard[item] for shard in shard_bytes)
    assert full_bytes["parameters"] == 4 * count_parameters(run.model, vocabulary)


def test_optimiser_bytes_by_hand() -> None:
    run = run_of("model.preset=micro")
    matrix_elements, other_elements = 2 * 12 * 64 * 64, 2 * 256 * 64 + 2 * 2 * 64 + 64
    expected = {
        "sgd": 0,
        "momentum": 4 * (matrix_elements + other_elements),
        "adam": 8 * (matrix_elements + other_elements),
        "adamw": 8 * (matrix_elements + other_elements),
        "muon": 4 * matrix_elements + 8 * other_elements,
        "adafactor": 4 * (2 * (4 * 128 + 2 * 320) + 2 * (256 + 64) + 5 * 64),
    }
    for name, size in expected.items():
        rank_bytes = state_bytes(
            run_of("model.preset=micro", f"optim.name={name}"), specs_of(run), 1, 0
        )
        assert rank_bytes["optimiser"] == size, name


@given(st.integers(1, 80), st.integers(1, 80))
@settings(deadline=None)
def test_partial_sums_are_those_of_the_tree(microbatches: int, workers: int) -> None:
    workers = min(workers, microbatches)
    run = run_of(f"batch.microbatches={microbatches}", "run.exact=true", "run.steps=1")
    max_count = end_count = total_count = 0
    for part in split_evenly(microbatches, workers):
        tree = TreeSum(part, microbatches)
        partial_sums: list[tuple[Node, int]] = []
        for index in part:
            max_count = max(max_count, len(partial_sums) + 1)
            tree.feed(partial_sums, index, 1, lambda a, b: a + b)
        end_count, total_count = max(end_count, len(partial_sums)), total_count + len(partial_sums)
    counts = partial_sum_counts(run, Layout(island=workers))
    assert (counts.peak, counts.final, counts.total) == (max_count, end_count, total_count)


@given(st.integers(1, 40), st.integers(2, 40), st.sampled_from(["identity", "bf16"]))
@settings(deadline=None)
def test_exchange_bytes_are_those_counted_on_the_wire(
    microbatches: int, islands: int, codec: str
) -> None:
    islands = min(islands, microbatches)
    run = run_of(f"batch.microbatches={microbatches}", "sync.protocol=exchange",
                 f"sync.codec={codec}")  # fmt: skip
    layout, specs = Layout(island=islands), specs_of(run)
    sync = choose_sync(run, layout)
    message_bytes = -(-sum(s.elements for s in specs) // islands) * (2 if codec == "bf16" else 4)
    rank_bytes = []
    for worker, part in enumerate(split_evenly(microbatches, islands)):
        tree = TreeSum(part, microbatches)
        partial_sums: list[tuple[Node, int]] = []
        for index in part:
            tree.feed(partial_sums, index, 1, lambda a, b: a + b)
        subtrees = subtree_count(run, layout, sync, worker)
        rank_bytes.append(gradient_bytes(specs, layout, sync, run, subtrees))
        messages = [message_bytes] * len(partial_sums) * (islands - 1) + [message_bytes] * (
            islands - 1
        )
        assert rank_bytes[-1] == sum(messages)
    sent_bytes = step_traffic(run, specs, layout, sync, CPU).sent_bytes.get("gradients", 0)
    assert sent_bytes == max(rank_bytes)


def test_allreduce_and_shard_bytes_by_hand() -> None:
    run = run_of("model.preset=micro", "batch.microbatches=8", "optim.name=adamw")
    specs, n = specs_of(run), 131_392
    layout = Layout(island=4)
    sync = choose_sync(run, layout)
    assert (sync.protocol, sync.is_canonical) == ("allreduce", False)
    assert step_traffic(run, specs, layout, sync, CPU).sent_bytes == {
        "gradients": 2 * 3 * 4 * n // 4
    }
    shard_layout = Layout(shard=4)
    rest_bytes = 4 * (2 * 256 * 64 + 64)
    block_bytes = 4 * n - rest_bytes
    # Two microbatches a rank: zero 3 gathers blocks for forward and backward, the rest once each;
    # 2 and 3 gather bf16.
    gather_bytes = {1: 4 * n, 2: 2 * n, 3: (2 * 2 * block_bytes + 2 * rest_bytes) // 2}
    reduce_bytes = {1: 4 * n, 2: 2 * 4 * n, 3: 2 * 4 * n}
    sync = choose_sync(run, shard_layout)
    for zero in (1, 2, 3):
        rank_load = RankLoad([all_layers(run)], zero)
        sent_bytes = step_traffic(run, specs, shard_layout, sync, CPU, rank_load).sent_bytes
        assert sent_bytes["parameters gathered"] == gather_bytes[zero] * 3 // 4
        assert sent_bytes["gradients reduced"] == reduce_bytes[zero] * 3 // 4


def test_memory_items_add_up_and_shards_need_less() -> None:
    run = run_of("model.preset=small", "batch.microbatches=8")
    specs = specs_of(run)
    for layout in (Layout(), Layout(island=4), Layout(shard=4), Layout(island=2, shard=2)):
        for is_exact in (False, True):
            run_variant = replace(run, run=replace(run.run, exact=is_exact))
            memory = rank_memory(
                run_variant, specs, layout, choose_sync(run_variant, layout), "cpu"
            )
            assert sum(memory.peak_items.values()) == memory.total_bytes
            assert memory.total_bytes == sum(memory.state.values()) + max(
                sum(phase.values()) for phase in memory.phases.values()
            )
    state = [sum(state_bytes(run, specs, shards, 0).values()) for shards in (1, 2, 4, 8)]
    assert state == sorted(state, reverse=True)
    assert state[0] == pytest.approx(8 * state[3], rel=1e-3)


def test_activations_are_what_autograd_keeps() -> None:
    torch = pytest.importorskip("torch")
    transformer = pytest.importorskip("cordee.model.transformer")
    moe_overrides = ["model.width=64", "model.heads=4", "model.layers=3", "model.moe.experts=8",
               "model.moe.active=2", "model.moe.width=48"]  # fmt: skip
    for overrides in (
        ["model.width=64", "model.heads=4", "model.layers=2", "data.sequence=200"],
        ["model.width=96", "model.heads=6", "model.layers=1", "model.mlp=gated"],
        ["model.width=64", "model.heads=4", "model.layers=2", "run.precision=bf16"],
        [*moe_overrides, "model.mlp=gated", "model.moe.router=sigmoid"],
        [*moe_overrides, "model.moe.active=1", "model.moe.dense_layers=1", "model.moe.shared=1"],
        [*moe_overrides, "run.precision=bf16", "model.moe.shared=2"],
    ):
        run = run_of(*overrides, "batch.microbatch=2")
        model = transformer.Transformer(run.model, 256)
        parameter_pointers = {p.untyped_storage().data_ptr() for p in model.parameters()}
        saved_bytes: dict[int, int] = {}
        saved_tensors: list[Any] = []

        def save_tensor(
            tensor: Any,
            saved_bytes: dict[int, int] = saved_bytes,
            saved_tensors: list[Any] = saved_tensors,
        ) -> Any:
            storage = tensor.untyped_storage()
            saved_tensors.append(tensor)
            saved_bytes[storage.data_ptr()] = storage.nbytes()
            return tensor

        tokens = torch.randint(256, (2, run.data.sequence + 1))
        is_bf16 = run.run.precision == "bf16"
        with (
            torch.autograd.graph.saved_tensors_hooks(save_tensor, lambda t: t),
            torch.autocast("cpu", torch.bfloat16, enabled=is_bf16),
        ):
            model(tokens[:, :-1], tokens[:, 1:])
        actual_bytes = sum(
            size for pointer, size in saved_bytes.items() if pointer not in parameter_pointers
        )
        logit_bytes = 2 * 4 * 2 * run.data.sequence * 256
        specs = [spec for spec in tensor_specs(run.model, 256) if len(spec.shape) > 1]
        cast_elements = [
            spec.elements for spec in specs if not re.search("embed|router", spec.name)
        ]
        weight_bytes = 2 * sum(cast_elements) if is_bf16 else 0
        expected_bytes = activation_bytes(run, "cpu") + logit_bytes + weight_bytes
        # In bf16 a CPU fills experts' rows up: how many rows of zeros hangs on the routing.
        is_padded = is_bf16 and run.model.moe.experts
        assert actual_bytes == pytest.approx(expected_bytes, rel=0.04 if is_padded else 0.01)


# ---- monotony and scale --------------------------------------------------------------------------


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 16))
@settings(max_examples=40, deadline=None)
def test_more_memory_never_means_fewer_layouts(size_a: int, size_b: int, microbatches: int) -> None:
    run = run_of("model.preset=medium", f"batch.microbatches={microbatches}")
    small_size, large_size = sorted((size_a, size_b))
    layout_sets = [
        {c.layout for c in search(run, replace(CPU, memory_bytes=size * 300 << 20)).candidates}
        for size in (small_size, large_size)
    ]
    assert layout_sets[0] <= layout_sets[1]


@given(
    st.sampled_from(["link_bytes_per_s", "network_bytes_per_s", "memory_bytes_per_s", "flops_fp32",
                     "flops_bf16"]),
    st.floats(1.0, 50.0),
    st.booleans(),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_a_faster_machine_is_never_slower(field_name: str, factor: float, is_cuda: bool) -> None:
    cluster = gpu_cluster("A100", 2, hosts=2) if is_cuda else replace(CPU, hosts=2)
    run = run_of("batch.microbatches=8", "run.precision=bf16")
    faster_cluster = replace(cluster, **{field_name: factor * getattr(cluster, field_name)})
    for layout in (Layout(), Layout(island=4), Layout(shard=4), Layout(island=2, shard=2)):
        base = predict(run, cluster, layout, specs_of(run)).prediction
        prediction = predict(run, faster_cluster, layout, specs_of(run)).prediction
        assert prediction.step_s <= base.step_s
        assert prediction.bytes_sent == base.bytes_sent


@pytest.mark.parametrize("ranks", [1, 2, 8, 1000, 100_000])
def test_any_number_of_ranks_is_planned_in_seconds(ranks: int) -> None:
    per_host = min(ranks, 8)
    cluster = gpu_cluster("H100", per_host, hosts=ranks // per_host)
    run = run_of("model.preset=large", f"batch.microbatches={ranks}", "optim.name=adamw")
    start_s = time.process_time()
    free_plan = make_plan(run, cluster)
    fixed_plan = make_plan(run, cluster, processes=ranks)
    assert time.process_time() - start_s < 15
    assert fixed_plan.processes == ranks and fixed_plan.layout.dp_size == ranks
    assert fixed_plan.splits == tuple((i, i + 1) for i in range(ranks))
    assert free_plan.predicted.step_s <= fixed_plan.predicted.step_s


@given(st.integers(1, 40), st.integers(1, 40))
@settings(deadline=None, max_examples=60)
def test_splits_give_every_microbatch_to_one_worker(microbatches: int, processes: int) -> None:
    run = run_of(f"batch.microbatches={microbatches}")
    if processes > min(microbatches, 32):
        with pytest.raises(ConfigError):
            make_plan(run, CPU, processes=processes)
        return
    plan = make_plan(run, CPU, processes=processes)
    assert [i for start, stop in plan.splits for i in range(start, stop)] == [*range(microbatches)]
    assert len(plan.splits) == plan.layout.dp_size == plan.processes == processes


# ---- choices -------------------------------------------------------------------------------------


def test_protocols() -> None:
    def protocol(layout: Layout, *overrides: str) -> tuple[str, bool]:
        sync = choose_sync(run_of("batch.microbatches=8", *overrides), layout)
        return sync.protocol, sync.is_canonical

    exact_overrides = ("run.exact=true", "run.steps=1")
    two_islands, two_shards = Layout(island=2), Layout(shard=2)
    assert protocol(two_islands) == ("allreduce", False)
    assert protocol(Layout()) == protocol(two_shards) == ("none", False)
    assert protocol(two_islands, "sync.codec=bf16") == ("exchange", True)
    assert protocol(Layout(), "sync.codec=bf16") == ("none", False)
    assert (
        protocol(two_islands, *exact_overrides)
        == protocol(Layout(), *exact_overrides)
        == ("exchange", True)
    )
    assert protocol(two_islands, "sync.protocol=exchange") == ("exchange", True)
    assert protocol(two_islands, "data.placement=replicate") == ("none", False)
    with pytest.raises(ConfigError, match="sends fp32 only"):
        protocol(two_islands, "sync.protocol=allreduce", "sync.codec=bf16")


def test_replicated_islands_compute_everything() -> None:
    run = run_of("data.placement=replicate", "batch.microbatches=3")
    plan = make_plan(run, CPU, processes=4)
    assert plan.splits == ((0, 3),) * 4
    assert plan.predicted.bytes_sent == 8 * 3
    assert plan.predicted.step_s > make_plan(run, CPU, processes=1).predicted.step_s
    assert {c.layout.shard for c in search(run, CPU).candidates} == {1}


def test_threads() -> None:
    run = run_of("batch.microbatches=8")
    assert make_plan(run, CPU, processes=1).threads == 4
    assert make_plan(run, CPU, processes=2).threads == 2
    assert make_plan(run, CPU, processes=8).threads == 1
    exact_run = run_of("run.exact=true", "run.steps=1", "batch.microbatches=8")
    assert make_plan(exact_run, CPU, processes=1).threads == 1
    three_threads_run = run_of("run.exact=true", "run.steps=1", "launch.threads=3")
    assert make_plan(three_threads_run, CPU, processes=1).threads == 3


def test_what_does_not_fit_is_sharded_or_refused_with_a_layout_that_fits() -> None:
    run = run_of("model.preset=xl", "optim.name=adamw", "batch.microbatches=8")
    small_cluster = replace(gpu_cluster("H100", 8), memory_bytes=18 << 30)
    free_plan = make_plan(run, small_cluster)
    assert free_plan.layout.shard > 1
    fixed_plan = make_plan(run, small_cluster, processes=8)
    assert (
        fixed_plan.layout.shard > 1
        and fixed_plan.processes == 8
        and "does not fit" in fixed_plan.why
    )
    with pytest.raises(LayoutError) as exc_info:
        make_plan(replace(run, layout=replace(run.layout, islands=8)), small_cluster)
    words = str(exc_info.value.fix).split(" (")[0].split()
    fix = {key: value for key, _, value in (word.partition("=") for word in words)}
    fixed_run = run_of("model.preset=xl", "optim.name=adamw", "batch.microbatches=8",
                   *(f"{key}={value}" for key, value in fix.items()))  # fmt: skip
    assert make_plan(fixed_run, small_cluster).layout.shard == int(fix["layout.shard"])
    with pytest.raises(LayoutError, match="no layout of these devices"):
        make_plan(run, replace(small_cluster, memory_bytes=1 << 30))
