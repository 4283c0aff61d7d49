"""The devices and links that a plan is made for (this machine's, or those that a TOML file
describes), and what a run may ask of them: precision, fp8, bits, arithmetic, messages.

This machine's figures are those of its profile (`profile.py`) where there is one. Without, a core's
peak is its clock times what its instruction set can do, and its bandwidth is a nominal value.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from cordee.config.load import read_toml
from cordee.config.run import Run, RunSettings
from cordee.errors import ConfigError, LayoutError
from cordee.hardware.devices import DEVICES, Accelerators, DeviceKind, detect_accelerators
from cordee.hardware.system import cpu_info, host_memory_bytes, read_text
from cordee.layout.axes import Layout
from cordee.planner.profile import Host, Profile, control_groups, field_of, local_host, read_profile

MIN_SPEEDUP = 1.5
"""How many times as fast products must be before casts to another precision pay."""

Precision = Literal["fp32", "bf16", "fp16"]

PORTABLE_ARITHMETICS = ("avx2", "compatible")
"""Values of run.arithmetic that make unlike processors take the same code."""

AVX2_FLAGS = frozenset({"avx2", "fma"})


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """`hosts` equal machines. What is per device is per core where `device` is cpu."""

    device: DeviceKind
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

_GPU_FIGURES = {
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
compute_cost.py. AMD's data sheets (of the MI250X one of its two devices); fp8 is left out, as
theirs has other types. Apple's figures of the M1, the one GPU whose speed it has published."""


_GPU_DEVICES: Mapping[str, DeviceKind] = {"M1": "mps"}
"""Kinds of the table that torch does not call cuda."""

FALLBACK_GPUS: Mapping[str, str] = {"cuda": "A100", "xpu": "A100", "mps": "M1"}
"""Whose figures a device has that the table does not know."""


def gpu_cluster(gpu: str, devices: int, *, hosts: int = 1, cores: int = 16) -> Cluster:
    """`hosts` machines with `devices` accelerators each, from the table; ConfigError if
    unknown."""
    if gpu not in _GPU_FIGURES:
        problem = "there is no such device in the table"
        raise _unknown_name_error(problem, "kind", gpu, list(_GPU_FIGURES))
    memory, fp32, bf16, fp8, share, bandwidth, link, network = _GPU_FIGURES[gpu]
    return Cluster(
        device=_GPU_DEVICES.get(gpu, "cuda"), name=f"{devices} {gpu}", devices=devices,
        cores=cores, hosts=hosts, memory_bytes=int(memory), flops_fp32=fp32, flops_bf16=bf16,
        flops_fp8=fp8, bf16_share=share, memory_bytes_per_s=bandwidth, link_bytes_per_s=link,
        link_s=15e-6, network_bytes_per_s=network, network_s=25e-6,
    )  # fmt: skip


def local_cluster(profile: Profile | None = None) -> Cluster:
    """This machine, by `profile`, the kept one (None), or else /proc, /sys, /dev and the process's
    CPU mask: about a millisecond, no torch.

    Several hosts are for the launcher to say: `replace(local_cluster(), hosts=4)`. A device that
    the table does not know is planned as one of it (`FALLBACK_GPUS`), and the name says so.
    """
    host = local_host()
    profile = profile or read_profile(host)[0]
    accelerators = detect_accelerators()
    if accelerators is not None and accelerators.is_usable:
        return _accelerator_cluster(accelerators, host.cores, profile)
    cluster = _cpu_cluster(host, profile)
    if accelerators is None:
        return cluster
    suffix = f"; its {accelerators.vendor} GPU is left, torch here is not built for it"
    return replace(cluster, name=cluster.name + suffix)


def _cpu_cluster(host: Host, profile: Profile | None) -> Cluster:
    info = cpu_info()
    fp32, bf16 = _core_flops(info)
    model_name = field_of(info, "model name") or "CPU"
    cluster = Cluster(
        device="cpu", name=f"{model_name}, {host.cores} core{'s' if host.cores > 1 else ''}",
        cores=host.cores, memory_bytes=_memory_bytes(), flops_fp32=fp32, flops_bf16=bf16,
        memory_bytes_per_s=CPU_MEMORY_BYTES_PER_S, link_bytes_per_s=CPU_LINK_BYTES_PER_S,
        link_s=CPU_LINK_S,
    )  # fmt: skip
    return cluster if profile is None else _with_profile(cluster, profile)


