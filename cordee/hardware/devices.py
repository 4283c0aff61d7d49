"""The kinds of device by torch's names and what each offers, and which accelerators this machine
has, from what its kernel shows: milliseconds, no torch.

NVIDIA by /dev and /proc, AMD by the topology of /dev/kfd (a "cuda" device of a torch that was built
with ROCm), Intel by /dev/dri, Apple by sysctl.
"""

from __future__ import annotations

import glob
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cordee.hardware.system import host_memory_bytes, read_text, sysctl_number, sysctl_text

ROOT = Path("/")
"""Where /dev, /proc and /sys are."""

AMD_NAMES = {"gfx90a": "MI250X", "gfx942": "MI300X", "gfx950": "MI355X"}
"""AMD's names for what the kernel calls by its instructions."""

INTEL_VENDOR, INTEL_DRIVERS = "0x8086", ("i915", "xe")
MIN_OWN_MEMORY_BYTES = 1 << 30
"""An Intel GPU that maps less has no memory of its own, but half of the host's."""

APPLE_MEMORY_SHARE = 2 / 3
"""Of the machine's memory that Apple's GPU may hold (macOS: two thirds, or more on large ones)."""

DeviceKind = Literal["cpu", "cuda", "xpu", "mps"]

HOST_GLOO = "cpu:gloo"
"""Messages of accelerators that travel from host memory: in groups with ranks of another kind, and
wherever a kind has no backend of its own."""


@dataclass(frozen=True, kw_only=True)
class DeviceSpec:
    """One kind. `backend` carries its ranks' messages (torch.distributed's words)."""

    backend: str
    multidevice: bool = True
    """Whether an island may have several of them: their messages stay on the devices."""
    precisions: tuple[str, ...] = ("fp32", "bf16", "fp16")
    exact: bool = False
    """Whether run.exact takes it: torch documents kernels that repeat their bits, and there is a
    test of ours that asks for it."""
    float64: bool = True
    streams: bool = True
    """Whether one waits for a stream alone; else for all that the device was given."""
    events: bool = True
    """Whether the device's own clock tells when it came to a point; else the host's does."""
    memory_statistics: bool = True
    """Whether the allocator tells its peak; else the process's peak is what is known."""
    pinning: bool = True
    """Whether copies from and to the host are quicker, and go on in the background, when the
    host's memory is pinned."""
    offload: bool = True
    """Whether there is a host beside it to offload to."""
    compiler: Literal["CXX", "CC"] = "CC"
    """What torch.compile builds for it with: the variable that names another compiler."""
    overhead_bytes: int = 900 << 20
    """Memory beside what torch's allocator holds: context and communicators; of a CPU, interpreter
    and torch."""
    cost_model: Literal["cpu", "cuda"] = "cuda"
    """Whose measured constants the planner takes (`planner/compute_cost.py`)."""


DEVICES: Mapping[str, DeviceSpec] = {
    "cpu": DeviceSpec(
        backend="gloo", exact=True, streams=False, events=False, memory_statistics=False,
        pinning=False, offload=False, compiler="CXX", overhead_bytes=250 << 20, cost_model="cpu",
    ),
    "cuda": DeviceSpec(
        backend="cpu:gloo,cuda:nccl", exact=True, precisions=("fp32", "bf16", "fp16", "fp8"),
    ),
    "xpu": DeviceSpec(backend="cpu:gloo,xpu:xccl"),
    "mps": DeviceSpec(
        backend=HOST_GLOO, multidevice=False, float64=False, streams=False, memory_statistics=False,
        pinning=False, offload=False, compiler="CXX",
    ),
}  # fmt: skip
"""ROCm's builds of torch call RCCL nccl. Apple's GPU works in the host's memory."""

BACKENDS: Mapping[str, str] = {kind: device.backend for kind, device in DEVICES.items()}
"""What carries a rank's messages, by its kind of device."""


@dataclass(frozen=True)
class Accelerators:
    """`count` equal devices of torch's kind `device`. `model` is what they are called, "" when
    unknown; `memory_bytes` is one's, 0 when unknown; `is_usable`: the torch here is built for
    them."""

    device: DeviceKind
    vendor: str
    model: str
    count: int
    memory_bytes: int = 0
    is_usable: bool = True


