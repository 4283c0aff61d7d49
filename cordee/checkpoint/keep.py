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

LAST_TRIES = 3
"""Tries for the save at the end of a run."""

Say = Callable[[str, int, Mapping[str, Any]], None]
"""(event, step, what is known)"""


class Keeper:
    """Decides when a save is due and settles it; the same decisions on every rank."""

    def __init__(self, saver: Saver, first: bool, every: int, say: Say) -> None:
        self._saver = saver
        self._first = first
        self._every = every
        self._say = say
        self._retry_at: int | None = None
        self._flying: int | None = None
        self._committed = False
        self.saved_step: int | None = None

    @property
    def status(self) -> int:
        """This rank's state, for the tally: a SaveStatus, or COMMITTED on rank 0."""
        return COMMITTED if self._committed else int(self._saver.poll())

    @property
    def unfinished(self) -> bool:
        """Whether a save is in flight or must be tried again."""
        return self._flying is not None or self._retry_at is not None

    def due(self, step: int) -> bool:
        """Whether a save should begin after `step`."""
        if self._flying is not None:
            return False
        if self._retry_at is not None and step >= self._retry_at:
            return True
        return self._every > 0 and step % self._every == 0

    def begin(
        self, step: int, generation: int, pieces: Sequence[Piece], meta: Mapping[str, Any]
    ) -> None:
        """Starts this rank's part; every rank calls it for the same step."""
        self._flying, self._retry_at = step, None
        self._saver.begin(step, generation, pieces, dict(meta))

    def settle(self, saving: Sequence[int]) -> None:
        """Goes on when `saving` (every rank's status) shows that all ranks stand at the same point.

        All have written: rank 0 commits, and says so with the next tally. It has: all are done.
        """
        if self._flying is None or any(s in (SaveStatus.WRITING, SaveStatus.IDLE) for s in saving):
            return
        failed = [rank for rank, status in enumerate(saving) if status == SaveStatus.FAILED]
        if failed:
            self._give_up(failed)
        elif saving[0] == COMMITTED:
            self.saved_step = self._flying
        else:
            if self._first:
                self._commit(self._flying)
            return
        self._flying, self._committed = None, False
        self._saver.finish()

    def drain(self, gather: Callable[[int], Sequence[int]], again: Callable[[], None]) -> bool:
        """Ends what is in flight; `gather` asks every rank, `again` begins the same save anew.

        Returns whether the newest save succeeded. Every rank calls it at the same point.
        """
        for attempt in range(LAST_TRIES):
            while self._flying is not None:
                self._saver.join()
                self.settle(gather(self.status))
            if self._retry_at is None or attempt == LAST_TRIES - 1:
                break
            again()
        return self._retry_at is None

    def _commit(self, step: int) -> None:
        report = self._saver.commit()  # None: the saver's status is FAILED now, and all will see it
        if report is not None:
            self._committed = True
            known = {"bytes": report.bytes, "seconds": report.seconds, "path": report.path.name}
            self._say("checkpoint", step, known)

    def _give_up(self, ranks: Sequence[int]) -> None:
        step = self._flying or 0
        self._retry_at = step + RETRY_STEPS
        cause = self._saver.failure or f"rank {ranks[0]} could not write"
        self._say("checkpoint_failed", step, {"ranks": list(ranks), "cause": cause})
