"""What a pipeline's schedule costs: microbatches whose activations a rank holds, and idle time.

Closed forms of what torch.distributed.pipelining executes; a test counts them in its own tables of
actions. Not here: which layers a stage has (`layout/stages.py`) and what is sent
(`step_traffic.py`).
"""

from __future__ import annotations

from cordee.config.run import LayoutSettings

ZERO_BUBBLE_RATIO = 1 / 3
"""Bubble of ZBV over that of 1F1B: weights' gradients fill it (Qi et al. 2023, half or less)."""


def in_flight_microbatches(
    settings: LayoutSettings, ranks: int, rank: int, microbatches: int
) -> list[int]:
    """For each stage of pipeline rank `rank`, the microbatches whose activations it holds at most.

    GPipe holds all; 1F1B as many as stages follow; interleaved what its warm-up forwards and one
    more; ZBV, whose first and last stage are on one rank, as many as there are stages in all.
    """
    m = microbatches
    if ranks == 1:
        return [1]
    match settings.schedule:
        case "gpipe":
            return [m]
        case "1f1b":
            return [min(m, ranks - rank)]
        case "interleaved":
            return _interleaved_in_flight(settings.chunks, ranks, rank, m)
    return [min(m, 2 * ranks - rank - 1), min(m, rank + 1)]


def bubble_ratio(settings: LayoutSettings, ranks: int, microbatches: int) -> float:
    """Idle time of a step over the time that a rank computes (Narayanan et al. 2021, section 2)."""
    ratio = (ranks - 1) / microbatches
    match settings.schedule:
        case "interleaved":
            return ratio / settings.chunks
        case "zero_bubble":
            return ratio * ZERO_BUBBLE_RATIO
    return ratio


def _interleaved_in_flight(chunks: int, ranks: int, rank: int, microbatches: int) -> list[int]:
    """Forwards before the first backward, dealt to the chunks in rounds."""
    round_size = microbatches // max(1, microbatches // ranks)
    warm_up = (chunks - 1) * round_size + 2 * (ranks - 1 - rank)
    forwards = min(warm_up + 1, microbatches * chunks)
    cycles, remainder = divmod(forwards, round_size * chunks)
    return [
        min(
            microbatches,
            cycles * round_size + min(round_size, max(0, remainder - round_size * chunk)),
        )
        for chunk in range(chunks)
    ]
