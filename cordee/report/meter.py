"""What a step costs: time by phase on the host's clock, bytes, memory, and the rates that follow.

Memory is this rank's peak above what the process held before the model was built, so that it
compares with the plan; on an accelerator whose allocator counts it, that count.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch

from cordee.hardware.devices import DEVICES
from cordee.hardware.system import peak_bytes, resident_bytes


class StepMeter:
    """Times phases of a step and remembers what the plan's check needs."""

    def __init__(self, device: str, flops_per_step: float, peak_flops: float) -> None:
        self._device = torch.device(device)
        self._flops_per_step = flops_per_step
        self._peak_flops = peak_flops
        self._baseline_bytes = resident_bytes()
        self._phase_times_s: dict[str, float] = {}
        self._step_start_s = time.perf_counter()
        self._step_times_s: list[float] = []
        self.bytes_sent = 0
        self._memory_bytes = math.nan

    def set_flops(self, flops_per_step: float, peak_flops: float) -> None:
        """Another plan: what a step computes, and what its devices could."""
        self._flops_per_step, self._peak_flops = flops_per_step, peak_flops

    def start_step(self) -> None:
        self._phase_times_s = {}
        self._step_start_s = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time of the block to phase `name` ("data", "comm", ...)."""
        start_s = time.perf_counter()
        yield
        self.add_phase_time(name, time.perf_counter() - start_s)

    def add_phase_time(self, name: str, time_s: float) -> None:
        self._phase_times_s[name] = self._phase_times_s.get(name, 0.0) + time_s

    def step_metrics(self, tokens: int, bytes_sent: int) -> dict[str, Any]:
        step_s, peak_flops = time.perf_counter() - self._step_start_s, self._peak_flops
        self._step_times_s.append(step_s)
        self.bytes_sent = bytes_sent
        self._memory_bytes = memory_bytes = self.peak_memory_bytes()
        return {
            "tokens_per_s": round(tokens / step_s, 1),
            "step_s": round(step_s, 6),
            "data_s": round(self._phase_times_s.get("data", 0.0), 6),
            "comm_s": round(self._phase_times_s.get("comm", 0.0), 6),
            "bytes_sent": bytes_sent,
            "memory_bytes": memory_bytes,
            "mfu": round(self._flops_per_step / step_s / peak_flops, 4) if peak_flops else None,
        }

    def peak_memory_bytes(self) -> int:
        if DEVICES[self._device.type].memory_statistics:
            return int(torch.accelerator.max_memory_allocated(self._device))
        return max(0, peak_bytes() - self._baseline_bytes)

    def measurements(self) -> dict[str, float]:
        """What is held against the plan: median step, bytes of a step, memory of the steps."""
        step_times_s = self._step_times_s[len(self._step_times_s) // 10 :] or [math.nan]
        return {
            "step_s": median(step_times_s),
            "bytes_sent": float(self.bytes_sent),
            "memory_bytes": self._memory_bytes,
        }
