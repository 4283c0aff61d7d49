"""`cordee train` on a host whose devices are called of another kind than they are.

Not a test. `python -m tests.drills.rendezvous_by_call KIND PYTHON -m cordee train ...`: its
supervisor tells the others KIND, its workers compute where they do. So hosts of two kinds meet on a
machine that has one.
"""

from __future__ import annotations

import sys

from cordee.cli.main import main
from cordee.config.run import Run
from cordee.elastic.hosts import RendezvousConfig
from cordee.launcher import prepare
from cordee.launcher.rendezvous import make_rendezvous_config


def meet_as_kind(run: Run, data: str, island_cut: str, device: str) -> RendezvousConfig:
    """As the house meets, but for the kind."""
    return make_rendezvous_config(run, data, island_cut, sys.argv[1])


if __name__ == "__main__":
    vars(prepare)["make_rendezvous_config"] = meet_as_kind
    sys.exit(main(sys.argv[5:]))
