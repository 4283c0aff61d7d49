"""Bytes that autograd keeps of a microbatch, counted block by block for the built-in model.

Per token and block: both norms keep a unit vector (fp32), their outputs are kept as inputs of the
matrices; queries and keys a unit vector each (fp32); queries, keys, values and the output
projection's input one each; the MLP two hidden vectors, four when gated; dropout its masks. Tensor
ranks hold their heads and hidden features of all positions and their positions of the stream.
Met within 1 % of what torch saves, uncut. Not here: state and buffers (`memory.py`). Traded away:
unequal routing; experts are taken as equally busy.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from cordee.config.run import Run
from cordee.layout.axes import Layout
from cordee.layout.stages import Part
from cordee.plan import classifier
from cordee.plan.costs import ALONE, CHUNKED_UP_TO, keys_per_query, whole

FP32 = 4

PLACED_BYTES = 36
"""Of each row of a token for an expert: places before and after sorting, and its weight."""

FILLED_ROWS = 16
"""Rows of zeros of an expert on a CPU in bf16, on average: half of what moe.py fills up to."""


def element_bytes(run: Run) -> int:
    """Bytes of what matrix products read: fp16 and fp8 are planned as bf16."""
    return FP32 if run.run.precision == "fp32" else 2


@dataclass(frozen=True)
class Moment:
    """`held_bytes` of activations when part `behind` of a stage's backward is over; `loss`: the
    stage's loss is being computed."""

    held_bytes: int
    behind: float
    loss: bool


def attended_tokens(run: Run, layout: Layout) -> int:
    """Tokens of a microbatch that a rank's attention and matrices see."""
    return run.batch.microbatch * run.data.sequence // layout.context


def activation_bytes(run: Run, device: str) -> int:
    """The most activations held at once by a run that is not cut (see `stage_moments`)."""
    return max(moment.held_bytes for moment in stage_moments(run, device, ALONE, whole(run)))


def stage_moments(run: Run, device: str, layout: Layout, part: Part) -> list[Moment]:
    """What one microbatch holds of one stage: before its backward, and at each block that is
    computed again. Without recomputation activations shrink faster than gradients grow, so the
    first moment is the worst."""
    if run.model.classifies:
        return [Moment(classifier.activation_bytes(run, device), 0.0, True)]
    split = attended_tokens(run, layout) / layout.tensor
    stream = FP32 * run.model.width * split
    last = _head_input(run, layout) if part.heads else 0.0
    sizes = {moe: _block(run, device, layout, moe) for moe in (False, True)}
    kinds = [run.model.is_moe(layer) for layer in range(part.start, part.stop)]
    again = [run.memory.recomputes(layer) for layer in range(part.start, part.stop)]
    held = (sizes[moe][repeated] for moe, repeated in zip(kinds, again, strict=True))
    # A schedule keeps what a stage was given and what it gave until its backward.
    kept = stream * ((not part.embeds) + (not part.heads))
    below = list(itertools.accumulate(held, initial=kept))
    moments = [Moment(int(below[-1] + last), 0.0, part.heads)]
    places = [place for place, repeated in enumerate(again) if repeated]
    for moe in (False, True):
        # Memory is linear in the place of equal blocks: the first or the last of them is worst.
        mine = [place for place in places if kinds[place] == moe]
        for place in {*mine[:1], *mine[-1:]}:
            # Its turn: it holds all that it computes again; what came after it is gone.
            behind = (len(kinds) - place) / (len(kinds) + 1)
            moments.append(Moment(int(below[place] + stream + sizes[moe][False]), behind, False))
    return moments


def rank_moments(
    run: Run, device: str, layout: Layout, parts: Sequence[Part], flights: Sequence[int]
) -> list[tuple[Moment, Part]]:
    """Moments of a rank that holds `flights[i]` microbatches of its stage `parts[i]`: the others
    wait, whole, while one is at its moment."""
    by_part = [stage_moments(run, device, layout, part) for part in parts]
    waiting = sum(
        flight * moments[0].held_bytes for flight, moments in zip(flights, by_part, strict=True)
    )
    return [
        (Moment(waiting - moments[0].held_bytes + m.held_bytes, m.behind, m.loss), part)
        for moments, part in zip(by_part, parts, strict=True)
        for m in moments
    ]


