"""Which samples each step used: asked of the order, and proved by what ranks noted as they loaded.

While a run trains, whoever computes a microbatch digests the ids of the rows that it loaded; the
digests of a step are one word in its row of metrics.jsonl. Comparing word by word finds the step
whose microbatch was left out, done twice or loaded from elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from cordee.data.order import SampleOrder
from cordee.errors import DataError

DIGEST_BITS = 52
"""A digest travels as a float64 in the tally, which holds whole numbers up to 2^53."""


def microbatch_digest(ids: NDArray[np.int64]) -> int:
    """52 bits that depend on the ids of a microbatch's rows and on their order."""
    return xxhash.xxh3_64_intdigest(ids.astype("<i8").tobytes()) >> (64 - DIGEST_BITS)


def step_digest(digests: Sequence[int]) -> str:
    """16 hexadecimal digits of a step, from its microbatches' digests in order."""
    return xxhash.xxh3_64_hexdigest(np.array(digests, "<i8").tobytes())


def expected_step_digest(order: SampleOrder, step: int) -> str:
    """The word that step `step` (from 0) must have."""
    return step_digest(
        [microbatch_digest(order.microbatch_row_ids(step, m)) for m in range(order.microbatches)]
    )


@dataclass(frozen=True)
class SampleUse:
    """One place of a sample: step (from 1, as in metrics.jsonl), microbatch, row in it, epoch."""

    step: int
    microbatch: int
    row: int
    epoch: int


def find_uses(order: SampleOrder, sample: int, steps: int) -> list[SampleUse]:
    """Every use of a sample in the first `steps` steps. DataError: there is no such sample."""
    if not 0 <= sample < order.rows:
        raise DataError(
            "there is no such sample",
            values={"sample": sample, "samples": order.rows},
            fix=f"0 to {order.rows - 1}",
        )
    uses = []
    for position, epoch in sorted(order.find_uses(sample, steps * order.step_rows)):
        step, offset = divmod(position, order.step_rows)
        uses.append(SampleUse(step + 1, *divmod(offset, order.microbatch_rows), epoch))
    return uses


MAX_MISSING = 1_000_000
"""Steps without a row that are listed one by one; a row that is further ahead is wrong itself."""


@dataclass
class LedgerCheck:
    """What a run's records prove. `run_steps` were recorded, `skipped` of them changed no
    parameter; `unproved` have no word; `wrong` have another than the order's, `missing_packages`
    have no row and `again` have more than one. `epochs` is how often every sample was drawn (a
    part: the last)."""

    steps: int = 0
    skipped: list[int] = field(default_factory=list)
    unproved: list[int] = field(default_factory=list)
    wrong: list[int] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)
    again: list[int] = field(default_factory=list)
    epochs: float = 0.0

    @property
    def is_exactly_once(self) -> bool:
        """Whether each step took its samples exactly once."""
        return not (self.wrong or self.missing or self.again or self.unproved)


def check_ledger(order: SampleOrder, rows: Iterable[Mapping[str, Any]]) -> LedgerCheck:
    """Holds a run's rows of metrics.jsonl (step, samples, skipped) to the order."""
    check, last_step = LedgerCheck(), 0
    for row in rows:
        step = int(row["step"])
        if step <= last_step:
            check.again.append(step)
            continue
        if step - last_step > MAX_MISSING:  # a number, but not of a step that was made
            check.wrong.append(step)
            continue
        check.missing += range(last_step + 1, step)
        last_step, check.steps = step, check.steps + 1
        digest = row.get("samples")
        if digest is None:
            check.unproved.append(step)
        elif digest != expected_step_digest(order, step - 1):
            check.wrong.append(step)
        if row.get("skipped"):
            check.skipped.append(step)
    check.epochs = last_step * order.step_rows / order.rows
    return check
