"""`cordee train` on a host whose devices are called of another kind than they are.

Not a test. `python -m tests.drills.called KIND PYTHON -m cordee train ...`: its supervisor tells
the others KIND, its workers compute where they do. So hosts of two kinds meet on a machine that has
one.
"""

from __future__ import annotations

import sys

from cordee import begin
from cordee.cli.main import main
from cordee.config.run import Run
from cordee.fault.hosts import Meeting
from cordee.rendezvous import meet


def meet_as(run: Run, data: str, inside: str, device: str) -> Meeting:
    """As the house meets, but for the kind."""
    return meet(run, data, inside, sys.argv[1])


if __name__ == "__main__":
    vars(begin)["meet"] = meet_as
    sys.exit(main(sys.argv[5:]))
