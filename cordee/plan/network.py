"""Bytes that a rank sends in a step, item by item, and the time they take.

W members agree on n elements of e bytes: the exchange sends (W-1)/W x n x e for each canonical
subtree of a rank's range and once more for the gather; the fused all-reduce 2 (W-1)/W x n x 4
(Thakur et al. 2005). FSDP2 inside an island gathers every block twice and the rest once per
microbatch and reduces once per step. Latency and bandwidth are two numbers per link (Hockney 1994);
r ranks of a group on a host see r times one rank's network. Not here: congestion and overlap on
CPU, where messages need the same cores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cordee.config.run import Run
from cordee.errors import ConfigError
from cordee.layout.axes import Layout
from cordee.layout.split import canonical_subtrees, split_evenly
from cordee.layout.tensors import TensorSpec
from cordee.plan.cluster import Cluster
from cordee.plan.costs import dealt, fresh_s, sharers
from cordee.plan.memory import FP32, TreeSums, Wire, tree_sums, unit_bytes

BF16 = 2
"""Bytes of an element of Muon's updates on the wire."""

GATHER_S = 1.9e-3
"""CPU: fixed time of gathering or reducing one unit with FSDP2 (hooks, copies in and out); with it,
two ranks and 0.2 to 7 M parameters were met within 15 %."""

MESSAGE_S = 20e-6
"""Each further message of a direct exchange: they are posted together and leave in turn."""

OVERLAP = 0.8
"""CUDA: part of FSDP2's messages that can hide behind the computation of the same microbatch."""

COUNTED = "gradients"
"""The item that the run itself counts (metrics.jsonl, bytes_sent)."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in a step, by item, and seconds that are not hidden."""

    sent_bytes: Mapping[str, int]
    seconds: Mapping[str, float]


def choose_wire(run: Run, layout: Layout) -> Wire:
    """The protocol, codec and order of summation of this run on this layout.

    Given: as given (ConfigError when both cannot act). auto: exchange when exact or with a rounding
    codec, all-reduce between islands otherwise, none when there is one island.
    """
    wanted, codec = run.sync.protocol, run.sync.codec
    if wanted == "allreduce" and codec != "identity":
        raise ConfigError(
            "the fused all-reduce sends fp32 only",
            values={"sync.protocol": wanted, "sync.codec": codec},
            fix="sync.protocol=exchange, or sync.codec=identity",
        )
    replicated = run.data.placement == "replicate"
    if run.run.exact or (wanted == "exchange" and not replicated):
        protocol = "exchange"
    elif replicated or layout.workers == 1:
        protocol = "none"
    elif codec != "identity":
        protocol = "exchange"
    else:
        protocol = "none" if layout.island == 1 else "allreduce"
    return Wire(protocol, codec, run.run.exact or protocol == "exchange")


def traffic(
    run: Run,
    specs: Sequence[TensorSpec],
    layout: Layout,
    wire: Wire,
    cluster: Cluster,
    backward_s: float = 0.0,
) -> Traffic:
    """What the busiest rank sends; messages can hide behind `backward_s` of computation."""
    sent: dict[str, int] = {}
    seconds: dict[str, float] = {}
    sums = tree_sums(run, layout) if wire.canonical else TreeSums(1, 1, layout.workers)
    sent[COUNTED] = gradient_bytes(specs, layout, wire, run, sums.ends)
    seconds["agree"] = _agree_s(run, specs, layout, wire, cluster, sent[COUNTED])
    if layout.shard > 1:
        gathered, reduced, units = _sharded(run, specs, layout, wire)
        sent["parameters gathered"], sent["gradients reduced"] = gathered, reduced
        seconds["shard"] = _shard_s(run, layout, cluster, gathered + reduced, units, backward_s)
    shared = _shared_updates(run, specs, layout)
    if shared:
        sent["updates shared"] = shared
        seconds["updates shared"] = _share_s(run, layout, cluster, shared)
    return Traffic({k: v for k, v in sent.items() if v}, {k: v for k, v in seconds.items() if v})


