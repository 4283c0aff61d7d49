"""Bytes of one rank, item by item: state that stays, and what the worst moment of a step adds.

State is counted from the table of tensors and is exact: the shards' bytes add up to the whole.
Activations are counted as autograd keeps them for the built-in model (model/transformer.py). Bytes
allocated at the peak were met within 1 % for six runs of 0.1 to 11 M parameters (torch's profiler,
one process, fp32 and bf16). Not here: the process itself (interpreter, torch), which is
`OVERHEAD_BYTES` and stands beside the state, not in it. Traded away: what glibc's allocator wastes
is one measured formula (`slack_bytes`); CUDA's is left to `FITS`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cordee.config.run import MemorySettings, Run
from cordee.layout.axes import Layout
from cordee.layout.split import canonical_subtrees, shard_rows, split_evenly
from cordee.layout.tensors import TensorSpec
from cordee.plan import classifier
from cordee.plan.costs import CHUNKED_UP_TO, keys_per_query

FP32 = 4
OVERHEAD_BYTES: Mapping[str, int] = {"cpu": 250 << 20, "cuda": 900 << 20}
"""Interpreter and torch (cpu); context and communicators outside torch's allocator (cuda)."""

FITS = 0.90
"""Part of the memory that a plan may fill; the rest is the allocator's fragments."""

STATE_BYTES: Mapping[str, int] = {"sgd": 0, "momentum": 4, "adam": 8, "adamw": 8, "muon": 4}
"""Optimiser bytes per parameter; muon: of matrices (adamw keeps the rest), adafactor: factored."""

SLACK_BYTES = 30 << 20
SLACK_RANKS_BYTES = 12 << 20
SLACK_SHARE = 0.6
"""CPU: kernels and thread stacks, gloo's buffers, and the part of activations that freed memory
between them costs. Resident peaks of 14 runs were 0.83 to 1.18 of what this predicts."""

LOOKED_AT = 256
"""Workers whose ranges are looked at one by one for the worst; beyond, a bound is used."""


@dataclass(frozen=True)
class Memory:
    """Bytes of the worst rank. `state` always; of `phases` only the largest counts."""

    state: Mapping[str, int]
    phases: Mapping[str, Mapping[str, int]]

    @property
    def peak(self) -> str:
        """The phase that needs most: "backward", "sum", "agree" or "update"."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def items(self) -> dict[str, int]:
        """What is alive at the peak; adds up to `total_bytes`."""
        alive = {**self.state, **self.phases[self.peak]}
        return {name: size for name, size in alive.items() if size}

    @property
    def total_bytes(self) -> int:
        """Bytes at the peak, without the process itself."""
        return sum(self.items.values())


@dataclass(frozen=True)
class Wire:
    """How ranks agree on gradients. `canonical`: whole gradients in the order of the tree."""

    protocol: str
    codec: str
    canonical: bool

    @property
    def element_bytes(self) -> int:
        """Bytes of a gradient's element on the wire."""
        return 2 if self.codec == "bf16" else FP32


@dataclass(frozen=True)
class TreeSums:
    """Partial sums of the canonical tree: most held at once, held at a step's end, in all."""

    most: int
    ends: int
    total: int


