"""What a run asks of its devices: the precision that is fastest there, fp8, bits, a host beside
them, messages. The table, the machine's profile or the cluster's file say what devices can.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from cordee.config.run import Run
from cordee.errors import ConfigError, LayoutError
from cordee.hardware.devices import DEVICES
from cordee.layout.axes import Layout
from cordee.planner.cluster import Cluster

MIN_SPEEDUP = 1.5
"""How many times as fast products must be before casts to another precision pay."""

Precision = Literal["fp32", "bf16", "fp16"]


def fastest_precision(cluster: Cluster) -> Precision:
    """bf16 where the devices multiply it faster than fp32, else fp32; fp16, which needs a scaled
    loss, only where it is measured to be faster than both."""
    fastest: Precision = "fp32"
    precisions = DEVICES[cluster.device].precisions
    if "bf16" in precisions and cluster.flops_bf16 >= MIN_SPEEDUP * cluster.flops_fp32:
        fastest = "bf16"
    if "fp16" in precisions and cluster.flops_fp16 >= MIN_SPEEDUP * cluster.flops(fastest):
        fastest = "fp16"
    return fastest


def with_precision(run: Run, cluster: Cluster) -> Run:
    """The run with run.precision=auto resolved for these devices."""
    if run.run.precision != "auto":
        return run
    return replace(run, run=replace(run.run, precision=fastest_precision(cluster)))


def precision_text(precision: str, cluster: Cluster) -> str:
    """Why a precision is fast or slow on these devices: its products against fp32's or bf16's."""
    source = "measured" if cluster.measured else "by nominal figures"
    source = "by the table of devices" if cluster.device != "cpu" else source
    if precision == "fp32":
        other_precision = "fp16" if cluster.flops_fp16 > cluster.flops_bf16 else "bf16"
        ratio = cluster.flops(other_precision) / cluster.flops_fp32
        if ratio < 1:
            return f"{other_precision} products are {1 / ratio:.1f} x slower here, {source}"
        return f"{other_precision} products are {ratio:.1f} x as fast here, {source}"
    ratio = cluster.flops(precision) / cluster.flops_fp32
    if ratio < 1:
        return (
            f"emulated here: products {1 / ratio:.1f} x slower than in fp32, {source};"
            " run.precision=fp32 is faster"
        )
    return f"products {ratio:.1f} x as fast as in fp32 here, {source}"


def check_devices(run: Run, cluster: Cluster) -> None:
    """ConfigError when these devices cannot do what the run asks of any of them."""
    device = DEVICES[cluster.device]
    if run.run.exact and not device.exact:
        raise ConfigError(
            f"run.exact promises bits, and {cluster.device} devices are not known to repeat them",
            values={"run.exact": True, "devices": cluster.name},
            fix="launch.device=cpu, or run.exact=false",
        )
    if run.run.precision == "fp8" and not ("fp8" in device.precisions and cluster.flops_fp8):
        raise ConfigError(
            "these devices are not known to multiply in fp8",
            values={"run.precision": "fp8", "devices": cluster.name},
            fix="run.precision=bf16",
        )
    if run.memory.offload != "none" and not device.offload:
        raise ConfigError(
            "the host is the device: there is nothing to offload to",
            values={"memory.offload": run.memory.offload, "devices": cluster.name},
            fix="memory.offload=none",
        )


def single_device_reason(cluster: Cluster) -> str:
    """Why an island has one of these devices only; "" where it may have several."""
    if DEVICES[cluster.device].multidevice:
        return ""
    return f"sends messages between devices, which {cluster.device} cannot"


def check_island_devices(layout: Layout, cluster: Cluster) -> None:
    """ConfigError for an island of several devices that cannot send each other messages."""
    if layout.size > layout.island and (reason := single_device_reason(cluster)):
        raise LayoutError(
            f"an island of several devices {reason}",
            values={"layout": layout.describe(), "devices": cluster.name},
            fix="islands of one device each (layout.islands), or launch.device=cpu",
        )
