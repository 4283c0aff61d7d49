"""The range of every number of a run: one table, one check.

A value beside its range makes a run worthless or impossible on any machine. Not here: what depends
on other keys (`check.py`) or on this machine (`plan/`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cordee.errors import ConfigError

SMALLEST_NORMAL = 2.0**-126
"""The smallest normal number of fp32, in which a run computes: a smaller one would act like 0."""

MAX_COUNT = 10**12
"""Most steps, tokens or bytes that are counted; sums and products with them fit 64 bits."""

MAX_DIM = 2**24
"""Largest dim of a matrix; that of the whole matrix is for the plan to judge."""

MAX_RANKS = 2**17
"""Most processes, and most parts that anything is cut into."""

MAX_LAYERS = 10_000
"""Most layers."""


@dataclass(frozen=True)
class Range:
    """From `minimum` to `maximum`, both included unless `excludes_minimum` or `excludes_maximum`
    says that it is only a bound. A number that is not 0 is one that fp32 can hold."""

    minimum: float
    maximum: float
    excludes_minimum: bool = False
    excludes_maximum: bool = False

    def __contains__(self, value: float) -> bool:
        is_large_enough = value > self.minimum if self.excludes_minimum else value >= self.minimum
        is_small_enough = value < self.maximum if self.excludes_maximum else value <= self.maximum
        return is_large_enough and is_small_enough and (value == 0 or abs(value) >= SMALLEST_NORMAL)

    def __str__(self) -> str:
        minimum_text = (
            f"{'above' if self.excludes_minimum else 'at least'} {_bound_text(self.minimum)}"
        )
        return (
            f"{minimum_text} and {'below' if self.excludes_maximum else 'at most'}"
            f" {_bound_text(self.maximum)}"
        )

    def nearest(self, value: float, default: float) -> float:
        """A value in the range: the end that is nearer, where that is one, else the usual one."""
        if value != value or value in (math.inf, -math.inf):
            return default
        end = self.minimum if value <= self.minimum else self.maximum
        nearest: Any = int(end) if isinstance(default, int) else end
        return nearest if nearest in self else default


FRACTION = Range(0, 1, excludes_maximum=True)
TENSOR_LIMIT = Range(0, 1e9)
"""A limit on numbers of a tensor; 0 turns it off."""
DEGREE = Range(1, MAX_RANKS)

RANGES: Mapping[str, Range] = {
    "run.seed": Range(0, 2**63 - 1),
    "run.steps": Range(0, MAX_COUNT),
    "run.tokens": Range(0, 1000 * MAX_COUNT),
    "run.epochs": Range(0, 10**6),
    "run.minutes": Range(0, 1e8),
    "run.loss_scale": Range(0, 2**24),
    "model.vocabulary": Range(0, MAX_DIM),
    "model.layers": Range(1, MAX_LAYERS),
    "model.width": Range(2, MAX_DIM),
    "model.heads": Range(1, MAX_DIM),
    "model.kv_heads": Range(0, MAX_DIM),
    "model.head_width": Range(0, MAX_DIM),
    "model.window": Range(0, MAX_COUNT),
    "model.ffn": Range(0, MAX_DIM),
    "model.dropout": FRACTION,
    "model.norm_eps": Range(0, 1, excludes_minimum=True),
    "model.rope_base": Range(1, 1e15, excludes_minimum=True),
    "model.logit_cap": Range(0, 1e6),
    "model.moe.experts": Range(0, MAX_RANKS),
    "model.moe.active": Range(1, MAX_RANKS),
    "model.moe.width": Range(0, MAX_DIM),
    "model.moe.shared": Range(0, MAX_RANKS),
    "model.moe.dense_layers": Range(0, MAX_LAYERS),
    "model.moe.balance_rate": Range(0, 1e3),
    "model.moe.capacity": Range(0, MAX_RANKS),
    "initial.embedding_std": Range(0, 1e3, excludes_minimum=True),
    "initial.std": Range(0, 1e3, excludes_minimum=True),
    "initial.gain": Range(0, 1e3, excludes_minimum=True),
    "data.sequence": Range(1, 2**30),
    "data.held_out": FRACTION,
    "data.tokens": Range(0, 10**9),
    "data.prefetch": Range(0, 1),
    "batch.microbatch": Range(1, MAX_DIM),
    "batch.microbatches": Range(1, 2**20),
    "memory.recompute_every": Range(1, MAX_LAYERS),
    "memory.loss_chunk": Range(0, MAX_COUNT),
    "optim.lr": Range(0, 1e6, excludes_minimum=True),
    "optim.adam_lr": Range(0, 1e6),
    "optim.weight_decay": Range(0, 1e3),
    "optim.momentum": FRACTION,
    "optim.beta1": FRACTION,
    "optim.beta2": FRACTION,
    # 0 divides by the root of a second moment that is 0 wherever a gradient is.
    "optim.eps": Range(0, 1, excludes_minimum=True),
    "optim.warmup": Range(0, 1),
    "optim.decay": Range(0, 1),
    "optim.final": Range(0, 1),
    "clip.limit": Range(0, 1e9, excludes_minimum=True),
    **{
        f"clip.{group}.{kind}": TENSOR_LIMIT
        for group in ("matrices", "embeddings", "vectors")
        for kind in ("value", "norm")
    },
    **{
        f"layout.{axis}": DEGREE
        for axis in ("islands", "shard", "tensor", "pipeline", "context", "expert", "chunks")
    },
    "sync.every": Range(1, MAX_COUNT),
    "launch.processes": DEGREE,
    "launch.threads": Range(1, 4096),
    "launch.timeout_s": Range(1, 1e7),
    "checkpoint.every": Range(0, MAX_COUNT),
    "checkpoint.keep": Range(1, 10**6),
    "guard.in_a_row": Range(1, 10**6),
    "evaluate.every": Range(0, MAX_COUNT),
    "evaluate.tokens": Range(0, MAX_COUNT),
    "evaluate.sample": Range(0, 10**6),
    "evaluate.layers_every": Range(0, MAX_COUNT),
    "fault.spares": Range(0, 64),
    "fault.copy_every": Range(0, MAX_COUNT),
    "fault.silence_s": Range(1, 1e7),
    "fault.host_silence_s": Range(0, 86400),
    "fault.tries": Range(1, 10**6),
}


def check_ranges(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """ConfigError for the first number beside its range; `defaults` are the defaults."""
    for key, value in ranged_values(values):
        if value not in (allowed_range := RANGES[key]):
            default = defaults[key] if not isinstance(defaults[key], str) else 1
            raise ConfigError(
                f"{key} is {allowed_range}",
                values={key: value},
                fix=f"{key}={allowed_range.nearest(value, default)}",
            )


def ranged_values(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The keys that have a range and whose value is a number, not "auto"."""
    return ((k, v) for k, v in values.items() if k in RANGES and not isinstance(v, str))


def _bound_text(bound: float) -> str:
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"
