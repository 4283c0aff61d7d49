"""Bytes of one rank, item by item: state that stays, and what the worst moment of a step adds.

State is counted from the table of tensors and is exact: the ranks' bytes add up to the whole. Peaks
were met within 1 % for six runs of 0.1 to 11 M parameters (torch's profiler, one process, fp32 and
bf16). The process itself (interpreter, torch) is `OVERHEAD_BYTES`, beside these.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from cordee.config.run import MemorySettings, OptimSettings, Run
from cordee.hardware.devices import DEVICES
from cordee.layout.axes import Layout
from cordee.layout.counts import (
    ORIGIN,
    RankTensors,
    TensorCounts,
    TensorSpecs,
    count_tensors,
    in_block,
)
from cordee.layout.microbatches import canonical_subtrees, split_evenly
from cordee.layout.stages import LayerRange, Stages, make_stages
from cordee.layout.validate import gathers_param_dtype, rank_microbatches
from cordee.planner.activations import (
    FP32,
    element_bytes,
    in_flight_microbatches,
    rank_backward_points,
    tokens_per_rank,
)
from cordee.planner.compute_cost import block_counts, hidden_width

OVERHEAD_BYTES: Mapping[str, int] = {k: device.overhead_bytes for k, device in DEVICES.items()}

USABLE_MEMORY_SHARE = 0.90
"""Part of the memory that a plan may fill; the rest is the allocator's fragments."""

SLACK_BYTES = 30 << 20
SLACK_RANKS_BYTES = 12 << 20
SLACK_SHARE = 0.6
"""CPU: kernels and thread stacks, gloo's buffers, and the part of activations that freed memory
between them costs. Resident peaks of 14 runs were 0.83 to 1.18 of what this predicts."""

MAX_EXACT_RANKS = 256
"""Workers whose ranges are looked at one by one for the worst; beyond, a bound is used."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes of the fullest rank: `state`, and of `phases` the largest."""

    state: Mapping[str, int]
    phases: Mapping[str, Mapping[str, int]]

    @property
    def peak_phase(self) -> str:
        """The phase that needs most: "backward", "sum", "agree" or "update"."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak_items(self) -> dict[str, int]:
        live_items = {**self.state, **self.phases[self.peak_phase]}
        return {name: size for name, size in live_items.items() if size}

    @property
    def total_bytes(self) -> int:
        """Bytes at the peak, without the process itself."""
        return sum(self.peak_items.values())


@dataclass(frozen=True)
class SyncChoice:
    """How ranks agree on gradients. `is_canonical`: whole gradients in the order of the tree."""

    protocol: str
    codec: str
    is_canonical: bool

    @property
    def element_bytes(self) -> int:
        """Bytes of a gradient's element on the wire."""
        return 2 if self.codec == "bf16" else FP32


@dataclass(frozen=True)
class PartialSumCounts:
    """Partial sums of the canonical tree: the most that a worker holds at once, those at a step's
    end, and those of all workers together."""

    peak: int
    final: int
    total: int


