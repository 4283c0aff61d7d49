"""Whether the kernel has killed for want of memory: it sends the signal that everybody else sends.

Not here: who was killed. Counted for the control group of this process (a job's, a container's), or
for the whole machine where there is none.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
MACHINE = Path("/proc/vmstat")

_COUNT = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)


def oom_kills(groups: Path = GROUPS, own: Path = OWN, machine: Path = MACHINE) -> int:
    """How often so far; 0 where the system does not say."""
    places = []
    with suppress(OSError, ValueError):
        for line in own.read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if not kinds:
                places.append(groups / path.lstrip("/") / "memory.events")
            elif "memory" in kinds.split(","):
                places.append(groups / "memory" / path.lstrip("/") / "memory.oom_control")
    for place in [*places, machine]:
        with suppress(OSError):
            if found := _COUNT.search(place.read_text()):
                return int(found[1])
    return 0
