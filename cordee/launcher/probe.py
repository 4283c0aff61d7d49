"""Measures this machine: products, element passes, memory, a small operator, messages.

One process and, for the messages, a fork of it; about a second beside the import of torch. Every
figure is the best of several rounds, and the rounds' differences tell how busy the machine was.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cordee.planner.profile import (
    PRECISIONS,
    Host,
    Profile,
    local_host,
    usable_cores,
    write_profile,
)

ROUNDS = 3
SLOT_S = 0.012
"""Time that one figure takes in one round, two calls at least."""

PRODUCT_SHAPES = ((512, 192, 768), (512, 768, 192), (512, 512, 512))
"""Rows, inner width and columns of the products: blocks of small models."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

CACHED_ELEMENTS = 512 * 768
"""Elements of a tensor that stays in cache: one activation of a small model."""
LARGE_ELEMENTS = 12 << 20
"""Elements of one that does not."""
SHARED_ELEMENTS = 40_000
"""Elements from which on torch lets threads share an operator (32,768), and a few more."""
REDUCED_ELEMENTS = 1 << 20
"""Elements of a sum over processes whose time is bandwidth."""
EMULATED_FLOPS = 6e9
"""Operations a second of one core below which it has no instructions for a precision: the slowest
processors with fp32 vectors reach more."""
STEADY_FIGURES = ("fp32", "passes")
"""Figures that repeat on a quiet machine."""
CALLS = 50
"""Messages, or operators, that are timed together."""


def measure_profile(host: Host | None = None) -> Profile:
    """The profile of this machine, in a process that has computed nothing yet: the messages'
    second process is a fork of it."""
    start_s = time.perf_counter()
    host = host or local_host()
    message_s, reduce_s, reduce_rate = _message_times()
    threads = _thread_counts(usable_cores())
    torch.set_num_threads(1)
    operators = [_operator_s() for _ in range(ROUNDS)]
    figures: dict[tuple[str, int], list[float]] = {}
    emulated_rates = {
        p: rate for p in PRECISIONS if (rate := _small_product_rate(p)) < EMULATED_FLOPS
    }
    for _ in range(ROUNDS):
        for count in threads:
            torch.set_num_threads(count)
            for name, figure in _FIGURES.items():
                rate = emulated_rates[name] if name in emulated_rates else figure()
                figures.setdefault((name, count), []).append(rate)

    def best_rates(name: str) -> tuple[float, ...]:
        return tuple(max(figures[name, count]) for count in threads)

    # Others differ by half even on a quiet machine: wake-ups, and memory that threads share.
    steady_rates = (values for (name, _), values in figures.items() if name in STEADY_FIGURES)
    spread = max(max(values) / min(values) - 1 for values in steady_rates)
    device, device_products = _device_rates()
    return Profile(
        host=host,
        threads=threads,
        products={precision: best_rates(precision) for precision in PRECISIONS},
        passes=best_rates("passes"),
        memory=best_rates("memory"),
        regions=tuple(1 / rate for rate in best_rates("regions")),
        operator_s=min(operators),
        message_s=message_s,
        reduce_s=reduce_s,
        reduce_bytes_per_s=reduce_rate,
        device=device,
        device_products=device_products,
        spread=spread,
        seconds=time.perf_counter() - start_s,
    )


def _thread_counts(max_threads: int) -> tuple[int, ...]:
    """1, 2, 4, ... and `max_threads`."""
    powers = [1 << power for power in range(max_threads.bit_length()) if 1 << power < max_threads]
    return (*powers, max_threads)


def _rate(work: float, call: Callable[[], Any], slot_s: float = SLOT_S) -> float:
    """`work` over the seconds of the fastest call, at least two of them."""
    best_s, first_start = math.inf, time.perf_counter()
    call()
    for _ in range(10_000):
        start = time.perf_counter()
        call()
        end = time.perf_counter()
        best_s = min(best_s, end - start)
        if end - first_start > slot_s:
            break
    return work / best_s


def _product_rate(precision: str, device: str = "cpu", scale: int = 1) -> float:
    """Operations per second over SHAPES, by the sum of their times."""
    dtype = DTYPES[precision]
    operations, seconds = 0.0, 0.0
    for rows, inner, columns in PRODUCT_SHAPES:
        left = torch.ones(rows * scale, inner * scale, dtype=dtype, device=device)
        right = torch.ones(inner * scale, columns * scale, dtype=dtype, device=device)
        work = 2.0 * left.numel() * right.shape[1]
        operations += work
        seconds += work / _rate(work, partial(_multiply, left, right), SLOT_S / len(PRODUCT_SHAPES))
    return operations / seconds


