"""Saving together: every rank writes its part in the background, rank 0 commits when all have.

Ranks learn of each other's saves through the step's tally, so nobody waits and nobody asks. A save
that failed is said, cleaned up and tried again some steps later; training goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cordee.checkpoint.format import Piece, SaveStatus
from cordee.checkpoint.save import Saver

RETRY_STEPS = 10
"""Steps after which a failed save is tried again."""

COMMITTED = 4
"""Rank 0's status after the commit, beside those of SaveStatus."""

FINAL_SAVE_ATTEMPTS = 3
"""Tries for the save at the end of a run."""

EventCallback = Callable[[str, int, Mapping[str, Any]], None]
"""(event, step, what is known)"""


class Checkpointer:
    """Decides when a save is due and settles it; the same decisions on every rank."""

    def __init__(
        self, saver: Saver, is_first_rank: bool, every_steps: int, log_event: EventCallback
    ) -> None:
        self._saver = saver
        self._is_first_rank = is_first_rank
        self._every_steps = every_steps
        self._log_event = log_event
        self._retry_at: int | None = None
        self._pending_step: int | None = None
        self._is_committed = False
        self.saved_step: int | None = None

    @property
    def status(self) -> int:
        """This rank's state, for the tally: a SaveStatus, or COMMITTED on rank 0."""
        return COMMITTED if self._is_committed else int(self._saver.poll())

    @property
    def has_pending_save(self) -> bool:
        """Whether a save is in flight or must be tried again."""
        return self._pending_step is not None or self._retry_at is not None

    def is_due(self, step: int) -> bool:
        """Whether a save should begin after `step`."""
        if self._pending_step is not None:
            return False
        if self._retry_at is not None and step >= self._retry_at:
            return True
        return self._every_steps > 0 and step % self._every_steps == 0

    def begin(
        self, step: int, generation: int, pieces: Sequence[Piece], meta: Mapping[str, Any]
    ) -> None:
        """Starts this rank's part; every rank calls it for the same step."""
        self._pending_step, self._retry_at = step, None
        self._saver.begin(step, generation, pieces, dict(meta))

    def advance(self, statuses: Sequence[int]) -> None:
        """Goes on when `statuses` (every rank's status) shows that all ranks stand at the same
        point.

        All have written: rank 0 commits, and says so with the next tally. It has: all are done.
        """
        if self._pending_step is None or any(
            s in (SaveStatus.WRITING, SaveStatus.IDLE) for s in statuses
        ):
            return
        failed_ranks = [rank for rank, status in enumerate(statuses) if status == SaveStatus.FAILED]
        if failed_ranks:
            self._schedule_retry(failed_ranks)
        elif statuses[0] == COMMITTED:
            self.saved_step = self._pending_step
        else:
            if self._is_first_rank:
                self._commit(self._pending_step)
            return
        self._pending_step, self._is_committed = None, False
        self._saver.finish()

    def drain(
        self, gather_statuses: Callable[[int], Sequence[int]], retry: Callable[[], None]
    ) -> bool:
        """Ends what is in flight; `gather_statuses` asks every rank, `retry` begins the same save
        anew.

        Returns whether the newest save succeeded. Every rank calls it at the same point.
        """
        for attempt in range(FINAL_SAVE_ATTEMPTS):
            while self._pending_step is not None:
                self._saver.join()
                self.advance(gather_statuses(self.status))
            if self._retry_at is None or attempt == FINAL_SAVE_ATTEMPTS - 1:
                break
            retry()
        return self._retry_at is None

    def _commit(self, step: int) -> None:
        report = self._saver.commit()  # None: the saver's status is FAILED now, and all will see it
        if report is not None:
            self._is_committed = True
            fields = {"bytes": report.bytes, "seconds": report.seconds, "path": report.path.name}
            self._log_event("checkpoint", step, fields)

    def _schedule_retry(self, ranks: Sequence[int]) -> None:
        step = self._pending_step or 0
        self._retry_at = step + RETRY_STEPS
        cause = self._saver.failure or f"rank {ranks[0]} could not write"
        self._log_event("checkpoint_failed", step, {"ranks": list(ranks), "cause": cause})
