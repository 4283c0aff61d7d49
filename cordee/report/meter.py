"""What a step costs: time by phase on the host's clock, bytes, memory, and the rates that follow.

Memory is this rank's peak above what the process held before the model was built, so that it
compares with the plan; on an accelerator whose allocator counts it, that count.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch

from cordee.hardware.devices import DEVICES
from cordee.hardware.system import peak_bytes, resident_bytes


class StepMeter:
    """Times phases of a step and remembers what the plan's check needs."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self.begin_plan(0.0, 0.0)
        self._baseline_bytes = resident_bytes()
        self._phase_times_s: dict[str, float] = {}
        self._step_start_s = time.perf_counter()
        self._step_times_s: list[float] = []
        self.bytes_sent = 0
        self._memory_bytes = math.nan

    def begin_plan(self, flops_per_step: float, peak_flops: float) -> None:
        """Another plan: what a step computes, what its devices could; counters begin at 0."""
        self._flops_per_step, self._peak_flops = flops_per_step, peak_flops
        self._totals = 0, 0.0
        self._axis_bytes: Mapping[str, int] = {}

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

    def step_metrics(
        self, tokens: int, sent_bytes: int, axis_bytes: Mapping[str, int], optimizer_comm_s: float
    ) -> dict[str, Any]:
        """The step's costs: the part of a metrics row that this file knows. `sent_bytes` (between
        islands), `axis_bytes` (inside one) and `optimizer_comm_s` are totals of this plan."""
        step_s, peak_flops = time.perf_counter() - self._step_start_s, self._peak_flops
        self._step_times_s.append(step_s)
        sent_before, comm_before_s = self._totals
        self._totals = sent_bytes, optimizer_comm_s
        self.add_phase_time("comm", optimizer_comm_s - comm_before_s)
        self.bytes_sent = sent_bytes - sent_before
        self._memory_bytes = memory_bytes = self.peak_memory_bytes()
        return {
            "tokens_per_s": round(tokens / step_s, 1),
            "step_s": round(step_s, 6),
            "data_s": round(self._phase_times_s.get("data", 0.0), 6),
            "comm_s": round(self._phase_times_s.get("comm", 0.0), 6),
            "bytes_sent": self.bytes_sent,
            "memory_bytes": memory_bytes,
            "mfu": round(self._flops_per_step / step_s / peak_flops, 4) if peak_flops else None,
            "bytes_inside": self.take_axis_bytes(axis_bytes),
        }

    def take_axis_bytes(self, totals: Mapping[str, int]) -> dict[str, int]:
        """Bytes that this rank has sent on each axis since the last call."""
        before, self._axis_bytes = self._axis_bytes, totals
        sent_bytes = {axis: total - before.get(axis, 0) for axis, total in totals.items()}
        return {axis: count for axis, count in sent_bytes.items() if count}

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
