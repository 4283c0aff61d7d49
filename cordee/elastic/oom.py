"""Whether the kernel has killed a process for want of memory, which its signal alone does not say.

Counted for this process's control group (a job's, a container's), else for the whole machine.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")
PROCESS_CGROUP = Path("/proc/self/cgroup")
VMSTAT = Path("/proc/vmstat")

_OOM_KILL_COUNT = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)


def oom_kills(
    cgroup_root: Path = CGROUP_ROOT, process_cgroup: Path = PROCESS_CGROUP, vmstat: Path = VMSTAT
) -> int:
    """How often so far; 0 where the system does not say."""
    count_files = []
    with suppress(OSError, ValueError):
        for line in process_cgroup.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                count_files.append(cgroup_root / path.lstrip("/") / "memory.events")
            elif "memory" in controllers.split(","):
                count_files.append(cgroup_root / "memory" / path.lstrip("/") / "memory.oom_control")
    for count_file in [*count_files, vmstat]:
        with suppress(OSError):
            if count_match := _OOM_KILL_COUNT.search(count_file.read_text()):
                return int(count_match[1])
    return 0