def partial_sum_counts(run: Run, layout: Layout) -> PartialSumCounts:
    """Whole gradients that the fullest worker holds, and subtrees that all workers send.

    A worker that has finished k subtrees and is inside one of 2^j microbatches holds k + j + 1.
    """
    count = run.batch.microbatches
    if run.data.placement == "replicate":
        return PartialSumCounts(count.bit_length(), 1, layout.dp_size)
    if layout.dp_size > MAX_EXACT_RANKS:
        bound = 2 * (count // layout.dp_size).bit_length()
        subtrees = 1 if _is_aligned(count, layout.dp_size) else bound
        partial_sums = subtrees - 1 + (-(-count // layout.dp_size)).bit_length()
        return PartialSumCounts(partial_sums, subtrees, subtrees * layout.dp_size)
    peak = final = total = 0
    for microbatches in split_evenly(count, layout.dp_size):
        nodes = canonical_subtrees(microbatches, count)
        depths = (k + (stop - start).bit_length() for k, (start, stop) in enumerate(nodes))
        peak, final, total = max(peak, *depths), max(final, len(nodes)), total + len(nodes)
    return PartialSumCounts(peak, final, total)


def rank_state_bytes(
    run: Run, specs: TensorSpecs, layout: Layout, stages: Stages, coords: Mapping[str, int]
) -> dict[str, int]:
    """Parameters, one gradient and optimiser state that the rank at coordinates `coords` holds, to
    the byte: tensors shaped like parameters (or their rows and columns), without counters of
    steps."""
    layer_ranges = stages.layer_ranges(coords["pipeline"])
    return _state_items(run, count_tensors(specs), layout, layer_ranges, coords)


def rank_memory(
    run: Run,
    specs: TensorSpecs,
    layout: Layout,
    sync: SyncChoice,
    device: str,
    zero: int = 1,
    stages: Stages | None = None,
) -> RankMemory:
    """Memory of the rank that needs most: of the first along each axis that cuts tensors, whose
    parts are never smaller than another's, on the worst stage of a pipeline."""
    tensor_counts = count_tensors(specs)
    stages = stages or make_stages(run.model, tensor_counts.vocabulary, run.layout, layout.pipeline)
    models = (
        _RankMemoryModel(run, tensor_counts, layout, sync, device, zero, ranges, pipeline_rank)
        for pipeline_rank, ranges in distinct_stages(run, stages)
    )
    return max((model.estimate() for model in models), key=lambda memory: memory.total_bytes)


def distinct_stages(run: Run, stages: Stages) -> list[tuple[int, list[LayerRange]]]:
    """Pipeline coordinates whose layers differ from those of all before, with these layers. Of
    those that are alike the first holds most microbatches at a time."""
    stages_by_signature: dict[tuple[object, ...], tuple[int, list[LayerRange]]] = {}
    recompute_every = run.memory.recompute_every
    for pipeline_rank in range(stages.ranks):
        layer_ranges = stages.layer_ranges(pipeline_rank)
        signature = tuple(
            (*block_counts(run, [r]), r.start % recompute_every, r.has_embedding, r.has_head)
            for r in layer_ranges
        )
        stages_by_signature.setdefault(signature, (pipeline_rank, layer_ranges))
    return list(stages_by_signature.values())


@dataclass(frozen=True)
class _RankMemoryModel:
    """One pipeline coordinate of a layout, the first along all other axes."""

    run: Run
    tensor_counts: TensorCounts
    layout: Layout
    sync: SyncChoice
    device: str
    zero: int
    layer_ranges: list[LayerRange]
    pipeline_rank: int

    def estimate(self) -> RankMemory:
        """State, and what each phase of a step adds to it."""
        run, layout, sync, counts = self.run, self.layout, self.sync, self.tensor_counts
        state_items = _state_items(run, counts, layout, self.layer_ranges, ORIGIN)
        if run.memory.offload != "none":
            state_items = dict.fromkeys(state_items, 0)  # in the host's memory
        elements = counts.rank_elements(layout, ORIGIN, self.layer_ranges, "tensor")
        full_grad_bytes = FP32 * elements
        sums = PartialSumCounts(1, 1, layout.dp_size)
        if sync.is_canonical:
            sums = partial_sum_counts(run, layout)
        grad_bytes = full_grad_bytes if self._keeps_full_gradients else state_items["gradients"]
        unit_sizes = fsdp_unit_bytes(counts, layout, self.layer_ranges)
        backward_items = self._backward_items(full_grad_bytes, grad_bytes, sums, unit_sizes)
        flat_bytes = max(_buffer_bytes(run, layout, sync, grad_bytes), self._flat_bytes())
        parameter_bytes, optimizer_bytes = state_items["parameters"], state_items["optimiser"]
        state = {
            "parameters": parameter_bytes,
            "optimiser": optimizer_bytes,
            "allocator slack": self._slack_bytes(),
        }
        phases = {
            "backward": max(backward_items, key=lambda items: sum(items.values())),
            "sum": {
                "gradients": sums.peak * grad_bytes,
                "gathered parameters": self._gathered_bytes(*unit_sizes),
            },
            "agree": {"gradients": sums.final * grad_bytes, "exchange buffers": flat_bytes},
            "update": {
                "gradients": grad_bytes if state_items["gradients"] else 0,
                "update temporaries": _update_bytes(run, counts, parameter_bytes),
            },
        }
        if self._has_peer_backup:
            # Own state and, if no other island has it, a neighbour's. New copies are complete
            # before the old ones go.
            copies = 2 if layout.island == 1 else 1
            copy_bytes = copies * (parameter_bytes + optimizer_bytes)
            state["copies for faults"] = copy_bytes
            phases["copy"] = {"copies being made": copy_bytes}
        return RankMemory(state, phases)

    def _backward_items(
        self,
        full_grad_bytes: int,
        grad_bytes: int,
        sums: PartialSumCounts,
        unit_sizes: tuple[int, int, int],
    ) -> Iterator[dict[str, int]]:
        """What is alive beside the state at each moment of a backward that may be the worst."""
        run, layout, is_canonical = self.run, self.layout, self.sync.is_canonical
        in_flight = self._in_flight()
        has_several = rank_microbatches(run, layout) > 1
        # Where shards reduce as they go (or at the last microbatch), earlier gradients are there.
        keeps_gradients = self._keeps_full_gradients or self.zero > 1
        earlier_gradients = sums.peak - 1 if is_canonical else int(has_several and keeps_gradients)
        # Gradients of this backward need room of their own, unless earlier ones take them in.
        growth_bytes = grad_bytes if is_canonical or not earlier_gradients else 0
        unreduced_bytes = self._unreduced_bytes(full_grad_bytes, has_several, *unit_sizes)
        gathered_bytes = self._gathered_bytes(*unit_sizes)
        cast_bytes = 0 if self._fsdp_casts else full_grad_bytes // 2
        for point, layer_range in rank_backward_points(
            run, self.device, layout, self.layer_ranges, in_flight
        ):
            done, work_items = point.fraction_done, _block_items(run, layout, layer_range)
            yield {
                "gradients": int(earlier_gradients * grad_bytes + growth_bytes * done),
                "gradients to reduce": unreduced_bytes,
                "gathered parameters": gathered_bytes,
                "activations": point.live_bytes,
                **(self._loss_items(in_flight) if point.is_loss else work_items),
                "bf16 weights": int(cast_bytes * cast_share(run, done, max(in_flight))),
            }

    @property
    def _keeps_full_gradients(self) -> bool:
        """Whether gradients are whole from the start: nothing reduces them inside the backward."""
        return self.sync.is_canonical or not self._uses_fsdp

    @property
    def _has_peer_backup(self) -> bool:
        """Whether copies of the state of a cut island are in the host's memory, which is this
        device's (checkpoint/peer_backup.py)."""
        is_sharded = self.layout.size > self.layout.island and self.device == "cpu"
        return is_sharded and self.run.fault.recover and self.run.fault.copy_every > 0

    @property
    def _uses_fsdp(self) -> bool:
        """Whether FSDP2 holds the parameters (for offload on one rank too)."""
        return self.layout.shard > 1 or self.run.memory.offload != "none"

    @property
    def _fsdp_casts(self) -> bool:
        """Whether FSDP2 gathers in the type of products, so that autocast has nothing to cast."""
        return self._uses_fsdp and gathers_param_dtype(self.run, self.zero)

    def _in_flight(self) -> list[int]:
        settings, ranks = self.run.layout, self.layout.pipeline
        microbatches = rank_microbatches(self.run, self.layout)
        return in_flight_microbatches(settings, ranks, self.pipeline_rank, microbatches)

    def _unreduced_bytes(
        self,
        full_grad_bytes: int,
        has_several: bool,
        rest_bytes: int,
        block_bytes: int,
        block_count: int,
    ) -> int:
        """Whole gradients that FSDP2 has not reduced yet: all until the last microbatch (zero 1),
        or those of one unit."""
        if self._keeps_full_gradients:
            return 0
        if has_several and self.zero == 1:
            return full_grad_bytes
        return max(rest_bytes, block_bytes // block_count)

    def _gathered_bytes(self, rest_bytes: int, block_bytes: int, block_count: int) -> int:
        """Parameters gathered by FSDP2 at once: all, or (zero 3) two blocks and the rest."""
        if not self._uses_fsdp:
            return 0
        if self.zero == 3:
            block_bytes = block_bytes * min(2, block_count) // block_count
        size = rest_bytes + block_bytes
        return size * element_bytes(self.run) // FP32 if self._fsdp_casts else size

    def _flat_bytes(self) -> int:
        """The largest flat buffer in which gradients are summed inside the island."""
        sums = grad_reduce_elements(self.tensor_counts, self.layout, self.layer_ranges, ORIGIN)
        return FP32 * max(sums.values(), default=0)

    def _loss_items(self, in_flight: Sequence[int]) -> dict[str, int]:
        """The larger of the logits at the loss and what the last block's backward works with.

        A schedule that runs several forwards first keeps what the backward of each loss needs."""
        run, layout = self.run, self.layout
        tokens = tokens_per_rank(run, layout)
        vocabulary = self.tensor_counts.vocabulary // layout.tensor
        chunk = min(tokens, run.memory.loss_chunk or tokens)
        has_cap = bool(run.model.logit_cap)
        logits = FP32 * chunk * vocabulary * (4 if has_cap else 3)
        saved_bytes = FP32 * chunk * vocabulary * (2 if has_cap else 1)
        if run.memory.loss_chunk:
            # The head's gradient and its last part, and the gradient of the head's input.
            dtype_bytes = element_bytes(run)
            saved_bytes = run.model.width * (vocabulary * FP32 + tokens * dtype_bytes)
            logits += saved_bytes + run.model.width * vocabulary * dtype_bytes
        logits += (in_flight[-1] - 1) * saved_bytes
        block_items = _block_items(run, layout, self.layer_ranges[-1])
        return {"logits": logits} if logits >= sum(block_items.values()) else block_items

    def _slack_bytes(self) -> int:
        """CPU: resident bytes beside the allocated ones; 0 on accelerators, of which the allocated
        ones are meant."""
        if self.device != "cpu":
            return 0
        rank_bytes = SLACK_RANKS_BYTES if self.layout.size > 1 else 0
        # What is computed again is allocated again and scatters the heap as if it had been kept.
        plain_run = replace(self.run, memory=MemorySettings())
        points = rank_backward_points(
            plain_run, self.device, self.layout, self.layer_ranges, self._in_flight()
        )
        churn_bytes = max(point.live_bytes for point, _ in points)
        return SLACK_BYTES + rank_bytes + int(SLACK_SHARE * churn_bytes)


def _state_items(
    run: Run,
    tensor_counts: TensorCounts,
    layout: Layout,
    layer_ranges: Sequence[LayerRange],
    coords: Mapping[str, int],
) -> dict[str, int]:
    sizes = {"parameters": 0, "gradients": 0, "optimiser": 0}
    for tensors in tensor_counts.rank_tensors(layout, coords, layer_ranges):
        sizes["parameters"] += FP32 * tensors.elements
        sizes["gradients"] += FP32 * tensors.elements
        sizes["optimiser"] += _optimizer_bytes(run.optim, tensors)
    return sizes


def cast_share(run: Run, fraction_done: float, in_flight: int = 1) -> float:
    """Part of the weights whose bf16 copies are held: all at the loss (autocast's cache), later
    those of blocks that keep them and of the one that is computed again. Every further microbatch
    in flight keeps copies of its own."""
    layers, memory = run.model.layers, run.memory
    recomputed_blocks = -(-layers // memory.recompute_every) if memory.recompute != "none" else 0
    if run.run.precision == "fp32":
        return 0.0
    share = 1.0 - max(0, recomputed_blocks - 1) / layers if fraction_done else 1.0
    return share + (in_flight - 1) * (1 - recomputed_blocks / layers)


def fsdp_unit_bytes(
    specs: TensorSpecs, layout: Layout, layer_ranges: Sequence[LayerRange]
) -> tuple[int, int, int]:
    """Gathered fp32 bytes as FSDP2 pads them: (embedding, last norm and head; all blocks), and the
    number of blocks."""
    rest_bytes = block_bytes = 0
    for tensors in count_tensors(specs).rank_tensors(layout, ORIGIN, layer_ranges):
        padded_bytes = FP32 * layout.shard * tensors.elements
        if in_block(tensors.spec):
            block_bytes += padded_bytes
        else:
            rest_bytes += padded_bytes
    return rest_bytes, block_bytes, sum(r.stop - r.start for r in layer_ranges)


def grad_reduce_elements(
    specs: TensorSpecs,
    layout: Layout,
    layer_ranges: Sequence[LayerRange] | None,
    coords: Mapping[str, int],
) -> dict[tuple[str, ...], int]:
    """Elements of gradients that the rank at `coords` sums inside its island, by the axes of each
    sum."""
    elements_by_axes: dict[tuple[str, ...], int] = {}
    for tensors in count_tensors(specs).rank_tensors(layout, coords, layer_ranges):
        if axes := tensors.spec.grad_reduce_axes(layout):
            elements_by_axes[axes] = elements_by_axes.get(axes, 0) + tensors.elements
    return elements_by_axes


def _block_items(run: Run, layout: Layout, layer_range: LayerRange) -> dict[str, int]:
    """What a block's backward works with."""
    model, tokens = run.model, tokens_per_rank(run, layout)
    hidden_features = hidden_width(model, model.is_moe(layer_range.stop - 1)) / layout.tensor
    return {"backward temporaries": int(FP32 * tokens * (hidden_features + model.width))}


def _buffer_bytes(run: Run, layout: Layout, sync: SyncChoice, grad_bytes: int) -> int:
    """Flat buffers of the exchange of a gradient of `grad_bytes` (dist/tree_all_reduce.py)."""
    if run.data.placement == "replicate" or layout.dp_size == 1 or sync.protocol == "none":
        return 0
    if sync.protocol == "allreduce":
        return grad_bytes
    members = layout.dp_size if sync.is_canonical else layout.island
    sums = partial_sum_counts(run, layout) if sync.is_canonical else PartialSumCounts(1, 1, members)
    received_copies, wire_bytes = sums.total / members, sync.element_bytes
    # Per element: flat copies, what is sent, received and gathered, and decoded where it differs.
    bytes_per_element = sums.final * (FP32 + wire_bytes) + (received_copies + 1) * wire_bytes
    if sync.codec != "identity":
        bytes_per_element += (received_copies + 1) * FP32
    return int(grad_bytes // FP32 * bytes_per_element)


def _update_bytes(run: Run, tensor_counts: TensorCounts, parameter_bytes: int) -> int:
    """What the rule holds beside its state: updates until they are applied, and the copies that
    kernels make where they are not fused."""
    rule = run.optim.rule
    if rule.held_update_bytes:
        matrix_elements = sum(
            tensor.spec.elements * len(tensor.layers)
            for tensor in tensor_counts.tensors
            if tensor.spec.group == "matrices"
        )
        held_bytes = matrix_elements * rule.held_update_bytes
        return parameter_bytes * held_bytes // (FP32 * tensor_counts.parameters)
    return parameter_bytes * rule.unfused_copies if run.run.exact else 0


def _optimizer_bytes(settings: OptimSettings, tensors: RankTensors) -> int:
    rule, shape = settings.rule.for_group(tensors.spec.group), tensors.shape
    if rule.is_factored and len(shape) > 1:
        rows, columns = math.prod(shape[:-1]), math.prod((*shape[:-2], shape[-1]))
        return rule.state_bytes * tensors.count * (rows + columns)
    return rule.state_bytes * tensors.elements


def _is_aligned(count: int, dp_size: int) -> bool:
    """Whether every worker's range is one subtree: equal shares of a power of two."""
    share, remainder = divmod(count, dp_size)
    return remainder == 0 and share & (share - 1) == 0