def _head_input(run: Run, layout: Layout) -> float:
    """What the last norm keeps: its unit vector (split) and the head's input (gathered)."""
    tokens = attended_tokens(run, layout)
    return (FP32 / layout.tensor + element_bytes(run)) * run.model.width * tokens


def _block(run: Run, device: str, layout: Layout, moe: bool) -> tuple[float, float]:
    """Bytes that a block keeps of a microbatch: (without, with being computed again)."""
    model, element = run.model, element_bytes(run)
    tokens = attended_tokens(run, layout)
    split = tokens / layout.tensor
    norms = 2 * FP32 * (model.width + 1) * split + element * model.width * tokens
    masks = 2 * model.width * (element if device == "cpu" else 1) * split if model.dropout else 0
    mixed, products = (
        _experts(run, device, layout) if moe else _mlp(run, layout, model.hidden_width)
    )
    full = norms + _attention(run, device, layout) + mixed + masks
    kept = FP32 * model.width * split
    if run.memory.recompute == "selective":
        # Queries, keys, values, what attention gives, its projection, and the MLP's products.
        mine = (2 * model.query_width + 2 * model.kv_width) / layout.tensor
        kept += element * (mine + model.width) * tokens + products
    return full, kept


def _attention(run: Run, device: str, layout: Layout) -> float:
    """Queries, keys, values, probabilities where they are kept, and the projection's input."""
    model, element = run.model, element_bytes(run)
    tokens, kv_heads = attended_tokens(run, layout), model.kv_heads or model.heads
    ring = layout.context > 1 and run.layout.attention == "ring"
    units = model.query_width + model.kv_width + model.heads + kv_heads if model.qk_norm else 0
    # A CPU repeats keys and values for each query head; gathered ones are those of all ranks.
    keys = model.query_width if device == "cpu" and not ring else model.kv_width
    seen = tokens if ring else tokens * layout.context
    kept = FP32 * units * tokens + 2 * element * (model.query_width * tokens + keys * seen)
    if ring or device != "cpu" or run.data.sequence > CHUNKED_UP_TO:
        per_head: float = FP32
    else:
        per_head = element * keys_per_query(run.data.sequence, device)
    return (kept + model.heads * per_head * tokens) / layout.tensor


def _mlp(run: Run, layout: Layout, width: int) -> tuple[float, float]:
    """Bytes of an MLP with `width` hidden features: (all that is kept, results of products)."""
    model, element = run.model, element_bytes(run)
    tokens = attended_tokens(run, layout)
    gated = model.mlp == "gated"
    hidden = width * tokens / layout.tensor
    kept = element * ((4 if gated else 2) * hidden + model.width * tokens)
    return kept, element * ((2 if gated else 1) * hidden + model.width * tokens)


def _experts(run: Run, device: str, layout: Layout) -> tuple[float, float]:
    """The same of experts, which work on split tokens: the router's fp32 input and scores, each
    chosen row on its way in and out, hidden vectors, places of rows (integers) and weights; shared
    experts as an MLP."""
    model, element = run.model, element_bytes(run)
    moe, gated = model.moe, model.mlp == "gated"
    split = attended_tokens(run, layout) / layout.tensor
    rows = split * moe.active
    hidden = (4 if gated else 2) * model.expert_width
    kept = element * (2 * model.width + hidden) * rows
    if device == "cpu" and run.run.precision == "bf16":
        kept += element * (model.width + hidden) * FILLED_ROWS * moe.experts / layout.expert
    kept += PLACED_BYTES * rows + FP32 * (moe.experts + (moe.router == "sigmoid")) * split
    products = element * (model.width + (2 if gated else 1) * model.expert_width) * rows
    products += FP32 * moe.experts * split
    if not moe.shared:
        return kept + FP32 * model.width * split, products
    shared = _mlp(run, layout, moe.shared * model.expert_width)
    # What shared experts read is the router's input, unless that was cast, or gathered for them.
    own = 0.0 if element == FP32 and layout.tensor == 1 else FP32 * model.width * split
    return kept + own + shared[0], products + shared[1]
