"""What a run asks of its devices that not all have: fp8 products, a host beside them.

Not here: how many devices there are and whether a layout fits (`plan.py`). Traded away: asking the
driver; the table and the cluster's file say what devices can, before anything is started.
"""

from __future__ import annotations

from cordee.config.run import Run
from cordee.errors import ConfigError
from cordee.plan.cluster import Cluster


def check_devices(run: Run, cluster: Cluster) -> None:
    """ConfigError when these devices cannot do what the run asks of any of them."""
    if run.run.precision == "fp8" and (cluster.device == "cpu" or not cluster.flops_fp8):
        raise ConfigError(
            "these devices are not known to multiply in fp8",
            values={"run.precision": "fp8", "devices": cluster.name},
            fix="run.precision=bf16",
        )
    if run.memory.offload != "none" and cluster.device == "cpu":
        raise ConfigError(
            "the host is the device: there is nothing to offload to",
            values={"memory.offload": run.memory.offload, "devices": cluster.name},
            fix="memory.offload=none",
        )
