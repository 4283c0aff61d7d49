"""What a device computes to the last bit, as a fingerprint, and a square root that is portable.

Two processors with the same fingerprint may continue each other's exact runs. A few dozen
operations at odd shapes stand for all, so equal fingerprints are strong evidence and no proof.
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

from cordee.model.layers import autocast_dtype

MATMUL_SHAPES = (
    (1, 64, 64), (7, 129, 33), (33, 77, 129), (64, 64, 64), (65, 257, 31), (96, 24, 200),
    (128, 64, 192), (128, 512, 48), (200, 1031, 17), (257, 256, 129),
)  # fmt: skip
"""[rows, inner] x [inner, columns]: smaller than and across the blocks of a library's kernels."""

ROW_WIDTHS = (1, 31, 64, 257)
"""Lengths of rows: multiples of a processor's vector registers, and with a remainder."""

ATTENTION_SHAPES = ((6, 33, 16), (2, 130, 24))
"""[heads, positions, width of a head] of attention."""

COMPATIBLE = "compatible"
"""The value of run.arithmetic under which processors of different makers agree."""


@cache
def arithmetic_fingerprint(device: str, precision: str, arithmetic: str) -> str:
    """16 hex digits of the results of products, element functions, sums, attention, losses and
    updates on `device` ("cpu", "cuda:0"), forward and backward, in that precision, on one thread.

    Operations that a device may add up in any order (atomics) are left out.
    """
    thread_count, digest = torch.get_num_threads(), hashlib.sha256()
    torch_device = torch.device(device)
    generator = torch.Generator().manual_seed(1)
    dtype = autocast_dtype(precision) or torch.float32
    torch.set_num_threads(1)
    try:
        with portable_sqrt(arithmetic == COMPATIBLE):
            for result in _all_results(_RandomTensors(generator, torch_device), dtype):
                flat = result.detach().cpu().contiguous().flatten()
                digest.update(flat.view(torch.uint8).numpy().tobytes())
    finally:
        torch.set_num_threads(thread_count)
    # Learning rates are computed by the interpreter with the C library's functions.
    scalars = [f(x / 7) for x in range(1, 50) for f in (math.exp, math.log, math.cos, math.sqrt)]
    digest.update(repr(scalars).encode())
    return digest.hexdigest()[:16]


class _RandomTensors:
    """Numbers in [-1, 1), made of the generator's integers and so the same on every device."""

    def __init__(self, generator: torch.Generator, device: torch.device) -> None:
        self.generator, self.device = generator, device

    def __call__(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        values = torch.rand(*shape, generator=self.generator) * 2 - 1
        return values.to(self.device, dtype).requires_grad_()


def _all_results(draw: _RandomTensors, dtype: torch.dtype) -> Iterator[Tensor]:
    for rows, inner, columns in MATMUL_SHAPES:
        a, b = draw(rows, inner, dtype=dtype), draw(inner, columns, dtype=dtype)
        yield from _forward_and_grads(a @ b, a, b)
    for heads, positions, width in ATTENTION_SHAPES:
        yield from _attention_results(
            *(draw(heads, positions, width, dtype=dtype) for _ in range(3))
        )
    for width in ROW_WIDTHS:
        yield from _function_results(draw(33, width))
    yield from _adamw_results(draw)


def _forward_and_grads(result: Tensor, *inputs: Tensor) -> Iterator[Tensor]:
    """The result, and each input's gradient for an output gradient that is not constant."""
    yield result
    weights = torch.linspace(-1, 1, result.numel(), dtype=torch.float64).to(result)
    # Of a scalar: with grad_outputs, torch imports sympy to compare shapes.
    yield from torch.autograd.grad((result * weights.view_as(result)).sum(), inputs)


def _attention_results(q: Tensor, k: Tensor, v: Tensor) -> Iterator[Tensor]:
    mask = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).triu_(1)
    scores = torch.baddbmm(q.new_zeros(()), q, k.transpose(1, 2), alpha=q.shape[2] ** -0.5)
    yield from _forward_and_grads(scores.masked_fill(mask, -math.inf).softmax(-1) @ v, q, k, v)


def _function_results(x: Tensor) -> Iterator[Tensor]:
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
        yield from _forward_and_grads(result, x)
    targets = torch.arange(len(x), device=x.device) % x.shape[1]
    yield from _forward_and_grads(F.cross_entropy(x * 5, targets, reduction="sum"), x)


def _adamw_results(draw: _RandomTensors) -> Iterator[Tensor]:
    """Two steps of AdamW without fused kernels, as in an exact run."""
    with torch.no_grad():
        parameters = [draw(33, 31).detach(), draw(257).detach()]
        exp_avgs, exp_avg_sqs = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
        steps = [torch.zeros(()) for _ in parameters]
        for _ in range(2):
            grads = [draw(*p.shape).detach() for p in parameters]
            adamw(
                parameters, grads, exp_avgs, exp_avg_sqs, [], steps, amsgrad=False, beta1=0.9,
                beta2=0.95, lr=0.01, weight_decay=0.1, eps=1e-8, maximize=False, foreach=True,
                fused=False,
            )  # fmt: skip
    yield from (*parameters, *exp_avgs, *exp_avg_sqs)


@contextmanager
def portable_sqrt(enabled: bool) -> Iterator[None]:
    """While `enabled`, square roots on CPUs are 1 / (1 / sqrt(x)), made of operations that every
    processor rounds alike; the library's start from an estimate that differs between makers."""
    if not enabled:
        yield
        return
    library_class: Any = torch.library.Library  # which has no types
    library = library_class("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is replaced is what is meant here
        library.impl("sqrt", lambda x: x.rsqrt().reciprocal_(), "CPU")
        library.impl("sqrt_", lambda x: x.rsqrt_().reciprocal_(), "CPU")
        library.impl("sqrt.out", lambda x, *, out: out.copy_(x.rsqrt().reciprocal_()), "CPU")
    try:
        yield
    finally:
        library._destroy()


def library_versions(model: nn.Module) -> dict[str, str]:
    """Versions of the installed packages whose classes make up `model`, torch's among them."""
    classes = {kind for module in model.modules() for kind in type(module).__mro__}
    names = {kind.__module__.partition(".")[0] for kind in classes} | {"torch"}
    versions = {}
    for name in sorted(names - {"cordee", "__main__", "builtins"}):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # a module beside the user's script
            continue
    return versions


if __name__ == "__main__":
    print(arithmetic_fingerprint(*sys.argv[1:]))
