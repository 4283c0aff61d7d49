"""What this device computes, to the last bit: a fingerprint, and a square root that is portable.

Two processors with the same fingerprint may go on with each other's exact runs. Not here: who
compares (`rendezvous.py`, `resume.py`), the environment that chooses code (`dist/start.py`). Traded
away: a proof; a few dozen operations at odd shapes stand for all.
"""

from __future__ import annotations

import hashlib
import math
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.adamw import adamw

from cordee.model.precision import autocast_dtype

PRODUCTS = (
    (1, 64, 64), (7, 129, 33), (33, 77, 129), (64, 64, 64), (65, 257, 31), (96, 24, 200),
    (128, 64, 192), (128, 512, 48), (200, 1031, 17), (257, 256, 129),
)  # fmt: skip
"""[rows, inner] x [inner, columns]: inside and across the blocks of a library's kernels."""

WIDTHS = (1, 31, 64, 257)
"""Lengths of rows: whole vectors of a processor's registers, and what is left over."""

HEADS = ((6, 33, 16), (2, 130, 24))
"""[heads, positions, width of a head] of attention."""

PORTABLE = "compatible"
"""The value of run.arithmetic under which processors of different makers agree."""


@cache
def fingerprint(device: str, precision: str, arithmetic: str) -> str:
    """16 hex digits of what products, element functions, sums, attention, losses and updates give
    on `device` ("cpu", "cuda:0"), forward and backward, in a run of that precision, on one thread.

    What a device may add in any order (by atomic operations) is left out: the same device must
    always give the same.
    """
    threads, found, place = torch.get_num_threads(), hashlib.sha256(), torch.device(device)
    draws = torch.Generator().manual_seed(1)
    dtype = autocast_dtype(precision) or torch.float32
    torch.set_num_threads(1)
    try:
        with portable_roots(arithmetic == PORTABLE):
            for result in _results(_Draws(draws, place), dtype):
                plain = result.detach().cpu().contiguous().flatten()
                found.update(plain.view(torch.uint8).numpy().tobytes())
    finally:
        torch.set_num_threads(threads)
    # Rates and schedules are the interpreter's, by the C library's functions.
    scalars = [f(x / 7) for x in range(1, 50) for f in (math.exp, math.log, math.cos, math.sqrt)]
    found.update(repr(scalars).encode())
    return found.hexdigest()[:16]


class _Draws:
    """Numbers in [-1, 1), made from integers alone and so the same everywhere."""

    def __init__(self, generator: torch.Generator, place: torch.device) -> None:
        self.generator, self.place = generator, place

    def __call__(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        drawn = torch.rand(*shape, generator=self.generator) * 2 - 1
        return drawn.to(self.place, dtype).requires_grad_()


def _results(draw: _Draws, dtype: torch.dtype) -> Iterator[Tensor]:
    for rows, inner, columns in PRODUCTS:
        a, b = draw(rows, inner, dtype=dtype), draw(inner, columns, dtype=dtype)
        yield from _both_ways(a @ b, a, b)
    for heads, positions, width in HEADS:
        yield from _attention(*(draw(heads, positions, width, dtype=dtype) for _ in range(3)))
    for width in WIDTHS:
        yield from _functions(draw(33, width))
    yield from _update(draw)


def _both_ways(result: Tensor, *sources: Tensor) -> Iterator[Tensor]:
    """The result, and what a gradient that is not constant gives for each source."""
    yield result
    along = torch.linspace(-1, 1, result.numel(), dtype=torch.float64).to(result)
    # Of a number: with a gradient given, torch imports sympy to compare shapes.
    yield from torch.autograd.grad((result * along.view_as(result)).sum(), sources)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Iterator[Tensor]:
    """Causal attention by its definition."""
    hidden = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).triu_(1)
    scores = torch.baddbmm(q.new_zeros(()), q, k.transpose(1, 2), alpha=q.shape[2] ** -0.5)
    yield from _both_ways(scores.masked_fill(hidden, -math.inf).softmax(-1) @ v, q, k, v)


def _functions(x: Tensor) -> Iterator[Tensor]:
    """Element functions, sums, norms and a loss, of [rows, width]."""
    width = x.shape[1:]
    for result in (
        x.exp(), x.tanh(), x.sigmoid(), x.erf(), x.abs().add(1e-3).log(), x.cos(), x.sin(),
        x.double().cos(), x.double().exp(), x.square().add(0.1).rsqrt(), x.abs().add(0.1).sqrt(),
        x.abs().double().add(0.1).sqrt(), x.relu().square(), F.gelu(x), F.silu(x), x.softmax(-1),
        x.log_softmax(-1), x.logsumexp(-1), x.sum(), x.sum(0), x.mean(-1),
        x.double().sum(), torch.linalg.vector_norm(x, dim=-1), F.rms_norm(x, width),
        F.layer_norm(x, width), x.lerp(x.flip(0), 0.3), torch.addcmul(x, x, x.flip(0), value=0.7),
    ):  # fmt: skip
        yield from _both_ways(result, x)
    targets = torch.arange(len(x), device=x.device) % x.shape[1]
    yield from _both_ways(F.cross_entropy(x * 5, targets, reduction="sum"), x)


def _update(draw: _Draws) -> Iterator[Tensor]:
    """Two steps of AdamW without fused kernels, as in an exact run."""
    with torch.no_grad():
        held = [draw(33, 31).detach(), draw(257).detach()]
        first, second = ([torch.zeros_like(p) for p in held] for _ in range(2))
        steps = [torch.zeros(()) for _ in held]
        for _ in range(2):
            grads = [draw(*p.shape).detach() for p in held]
            adamw(held, grads, first, second, [], steps, amsgrad=False, beta1=0.9, beta2=0.95,
                  lr=0.01, weight_decay=0.1, eps=1e-8, maximize=False, foreach=True,
                  fused=False)  # fmt: skip
    yield from (*held, *first, *second)


@contextmanager
def portable_roots(on: bool) -> Iterator[None]:
    """While it is `on`, square roots on CPUs are 1 / (1 / sqrt(x)), of operations that every
    processor rounds alike; the library's begin with an estimate that differs between makers."""
    if not on:
        yield
        return
    make: Any = torch.library.Library  # which has no types
    library = make("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is replaced is what is meant here
        library.impl("sqrt", lambda x: x.rsqrt().reciprocal_(), "CPU")
        library.impl("sqrt_", lambda x: x.rsqrt_().reciprocal_(), "CPU")
        library.impl("sqrt.out", lambda x, *, out: out.copy_(x.rsqrt().reciprocal_()), "CPU")
    try:
        yield
    finally:
        library._destroy()


def libraries(model: nn.Module) -> dict[str, str]:
    """Versions of the installed packages whose classes make up `model`, torch's among them."""
    kinds = {kind for part in model.modules() for kind in type(part).__mro__}
    names = {kind.__module__.partition(".")[0] for kind in kinds} | {"torch"}
    found = {}
    for name in sorted(names - {"cordee", "__main__", "builtins"}):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a module beside the user's script
            continue
    return found


if __name__ == "__main__":
    print(fingerprint(*sys.argv[1:]))