def tree_sums(run: Run, layout: Layout) -> TreeSums:
    """Whole gradients that the worst worker holds, and subtrees that all workers send.

    A worker that has finished k subtrees and is inside one of 2^j microbatches holds k + j + 1.
    """
    count = run.batch.microbatches
    if run.data.placement == "replicate":
        return TreeSums(count.bit_length(), 1, layout.workers)
    if layout.workers > LOOKED_AT:
        each = 1 if _aligned(count, layout.workers) else 2 * (count // layout.workers).bit_length()
        held = each - 1 + (-(-count // layout.workers)).bit_length()
        return TreeSums(held, each, each * layout.workers)
    most = ends = total = 0
    for part in split_evenly(count, layout.workers):
        nodes = canonical_subtrees(part, count)
        depths = (k + (stop - start).bit_length() for k, (start, stop) in enumerate(nodes))
        most, ends, total = max(most, *depths), max(ends, len(nodes)), total + len(nodes)
    return TreeSums(most, ends, total)


def state_bytes(run: Run, specs: Sequence[TensorSpec], shards: int, index: int) -> dict[str, int]:
    """Parameters, one gradient and optimiser state that shard `index` of `shards` holds."""
    found = {"parameters": 0, "gradients": 0, "optimiser": 0}
    for spec in specs:
        rows = len(shard_rows(spec.shape[0], shards, index))
        size = FP32 * rows * _row(spec)
        found["parameters"] += size
        found["gradients"] += size
        found["optimiser"] += _optimiser_bytes(run.optim.name, spec, rows)
    return found


def rank_memory(
    run: Run, specs: Sequence[TensorSpec], layout: Layout, wire: Wire, device: str
) -> Memory:
    """Memory of the rank that needs most: shard 0, whose rows are never fewer than another's."""
    held = state_bytes(run, specs, layout.shard, 0)
    offload = run.memory.offload != "none"
    if offload:
        held = dict.fromkeys(held, 0)  # the host's, who is not counted
    whole = FP32 * sum(spec.elements for spec in specs)
    sums = tree_sums(run, layout) if wire.canonical else TreeSums(1, 1, layout.workers)
    keeps_whole = wire.canonical or (layout.shard == 1 and not offload)
    mine = whole if keeps_whole else held["gradients"]
    several = -(-run.batch.microbatches // layout.workers) > 1
    before = sums.most - 1 if wire.canonical else int(several and keeps_whole)
    # Gradients of this backward need room of their own, unless earlier ones take them in.
    grows = mine if wire.canonical or not before else 0
    gathered = gathered_bytes(run, specs, layout, wire.canonical)
    moments = [
        {
            "gradients": int(before * mine + grows * behind),
            # FSDP2 adds whole gradients up until the last microbatch, then reduces unit by unit.
            "gradients to reduce": 0 if keeps_whole else whole if several else _unit(run, specs),
            "gathered parameters": gathered,
            "activations": activations,
            **(_block_bytes(run) if behind else _top_bytes(run, specs)),
            "bf16 weights": int(whole // 2 * cast_share(run, behind)),
        }
        for activations, behind in activation_moments(run, device)
    ]
    backward = max(moments, key=lambda items: sum(items.values()))
    summed = {
        "gradients": sums.most * mine,
        "gathered parameters": gathered,
    }
    agree = {
        "gradients": sums.ends * mine,
        "exchange buffers": _buffer_bytes(run, layout, wire, mine),
    }
    update = {
        "gradients": 0 if offload else mine,
        "update temporaries": _update_bytes(run, specs, held["parameters"]),
    }
    state = {
        "parameters": held["parameters"],
        "optimiser": held["optimiser"],
        "allocator slack": slack_bytes(run, layout, device),
    }
    phases = {"backward": backward, "sum": summed, "agree": agree, "update": update}
    return Memory(state, phases)


def slack_bytes(run: Run, layout: Layout, device: str) -> int:
    """CPU: resident bytes beside what is allocated; 0 on CUDA, where allocated bytes are meant."""
    if device != "cpu":
        return 0
    ranks = SLACK_RANKS_BYTES if layout.size > 1 else 0
    # What is computed again is allocated again and scatters the heap as if it had been kept.
    churn = activation_bytes(replace(run, memory=MemorySettings()), device)
    return SLACK_BYTES + ranks + int(SLACK_SHARE * churn)


def activation_bytes(run: Run, device: str) -> int:
    """The most activations held at once (see `activation_moments`)."""
    return max(held for held, _ in activation_moments(run, device))


def activation_moments(run: Run, device: str) -> list[tuple[int, float]]:
    """(bytes autograd holds of one microbatch, part of the backward that is behind) at the loss and
    at each block that is computed again.

    Without recomputation activations shrink faster than gradients grow, so the loss is the worst.

    Per token and block: both block norms keep a unit vector (fp32) and an output; queries and keys
    a unit vector each (fp32); queries, keys, values and the output projection's input one each; the
    MLP two hidden vectors, four when gated; dropout its masks.
    """
    if run.model.classifies:
        return [(classifier.activation_bytes(run, device), 0.0)]
    model, tokens = run.model, run.batch.microbatch * run.data.sequence
    element = 2 if run.run.precision != "fp32" else FP32
    width, heads = model.width, model.heads
    norms = 2 * (FP32 + element) * width + 2 * FP32
    keys, kv_heads = model.kv_width, model.kv_heads or heads
    queries = FP32 * (width + keys + heads + kv_heads) if model.qk_norm else 0
    # Queries and what attention gives; keys and values, which a CPU repeats for each query head.
    held = width if device == "cpu" else keys
    attention = 2 * element * (width + held) + heads * _kept_per_head(run, device, element)
    mlp = (4 if model.mlp == "gated" else 2) * element * model.hidden_width
    masks = 2 * width * (element if device == "cpu" else 1) if model.dropout else 0
    last = (FP32 + element) * width
    whole = norms + queries + attention + mlp + masks
    kept = FP32 * width + (_products_bytes(run, element) if run.memory.recompute != "full" else 0)
    again = [run.memory.recomputes(index) for index in range(model.layers)]
    below = [0.0, *itertools.accumulate(kept if block else whole for block in again)]
    moments = [(int(tokens * (below[-1] + last)), 0.0)]
    for index in range(model.layers):
        if again[index]:
            # Its turn: it holds all that it computes again; what came after it is gone.
            behind = (model.layers - index) / (model.layers + 1)
            moments.append((int(tokens * (below[index] + FP32 * width + whole)), behind))
    return moments


def cast_share(run: Run, behind: float) -> float:
    """Part of the weights whose bf16 copies are held: all at the loss (autocast's cache), later
    those of blocks that keep them and of the one that is computed again."""
    again = sum(map(run.memory.recomputes, range(run.model.layers))) if behind else 0
    return 1.0 - max(0, again - 1) / run.model.layers if run.run.precision != "fp32" else 0.0


def _products_bytes(run: Run, element: int) -> int:
    """What selective recomputation keeps of a block per token: results of matrix products."""
    model = run.model
    hidden = (2 if model.mlp == "gated" else 1) * model.hidden_width
    # Queries, keys, values, what attention gives, its projection, and the MLP's last product.
    return element * (4 * model.width + 2 * model.kv_width + hidden)


def gathered_bytes(run: Run, specs: Sequence[TensorSpec], layout: Layout, canonical: bool) -> int:
    """Parameters gathered by FSDP2 at once: two blocks and the rest, or all when canonical."""
    if layout.shard == 1 and run.memory.offload == "none":
        return 0
    rest, blocks = unit_bytes(specs, layout.shard)
    layers = run.model.layers
    return rest + (blocks if canonical else blocks * min(2, layers) // layers)


def unit_bytes(specs: Sequence[TensorSpec], shards: int) -> tuple[int, int]:
    """Gathered fp32 bytes: (embedding, last norm and head; all blocks), as FSDP2 pads them."""
    rest = blocks = 0
    for spec in specs:
        padded = FP32 * shards * len(shard_rows(spec.shape[0], shards, 0)) * _row(spec)
        if spec.name.startswith("blocks."):
            blocks += padded
        else:
            rest += padded
    return rest, blocks


def _top_bytes(run: Run, specs: Sequence[TensorSpec]) -> dict[str, int]:
    """The larger of the logits at the loss and what the last block's backward works with."""
    if run.model.classifies:
        return {"backward temporaries": classifier.temporary_bytes(run)}
    tokens = run.batch.microbatch * run.data.sequence
    vocabulary = specs[0].shape[0]
    chunk = min(tokens, run.memory.loss_chunk or tokens)
    logits = FP32 * chunk * vocabulary * (4 if run.model.logit_cap else 3)
    if run.memory.loss_chunk:
        # The head's gradient and its last part, and the gradient of the head's input.
        element = 2 if run.run.precision != "fp32" else FP32
        logits += run.model.width * (vocabulary * (FP32 + element) + tokens * element)
    block = _block_bytes(run)
    return {"logits": logits} if logits >= sum(block.values()) else block


def _block_bytes(run: Run) -> dict[str, int]:
    """What a block's backward works with."""
    tokens = run.batch.microbatch * run.data.sequence
    return {"backward temporaries": FP32 * tokens * (run.model.hidden_width + run.model.width)}


def _kept_per_head(run: Run, device: str, element: int) -> float:
    """Bytes per token and head: the probabilities, or one sum where they are not kept."""
    if device != "cpu" or run.data.sequence > CHUNKED_UP_TO:
        return FP32
    return element * keys_per_query(run.data.sequence, device)


def _buffer_bytes(run: Run, layout: Layout, wire: Wire, mine: int) -> int:
    """Flat buffers while ranks agree on a gradient of `mine` bytes (dist/exchange.py)."""
    if run.data.placement == "replicate" or layout.workers == 1:
        return 0
    if not wire.canonical:
        return mine if wire.protocol == "allreduce" else 0
    sums, on_wire = tree_sums(run, layout), wire.element_bytes
    received = sums.total / layout.workers
    # Per element: flat copies, what is sent, received and gathered, and decoded where it differs.
    each = sums.ends * (FP32 + on_wire) + (received + 1) * on_wire
    if wire.codec != "identity":
        each += (received + 1) * FP32
    return int(mine // FP32 * each)


def _update_bytes(run: Run, specs: Sequence[TensorSpec], mine: int) -> int:
    """What the rule holds beside its state: muon its updates in fp32 and bf16, adam's kernels that
    are not fused a copy of all parameters."""
    if run.optim.name == "muon":
        matrices = sum(spec.elements for spec in specs if spec.group == "matrices")
        whole = sum(spec.elements for spec in specs)
        return mine * matrices * 6 // (FP32 * whole)
    return mine if run.run.exact and run.optim.name in ("adam", "adamw") else 0


def _optimiser_bytes(name: str, spec: TensorSpec, rows: int) -> int:
    if name == "adafactor":
        factored = len(spec.shape) > 1
        return FP32 * (rows + _row(spec) if factored and rows else rows * _row(spec))
    rule = "adamw" if name == "muon" and spec.group != "matrices" else name
    return STATE_BYTES[rule] * rows * _row(spec)


def _unit(run: Run, specs: Sequence[TensorSpec]) -> int:
    """Bytes of the largest unit that FSDP2 reduces at once: a block, or embedding and head."""
    rest, blocks = unit_bytes(specs, 1)
    return max(rest, blocks // run.model.layers)


def _row(spec: TensorSpec) -> int:
    """Elements of one row of dim 0."""
    return spec.elements // spec.shape[0]


def _aligned(count: int, workers: int) -> bool:
    """Whether every worker's range is one subtree: equal shares of a power of two."""
    share, left = divmod(count, workers)
    return left == 0 and share & (share - 1) == 0
