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

SMALLEST = 2.0**-126
"""The smallest normal number of fp32, in which a run computes: a smaller one would act like 0."""

MANY = 10**12
"""Most steps, tokens or bytes that are counted; sums and products with them fit 64 bits."""

WIDE = 2**24
"""Largest dim of a matrix; that of the whole matrix is for the plan to judge."""

RANKS = 2**17
"""Most processes, and most parts that anything is cut into."""

BLOCKS = 10_000
"""Most layers."""


@dataclass(frozen=True)
class Range:
    """From `least` to `most`, both included unless `above` or `below` says that it is only a bound.
    A number that is not 0 is one that fp32 can hold."""

    least: float
    most: float
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        low = value > self.least if self.above else value >= self.least
        high = value < self.most if self.below else value <= self.most
        return low and high and (value == 0 or abs(value) >= SMALLEST)

    def __str__(self) -> str:
        least = f"{'above' if self.above else 'at least'} {_short(self.least)}"
        return f"{least} and {'below' if self.below else 'at most'} {_short(self.most)}"

    def near(self, value: float, usual: float) -> float:
        """A value in the range: the end that is nearer, where that is one, else the usual one."""
        if value != value or value in (math.inf, -math.inf):
            return usual
        end = self.least if value <= self.least else self.most
        near: Any = int(end) if isinstance(usual, int) else end
        return near if near in self else usual


PART = Range(0, 1, below=True)
LIMIT = Range(0, 1e9)
"""A limit on numbers of a tensor; 0 turns it off."""
DEGREE = Range(1, RANKS)

RANGES: Mapping[str, Range] = {
    "run.seed": Range(0, 2**63 - 1),
    "run.steps": Range(0, MANY),
    "run.tokens": Range(0, 1000 * MANY),
    "run.epochs": Range(0, 10**6),
    "run.minutes": Range(0, 1e8),
    "run.loss_scale": Range(0, 2**24),
    "model.vocabulary": Range(0, WIDE),
    "model.layers": Range(1, BLOCKS),
    "model.width": Range(2, WIDE),
    "model.heads": Range(1, WIDE),
    "model.kv_heads": Range(0, WIDE),
    "model.head_width": Range(0, WIDE),
    "model.window": Range(0, MANY),
    "model.ffn": Range(0, WIDE),
    "model.dropout": PART,
    "model.norm_eps": Range(0, 1, above=True),
    "model.rope_base": Range(1, 1e15, above=True),
    "model.logit_cap": Range(0, 1e6),
    "model.moe.experts": Range(0, RANKS),
    "model.moe.active": Range(1, RANKS),
    "model.moe.width": Range(0, WIDE),
    "model.moe.shared": Range(0, RANKS),
    "model.moe.dense_layers": Range(0, BLOCKS),
    "model.moe.balance_rate": Range(0, 1e3),
    "model.moe.capacity": Range(0, RANKS),
    "model.image.side": Range(1, 2**16),
    "model.image.channels": Range(1, 2**16),
    "model.image.classes": Range(2, 256),
    "initial.embedding_std": Range(0, 1e3, above=True),
    "initial.std": Range(0, 1e3, above=True),
    "initial.gain": Range(0, 1e3, above=True),
    "data.sequence": Range(1, 2**30),
    "data.held_out": PART,
    "data.tokens": Range(0, 10**9),
    "data.prefetch": Range(0, 1),
    "batch.microbatch": Range(1, WIDE),
    "batch.microbatches": Range(1, 2**20),
    "memory.recompute_every": Range(1, BLOCKS),
    "memory.loss_chunk": Range(0, MANY),
    "optim.lr": Range(0, 1e6, above=True),
    "optim.adam_lr": Range(0, 1e6),
    "optim.weight_decay": Range(0, 1e3),
    "optim.momentum": PART,
    "optim.beta1": PART,
    "optim.beta2": PART,
    # 0 divides by the root of a second moment that is 0 wherever a gradient is.
    "optim.eps": Range(0, 1, above=True),
    "optim.warmup": Range(0, 1),
    "optim.decay": Range(0, 1),
    "optim.final": Range(0, 1),
    "clip.limit": Range(0, 1e9, above=True),
    **{
        f"clip.{group}.{kind}": LIMIT
        for group in ("matrices", "embeddings", "vectors")
        for kind in ("value", "norm")
    },
    **{
        f"layout.{axis}": DEGREE
        for axis in ("islands", "shard", "tensor", "pipeline", "context", "expert", "chunks")
    },
    "sync.every": Range(1, MANY),
    "launch.processes": DEGREE,
    "launch.threads": Range(1, 4096),
    "launch.timeout_s": Range(1, 1e7),
    "checkpoint.every": Range(0, MANY),
    "checkpoint.keep": Range(1, 10**6),
    "guard.in_a_row": Range(1, 10**6),
    "evaluate.every": Range(0, MANY),
    "evaluate.tokens": Range(0, MANY),
    "evaluate.sample": Range(0, 10**6),
    "evaluate.layers_every": Range(0, MANY),
    "fault.spares": Range(0, 64),
    "fault.copy_every": Range(0, MANY),
    "fault.silence_s": Range(1, 1e7),
    "fault.host_silence_s": Range(0, 86400),
    "fault.tries": Range(1, 10**6),
}


def check_ranges(values: Mapping[str, Any], usual: Mapping[str, Any]) -> None:
    """ConfigError for the first number beside its range; `usual` are the defaults."""
    for key, value in numbers(values):
        if value not in (given := RANGES[key]):
            other = usual[key] if not isinstance(usual[key], str) else 1
            raise ConfigError(
                f"{key} is {given}",
                values={key: value},
                fix=f"{key}={given.near(value, other)}",
            )


def numbers(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The keys that have a range and whose value is a number, not "auto"."""
    return ((k, v) for k, v in values.items() if k in RANGES and not isinstance(v, str))


def _short(bound: float) -> str:
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"
