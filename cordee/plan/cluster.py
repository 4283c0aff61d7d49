"""The devices and links that a plan is made for: this machine, or what a TOML file describes.

This machine's figures are those of its profile (`profile.py`) where there is one. Without, a core's
peak is its clock times what its instruction set can do, and its bandwidth is a nominal value.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from cordee.config.load import read_toml
from cordee.devices import DEVICES, Kind
from cordee.errors import ConfigError
from cordee.plan.accelerators import Accelerators, recognise
from cordee.plan.profile import (
    Host,
    Profile,
    control_groups,
    field_of,
    read_profile,
    read_text,
    this_host,
)
from cordee.system import cpu_info, host_memory_bytes


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """`hosts` equal machines. What is per device is per core where `device` is cpu."""

    device: Kind
    name: str
    devices: int = 0
    """Accelerators of one host; 0 where `device` is cpu."""
    cores: int
    """CPU cores of one host that this program may use."""
    hosts: int = 1
    memory_bytes: int
    """Memory of one accelerator, or of one host, shared by its ranks, where `device` is cpu."""
    flops_fp32: float
    """Peak dense floating-point operations per second of one accelerator or one core, fp32."""
    flops_bf16: float
    """The same in bf16 with fp32 sums."""
    flops_fp8: float = 0.0
    """The same in fp8; 0: not known to have it."""
    flops_fp16: float = 0.0
    """The same in fp16; 0: as in bf16."""
    bf16_share: float = 0.0
    """Share of the bf16 peak that large products reach; 0: what is usual for such devices."""
    measured: bool = False
    """Whether the figures of a CPU were measured on it: products then reach their rates whole."""
    thread_products: float = 0.0
    """How many times as fast all threads of a host multiply as one; 0: what is usual."""
    thread_passes: float = 0.0
    """The same for element passes."""
    pass_bytes_per_s: float = 0.0
    """What element passes of one core read and write in cache; 0: a share of the memory's."""
    region_s: float = 0.0
    """What it costs to wake the threads of a rank for one operator; 0: not known."""
    operator_s: float = 0.0
    """Time of a small operator, forward and backward; 0: what is usual."""
    spread: float = 0.0
    """Relative difference of repeated measurements: a busy machine's step is less certain."""
    memory_bytes_per_s: float
    """Bandwidth of the memory as one accelerator or one core sees it."""
    link_bytes_per_s: float
    """What one rank sends to a rank of its host, one way."""
    link_s: float
    """Latency of one message between two ranks of a host, library included."""
    network_bytes_per_s: float = 1.25e9
    """What one rank sends to another host, one way (10 Gbit/s unless told)."""
    network_s: float = 100e-6
    """Latency of one message between hosts."""

    @property
    def slots(self) -> int:
        """Accelerators in all, or cores in all where `device` is cpu."""
        return (self.cores if self.device == "cpu" else self.devices) * self.hosts

    def flops(self, precision: str) -> float:
        """Peak of one accelerator or core, operations per second: fp32's, fp16's, or bf16's for
        what is narrower (in fp8 are only the blocks' products; MFU counts against bf16)."""
        if precision == "fp16" and self.flops_fp16:
            return self.flops_fp16
        return self.flops_fp32 if precision == "fp32" else self.flops_bf16


CPU_LINK_BYTES_PER_S = 1.3e9
CPU_LINK_S = 120e-6
"""Gloo between two processes of one machine: all-reduce and exchange of 0.5 to 43 MB, measured."""
CPU_MEMORY_BYTES_PER_S = 20e9
CPU_TURBO = 1.25
"""Turbo clock over the clock that /proc/cpuinfo shows, where the kernel does not tell it."""

