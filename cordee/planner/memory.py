"""Bytes of one rank, item by item: state that stays, and what the worst moment of a step adds.

State is counted from the table of tensors and is exact: the ranks' bytes add up to the whole.
Activations are counted block by block (`activations.py`). Bytes allocated
at the peak were met within 1 % for six runs of 0.1 to 11 M parameters (torch's profiler, one
process, fp32 and bf16). Not here: the process itself (interpreter, torch), which is
`OVERHEAD_BYTES` and stands beside the state, not in it. Traded away: what glibc's allocator wastes
is one measured formula (`slack_bytes`); CUDA's is left to `USABLE_MEMORY_SHARE`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from cordee.config.run import MemorySettings, Run
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
from cordee.planner.activations import FP32, element_bytes, rank_backward_points, tokens_per_rank
from cordee.planner.compute_cost import block_counts, hidden_width
from cordee.planner.pipeline import in_flight_microbatches

OVERHEAD_BYTES: Mapping[str, int] = {k: device.overhead_bytes for k, device in DEVICES.items()}

USABLE_MEMORY_SHARE = 0.90
"""Part of the memory that a plan may fill; the rest is the allocator's fragments."""

OPTIMIZER_STATE_BYTES: Mapping[str, int] = {
    "sgd": 0,
    "momentum": 4,
    "adam": 8,
    "adamw": 8,
    "muon": 4,
}
"""Optimiser bytes per parameter; muon: of matrices (adamw keeps the rest), adafactor: factored."""

SLACK_BYTES = 30 << 20
SLACK_RANKS_BYTES = 12 << 20
SLACK_SHARE = 0.6
"""CPU: kernels and thread stacks, gloo's buffers, and the part of activations that freed memory
between them costs. Resident peaks of 14 runs were 0.83 to 1.18 of what this predicts."""

MAX_EXACT_RANKS = 256
"""Workers whose ranges are looked at one by one for the worst; beyond, a bound is used."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes of the worst rank. `state` always; of `phases` only the largest counts."""

    state: Mapping[str, int]
    phases: Mapping[str, Mapping[str, int]]

    @property
    def peak_phase(self) -> str:
        """The phase that needs most: "backward", "sum", "agree" or "update"."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak_items(self) -> dict[str, int]:
        """What is alive at the peak; adds up to `total_bytes`."""
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
    """Partial sums of the canonical tree: most held at once, held at a step's end, in all."""

    peak: int
    final: int
    total: int


def partial_sum_counts(run: Run, layout: Layout) -> PartialSumCounts:
    """Whole gradients that the worst worker holds, and subtrees that all workers send.

    A worker that has finished k subtrees and is inside one of 2^j microbatches holds k + j + 1.
    """
    count = run.batch.microbatches
    if run.data.placement == "replicate":
        return PartialSumCounts(count.bit_length(), 1, layout.dp_size)
    if layout.dp_size > MAX_EXACT_RANKS:
        subtrees = (
            1 if _is_aligned(count, layout.dp_size) else 2 * (count // layout.dp_size).bit_length()
        )
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
    return _state_items(
        run, count_tensors(specs), layout, stages.layer_ranges(coords["pipeline"]), coords
    )


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
        _RankMemoryModel(
            run, tensor_counts, layout, sync, device, zero, layer_ranges, pipeline_rank
        )
        for pipeline_rank, layer_ranges in distinct_stages(run, stages)
    )
    return max((model.estimate() for model in models), key=lambda memory: memory.total_bytes)


