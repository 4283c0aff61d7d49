"""Bytes that axes send, as formulas; a test holds them against the bytes that wires count.

Not here: time on links (`plan/network.py`) or gradients between islands (`plan/costs.py`).
"""

from __future__ import annotations


def expert_bytes(tokens: int, active: int, width: int, ranks: int, element: int) -> float:
    """Bytes that one rank sends for one mixture of experts, forward and backward, of a microbatch
    of which it holds `tokens`, when every expert is equally busy.

    tokens x active rows of width x element bytes go to their expert and back, and so do their
    gradients; (ranks - 1) / ranks of them leave the rank. A block that is computed again sends half
    as much once more. Left out: the counts, 8 bytes an expert and pass.
    """
    return 4 * tokens * active * width * element * (ranks - 1) / ranks