_GPU = {
    "A100": (80e9, 19.5e12, 312e12, 0.0, 0.70, 2.04e12, 300e9, 25e9),
    "H100": (80e9, 67e12, 989e12, 1979e12, 0.57, 3.35e12, 450e9, 50e9),
    "H200": (141e9, 67e12, 989e12, 1979e12, 0.57, 4.8e12, 450e9, 50e9),
    "B200": (180e9, 75e12, 2250e12, 4500e12, 0.48, 7.7e12, 900e9, 50e9),
    "MI250X": (64e9, 47.9e12, 191.5e12, 0.0, 0.0, 1.6e12, 100e9, 25e9),
    "MI300X": (192e9, 163.4e12, 1307e12, 0.0, 0.0, 5.3e12, 448e9, 50e9),
    "MI355X": (288e9, 157.3e12, 2516e12, 0.0, 0.0, 8.0e12, 538e9, 50e9),
    "M1": (10e9, 2.6e12, 2.6e12, 0.0, 0.0, 68e9, 30e9, 1.25e9),
}
"""Memory, fp32, dense bf16 and dense fp8 peak, share of bf16's that training reaches, HBM
bandwidth, NVLink one way, one NIC. NVIDIA's data sheets of the A100 80GB SXM, H100 SXM, H200 SXM
and HGX B200 (half of the bf16 and fp8 figures given "with sparsity", half of the NVLink figures,
which count both ways); NICs of 200 and 400 Gbit/s per GPU, as in DGX systems of that time. Shares:
costs.py. AMD's data sheets (of the MI250X one of its two devices); fp8 is left out, as theirs has
other types. Apple's figures of the M1, the one GPU whose speed it has published."""


_DEVICE: Mapping[str, Kind] = {"M1": "mps"}
"""Kinds of the table that torch does not call cuda."""

STAND_INS: Mapping[str, str] = {"cuda": "A100", "xpu": "A100", "mps": "M1"}
"""Whose figures a device has that the table does not know."""


def gpu_cluster(kind: str, devices: int, *, hosts: int = 1, cores: int = 16) -> Cluster:
    """`hosts` machines with `devices` accelerators each, from the table; ConfigError if unknown."""
    if kind not in _GPU:
        raise _unlike("there is no such device in the table", "kind", kind, list(_GPU))
    memory, fp32, bf16, fp8, share, bandwidth, link, network = _GPU[kind]
    return Cluster(
        device=_DEVICE.get(kind, "cuda"),
        name=f"{devices} {kind}",
        devices=devices,
        cores=cores,
        hosts=hosts,
        memory_bytes=int(memory),
        flops_fp32=fp32,
        flops_bf16=bf16,
        flops_fp8=fp8,
        bf16_share=share,
        memory_bytes_per_s=bandwidth,
        link_bytes_per_s=link,
        link_s=15e-6,
        network_bytes_per_s=network,
        network_s=25e-6,
    )


def local_cluster(profile: Profile | None = None) -> Cluster:
    """This machine, by `profile`, the kept one (None), or else /proc, /sys, /dev and the process's
    CPU mask: about a millisecond, no torch.

    Several hosts are for the launcher to say: `replace(local_cluster(), hosts=4)`. A device that
    the table does not know is planned as one of it (`STAND_INS`), and the name says so.
    """
    host = this_host()
    profile = profile or read_profile(host)[0]
    found = recognise()
    if found is not None and found.usable:
        return _accelerated(found, host.cores, profile)
    left = f"; its {found.maker} GPU is left, torch here is not built for it" if found else ""
    made = _cpu_cluster(host, profile)
    return replace(made, name=made.name + left)


def _cpu_cluster(host: Host, profile: Profile | None) -> Cluster:
    info = cpu_info()
    fp32, bf16 = _core_flops(info)
    told = field_of(info, "model name") or "CPU"
    made = Cluster(
        device="cpu",
        name=f"{told}, {host.cores} core{'s' if host.cores > 1 else ''}",
        cores=host.cores,
        memory_bytes=_memory_bytes(),
        flops_fp32=fp32,
        flops_bf16=bf16,
        memory_bytes_per_s=CPU_MEMORY_BYTES_PER_S,
        link_bytes_per_s=CPU_LINK_BYTES_PER_S,
        link_s=CPU_LINK_S,
    )
    return made if profile is None else _with_profile(made, profile)


