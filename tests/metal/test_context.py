"""Attention over a cut sequence, on real ranks, against the same attention in one process."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cordee.config.model import ModelSettings
from cordee.config.run import MemorySettings
from cordee.dist.start import World
from cordee.errors import LayoutError
from cordee.layout.split import context_chunks
from cordee.layout.traffic import context_bytes
from cordee.model.attention import Attention, causal_attention, rotary_turns
from cordee.model.recompute import run_block
from cordee.parallel.context import GatherAttention, RingAttention
from cordee.testing import launch

Case = tuple[str, int, int, int, int, torch.dtype]
"""Method, rows, length, key heads, window, type. There are 4 query heads of width 8."""

METHODS: dict[str, Any] = {"gather": GatherAttention, "ring": RingAttention}
LENGTHS = {2: 600, 3: 300, 4: 160}
"""Chunks of 150 (more than a tile of queries), 50 and 20 positions."""
SETTINGS = ModelSettings(width=32, heads=4, kv_heads=2, head_width=16, qk_gain=True)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def cases(ranks: int) -> list[Case]:
    length = LENGTHS[ranks]
    near = length // ranks + 7
    found: list[Case] = []
    for method in METHODS:
        for kv_heads, window in ((4, 0), (2, 0), (1, near), (4, 3), (2, length - 1)):
            found.append((method, 2, length, kv_heads, window, torch.float32))
        found.append((method, 2, length, 2, 0, torch.bfloat16))
        found.append((method, 1, length, 2, near, torch.bfloat16))
    return found


def drawn(case: Case) -> list[Tensor]:
    """q, k, v and the output's gradient, the same on every rank."""
    _, rows, length, kv_heads, _, dtype = case
    made = torch.Generator().manual_seed(length)
    shapes = [(rows, length, heads, 8) for heads in (4, kv_heads, kv_heads, 4)]
    return [torch.randn(shape, generator=made).to(dtype) for shape in shapes]


def positions(length: int, size: int, index: int) -> list[int]:
    return [p for chunk in context_chunks(length, size, index) for p in chunk]


def attention(world: World, method: str, window: int) -> Any:
    group = dist.group.WORLD if world.size > 1 else None
    return METHODS[method](group, world.rank, world.size, window)


def attend(world: World, wanted: list[Case]) -> list[tuple[list[Tensor], int]]:
    """(output and gradients of this rank's positions, bytes sent) of every case."""
    found = []
    for case in wanted:
        made = attention(world, case[0], case[4])
        mine = positions(case[2], world.size, world.rank)
        q, k, v, grad = (x[:, mine] for x in drawn(case))
        inputs = [x.requires_grad_() for x in (q, k, v)]
        out = made(*inputs)
        grads = torch.autograd.grad(out, inputs, grad)
        found.append(([out.detach(), *grads], made.bytes_sent))
    return found


def alone(case: Case) -> list[Tensor]:
    """The same in this process, in fp32 from the same inputs."""
    *inputs, grad = (x.float() for x in drawn(case))
    for x in inputs:
        x.requires_grad_()
    out = causal_attention(*inputs, window=case[4])
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_outputs_and_gradients_are_those_of_one_process(ranks: int) -> None:
    wanted = cases(ranks)
    everybody = launch(attend, wanted, ranks=ranks)
    for index, case in enumerate(wanted):
        method, rows, length, kv_heads, _, dtype = case
        near = 1e-5 if dtype == torch.float32 else 2e-2
        for which, expected in enumerate(alone(case)):
            whole = torch.full_like(expected, float("nan"))
            for rank, results in enumerate(everybody):
                part = results[index][0][which]
                assert part.dtype == dtype
                whole[:, positions(length, ranks, rank)] = part.float()
            torch.testing.assert_close(
                whole,
                expected,
                rtol=near,
                atol=near,
                msg=lambda m, c=case, w=which: f"{c} {w}: {m}",
            )
        told = context_bytes(method, rows * length, kv_heads * 8, dtype.itemsize, ranks)  # type: ignore[arg-type]
        assert [results[index][1] for results in everybody] == [told] * ranks


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("method", METHODS)
def test_one_part_is_attention(method: str, window: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 7, 4, 2, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 7, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    made = METHODS[method](None, 0, 1, window)
    torch.testing.assert_close(made(q, k, v), causal_attention(q, k, v, window))
    assert torch.autograd.gradcheck(made, (q, k, v))
    assert made.bytes_sent == 0


@pytest.mark.parametrize("method", METHODS)
def test_a_sequence_that_cannot_be_cut_is_refused(method: str) -> None:
    q = torch.zeros(1, 5, 1, 4)
    with pytest.raises(LayoutError, match=r"data\.sequence=8"):
        METHODS[method](None, 0, 2)(q, q, q)


# ---- in the model --------------------------------------------------------------------------------


def module_and_input(length: int) -> tuple[Attention, Tensor, Tensor]:
    torch.manual_seed(0)
    module = Attention(SETTINGS)
    return module, torch.randn(2, length, 32), rotary_turns(length, 16, 1e4, torch.device("cpu"))


STANDING = [
    ("gather", 0, "full", False),
    ("gather", 20, "selective", True),
    ("ring", 20, "full", False),
    ("ring", 0, "selective", False),
    ("ring", 0, "none", True),
]
"""Method, window, what the backward computes again, autocast."""


def in_the_model(world: World) -> list[tuple[list[Tensor], int]]:
    """(Sums over ranks of the gradients of attention's parameters, bytes sent) of every case."""
    mine = positions(96, world.size, world.rank)
    found = []
    for method, window, again, autocast in STANDING:
        module, x_BTD, turns_TE2 = module_and_input(96)
        made = module.attend = attention(world, method, window)
        memory = MemorySettings(recompute=again)  # type: ignore[arg-type]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = run_block(memory, 0, module, x_BTD[:, mine], turns_TE2[mine])
        out.float().square().sum().backward()
        grads = [p.grad for p in module.parameters() if p.grad is not None]
        for grad in grads:
            dist.all_reduce(grad)
        found.append((grads, made.bytes_sent))
    return found


def test_it_stands_in_the_model() -> None:
    everybody = launch(in_the_model, ranks=2)
    for index, (method, window, again, autocast) in enumerate(STANDING):
        module, x_BTD, turns_TE2 = module_and_input(96)
        module.attend = partial(causal_attention, window=window)
        module(x_BTD, turns_TE2).square().sum().backward()
        element, near = (2, 2e-2) if autocast else (4, 1e-5)
        told = context_bytes(method, 2 * 96, 32, element, 2, 1 if again == "none" else 2)  # type: ignore[arg-type]
        for grads, sent in (results[index] for results in everybody):
            for grad, (name, parameter) in zip(grads, module.named_parameters(), strict=True):
                assert parameter.grad is not None
                worst = (grad - parameter.grad).abs().max() / parameter.grad.abs().max()
                assert worst < near, (method, again, name)
            assert sent == told
