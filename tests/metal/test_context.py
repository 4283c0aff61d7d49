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
from cordee.dist.process_group import RankProcess
from cordee.errors import LayoutError
from cordee.launcher.run_ranks import launch
from cordee.layout.microbatches import context_chunks
from cordee.model.attention import Attention, causal_attention, rope_table
from cordee.model.layers import run_block
from cordee.parallel.context import GatherAttention, RingAttention
from cordee.planner.traffic import context_layer_bytes

Case = tuple[str, int, int, int, int, torch.dtype]
"""Method, rows, length, key heads, window, type. There are 4 query heads of width 8."""

METHODS: dict[str, Any] = {"gather": GatherAttention, "ring": RingAttention}
LENGTHS = {2: 600, 3: 300, 4: 160}
"""Chunks of 150 (more than a tile of queries), 50 and 20 positions."""
SETTINGS = ModelSettings(width=32, heads=4, kv_heads=2, head_width=16, qk_gain=True)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def make_cases(ranks: int) -> list[Case]:
    length = LENGTHS[ranks]
    short_window = length // ranks + 7
    cases: list[Case] = []
    for method in METHODS:
        for kv_heads, window in ((4, 0), (2, 0), (1, short_window), (4, 3), (2, length - 1)):
            cases.append((method, 2, length, kv_heads, window, torch.float32))
        cases.append((method, 2, length, 2, 0, torch.bfloat16))
        cases.append((method, 1, length, 2, short_window, torch.bfloat16))
    return cases


def draw_inputs(case: Case) -> list[Tensor]:
    """q, k, v and the output's gradient, the same on every rank."""
    _, rows, length, kv_heads, _, dtype = case
    generator = torch.Generator().manual_seed(length)
    shapes = [(rows, length, heads, 8) for heads in (4, kv_heads, kv_heads, 4)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def positions(length: int, size: int, index: int) -> list[int]:
    return [p for chunk in context_chunks(length, size, index) for p in chunk]


def make_attention(process: RankProcess, method: str, window: int) -> Any:
    group = dist.group.WORLD if process.size > 1 else None
    return METHODS[method](group, process.rank, process.size, window)


def run_attention(process: RankProcess, cases: list[Case]) -> list[tuple[list[Tensor], int]]:
    """(output and gradients of this rank's positions, bytes sent) of every case."""
    results = []
    for case in cases:
        attention = make_attention(process, case[0], case[4])
        local_positions = positions(case[2], process.size, process.rank)
        q, k, v, grad = (x[:, local_positions] for x in draw_inputs(case))
        inputs = [x.requires_grad_() for x in (q, k, v)]
        output = attention(*inputs)
        grads = torch.autograd.grad(output, inputs, grad)
        results.append(([output.detach(), *grads], attention.bytes_sent))
    return results


def reference_attention(case: Case) -> list[Tensor]:
    """The same in this process, in fp32 from the same inputs."""
    *inputs, grad = (x.float() for x in draw_inputs(case))
    for x in inputs:
        x.requires_grad_()
    output = causal_attention(*inputs, window=case[4])
    return [output.detach(), *torch.autograd.grad(output, inputs, grad)]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_outputs_and_gradients_are_those_of_one_process(ranks: int) -> None:
    cases = make_cases(ranks)
    results_by_rank = launch(run_attention, cases, ranks=ranks)
    for index, case in enumerate(cases):
        method, rows, length, kv_heads, _, dtype = case
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        for tensor_index, expected in enumerate(reference_attention(case)):
            full_tensor = torch.full_like(expected, float("nan"))
            for rank, results in enumerate(results_by_rank):
                local_part = results[index][0][tensor_index]
                assert local_part.dtype == dtype
                full_tensor[:, positions(length, ranks, rank)] = local_part.float()
            torch.testing.assert_close(
                full_tensor,
                expected,
                rtol=tolerance,
                atol=tolerance,
                msg=lambda m, c=case, w=tensor_index: f"{c} {w}: {m}",
            )
        predicted_bytes = context_layer_bytes(
            method, rows * length, kv_heads * 8, dtype.itemsize, ranks
        )  # type: ignore[arg-type]
        assert [results[index][1] for results in results_by_rank] == [predicted_bytes] * ranks


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("method", METHODS)
def test_one_part_is_attention(method: str, window: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 7, 4, 2, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 7, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    attention = METHODS[method](None, 0, 1, window)
    torch.testing.assert_close(attention(q, k, v), causal_attention(q, k, v, window))
    assert torch.autograd.gradcheck(attention, (q, k, v))
    assert attention.bytes_sent == 0


@pytest.mark.parametrize("method", METHODS)
def test_a_sequence_that_cannot_be_cut_is_refused(method: str) -> None:
    q = torch.zeros(1, 5, 1, 4)
    with pytest.raises(LayoutError, match=r"data\.sequence=8"):
        METHODS[method](None, 0, 2)(q, q, q)


# ---- in the model --------------------------------------------------------------------------------


def module_and_input(length: int) -> tuple[Attention, Tensor, Tensor]:
    torch.manual_seed(0)
    module = Attention(SETTINGS)
    return module, torch.randn(2, length, 32), rope_table(length, 16, 1e4, torch.device("cpu"))


MODEL_CASES = [
    ("gather", 0, "full", False),
    ("gather", 20, "selective", True),
    ("ring", 20, "full", False),
    ("ring", 0, "selective", False),
    ("ring", 0, "none", True),
]
"""Method, window, what the backward computes again, autocast."""


def run_in_model(process: RankProcess) -> list[tuple[list[Tensor], int]]:
    """(Sums over ranks of the gradients of attention's parameters, bytes sent) of every case."""
    local_positions = positions(96, process.size, process.rank)
    results = []
    for method, window, recompute, autocast in MODEL_CASES:
        module, x_BTD, rope_TE2 = module_and_input(96)
        attention = module.attend = make_attention(process, method, window)
        memory = MemorySettings(recompute=recompute)  # type: ignore[arg-type]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = run_block(
                memory, 0, module, x_BTD[:, local_positions], rope_TE2[local_positions]
            )
        output.float().square().sum().backward()
        grads = [p.grad for p in module.parameters() if p.grad is not None]
        for grad in grads:
            dist.all_reduce(grad)
        results.append((grads, attention.bytes_sent))
    return results


def test_it_stands_in_the_model() -> None:
    results_by_rank = launch(run_in_model, ranks=2)
    for index, (method, window, recompute, autocast) in enumerate(MODEL_CASES):
        module, x_BTD, rope_TE2 = module_and_input(96)
        module.attend = partial(causal_attention, window=window)
        module(x_BTD, rope_TE2).square().sum().backward()
        element_bytes, tolerance = (2, 2e-2) if autocast else (4, 1e-5)
        predicted_bytes = context_layer_bytes(
            method, 2 * 96, 32, element_bytes, 2, 1 if recompute == "none" else 2
        )  # type: ignore[arg-type]
        for grads, sent_bytes in (results[index] for results in results_by_rank):
            for grad, (name, parameter) in zip(grads, module.named_parameters(), strict=True):
                assert parameter.grad is not None
                max_error = (grad - parameter.grad).abs().max() / parameter.grad.abs().max()
                assert max_error < tolerance, (method, recompute, name)
            assert sent_bytes == predicted_bytes