def distinct_stages(run: Run, stages: Stages) -> list[tuple[int, list[LayerRange]]]:
    """Pipeline coordinates whose layers differ from those of all before, with what they hold. Of
    those that are alike the first holds most microbatches at a time."""
    stages_by_signature: dict[tuple[object, ...], tuple[int, list[LayerRange]]] = {}
    recompute_every = run.memory.recompute_every
    for pipeline_rank in range(stages.ranks):
        layer_ranges = stages.layer_ranges(pipeline_rank)
        signature = tuple(
            (
                *block_counts(run, [layer_range]),
                layer_range.start % recompute_every,
                layer_range.has_embedding,
                layer_range.has_head,
            )
            for layer_range in layer_ranges
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
        run, layout, sync = self.run, self.layout, self.sync
        state_items = _state_items(run, self.tensor_counts, layout, self.layer_ranges, ORIGIN)
        if run.memory.offload != "none":
            state_items = dict.fromkeys(state_items, 0)  # the host's, who is not counted
        full_grad_bytes = FP32 * self.tensor_counts.rank_elements(
            layout, ORIGIN, self.layer_ranges, "tensor"
        )
        sums = (
            partial_sum_counts(run, layout)
            if sync.is_canonical
            else PartialSumCounts(1, 1, layout.dp_size)
        )
        grad_bytes = full_grad_bytes if self._keeps_full_gradients else state_items["gradients"]
        unit_sizes = fsdp_unit_bytes(self.tensor_counts, layout, self.layer_ranges)
        gathered_bytes = self._gathered_bytes(*unit_sizes)
        backward_items = self._backward_items(full_grad_bytes, grad_bytes, sums, unit_sizes)
        worst_backward = max(backward_items, key=lambda items: sum(items.values()))
        sum_items = {"gradients": sums.peak * grad_bytes, "gathered parameters": gathered_bytes}
        sync_items = {
            "gradients": sums.final * grad_bytes,
            "exchange buffers": max(
                _buffer_bytes(run, layout, sync, grad_bytes), self._flat_bytes()
            ),
        }
        update_items = {
            "gradients": grad_bytes if state_items["gradients"] else 0,
            "update temporaries": _update_bytes(run, self.tensor_counts, state_items["parameters"]),
        }
        state = {
            "parameters": state_items["parameters"],
            "optimiser": state_items["optimiser"],
            "allocator slack": self._slack_bytes(),
        }
        phases = {
            "backward": worst_backward,
            "sum": sum_items,
            "agree": sync_items,
            "update": update_items,
        }
        if self._has_peer_backup:
            # Own state and, if no island has it too, a neighbour's; while they are made, both anew.
            copies = 2 if layout.island == 1 else 1
            state["copies for faults"] = copies * (
                state_items["parameters"] + state_items["optimiser"]
            )
            phases["copy"] = {"copies being made": state["copies for faults"]}
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
        unreduced_bytes, gathered_bytes = (
            self._unreduced_bytes(full_grad_bytes, has_several, *unit_sizes),
            self._gathered_bytes(*unit_sizes),
        )
        cast_bytes = 0 if self._fsdp_casts else full_grad_bytes // 2
        for point, layer_range in rank_backward_points(
            run, self.device, layout, self.layer_ranges, in_flight
        ):
            yield {
                "gradients": int(
                    earlier_gradients * grad_bytes + growth_bytes * point.fraction_done
                ),
                "gradients to reduce": unreduced_bytes,
                "gathered parameters": gathered_bytes,
                "activations": point.live_bytes,
                **(
                    self._loss_items(in_flight)
                    if point.is_loss
                    else _block_items(run, layout, layer_range)
                ),
                "bf16 weights": int(
                    cast_bytes * cast_share(run, point.fraction_done, max(in_flight))
                ),
            }

    @property
    def _keeps_full_gradients(self) -> bool:
        """Whether gradients are whole from the start: nothing reduces them inside the backward."""
        return self.sync.is_canonical or not self._uses_fsdp

    @property
    def _has_peer_backup(self) -> bool:
        """Whether the state of an island that is cut is kept once more in this device's memory, the
        host's: checkpoint/peer_backup.py."""
        is_sharded = self.layout.size > self.layout.island and self.device == "cpu"
        return is_sharded and self.run.fault.recover and self.run.fault.copy_every > 0

    @property
    def _uses_fsdp(self) -> bool:
        """Whether FSDP2 stands between parameters and modules (for offload, on one rank too)."""
        return self.layout.shard > 1 or self.run.memory.offload != "none"

    @property
    def _fsdp_casts(self) -> bool:
        """Whether it gathers them in the type of products, so that nothing else casts them."""
        return self._uses_fsdp and gathers_param_dtype(self.run, self.zero)

    def _in_flight(self) -> list[int]:
        microbatches = rank_microbatches(self.run, self.layout)
        return in_flight_microbatches(
            self.run.layout, self.layout.pipeline, self.pipeline_rank, microbatches
        )

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
        return (
            full_grad_bytes
            if has_several and self.zero == 1
            else max(rest_bytes, block_bytes // block_count)
        )

    def _gathered_bytes(self, rest_bytes: int, block_bytes: int, block_count: int) -> int:
        """Parameters gathered by FSDP2 at once: all, or (zero 3) two blocks and the rest."""
        if not self._uses_fsdp:
            return 0
        unit_bytes = rest_bytes + (
            block_bytes * min(2, block_count) // block_count if self.zero == 3 else block_bytes
        )
        return unit_bytes * element_bytes(self.run) // FP32 if self._fsdp_casts else unit_bytes

    def _flat_bytes(self) -> int:
        """The largest flat buffer in which gradients are summed inside the island."""
        sums = grad_reduce_elements(self.tensor_counts, self.layout, self.layer_ranges, ORIGIN)
        return FP32 * max(sums.values(), default=0)

    def _loss_items(self, in_flight: Sequence[int]) -> dict[str, int]:
        """The larger of the logits at the loss and what the last block's backward works with.

        A schedule that runs several forwards first keeps what their losses' backwards need."""
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
        """CPU: resident bytes beside what is allocated; 0 on CUDA, where allocated bytes are
        meant."""
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
        sizes["optimiser"] += _optimizer_bytes(run.optim.name, tensors)
    return sizes


def cast_share(run: Run, fraction_done: float, in_flight: int = 1) -> float:
    """Part of the weights whose bf16 copies are held: all at the loss (autocast's cache), later
    those of blocks that keep them and of the one that is computed again. Every further microbatch
    in flight keeps copies of its own."""
    layers, memory = run.model.layers, run.memory
    recomputed_blocks = -(-layers // memory.recompute_every) if memory.recompute != "none" else 0
    share = 1.0 - max(0, recomputed_blocks - 1) / layers if fraction_done else 1.0
    return (
        share + (in_flight - 1) * (1 - recomputed_blocks / layers)
        if run.run.precision != "fp32"
        else 0.0
    )


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
    return (
        rest_bytes,
        block_bytes,
        sum(layer_range.stop - layer_range.start for layer_range in layer_ranges),
    )


def grad_reduce_elements(
    specs: TensorSpecs,
    layout: Layout,
    layer_ranges: Sequence[LayerRange] | None,
    coords: Mapping[str, int],
) -> dict[tuple[str, ...], int]:
    """Elements of gradients that the rank at `coords` sums inside its island, by the axes it sums
    them over (TensorSpec.summed)."""
    elements_by_axes: dict[tuple[str, ...], int] = {}
    for tensors in count_tensors(specs).rank_tensors(layout, coords, layer_ranges):
        if axes := tensors.spec.grad_reduce_axes(layout):
            elements_by_axes[axes] = elements_by_axes.get(axes, 0) + tensors.elements
    return elements_by_axes


def _block_items(run: Run, layout: Layout, layer_range: LayerRange) -> dict[str, int]:
    """What a block's backward works with."""
    hidden_features = (
        hidden_width(run.model, run.model.is_moe(layer_range.stop - 1)) / layout.tensor
    )
    tokens = tokens_per_rank(run, layout)
    return {"backward temporaries": int(FP32 * tokens * (hidden_features + run.model.width))}


def _buffer_bytes(run: Run, layout: Layout, sync: SyncChoice, grad_bytes: int) -> int:
    """Flat buffers while ranks agree on a gradient of `mine` bytes (dist/tree_all_reduce.py)."""
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
    """What the rule holds beside its state: muon all updates before the first is applied (fp32) and
    the share that it sends, adam's kernels that are not fused a copy of all parameters."""
    if run.optim.name == "muon":
        matrix_elements = sum(
            tensor.spec.elements * len(tensor.layers)
            for tensor in tensor_counts.tensors
            if tensor.spec.group == "matrices"
        )
        return parameter_bytes * matrix_elements * 6 // (FP32 * tensor_counts.parameters)
    return parameter_bytes if run.run.exact and run.optim.name in ("adam", "adamw") else 0


def _optimizer_bytes(name: str, tensors: RankTensors) -> int:
    if name == "adafactor":
        rows, columns = (
            math.prod(tensors.shape[:-1]),
            math.prod((*tensors.shape[:-2], tensors.shape[-1])),
        )
        is_factored = len(tensors.shape) > 1
        return FP32 * tensors.count * (rows + columns) if is_factored else FP32 * tensors.elements
    rule = "adamw" if name == "muon" and tensors.spec.group != "matrices" else name
    return OPTIMIZER_STATE_BYTES[rule] * tensors.elements


def _is_aligned(count: int, dp_size: int) -> bool:
    """Whether every worker's range is one subtree: equal shares of a power of two."""
    share, remainder = divmod(count, dp_size)
    return remainder == 0 and share & (share - 1) == 0
