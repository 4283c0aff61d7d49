"""Initial values: one table of schemes, and one random generator per parameter.

Every parameter is drawn whole, in fp32 on the CPU, from a generator seeded by a hash of (seed,
name). So the values depend neither on layout, order nor device; a rank that holds some rows draws
the whole tensor (20 ns an element) and keeps its own.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cordee.config.model import InitialSettings
from cordee.errors import ConfigError

RESIDUAL_SUFFIXES = (
    "attention.out.weight", "mlp.down.weight", "moe.down", "moe.shared.down.weight",
    ".second.weight",
)  # fmt: skip
"""Ends of the names of the matrices that write into the residual stream."""


@dataclass(frozen=True)
class InitContext:
    """What a scheme may use; `std` is initial.std."""

    generator: torch.Generator
    fan_in: int
    fan_out: int
    std: float


@dataclass(frozen=True)
class InitScheme:
    """One way to fill a matrix in place, its formula in words and its source."""

    formula: str
    source: str
    fill_tensor: Callable[[Tensor, InitContext], object]


def _uniform(variance: Callable[[InitContext], float]) -> Callable[[Tensor, InitContext], object]:
    def fill(tensor: Tensor, context: InitContext) -> None:
        bound = math.sqrt(3.0 * variance(context))
        tensor.uniform_(-bound, bound, generator=context.generator)

    return fill


def _normal(variance: Callable[[InitContext], float]) -> Callable[[Tensor, InitContext], object]:
    def fill(tensor: Tensor, context: InitContext) -> None:
        tensor.normal_(0.0, math.sqrt(variance(context)), generator=context.generator)

    return fill


def _xavier_variance(context: InitContext) -> float:
    return 2.0 / (context.fan_in + context.fan_out)


def _kaiming_variance(context: InitContext) -> float:
    return 2.0 / context.fan_in


def _orthogonal(tensor: Tensor, context: InitContext) -> None:
    rows, columns = tensor.shape[0], tensor[0].numel()
    matrix = torch.empty(max(rows, columns), min(rows, columns))
    q, r = torch.linalg.qr(matrix.normal_(generator=context.generator))
    q *= r.diagonal().sign()  # without it q is not uniform over orthogonal matrices
    tensor.copy_((q if rows >= columns else q.T).reshape(tensor.shape))


def _truncated_normal(tensor: Tensor, context: InitContext) -> None:
    bound = 2.0 * context.std
    nn.init.trunc_normal_(tensor, 0.0, context.std, -bound, bound, generator=context.generator)


INIT_SCHEMES: Mapping[str, InitScheme] = {
    "xavier": InitScheme("uniform, variance 2 / (inputs + outputs)", "Glorot & Bengio 2010",
                         _uniform(_xavier_variance)),
    "xavier_normal": InitScheme("normal, variance 2 / (inputs + outputs)", "Glorot & Bengio 2010",
                                _normal(_xavier_variance)),
    "kaiming": InitScheme("uniform, variance 2 / inputs", "He et al. 2015",
                          _uniform(_kaiming_variance)),
    "kaiming_normal": InitScheme("normal, variance 2 / inputs", "He et al. 2015",
                                 _normal(_kaiming_variance)),
    "orthogonal": InitScheme("orthonormal rows or columns, from a QR of normal numbers",
                             "Saxe et al. 2014; Mezzadri 2007", _orthogonal),
    "truncated_normal": InitScheme("normal of deviation std, redrawn inside 2 std",
                                   "Devlin et al. 2019", _truncated_normal),
    "normal": InitScheme("normal of deviation std", "Radford et al. 2019",
                         _normal(lambda context: context.std**2)),
    "zero": InitScheme("all zero", "Zhang et al. 2019 (Fixup)",
                       lambda tensor, context: tensor.zero_()),
}  # fmt: skip
"""initial.matrices -> formula, source, code; initial.gain multiplies the result."""


def tensor_seed(seed: int, name: str) -> int:
    """64 bits from (seed, name), the same on every machine and version of Python."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def initial_tensor(
    name: str, shape: Sequence[int], settings: InitialSettings, seed: int, layers: int
) -> Tensor:
    """The whole initial tensor of parameter `name`, fp32 on the CPU.

    Gains of norms start at 1 and other vectors at 0, the embedding is normal with embedding_std,
    the head and the matrices follow their settings. `shape` is [outputs, inputs, ...] as in
    nn.Linear; `layers` is the number of blocks (for depth_scaled). Experts ([experts, outputs,
    inputs], names with ".moe.") are drawn one by one, each from its own name.
    """
    if len(shape) == 3 and ".moe." in name:
        experts = (initial_tensor(f"{name}/{e}", shape[1:], settings, seed, layers)
                for e in range(shape[0]))  # fmt: skip
        return torch.stack(list(experts))
    tensor = torch.empty(tuple(shape), dtype=torch.float32, device="cpu")
    if tensor.ndim < 2:
        return tensor.fill_(1.0 if name.endswith("weight") else 0.0)
    generator = torch.Generator(device="cpu").manual_seed(tensor_seed(seed, name))
    if name == "embed.weight":
        return tensor.normal_(0.0, settings.embedding_std, generator=generator)
    scheme, gain = _scheme_and_gain(name, settings, layers)
    if scheme not in INIT_SCHEMES:
        raise ConfigError(
            "no such way to start a matrix",
            values={"initial.matrices": scheme},
            fix="initial.matrices=" + next(iter(INIT_SCHEMES)),
        )
    area = math.prod(shape[2:])
    context = InitContext(generator, shape[1] * area, shape[0] * area, settings.std)
    with torch.no_grad():
        INIT_SCHEMES[scheme].fill_tensor(tensor, context)
        return tensor.mul_(gain)


def init_weights(
    model: nn.Module,
    settings: InitialSettings,
    seed: int,
    layers: int,
    write: Callable[[nn.Parameter, Tensor], object] | None = None,
) -> None:
    """Fills every parameter of `model` from (seed, name) and resets rotary tables and counts.

    `write(parameter, tensor)` stores a tensor [parameter.shape, fp32, CPU]; else it is copied.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            tensor = initial_tensor(name, parameter.shape, settings, seed, layers)
            if write is None:
                parameter.copy_(tensor)
            else:
                write(parameter, tensor)
    for module in model.modules():
        for name in ("reset_rope_cache", "reset_balance"):
            reset = getattr(module, name, None)
            if reset is not None:
                reset()


def _scheme_and_gain(name: str, settings: InitialSettings, layers: int) -> tuple[str, float]:
    if name == "head.weight" and settings.head != "same":
        return settings.head, 1.0
    if name.partition("/")[0].endswith(RESIDUAL_SUFFIXES):
        if settings.residual == "zero":
            return "zero", 1.0
        if settings.residual == "depth_scaled":
            return settings.matrices, settings.gain / math.sqrt(2.0 * layers)
    return settings.matrices, settings.gain


@contextmanager
def seeded_rng(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, torch's generators are a function of `seed`; outside, they go on as before."""
    is_accelerator = device.type not in ("cpu", "meta")
    device_type = device.type if is_accelerator else None
    with torch.random.fork_rng([device] if is_accelerator else [], device_type=device_type):
        torch.manual_seed(seed)
        yield
