"""Bytes of one rank, item by item: state that stays, and what the worst moment of a step adds.

State is counted from the table of tensors and is exact: the ranks' bytes add up to the whole.
Activations are counted block by block (`activations.py`). Bytes allocated
at the peak were met within 1 % for six runs of 0.1 to 11 M parameters (torch's profiler, one
process, fp32 and bf16). Not here: the process itself (interpreter, torch), which is
`OVERHEAD_BYTES` and stands beside the state, not in it. Traded away: what glibc's allocator wastes
is one measured formula (`slack_bytes`); CUDA's is left to `FITS`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from cordee.config.run import MemorySettings, Run
from cordee.devices import DEVICES
from cordee.layout.axes import Layout
from cordee.layout.census import ORIGIN, Census, Held, Specs, census, in_block
from cordee.layout.legal import gathers_cast, worker_microbatches
from cordee.layout.split import canonical_subtrees, split_evenly
from cordee.layout.stages import Part, Stages, make_stages
from cordee.plan import classifier
from cordee.plan.activations import FP32, attended_tokens, element_bytes, rank_moments
from cordee.plan.costs import block_counts, hidden_width
from cordee.plan.pipeline import in_flight

OVERHEAD_BYTES: Mapping[str, int] = {k: device.overhead_bytes for k, device in DEVICES.items()}

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


def rank_state_bytes(
    run: Run, specs: Specs, layout: Layout, stages: Stages, at: Mapping[str, int]
) -> dict[str, int]:
    """Parameters, one gradient and optimiser state that the rank at coordinates `at` holds, to the
    byte: tensors shaped like parameters (or their rows and columns), without counters of steps."""
    return _state(run, census(specs), layout, stages.held(at["pipeline"]), at)


def rank_memory(
    run: Run,
    specs: Specs,
    layout: Layout,
    wire: Wire,
    device: str,
    zero: int = 1,
    stages: Stages | None = None,
) -> Memory:
    """Memory of the rank that needs most: of the first along each axis that cuts tensors, whose
    parts are never smaller than another's, on the worst stage of a pipeline."""
    counted = census(specs)
    stages = stages or make_stages(run.model, counted.vocabulary, run.layout, layout.pipeline)
    ranks = (
        _Rank(run, counted, layout, wire, device, zero, parts, index)
        for index, parts in unlike(run, stages)
    )
    return max((rank.memory() for rank in ranks), key=lambda memory: memory.total_bytes)


def unlike(run: Run, stages: Stages) -> list[tuple[int, list[Part]]]:
    """Pipeline coordinates whose layers differ from those of all before, with what they hold. Of
    those that are alike the first holds most microbatches at a time."""
    found: dict[tuple[object, ...], tuple[int, list[Part]]] = {}
    every = run.memory.recompute_every
    for index in range(stages.ranks):
        parts = stages.held(index)
        looks = tuple(
            (*block_counts(run, [part]), part.start % every, part.embeds, part.heads)
            for part in parts
        )
        found.setdefault(looks, (index, parts))
    return list(found.values())