def _with_profile(cluster: Cluster, profile: Profile) -> Cluster:
    """A CPU host with measured rates instead of nominal ones."""
    products = profile.products
    return replace(
        cluster,
        flops_fp32=products["fp32"][0],
        flops_bf16=products["bf16"][0],
        flops_fp16=products["fp16"][0],
        measured=True,
        thread_products=products["fp32"][-1] / products["fp32"][0],
        thread_passes=profile.passes[-1] / profile.passes[0],
        region_s=max(0.0, profile.regions[-1] - profile.regions[0]),
        operator_s=profile.operator_s,
        spread=profile.spread,
        memory_bytes_per_s=profile.memory[0],
        pass_bytes_per_s=profile.passes[0],
        link_bytes_per_s=profile.reduce_bytes_per_s or CPU_LINK_BYTES_PER_S,
        link_s=profile.reduce_s or CPU_LINK_S,
    )


def _accelerated(found: Accelerators, cores: int, profile: Profile | None) -> Cluster:
    """The figures of what was recognised, what the driver says of its memory, and of a device that
    the table lacks the products that were measured."""
    kind = next((k for k in _GPU if k in found.model and k not in _DEVICE), None)
    made = gpu_cluster(kind or STAND_INS[found.device], found.count, cores=cores)
    memory_bytes = found.memory_bytes or made.memory_bytes
    made = replace(made, device=found.device, memory_bytes=memory_bytes)
    if kind:
        return made
    told = found.model or ("GPU" if found.maker == "NVIDIA" else f"{found.maker} GPU")
    made = replace(made, name=f"{found.count} {told} (as {STAND_INS[found.device]})")
    if profile is None or not profile.device_products:
        return made
    rates = profile.device_products
    return replace(
        made,
        bf16_share=1.0,
        flops_fp32=rates["fp32"],
        flops_bf16=rates["bf16"],
        flops_fp16=rates["fp16"],
    )


def processor_flags() -> frozenset[str]:
    """What an x86 processor says that it has (Linux); empty for others."""
    return frozenset(field_of(cpu_info(), "flags").split())


def cpu_only(cluster: Cluster) -> Cluster:
    """The same hosts without their accelerators (launch.device=cpu); the memory is this host's."""
    if cluster.device == "cpu":
        return cluster
    host = this_host()
    made = _cpu_cluster(host, read_profile(host)[0])
    name = f"{cluster.cores} cores of {cluster.name}"
    return replace(made, name=name, cores=cluster.cores, hosts=cluster.hosts)


def read_cluster(path: str | Path) -> Cluster:
    """A cluster from TOML: the fields of `Cluster`, or `kind` and `devices` and what differs.

    `kind = "H100"` takes the table's figures, `kind = "local"` this machine's; every other key then
    replaces one. Raises ConfigError for an unknown key, a wrong type, or a missing field.
    """
    given = dict(read_toml(Path(path)))
    kinds = {f.name: f.type for f in fields(Cluster)}
    for key in given:
        if key not in kinds and key != "kind":
            raise _unlike("a cluster has no such key", "key", key, [*kinds, "kind"], str(path))
    kind = given.pop("kind", None)
    values = {key: _typed(key, value, str(kinds[key]), path) for key, value in given.items()}
    if kind is None:
        base: dict[str, Any] = {}
    elif kind == "local":
        base = asdict(local_cluster())
    else:
        devices, hosts = int(values.get("devices", 1)), int(values.get("hosts", 1))
        base = asdict(gpu_cluster(str(kind), devices, hosts=hosts))
    made = {**base, **values}
    needed = [name for name in kinds if name not in made and not _has_default(name)]
    if needed:
        raise ConfigError(
            "the cluster lacks a field",
            values={"file": str(path), "missing": needed},
            fix=f'kind = "local" or kind = "H100" gives every field; else add {needed[0]}',
        )
    return _sensible(Cluster(**made), path)


