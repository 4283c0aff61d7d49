"""The kinds of device by torch's names, and what each offers: the one table that all ask.

No torch here: the planner reads it too. An AMD card is a "cuda" device of a torch that was built
with ROCm. Not here: which devices this machine has (`planner/accelerators.py`). Traded away: asking
torch, which would cost an import of it; what a row says of a kind that nobody has run this on is
what torch documents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

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
