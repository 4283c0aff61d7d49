"""What one rank sends inside an island, as a formula: the paper side of the counts in `parallel/`.

A test holds every formula equal to the bytes that the runtime counts. Not here: sums between
islands and time (`planner/network.py`). Traded away: headers and retries, which nobody counts.
"""

from __future__ import annotations

from typing import Literal

ContextMethod = Literal["gather", "ring"]
"""How ranks of a context group get each other's keys and values (parallel/context.py)."""

ACCUMULATOR_BYTES = 4
"""Gradients of keys and values travel round the ring in fp32: every stop adds to them."""


def context_layer_bytes(
    method: ContextMethod,
    tokens: int,
    kv_width: int,
    element_bytes: int,
    ranks: int,
    forwards: int = 1,
) -> int:
    """Bytes that each of `ranks` ranks sends for one attention layer and one microbatch.

    `tokens` are those of the whole microbatch (rows x sequence), `kv_width` the width of keys that
    this rank computes (its heads), `forwards` 2 where the backward computes the block again.
    Keys and values go to everybody once a forward. Their gradients come back: summed at once
    (gather: as wide as themselves) or stop by stop together with them (ring: fp32).
    """
    elements = 2 * tokens // ranks * kv_width
    gradient_bytes = element_bytes if method == "gather" else element_bytes + ACCUMULATOR_BYTES
    return (ranks - 1) * elements * (forwards * element_bytes + gradient_bytes)


def expert_layer_bytes(
    tokens: int,
    experts_per_token: int,
    width: int,
    ranks: int,
    element_bytes: int,
    forwards: int = 1,
) -> float:
    """Bytes that each of `ranks` sends for one mixture of experts and one microbatch of
    each, when all experts are equally busy.

    `tokens` are those that this rank holds; `experts_per_token` rows of each go to their experts
    and back, in every forward and as gradients; (ranks - 1) / ranks of them leave the rank. Left
    out: the counts, 8 bytes an expert and forward.
    """
    rows = tokens * experts_per_token * (ranks - 1) / ranks
    return (2 * forwards + 2) * rows * width * element_bytes