def gradient_bytes(
    specs: Sequence[TensorSpec], layout: Layout, wire: Wire, run: Run, subtrees: int
) -> int:
    """Bytes of gradients that a rank with so many canonical subtrees sends, as it counts them."""
    whole = sum(spec.elements for spec in specs)
    if run.data.placement == "replicate":
        return 8 * (layout.island - 1)
    if wire.canonical:
        members = layout.workers
        slice_bytes = -(-whole // members) * wire.element_bytes
        return (subtrees + 1) * (members - 1) * slice_bytes if members > 1 else 0
    if wire.protocol == "allreduce":
        mine = whole if layout.shard == 1 else unit_sum(specs, layout.shard)
        return int(2 * (layout.island - 1) / layout.island * mine * FP32)
    return 0


def rank_subtrees(run: Run, layout: Layout, wire: Wire, worker: int) -> int:
    """Canonical subtrees that `worker` sends: 1 unless the order is canonical."""
    if not wire.canonical or run.data.placement == "replicate":
        return 1
    total = run.batch.microbatches
    first, last = total * worker // layout.workers, total * (worker + 1) // layout.workers
    return len(canonical_subtrees(range(first, last), total))


def splits(run: Run, layout: Layout) -> list[range]:
    """Microbatches of each worker; with replicated data every island has all of them."""
    total = run.batch.microbatches
    if run.data.placement == "replicate":
        return [range(total)] * layout.workers
    return split_evenly(total, layout.workers)


def unit_sum(specs: Sequence[TensorSpec], shards: int) -> int:
    """Elements that the first shard holds."""
    return sum(unit_bytes(specs, shards)) // (FP32 * shards)


@dataclass(frozen=True)
class _Reach:
    """What one rank of a group sees: the slowest link and the share that crosses it."""

    latency_s: float
    ring_s: float
    ring_bytes_per_s: float
    direct_bytes_per_s: float


def _reach(cluster: Cluster, members: int, stride: int) -> _Reach:
    """A group of `members` ranks, `stride` apart, on the hosts that a full job needs."""
    per_host = max(1, cluster.slots // cluster.hosts)
    together = max(1, per_host // stride)
    hosts = -(-members // together)
    link = cluster.link_bytes_per_s
    # gloo waits at each of a ring's hops; NCCL's inside a host are a small part of one latency.
    hops = (members - 1) * cluster.link_s if cluster.device == "cpu" else cluster.link_s
    if hosts == 1:
        return _Reach(cluster.link_s, hops, link, link)
    hops += (hosts - 1) * cluster.network_s
    ring = min(link, min(together, members) * cluster.network_bytes_per_s)
    # Direct messages: (hosts-1)/hosts of the bytes cross the rank's own network card.
    across = (hosts - 1) / hosts
    direct = 1 / (across / cluster.network_bytes_per_s + (1 - across) / link)
    return _Reach(max(cluster.link_s, cluster.network_s), hops, ring, direct)


def _agree_s(
    run: Run,
    specs: Sequence[TensorSpec],
    layout: Layout,
    wire: Wire,
    cluster: Cluster,
    sent: int,
) -> float:
    """Seconds until all ranks hold the whole gradient."""
    if not sent:
        return 0.0
    whole = FP32 * sum(spec.elements for spec in specs)
    if run.data.placement == "replicate":
        # Every island reads its gradient once to digest it.
        return _reach(cluster, layout.island, 1).latency_s + whole / cluster.memory_bytes_per_s
    if wire.canonical:
        reach = _reach(cluster, layout.workers, 1)
        passes = 10 * whole / cluster.memory_bytes_per_s
        rounds = 2 * (reach.latency_s + (layout.workers - 2) * MESSAGE_S)
        encoded = whole * wire.element_bytes / FP32
        fresh = fresh_s(cluster, encoded, 3) + fresh_s(cluster, whole, 1)
        return rounds + sent / reach.direct_bytes_per_s + passes + fresh
    reach = _reach(cluster, layout.island, layout.shard)
    mine = whole // layout.shard
    passes = 2 * mine / cluster.memory_bytes_per_s
    return 2 * reach.ring_s + sent / reach.ring_bytes_per_s + passes + fresh_s(cluster, mine, 1)


def _sharded(
    run: Run, specs: Sequence[TensorSpec], layout: Layout, wire: Wire
) -> tuple[int, int, int]:
    """FSDP2 in one step: (bytes gathered, bytes reduced, collectives) of one rank.

    Canonical runs keep parameters gathered after a backward, so only the first microbatch gathers a
    block twice, and they leave the reduction to the exchange.
    """
    rest, blocks = unit_bytes(specs, layout.shard)
    share = (layout.shard - 1) / layout.shard
    count = -(-run.batch.microbatches // layout.workers)
    if wire.canonical:
        times_blocks, times_rest, reductions = count + 1, 1, 0
    else:
        times_blocks, times_rest, reductions = 2 * count, count, 1
    gathered = share * (times_blocks * blocks + times_rest * rest)
    reduced = share * reductions * (blocks + rest)
    layers = run.model.layers
    units = times_blocks * layers + times_rest + reductions * (layers + 1)
    return int(gathered), int(reduced), units


def _shard_s(
    run: Run, layout: Layout, cluster: Cluster, sent: int, units: int, backward_s: float
) -> float:
    """Seconds of FSDP2's messages that computation does not hide."""
    reach = _reach(cluster, layout.shard, 1)
    fixed = GATHER_S if cluster.device == "cpu" else reach.ring_s
    messages = units * fixed + sent / reach.ring_bytes_per_s
    if cluster.device == "cpu":
        # Reductions and gathers copy in and out; gloo reduces at half of the link's rate.
        return messages + sent / reach.ring_bytes_per_s
    exposed = messages / max(1, units)
    return exposed + max(0.0, messages - OVERLAP * backward_s)


def _shared_updates(run: Run, specs: Sequence[TensorSpec], layout: Layout) -> int:
    """Bytes of Muon's bf16 updates that the busiest rank sends (optim/muon.py).

    Whole copies: one gather, padded to the rank with most elements. Shards: rows go to the matrix's
    owner and come back.
    """
    ranks = sharers(run, layout)
    if run.optim.name != "muon" or ranks == 1:
        return 0
    _, most = dealt(specs, ranks)
    if layout.shard == 1:
        return most * BF16 * (ranks - 1)
    rows = sum(spec.elements for spec in specs if spec.group == "matrices") // ranks
    return (rows - most // ranks + most - most // ranks) * BF16


def _share_s(run: Run, layout: Layout, cluster: Cluster, sent: int) -> float:
    ranks = sharers(run, layout)
    reach = _reach(cluster, ranks, 1)
    rounds = reach.latency_s if layout.shard == 1 else 2 * reach.latency_s
    return rounds + (ranks - 1) * MESSAGE_S + sent / reach.direct_bytes_per_s