def detect_accelerators() -> Accelerators | None:
    """This machine's accelerators: the first that torch can use, else the first; None: a CPU."""
    candidates = (_nvidia(), _amd(), _intel(), _apple())
    accelerators = [candidate for candidate in candidates if candidate is not None]
    return next(
        (candidate for candidate in accelerators if candidate.is_usable),
        accelerators[0] if accelerators else None,
    )


def _nvidia() -> Accelerators | None:
    device_files = [
        path for path in _glob("dev/nvidia[0-9]*") if path.name.removeprefix("nvidia").isdigit()
    ]
    if not device_files:
        return None
    texts = map(read_text, sorted(_glob("proc/driver/nvidia/gpus/*/information")))
    models = [
        match.group(1).strip() for text in texts if (match := re.search(r"Model\s*:(.*)", text))
    ]
    return Accelerators(
        "cuda", "NVIDIA", (models or [""])[0], len(device_files), is_usable=_is_built_for("cuda")
    )


def _amd() -> Accelerators | None:
    """Nodes that compute and that this process has a device file of: a container sees all nodes."""
    if not (ROOT / "dev/kfd").exists():
        return None
    models, memories = [], []
    for node in sorted(_glob("sys/class/kfd/kfd/topology/nodes/*")):
        properties = _parse_numbers(read_text(node / "properties"))
        device_file = ROOT / f"dev/dri/renderD{properties.get('drm_render_minor', -1)}"
        if not properties.get("simd_count") or not device_file.exists():
            continue
        version = properties.get("gfx_target_version", 0)  # 90402: major 9, minor 4, step 2
        models.append(f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}")
        banks = map(read_text, node.glob("mem_banks/*/properties"))
        memories.append(sum(_parse_numbers(bank).get("size_in_bytes", 0) for bank in banks))
    if not models:
        return None
    model = AMD_NAMES.get(models[0], models[0])
    return Accelerators("cuda", "AMD", model, len(models), min(memories), _is_built_for("hip"))


def _intel() -> Accelerators | None:
    memories = []
    for node in _glob("sys/class/drm/renderD*"):
        driver = (node / "device/driver").resolve().name
        vendor = read_text(node / "device/vendor").strip()
        if vendor == INTEL_VENDOR and driver in INTEL_DRIVERS and _device_file(node).exists():
            memories.append(_mapped_bytes(read_text(node / "device/resource")))
    if not memories:
        return None
    memory = min(memories)
    if memory < MIN_OWN_MEMORY_BYTES:
        memory = host_memory_bytes() // 2
    return Accelerators("xpu", "Intel", "", len(memories), memory, _is_built_for("xpu"))


def _apple() -> Accelerators | None:
    """Only for a process of Apple's own instructions: torch has no such device under Rosetta."""
    if not sysctl_number("hw.optional.arm64") or sysctl_number("sysctl.proc_translated"):
        return None
    memory = int(APPLE_MEMORY_SHARE * host_memory_bytes())
    return Accelerators("mps", "Apple", sysctl_text("machdep.cpu.brand_string"), 1, memory)


def _is_built_for(backend: str) -> bool:
    """Whether the torch here was built with "cuda", "hip" (ROCm) or "xpu", by its own file of
    versions; True when there is none to ask."""
    spec = importlib.util.find_spec("torch")
    text = read_text(Path(spec.origin).with_name("version.py")) if spec and spec.origin else ""
    match = re.search(rf"^{backend}\b[^=\n]*=\s*(\S+)", text, re.MULTILINE)
    return match is None or match.group(1) != "None"


def _mapped_bytes(table: str) -> int:
    """The largest range of memory in a PCI device's table of ranges (start, end, flags)."""
    rows = [line.split() for line in table.splitlines()]
    pairs = [(int(row[0], 16), int(row[1], 16)) for row in rows if len(row) == 3]
    return max((end - start + 1 for start, end in pairs if end > start), default=0)


def _parse_numbers(text: str) -> dict[str, int]:
    pairs = (line.split() for line in text.splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def _device_file(node: Path) -> Path:
    return ROOT / "dev/dri" / node.name


def _glob(pattern: str) -> list[Path]:
    return [Path(path) for path in glob.glob(str(ROOT / pattern))]