def _with_profile(cluster: Cluster, profile: Profile) -> Cluster:
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


def _accelerator_cluster(
    accelerators: Accelerators, cores: int, profile: Profile | None
) -> Cluster:
    """The table's figures with the memory that the driver reports; of a device that it lacks, the
    measured products."""
    gpu = next((k for k in _GPU_FIGURES if k in accelerators.model and k not in _GPU_DEVICES), None)
    substitute = FALLBACK_GPUS[accelerators.device]
    cluster = gpu_cluster(gpu or substitute, accelerators.count, cores=cores)
    memory_bytes = accelerators.memory_bytes or cluster.memory_bytes
    cluster = replace(cluster, device=accelerators.device, memory_bytes=memory_bytes)
    if gpu:
        return cluster
    vendor = "" if accelerators.vendor == "NVIDIA" else f"{accelerators.vendor} "
    model_name = accelerators.model or f"{vendor}GPU"
    cluster = replace(cluster, name=f"{accelerators.count} {model_name} (as {substitute})")
    if profile is None or not profile.device_products:
        return cluster
    fp32, bf16, fp16 = (profile.device_products[p] for p in ("fp32", "bf16", "fp16"))
    return replace(cluster, bf16_share=1.0, flops_fp32=fp32, flops_bf16=bf16, flops_fp16=fp16)


def processor_flags() -> frozenset[str]:
    """What an x86 processor says that it has (Linux); empty for others."""
    return frozenset(field_of(cpu_info(), "flags").split())


def without_accelerators(cluster: Cluster) -> Cluster:
    """The same hosts without their accelerators (launch.device=cpu); the memory is this host's."""
    if cluster.device == "cpu":
        return cluster
    host = local_host()
    cpu_cluster = _cpu_cluster(host, read_profile(host)[0])
    name = f"{cluster.cores} cores of {cluster.name}"
    return replace(cpu_cluster, name=name, cores=cluster.cores, hosts=cluster.hosts)


def read_cluster(path: str | Path) -> Cluster:
    """A cluster from TOML: the fields of `Cluster`, or `kind` and `devices` and what differs.

    `kind = "H100"` takes the table's figures, `kind = "local"` this machine's; every other key then
    replaces one. Raises ConfigError for an unknown key, a wrong type, or a missing field.
    """
    table = dict(read_toml(Path(path)))
    field_types = {f.name: f.type for f in fields(Cluster)}
    for key in table:
        if key not in field_types and key != "kind":
            names = [*field_types, "kind"]
            raise _unknown_name_error("a cluster has no such key", "key", key, names, str(path))
    kind = table.pop("kind", None)
    values = {k: _convert_field(k, value, str(field_types[k]), path) for k, value in table.items()}
    base: dict[str, Any] = {}
    if kind == "local":
        base = asdict(local_cluster())
    elif kind is not None:
        devices, hosts = int(values.get("devices", 1)), int(values.get("hosts", 1))
        base = asdict(gpu_cluster(str(kind), devices, hosts=hosts))
    figures = {**base, **values}
    required_fields = [name for name in field_types if not hasattr(Cluster, name)]
    missing_fields = [name for name in required_fields if name not in figures]
    if missing_fields:
        raise ConfigError(
            "the cluster lacks a field",
            values={"file": str(path), "missing": missing_fields},
            fix=f'kind = "local" or kind = "H100" gives every field; else add {missing_fields[0]}',
        )
    return _check_cluster(Cluster(**figures), path)


def _check_cluster(cluster: Cluster, path: str | Path) -> Cluster:
    if cluster.device not in DEVICES:
        raise _unknown_name_error("no such kind of device", "device", cluster.device, list(DEVICES))
    optional_fields = {f.name for f in fields(Cluster) if f.default == 0}
    for key, value in asdict(cluster).items():
        if isinstance(value, int | float) and key not in optional_fields and value <= 0:
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


