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
from cordee.errors import ConfigError, LayoutError
from cordee.layout.axes import Layout
from cordee.layout.split import Node, TreeSum, split_evenly
from cordee.layout.stages import make_stages
from cordee.layout.tensors import TensorSpec, parameters, tensors
from cordee.plan.activations import activation_bytes
from cordee.plan.cluster import Cluster, gpu_cluster
from cordee.plan.costs import keys_per_query, microbatch_work, whole
from cordee.plan.dealing import dealt, newton_schulz_flops
from cordee.plan.memory import rank_memory, rank_state_bytes, tree_sums
from cordee.plan.network import Load, choose_wire, gradient_bytes, rank_subtrees, traffic
from cordee.plan.plan import make_plan
from cordee.plan.search import predict, search

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
    return tuple(tensors(run.model, vocabulary))


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
    assert parameters(model, 256) == count
    assert count == 2 * 256 * w + layers * (12 * w * w + 2 * w) + w


def test_recomputation_costs_time_and_saves_memory() -> None:
    plain = make_plan(run_of("launch.processes=1"), CPU).predicted
    for kind, every in (("full", 1), ("full", 2), ("selective", 1)):
        words = (f"memory.recompute={kind}", f"memory.recompute_every={every}")
        other = make_plan(run_of("launch.processes=1", *words), CPU).predicted
        assert other.step_s > plain.step_s
        assert other.memory_bytes < plain.memory_bytes
        assert other.flops == plain.flops, "what the result needs stays the same"
    work = microbatch_work(run_of(), 256, "cuda")
    again = microbatch_work(run_of("memory.recompute=full"), 256, "cuda")
    head = 6 * 512 * 256 * 128
    assert again.matrix_flops - head == (work.matrix_flops - head) * 8 / 6
    whole, chunk = (
        make_plan(run_of("launch.processes=1", f"memory.loss_chunk={c}"), CPU, 50_000).predicted
        for c in (0, 64)
    )
    assert chunk.memory_items["logits"] < whole.memory_items["logits"] / 2


def test_operations_by_hand() -> None:
    run = run_of("model.preset=tiny", "batch.microbatch=4")
    work = microbatch_work(run, 256, "cuda")
    tokens, w, layers, length = 4 * 256, 128, 5, 256
    assert work.tokens == tokens
    assert work.matrix_flops == 6 * tokens * (layers * 12 * w * w + 256 * w)
    assert work.flops - work.matrix_flops == 6 * tokens * layers * length * w
    assert work.attention_flops == work.flops - work.matrix_flops
    assert newton_schulz_flops((1, 2, 3)) == 5 * (4 * 2 * 2 * 3 + 2 * 2**3)
    plan = make_plan(run, CPU)
    assert plan.predicted.flops == 4 * work.flops
    assert plan.predicted.parameters == 1_049_984