def _sensible(cluster: Cluster, path: str | Path) -> Cluster:
    if cluster.device not in DEVICES:
        raise _unlike("no such kind of device", "device", cluster.device, list(DEVICES))
    free = {f.name for f in fields(Cluster) if f.default == 0}
    for key, value in asdict(cluster).items():
        if isinstance(value, int | float) and key not in free and value <= 0:
            raise ConfigError(
                f"{key} is above 0", values={"file": str(path), key: value}, fix=f"{key} = 1"
            )
    if cluster.measured and not (cluster.pass_bytes_per_s > 0 and cluster.operator_s > 0):
        raise ConfigError(
            "a measured cluster has pass_bytes_per_s and operator_s",
            values={"file": str(path), "measured": True},
            fix='kind = "local" after cordee probe, or leave measured out',
        )
    if cluster.device != "cpu" and cluster.devices < 1:
        raise ConfigError(
            f"a {cluster.device} cluster has devices",
            values={"file": str(path), "devices": cluster.devices},
            fix="devices = 8",
        )
    return cluster


def _typed(key: str, value: Any, kind: str, path: str | Path) -> Any:
    """`value` as the field wants it: text, a whole number, or any number."""
    text = "str" in kind or kind == "Kind"
    right = isinstance(value, str) if text else isinstance(value, int | float)
    if not text and isinstance(value, bool):
        right = kind == "bool"
    if kind == "int" and isinstance(value, float) and not value.is_integer():
        right = False
    if not right:
        told = "text" if text else "a whole number" if kind == "int" else "a number"
        raise ConfigError(
            f"{key} has the wrong type: it is {told}",
            values={"file": str(path), key: value},
            fix=f'{key} = "{value}"' if text else f"{key} = 8",
        )
    return value if text or kind == "bool" else int(value) if kind == "int" else float(value)


def _has_default(name: str) -> bool:
    return hasattr(Cluster, name)


def _unlike(what: str, key: str, value: str, known: list[str], file: str = "") -> ConfigError:
    near = difflib.get_close_matches(value, known, n=1, cutoff=0.4)
    values: Mapping[str, object] = {key: value} | ({"file": file} if file else {})
    fix = f"did you mean {near[0]}?" if near else "one of " + ", ".join(known)
    return ConfigError(what, values=values, fix=fix)


def _memory_bytes() -> int:
    """Memory of the machine, or the control groups' limit where that is lower."""
    limits = [host_memory_bytes() or 8 * 2**30]
    for folder in control_groups("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):  # versions 2 and 1
            limit = read_text(folder / name).strip()
            limits += [int(limit)] if limit.isdigit() else []
    return min(limits)


def _core_flops(info: str) -> tuple[float, float]:
    """Peak of one core in fp32 and bf16 from its flags: lanes x 2 (multiply and add) x 2 units.

    AMD's family 25 (Zen 3 and 4) runs 512-bit instructions in two halves. bf16 without its own
    instructions is widened to fp32 and gains nothing. Two hardware threads of a core share it.
    """
    flags = set((field_of(info, "flags") or field_of(info, "Features")).split())
    halves = "AMD" in field_of(info, "vendor_id") and field_of(info, "cpu family") == "25"
    if "avx512f" in flags and not halves:
        per_cycle = 64
    elif "fma" in flags or "avx512f" in flags:
        per_cycle = 32
    else:
        per_cycle = 16  # two 128-bit units, as on most 64-bit Arm cores
    gain = 8.0 if "amx_bf16" in flags else 2.0 if flags & {"avx512_bf16", "bf16"} else 1.0
    whole, seen = field_of(info, "cpu cores"), field_of(info, "siblings")
    part = int(whole) / int(seen) if whole.isdigit() and seen.isdigit() and int(seen) else 1.0
    peak = per_cycle * _clock_hz(info) * min(1.0, part or 1.0)
    return peak, gain * peak


def _clock_hz(info: str) -> float:
    told = read_text("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq").strip()
    if told.isdigit():
        return float(told) * 1e3
    shown = re.search(r"^cpu MHz\s*:\s*([\d.]+)", info, re.MULTILINE)
    return float(shown.group(1)) * 1e6 * CPU_TURBO if shown else 2.5e9