def _small_product_rate(precision: str) -> float:
    """Operations per second of a small product: what is emulated would take long in a large one."""
    square = torch.ones(96, 96, dtype=DTYPES[precision])
    return _rate(2.0 * 96**3, lambda: square @ square, slot_s=0.002)


def _multiply(left: Tensor, right: Tensor) -> None:
    """A product; waits for an accelerator. A CPU's result is there when the call returns."""
    result = left @ right
    if result.device.type != "cpu":
        torch.accelerator.synchronize()


def _pass_rate() -> float:
    """Bytes a second of x * y in cache: two read, one written."""
    left, right = torch.ones(CACHED_ELEMENTS), torch.ones(CACHED_ELEMENTS)
    out = torch.empty(CACHED_ELEMENTS)
    return _rate(12.0 * CACHED_ELEMENTS, lambda: torch.mul(left, right, out=out))


def _memory_rate() -> float:
    """Bytes a second of an update in place beyond the caches: one read, one written."""
    values = torch.ones(LARGE_ELEMENTS)
    return _rate(8.0 * LARGE_ELEMENTS, lambda: values.mul_(1.0))


def _region_rate() -> float:
    """Calls a second of an operator that threads share, one after another."""
    values = torch.ones(SHARED_ELEMENTS)
    start_s = time.perf_counter()
    for _ in range(CALLS):
        values.mul_(1.0)
    return CALLS / (time.perf_counter() - start_s)


_FIGURES: dict[str, Callable[[], float]] = {
    **{precision: partial(_product_rate, precision) for precision in PRECISIONS},
    "passes": _pass_rate,
    "memory": _memory_rate,
    "regions": _region_rate,
}


def _operator_s() -> float:
    """One small operator, forward and backward, with autograd's share."""
    start = torch.ones(64, requires_grad=True)

    def chain() -> None:
        x = start
        for _ in range(CALLS):
            x = x * 1.0
        torch.autograd.backward(x.sum())

    return CALLS / _rate(CALLS, chain) / CALLS


def _device_rates() -> tuple[str, dict[str, float]]:
    """The accelerator's name and its rates by precision; ("", {}) where there is none."""
    if not torch.cuda.is_available():
        return "", {}
    rates = {p: _product_rate(p, "cuda", scale=8) for p in PRECISIONS}
    return torch.cuda.get_device_name(0), rates


def _message_times() -> tuple[float, float, float]:
    """(seconds of a small message, seconds of a small sum, bytes a second of a large one) between
    two processes of this host; zeros where they cannot be had."""
    if not (sys.platform.startswith("linux") and dist.is_available() and dist.is_gloo_available()):
        return 0.0, 0.0, 0.0
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="cordee-probe-") as folder:
        peer_process = context.Process(target=_run_rank, args=(1, folder), daemon=True)
        peer_process.start()
        try:
            return _run_rank(0, folder)
        except RuntimeError:  # a host whose name gloo cannot bind to
            return 0.0, 0.0, 0.0
        finally:
            peer_process.join(5)
            if peer_process.is_alive():
                peer_process.kill()


def _run_rank(rank: int, folder: str) -> tuple[float, float, float]:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)  # type: ignore[attr-defined]
    timeout = timedelta(seconds=10)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timeout)
    try:
        small, large = torch.ones(4), torch.ones(REDUCED_ELEMENTS)
        message_s = min(_round_trips_s(rank, small) for _ in range(ROUNDS)) / 2
        reduce_s = min(_mean_call_s(CALLS, lambda: dist.all_reduce(small)) for _ in range(ROUNDS))
        bulk_s = min(_mean_call_s(2, lambda: dist.all_reduce(large)) for _ in range(ROUNDS))
        dist.barrier()
    finally:
        dist.destroy_process_group()
    return message_s, reduce_s, 4 * REDUCED_ELEMENTS / bulk_s


def _round_trips_s(rank: int, small: Tensor) -> float:
    def trip() -> None:
        if rank == 0:
            dist.send(small, 1)
            dist.recv(small, 1)
        else:
            dist.recv(small, 0)
            dist.send(small, 0)

    return _mean_call_s(CALLS, trip)


def _mean_call_s(calls: int, call: Callable[[], Any]) -> float:
    """Mean seconds of a call, after one that warms up; both ranks make the same calls."""
    call()
    start_s = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start_s) / calls


def main() -> int:
    """As a process of its own: one JSON object on standard output, kept in the cache."""
    profile = measure_profile()
    problem = write_profile(profile)
    print(json.dumps({"profile": json.loads(profile.to_json()), "trouble": problem}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