@given(st.integers(1, 1500))
def test_keys_per_query_is_what_chunks_meet(length: int) -> None:
    met = [min(length, (q // 128 + 1) * 128) for q in range(length)]
    slow = sum(met) / length if length <= 1024 else length / 2
    assert math.isclose(keys_per_query(length, "cpu"), slow)
    assert keys_per_query(length, "cuda") == length / 2


@given(st.integers(1, 40), st.sampled_from(["micro", "tiny", "medium"]), st.booleans())
@settings(deadline=None, max_examples=40)
def test_muons_matrices_are_dealt_to_the_least_loaded(ranks: int, preset: str, gated: bool) -> None:
    run = run_of(f"model.preset={preset}", f"model.mlp={'gated' if gated else 'relu2'}")
    shapes = [(1, *s.shape) for s in specs_of(run) if s.group == "matrices"]
    load, elements = [0.0] * ranks, [0] * ranks
    for shape in sorted(shapes, key=newton_schulz_flops, reverse=True):
        least = min(range(ranks), key=lambda rank: (load[rank], rank))
        load[least] += newton_schulz_flops(shape)
        elements[least] += math.prod(shape)
    assert dealt(shapes, ranks) == (max(load), max(elements))


# ---- bytes ---------------------------------------------------------------------------------------

OPTIMISERS = ("sgd", "momentum", "adam", "adamw", "muon", "adafactor")


@given(
    layers=st.integers(1, 5),
    heads=st.integers(1, 4),
    half=st.integers(1, 20),
    gated=st.booleans(),
    tied=st.booleans(),
    vocabulary=st.integers(2, 700),
    shards=st.integers(1, 300),
    optimiser=st.sampled_from([o for o in OPTIMISERS if o != "adafactor"]),
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
    whole = state_bytes(run, specs, 1, 0)
    parts = [state_bytes(run, specs, shards, index) for index in range(shards)]
    for item, size in whole.items():
        assert sum(part[item] for part in parts) == size
        assert parts[0][item] == max(part[item] for part in parts)
    assert whole["parameters"] == 4 * parameters(run.model, vocabulary)


def test_optimiser_bytes_by_hand() -> None:
    run = run_of("model.preset=micro")
    matrices, others = 2 * 12 * 64 * 64, 2 * 256 * 64 + 2 * 2 * 64 + 64
    expected = {
        "sgd": 0,
        "momentum": 4 * (matrices + others),
        "adam": 8 * (matrices + others),
        "adamw": 8 * (matrices + others),
        "muon": 4 * matrices + 8 * others,
        "adafactor": 4 * (2 * (4 * 128 + 2 * 320) + 2 * (256 + 64) + 5 * 64),
    }
    for name, size in expected.items():
        told = state_bytes(run_of("model.preset=micro", f"optim.name={name}"), specs_of(run), 1, 0)
        assert told["optimiser"] == size, name


@given(st.integers(1, 80), st.integers(1, 80))
@settings(deadline=None)
def test_partial_sums_are_those_of_the_tree(microbatches: int, workers: int) -> None:
    workers = min(workers, microbatches)
    run = run_of(f"batch.microbatches={microbatches}", "run.exact=true", "run.steps=1")
    most = ends = total = 0
    for part in split_evenly(microbatches, workers):
        tree = TreeSum(part, microbatches)
        partial: list[tuple[Node, int]] = []
        for index in part:
            most = max(most, len(partial) + 1)
            tree.feed(partial, index, 1, lambda a, b: a + b)
        ends, total = max(ends, len(partial)), total + len(partial)
    told = tree_sums(run, Layout(island=workers))
    assert (told.most, told.ends, told.total) == (most, ends, total)


@given(st.integers(1, 40), st.integers(2, 40), st.sampled_from(["identity", "bf16"]))
@settings(deadline=None)
def test_exchange_bytes_are_those_counted_on_the_wire(
    microbatches: int, islands: int, codec: str
) -> None:
    islands = min(islands, microbatches)
    run = run_of(f"batch.microbatches={microbatches}", "sync.protocol=exchange",
                 f"sync.codec={codec}")  # fmt: skip
    layout, specs = Layout(island=islands), specs_of(run)
    wire = choose_wire(run, layout)
    size = -(-sum(s.elements for s in specs) // islands) * (2 if codec == "bf16" else 4)
    counted = []
    for worker, part in enumerate(split_evenly(microbatches, islands)):
        tree = TreeSum(part, microbatches)
        partial: list[tuple[Node, int]] = []
        for index in part:
            tree.feed(partial, index, 1, lambda a, b: a + b)
        subtrees = rank_subtrees(run, layout, wire, worker)
        counted.append(gradient_bytes(specs, layout, wire, run, subtrees))
        messages = [size] * len(partial) * (islands - 1) + [size] * (islands - 1)
        assert counted[-1] == sum(messages)
    sent = traffic(run, specs, layout, wire, CPU).sent_bytes.get("gradients", 0)
    assert sent == max(counted)


def test_allreduce_and_shard_bytes_by_hand() -> None:
    run = run_of("model.preset=micro", "batch.microbatches=8", "optim.name=adamw")
    specs, n = specs_of(run), 131_392
    layout = Layout(island=4)
    wire = choose_wire(run, layout)
    assert (wire.protocol, wire.canonical) == ("allreduce", False)
    assert traffic(run, specs, layout, wire, CPU).sent_bytes == {"gradients": 2 * 3 * 4 * n // 4}
    sharded = Layout(shard=4)
    rest = 4 * (2 * 256 * 64 + 64)
    blocks = 4 * n - rest
    # Two microbatches a rank: zero 3 gathers blocks for forward and backward, the rest once each;
    # 2 and 3 gather bf16.
    gathered = {1: 4 * n, 2: 2 * n, 3: (2 * 2 * blocks + 2 * rest) // 2}
    reduced = {1: 4 * n, 2: 2 * 4 * n, 3: 2 * 4 * n}
    wire = choose_wire(run, sharded)
    for zero in (1, 2, 3):
        load = Load([whole(run)], zero)
        sent = traffic(run, specs, sharded, wire, CPU, load).sent_bytes
        assert sent["parameters gathered"] == gathered[zero] * 3 // 4
        assert sent["gradients reduced"] == reduced[zero] * 3 // 4


def test_memory_items_add_up_and_shards_need_less() -> None:
    run = run_of("model.preset=small", "batch.microbatches=8")
    specs = specs_of(run)
    for layout in (Layout(), Layout(island=4), Layout(shard=4), Layout(island=2, shard=2)):
        for exact in (False, True):
            wanted = replace(run, run=replace(run.run, exact=exact))
            memory = rank_memory(wanted, specs, layout, choose_wire(wanted, layout), "cpu")
            assert sum(memory.items.values()) == memory.total_bytes
            assert memory.total_bytes == sum(memory.state.values()) + max(
                sum(phase.values()) for phase in memory.phases.values()
            )
    state = [sum(state_bytes(run, specs, shards, 0).values()) for shards in (1, 2, 4, 8)]
    assert state == sorted(state, reverse=True)
    assert state[0] == pytest.approx(8 * state[3], rel=1e-3)


def test_activations_are_what_autograd_keeps() -> None:
    torch = pytest.importorskip("torch")
    transformer = pytest.importorskip("cordee.model.transformer")
    experts = ["model.width=64", "model.heads=4", "model.layers=3", "model.moe.experts=8",
               "model.moe.active=2", "model.moe.width=48"]  # fmt: skip
    for overrides in (
        ["model.width=64", "model.heads=4", "model.layers=2", "data.sequence=200"],
        ["model.width=96", "model.heads=6", "model.layers=1", "model.mlp=gated"],
        ["model.width=64", "model.heads=4", "model.layers=2", "run.precision=bf16"],
        [*experts, "model.mlp=gated", "model.moe.router=sigmoid"],
        [*experts, "model.moe.active=1", "model.moe.dense_layers=1", "model.moe.shared=1"],
        [*experts, "run.precision=bf16", "model.moe.shared=2"],
    ):
        run = run_of(*overrides, "batch.microbatch=2")
        model = transformer.Transformer(run.model, 256)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept: dict[int, int] = {}
        alive: list[Any] = []

        def keep(tensor: Any, kept: dict[int, int] = kept, alive: list[Any] = alive) -> Any:
            storage = tensor.untyped_storage()
            alive.append(tensor)
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        tokens = torch.randint(256, (2, run.data.sequence + 1))
        bf16 = run.run.precision == "bf16"
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
            torch.autocast("cpu", torch.bfloat16, enabled=bf16),
        ):
            model(tokens[:, :-1], tokens[:, 1:])
        real = sum(size for pointer, size in kept.items() if pointer not in own)
        logits = 2 * 4 * 2 * run.data.sequence * 256
        specs = [spec for spec in tensors(run.model, 256) if len(spec.shape) > 1]
        cast = [spec.elements for spec in specs if not re.search("embed|router", spec.name)]
        weights = 2 * sum(cast) if bf16 else 0
        told = activation_bytes(run, "cpu") + logits + weights
        # In bf16 a CPU fills experts' rows up: how many rows of zeros hangs on the routing.
        filled = bf16 and run.model.moe.experts
        assert real == pytest.approx(told, rel=0.04 if filled else 0.01)


# ---- monotony and scale --------------------------------------------------------------------------


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 16))
@settings(max_examples=40, deadline=None)
def test_more_memory_never_means_fewer_layouts(less: int, more: int, microbatches: int) -> None:
    run = run_of("model.preset=medium", f"batch.microbatches={microbatches}")
    small, large = sorted((less, more))
    found = [
        {c.layout for c in search(run, replace(CPU, memory_bytes=size * 300 << 20)).ranked}
        for size in (small, large)
    ]
    assert found[0] <= found[1]


@given(
    st.sampled_from(["link_bytes_per_s", "network_bytes_per_s", "memory_bytes_per_s", "flops_fp32",
                     "flops_bf16"]),
    st.floats(1.0, 50.0),
    st.booleans(),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_a_faster_machine_is_never_slower(part: str, factor: float, cuda: bool) -> None:
    cluster = gpu_cluster("A100", 2, hosts=2) if cuda else replace(CPU, hosts=2)
    run = run_of("batch.microbatches=8", "run.precision=bf16")
    faster = replace(cluster, **{part: factor * getattr(cluster, part)})
    for layout in (Layout(), Layout(island=4), Layout(shard=4), Layout(island=2, shard=2)):
        before = predict(run, cluster, layout, specs_of(run)).predicted
        after = predict(run, faster, layout, specs_of(run)).predicted
        assert after.step_s <= before.step_s
        assert after.bytes_sent == before.bytes_sent


@pytest.mark.parametrize("ranks", [1, 2, 8, 1000, 100_000])
def test_any_number_of_ranks_is_planned_in_seconds(ranks: int) -> None:
    per_host = min(ranks, 8)
    cluster = gpu_cluster("H100", per_host, hosts=ranks // per_host)
    run = run_of("model.preset=large", f"batch.microbatches={ranks}", "optim.name=adamw")
    began = time.process_time()
    free = make_plan(run, cluster)
    told = make_plan(run, cluster, processes=ranks)
    assert time.process_time() - began < 15
    assert told.processes == ranks and told.layout.workers == ranks
    assert told.splits == tuple((i, i + 1) for i in range(ranks))
    assert free.predicted.step_s <= told.predicted.step_s


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
    assert len(plan.splits) == plan.layout.workers == plan.processes == processes


# ---- choices -------------------------------------------------------------------------------------


def test_protocols() -> None:
    def protocol(layout: Layout, *overrides: str) -> tuple[str, bool]:
        wire = choose_wire(run_of("batch.microbatches=8", *overrides), layout)
        return wire.protocol, wire.canonical

    exact = ("run.exact=true", "run.steps=1")
    two, sharded = Layout(island=2), Layout(shard=2)
    assert protocol(two) == ("allreduce", False)
    assert protocol(Layout()) == protocol(sharded) == ("none", False)
    assert protocol(two, "sync.codec=bf16") == ("exchange", True)
    assert protocol(Layout(), "sync.codec=bf16") == ("none", False)
    assert protocol(two, *exact) == protocol(Layout(), *exact) == ("exchange", True)
    assert protocol(two, "sync.protocol=exchange") == ("exchange", True)
    assert protocol(two, "data.placement=replicate") == ("none", False)
    with pytest.raises(ConfigError, match="sends fp32 only"):
        protocol(two, "sync.protocol=allreduce", "sync.codec=bf16")


def test_replicated_islands_compute_everything() -> None:
    run = run_of("data.placement=replicate", "batch.microbatches=3")
    plan = make_plan(run, CPU, processes=4)
    assert plan.splits == ((0, 3),) * 4
    assert plan.predicted.bytes_sent == 8 * 3
    assert plan.predicted.step_s > make_plan(run, CPU, processes=1).predicted.step_s
    assert {c.layout.shard for c in search(run, CPU).ranked} == {1}


def test_threads() -> None:
    run = run_of("batch.microbatches=8")
    assert make_plan(run, CPU, processes=1).threads == 4
    assert make_plan(run, CPU, processes=2).threads == 2
    assert make_plan(run, CPU, processes=8).threads == 1
    exact = run_of("run.exact=true", "run.steps=1", "batch.microbatches=8")
    assert make_plan(exact, CPU, processes=1).threads == 1
    given = run_of("run.exact=true", "run.steps=1", "launch.threads=3")
    assert make_plan(given, CPU, processes=1).threads == 3


def test_what_does_not_fit_is_sharded_or_refused_with_a_layout_that_fits() -> None:
    run = run_of("model.preset=xl", "optim.name=adamw", "batch.microbatches=8")
    tight = replace(gpu_cluster("H100", 8), memory_bytes=18 << 30)
    free = make_plan(run, tight)
    assert free.layout.shard > 1
    asked = make_plan(run, tight, processes=8)
    assert asked.layout.shard > 1 and asked.processes == 8 and "does not fit" in asked.why
    with pytest.raises(LayoutError) as raised:
        make_plan(replace(run, layout=replace(run.layout, islands=8)), tight)
    words = str(raised.value.fix).split(" (")[0].split()
    fix = {key: value for key, _, value in (word.partition("=") for word in words)}
    fixed = run_of("model.preset=xl", "optim.name=adamw", "batch.microbatches=8",
                   *(f"{key}={value}" for key, value in fix.items()))  # fmt: skip
    assert make_plan(fixed, tight).layout.shard == int(fix["layout.shard"])
    with pytest.raises(LayoutError, match="no layout of these devices"):
        make_plan(run, replace(tight, memory_bytes=1 << 30))