@dataclass(frozen=True)
class _Rank:
    """One pipeline coordinate of a layout, the first along all other axes."""

    run: Run
    counted: Census
    layout: Layout
    wire: Wire
    device: str
    zero: int
    parts: list[Part]
    index: int

    def memory(self) -> Memory:
        """State, and what each phase of a step adds to it."""
        run, layout, wire = self.run, self.layout, self.wire
        held = _state(run, self.counted, layout, self.parts, ORIGIN)
        if run.memory.offload != "none":
            held = dict.fromkeys(held, 0)  # the host's, who is not counted
        whole = FP32 * self.counted.elements(layout, ORIGIN, self.parts, "tensor")
        sums = tree_sums(run, layout) if wire.canonical else TreeSums(1, 1, layout.workers)
        mine = whole if self._keeps_whole else held["gradients"]
        units = unit_bytes(self.counted, layout, self.parts)
        gathered = self._gathered(*units)
        moments = self._moments(whole, mine, sums, units)
        backward = max(moments, key=lambda items: sum(items.values()))
        summed = {"gradients": sums.most * mine, "gathered parameters": gathered}
        agree = {
            "gradients": sums.ends * mine,
            "exchange buffers": max(_buffer_bytes(run, layout, wire, mine), self._flat_bytes()),
        }
        update = {
            "gradients": mine if held["gradients"] else 0,
            "update temporaries": _update_bytes(run, self.counted, held["parameters"]),
        }
        state = {
            "parameters": held["parameters"],
            "optimiser": held["optimiser"],
            "allocator slack": self._slack_bytes(),
        }
        phases = {"backward": backward, "sum": summed, "agree": agree, "update": update}
        if self._copies_near:
            # Own state and, if no island has it too, a neighbour's; while they are made, both anew.
            both = 2 if layout.island == 1 else 1
            state["copies for faults"] = both * (held["parameters"] + held["optimiser"])
            phases["copy"] = {"copies being made": state["copies for faults"]}
        return Memory(state, phases)

    def _moments(
        self, whole: int, mine: int, sums: TreeSums, units: tuple[int, int, int]
    ) -> Iterator[dict[str, int]]:
        """What is alive beside the state at each moment of a backward that may be the worst."""
        run, layout, canonical = self.run, self.layout, self.wire.canonical
        flights = self._flights()
        several = worker_microbatches(run, layout) > 1
        # Where shards reduce as they go (or at the last microbatch), earlier gradients are there.
        keeps = self._keeps_whole or self.zero > 1
        before = sums.most - 1 if canonical else int(several and keeps)
        # Gradients of this backward need room of their own, unless earlier ones take them in.
        grows = mine if canonical or not before else 0
        to_reduce, gathered = self._to_reduce(whole, several, *units), self._gathered(*units)
        cast = 0 if self._casts else whole // 2
        for moment, part in rank_moments(run, self.device, layout, self.parts, flights):
            yield {
                "gradients": int(before * mine + grows * moment.behind),
                "gradients to reduce": to_reduce,
                "gathered parameters": gathered,
                "activations": moment.held_bytes,
                **(self._loss_bytes(flights) if moment.loss else _block_bytes(run, layout, part)),
                "bf16 weights": int(cast * cast_share(run, moment.behind, max(flights))),
            }

    @property
    def _keeps_whole(self) -> bool:
        """Whether gradients are whole from the start: nothing reduces them inside the backward."""
        return self.wire.canonical or not self._gathers

    @property
    def _copies_near(self) -> bool:
        """Whether the state of an island that is cut is kept once more in this device's memory, the
        host's: checkpoint/neighbour.py."""
        cut = self.layout.size > self.layout.island and self.device == "cpu"
        return cut and self.run.fault.recover and self.run.fault.copy_every > 0

    @property
    def _gathers(self) -> bool:
        """Whether FSDP2 stands between parameters and modules (for offload, on one rank too)."""
        return self.layout.shard > 1 or self.run.memory.offload != "none"

    @property
    def _casts(self) -> bool:
        """Whether it gathers them in the type of products, so that nothing else casts them."""
        return self._gathers and gathers_cast(self.run, self.zero)

    def _flights(self) -> list[int]:
        each = worker_microbatches(self.run, self.layout)
        return in_flight(self.run.layout, self.layout.pipeline, self.index, each)

    def _to_reduce(self, whole: int, several: bool, rest: int, blocks: int, number: int) -> int:
        """Whole gradients that FSDP2 has not reduced yet: all until the last microbatch (zero 1),
        or those of one unit."""
        if self._keeps_whole:
            return 0
        return whole if several and self.zero == 1 else max(rest, blocks // number)

    def _gathered(self, rest: int, blocks: int, number: int) -> int:
        """Parameters gathered by FSDP2 at once: all, or (zero 3) two blocks and the rest."""
        if not self._gathers:
            return 0
        found = rest + (blocks * min(2, number) // number if self.zero == 3 else blocks)
        return found * element_bytes(self.run) // FP32 if self._casts else found

    def _flat_bytes(self) -> int:
        """The largest flat buffer in which gradients are summed inside the island."""
        sums = summed_elements(self.counted, self.layout, self.parts, ORIGIN)
        return FP32 * max(sums.values(), default=0)

    def _loss_bytes(self, flights: Sequence[int]) -> dict[str, int]:
        """The larger of the logits at the loss and what the last block's backward works with.

        A schedule that runs several forwards first keeps what their losses' backwards need."""
        run, layout = self.run, self.layout
        if run.model.classifies:
            return {"backward temporaries": classifier.temporary_bytes(run)}
        tokens = attended_tokens(run, layout)
        vocabulary = self.counted.vocabulary // layout.tensor
        chunk = min(tokens, run.memory.loss_chunk or tokens)
        cap = bool(run.model.logit_cap)
        logits = FP32 * chunk * vocabulary * (4 if cap else 3)
        kept = FP32 * chunk * vocabulary * (2 if cap else 1)
        if run.memory.loss_chunk:
            # The head's gradient and its last part, and the gradient of the head's input.
            element = element_bytes(run)
            kept = run.model.width * (vocabulary * FP32 + tokens * element)
            logits += kept + run.model.width * vocabulary * element
        logits += (flights[-1] - 1) * kept
        block = _block_bytes(run, layout, self.parts[-1])
        return {"logits": logits} if logits >= sum(block.values()) else block

    def _slack_bytes(self) -> int:
        """CPU: resident bytes beside what is allocated; 0 on CUDA, where allocated bytes are
        meant."""
        if self.device != "cpu":
            return 0
        ranks = SLACK_RANKS_BYTES if self.layout.size > 1 else 0
        # What is computed again is allocated again and scatters the heap as if it had been kept.
        plain = replace(self.run, memory=MemorySettings())
        moments = rank_moments(plain, self.device, self.layout, self.parts, self._flights())
        churn = max(moment.held_bytes for moment, _ in moments)
        return SLACK_BYTES + ranks + int(SLACK_SHARE * churn)


def _state(
    run: Run,
    counted: Census,
    layout: Layout,
    parts: Sequence[Part],
    at: Mapping[str, int],
) -> dict[str, int]:
    found = {"parameters": 0, "gradients": 0, "optimiser": 0}
    for held in counted.held(layout, at, parts):
        found["parameters"] += FP32 * held.elements
        found["gradients"] += FP32 * held.elements
        found["optimiser"] += _optimiser_bytes(run.optim.name, held)
    return found


def cast_share(run: Run, behind: float, flights: int = 1) -> float:
    """Part of the weights whose bf16 copies are held: all at the loss (autocast's cache), later
    those of blocks that keep them and of the one that is computed again. Every further microbatch
    in flight keeps copies of its own."""
    layers, memory = run.model.layers, run.memory
    again = -(-layers // memory.recompute_every) if memory.recompute != "none" else 0
    now = 1.0 - max(0, again - 1) / layers if behind else 1.0
    return now + (flights - 1) * (1 - again / layers) if run.run.precision != "fp32" else 0.0


def unit_bytes(specs: Specs, layout: Layout, parts: Sequence[Part]) -> tuple[int, int, int]:
    """Gathered fp32 bytes as FSDP2 pads them: (embedding, last norm and head; all blocks), and the
    number of blocks."""
    rest = blocks = 0
    for held in census(specs).held(layout, ORIGIN, parts):
        padded = FP32 * layout.shard * held.elements
        if in_block(held.spec):
            blocks += padded
        else:
            rest += padded
    return rest, blocks, sum(part.stop - part.start for part in parts)


def summed_elements(
    specs: Specs, layout: Layout, parts: Sequence[Part] | None, at: Mapping[str, int]
) -> dict[tuple[str, ...], int]:
    """Elements of gradients that the rank at `at` sums inside its island, by the axes it sums them
    over (TensorSpec.summed)."""
    found: dict[tuple[str, ...], int] = {}
    for held in census(specs).held(layout, at, parts):
        if axes := held.spec.summed(layout):
            found[axes] = found.get(axes, 0) + held.elements
    return found


def _block_bytes(run: Run, layout: Layout, part: Part) -> dict[str, int]:
    """What a block's backward works with."""
    hidden = hidden_width(run.model, run.model.is_moe(part.stop - 1)) / layout.tensor
    tokens = attended_tokens(run, layout)
    return {"backward temporaries": int(FP32 * tokens * (hidden + run.model.width))}


def _buffer_bytes(run: Run, layout: Layout, wire: Wire, mine: int) -> int:
    """Flat buffers while ranks agree on a gradient of `mine` bytes (dist/exchange.py)."""
    if run.data.placement == "replicate" or layout.workers == 1 or wire.protocol == "none":
        return 0
    if wire.protocol == "allreduce":
        return mine
    members = layout.workers if wire.canonical else layout.island
    sums = tree_sums(run, layout) if wire.canonical else TreeSums(1, 1, members)
    received, on_wire = sums.total / members, wire.element_bytes
    # Per element: flat copies, what is sent, received and gathered, and decoded where it differs.
    each = sums.ends * (FP32 + on_wire) + (received + 1) * on_wire
    if wire.codec != "identity":
        each += (received + 1) * FP32
    return int(mine // FP32 * each)


def _update_bytes(run: Run, counted: Census, mine: int) -> int:
    """What the rule holds beside its state: muon all updates before the first is applied (fp32) and
    the share that it sends, adam's kernels that are not fused a copy of all parameters."""
    if run.optim.name == "muon":
        matrices = sum(
            kind.spec.elements * len(kind.layers)
            for kind in counted.kinds
            if kind.spec.group == "matrices"
        )
        return mine * matrices * 6 // (FP32 * counted.parameters)
    return mine if run.run.exact and run.optim.name in ("adam", "adamw") else 0


def _optimiser_bytes(name: str, held: Held) -> int:
    if name == "adafactor":
        rows, columns = math.prod(held.shape[:-1]), math.prod((*held.shape[:-2], held.shape[-1]))
        factored = len(held.shape) > 1
        return FP32 * held.count * (rows + columns) if factored else FP32 * held.elements
    rule = "adamw" if name == "muon" and held.spec.group != "matrices" else name
    return STATE_BYTES[rule] * held.elements


def _aligned(count: int, workers: int) -> bool:
    """Whether every worker's range is one subtree: equal shares of a power of two."""
    share, left = divmod(count, workers)
    return left == 0 and share & (share - 1) == 0
