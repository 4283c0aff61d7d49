"""This machine's profile where a plan needs it: the kept one, or measured now.

The measuring is a process of its own (`probe_machine.py`): it imports torch, which the caller need
not.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict
from typing import Any

from cordee.dist.process_group import loopback_environment, module_command
from cordee.dist.streams import print_to_stderr
from cordee.planner.cluster import Cluster, local_cluster
from cordee.planner.profile import Host, Profile, local_host, profile_text, read_profile

PROBE_TIMEOUT_S = 60.0
"""A measurement that takes longer is given up."""


def measure_cluster(may_probe: bool) -> tuple[Cluster, dict[str, Any]]:
    """This machine and the profile that its figures rest on ({}: the processor's flags).
    `may_probe`: measure it now where no profile is kept, and say so."""
    host = local_host()
    profile, problem = read_profile(host)
    if problem:
        print_to_stderr(f"profile {problem}")
    if profile is None and may_probe:
        profile = probe_machine(host)
    return local_cluster(profile), {} if profile is None else asdict(profile)


def probe_machine(host: Host) -> Profile | None:
    """Measures this machine in a process of its own and keeps the profile; says in one line what
    was measured, or why nothing was (None)."""
    command = module_command("cordee.launcher.probe")
    environment = loopback_environment()
    try:
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S
        )
        answer = json.loads(result.stdout)
        profile = Profile.from_json(json.dumps(answer["profile"]))
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError) as error:
        print_to_stderr(f"profile none, by the processor's flags: {error}")
        return None
    save_note = f" (not kept: {answer['trouble']})" if answer["trouble"] else ""
    print_to_stderr(
        f"profile {profile_text(profile)}; measured in {profile.seconds:.1f} s{save_note}"
    )
    return profile if profile.host == host else None