def _convert_field(key: str, value: Any, type_name: str, path: str | Path) -> Any:
    """`value` as the field wants it: text, a whole number, or any number."""
    is_text = type_name in ("str", "DeviceKind")
    is_valid = isinstance(value, str) if is_text else isinstance(value, int | float)
    if not is_text and isinstance(value, bool):
        is_valid = type_name == "bool"
    if type_name == "int" and isinstance(value, float) and not value.is_integer():
        is_valid = False
    if not is_valid:
        words = {"int": "a whole number", "str": "text", "DeviceKind": "text"}
        raise ConfigError(
            f"{key} has the wrong type: it is {words.get(type_name, 'a number')}",
            values={"file": str(path), key: value},
            fix=f'{key} = "{value}"' if is_text else f"{key} = 8",
        )
    if is_text or type_name == "bool":
        return value
    return int(value) if type_name == "int" else float(value)


def _unknown_name_error(
    problem: str, key: str, value: str, names: list[str], file: str = ""
) -> ConfigError:
    matches = difflib.get_close_matches(value, names, n=1, cutoff=0.4)
    values: Mapping[str, object] = {key: value} | ({"file": file} if file else {})
    fix = f"did you mean {matches[0]}?" if matches else "one of " + ", ".join(names)
    return ConfigError(problem, values=values, fix=fix)


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
    is_half_rate = "AMD" in field_of(info, "vendor_id") and field_of(info, "cpu family") == "25"
    if "avx512f" in flags and not is_half_rate:
        per_cycle = 64
    elif "fma" in flags or "avx512f" in flags:
        per_cycle = 32
    else:
        per_cycle = 16  # two 128-bit units, as on most 64-bit Arm cores
    bf16_gain = 8.0 if "amx_bf16" in flags else 2.0 if flags & {"avx512_bf16", "bf16"} else 1.0
    counts = [field_of(info, name) for name in ("cpu cores", "siblings")]
    core_count, thread_count = (int(text) if text.isdigit() else 0 for text in counts)
    core_share = min(1.0, core_count / thread_count) if core_count and thread_count else 1.0
    peak = per_cycle * _clock_hz(info) * core_share
    return peak, bf16_gain * peak


def _clock_hz(info: str) -> float:
    max_khz = read_text("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq").strip()
    if max_khz.isdigit():
        return float(max_khz) * 1e3
    match = re.search(r"^cpu MHz\s*:\s*([\d.]+)", info, re.MULTILINE)
    return float(match.group(1)) * 1e6 * CPU_TURBO if match else 2.5e9


def choose_arithmetic(
    settings: RunSettings, device: str, flags: Collection[str], variables: Collection[str] = ()
) -> tuple[str, str]:
    """run.arithmetic=auto resolved for one host: (native, avx2 or compatible; why, in words).

    `device` is the plan's kind, `flags` are the processor's (empty: not an x86 one), `variables`
    those of the environment that choose instructions by themselves. ConfigError when the processor
    lacks what the run asks for.
    """
    has_avx2 = AVX2_FLAGS.issubset(flags)
    if settings.arithmetic in PORTABLE_ARITHMETICS and not (device == "cpu" and has_avx2):
        raise ConfigError(
            f"run.arithmetic={settings.arithmetic} is for x86 processors that have AVX2",
            values={"run.arithmetic": settings.arithmetic, "device": device, "AVX2": has_avx2},
            fix="run.arithmetic=native" + (", or launch.device=cpu" if has_avx2 else ""),
        )
    if settings.arithmetic != "auto":
        return settings.arithmetic, "as asked"
    if not settings.exact or settings.precision != "fp32":
        return "native", "processors agree in exact fp32 runs alone"
    if device != "cpu" or not has_avx2:
        return "native", f"{device} without AVX2" if device == "cpu" else f"devices are {device}"
    if variables:
        return "native", "the environment has its own " + ", ".join(sorted(variables))
    if any(flag.startswith(("avx512", "amx")) for flag in flags):
        return "native", "this processor has wider instructions than AVX2"
    return "avx2", "this processor has nothing wider"


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
        other = "fp16" if cluster.flops_fp16 > cluster.flops_bf16 else "bf16"
        ratio = cluster.flops(other) / cluster.flops_fp32
        speed = f"{1 / ratio:.1f} x slower" if ratio < 1 else f"{ratio:.1f} x as fast"
        return f"{other} products are {speed} here, {source}"
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
