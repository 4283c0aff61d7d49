"""This machine's profile where a plan needs it: the kept one, or measured now.

The measuring is a process of its own (`probe.py`): it imports torch, which the caller need not.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict
from typing import Any

from cordee.dist.start import loopback_environment, module_command
from cordee.dist.streams import say
from cordee.plan.cluster import Cluster, local_cluster
from cordee.plan.profile import Host, Profile, describe, read_profile, this_host

LIMIT_S = 60.0
"""A measurement that takes longer is given up."""


def measured_cluster(probes: bool) -> tuple[Cluster, dict[str, Any]]:
    """This machine and the profile that its figures rest on ({}: the processor's flags). `probes`:
    measure it now where no profile is kept, and say so."""
    host = this_host()
    profile, trouble = read_profile(host)
    if trouble:
        say(f"profile {trouble}")
    if profile is None and probes:
        profile = probe(host)
    return local_cluster(profile), {} if profile is None else asdict(profile)


def probe(host: Host) -> Profile | None:
    """Measures this machine in a process of its own and keeps the profile; says in one line what
    was measured, or why nothing was (None)."""
    command = module_command("cordee.probe")
    environment = loopback_environment()
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=LIMIT_S
        )
        answer = json.loads(done.stdout)
        profile = Profile.from_json(json.dumps(answer["profile"]))
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError) as error:
        say(f"profile none, by the processor's flags: {error}")
        return None
    kept = f" (not kept: {answer['trouble']})" if answer["trouble"] else ""
    say(f"profile {describe(profile)}; measured in {profile.seconds:.1f} s{kept}")
    return profile if profile.host == host else None
