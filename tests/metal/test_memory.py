"""Memory levers: the same bits with less kept, the same loss without whole logits, as predicted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import cordee
from cordee.config.load import override
from cordee.config.model import InitialSettings, ModelSettings
from cordee.config.run import MemorySettings, Run
from cordee.errors import ConfigError
from cordee.layout.axes import Layout
from cordee.layout.tensors import tensor_specs
from cordee.model.init_weights import init_weights
from cordee.model.loss import chunked_loss, head_loss
from cordee.model.transformer import Transformer
from cordee.planner.memory import SyncChoice, rank_memory
from cordee.training.user_parts import Parts
from tests.conftest import SMALL, read_rows, run_cordee, train_small, weights_digest

KINDS = [("selective", 1), ("full", 1), ("full", 2), ("selective", 3)]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def make_model(settings: ModelSettings, vocabulary: int = 256) -> Transformer:
    model = Transformer(settings, vocabulary)
    init_weights(model, InitialSettings(residual="same", head="same"), 0, settings.layers)
    return model


def run_once(model: Transformer, tokens: Tensor, bf16: bool) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of one microbatch, dropout seeded."""
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model.loss(tokens)
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    for parameter in model.parameters():
        parameter.grad = None
    return loss.detach(), grads


@pytest.mark.parametrize("mlp", ["relu2", "gated"])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("kind", "recompute_every"), KINDS)
def test_computing_again_gives_the_same_bits(
    kind: str, recompute_every: int, bf16: bool, mlp: str
) -> None:
    model = make_model(ModelSettings(layers=3, width=32, heads=4, dropout=0.2, mlp=mlp))  # type: ignore[arg-type]
    tokens = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(1))
    loss, grads = run_once(model, tokens, bf16)
    model.memory = MemorySettings(recompute=kind, recompute_every=recompute_every)  # type: ignore[arg-type]
    second_loss, second_grads = run_once(model, tokens, bf16)
    assert torch.equal(loss, second_loss)
    assert len(grads) == len(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(grads, second_grads, strict=True))


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_chunked_loss_is_the_loss(chunk: int, cap: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(65, 24, generator=generator, requires_grad=True)
    head = torch.randn(50, 24, generator=generator, requires_grad=True)
    targets = torch.randint(0, 50, (65,), generator=generator)
    targets[[3, 64]] = -100
    full_loss = head_loss(x, head, targets, cap)
    expected_grads = torch.autograd.grad(full_loss * 0.25, (x, head))
    loss = chunked_loss(x, head, targets, cap, chunk)
    grads = torch.autograd.grad(loss * 0.25, (x, head))
    torch.testing.assert_close(loss, full_loss, rtol=1e-6, atol=1e-5)
    for a, b in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(chunked_loss(x, head, targets, cap, chunk), full_loss)


@pytest.mark.parametrize("tied", [False, True])
def test_chunks_in_the_model(tied: bool) -> None:
    model = make_model(ModelSettings(layers=2, width=32, heads=4, tied=tied))
    tokens = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(1))
    loss, grads = run_once(model, tokens, bf16=False)
    model.memory = MemorySettings(loss_chunk=17)
    second_loss, second_grads = run_once(model, tokens, bf16=False)
    torch.testing.assert_close(second_loss, loss)
    for a, b in zip(second_grads, grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def measure_peak_bytes(run: Run, vocabulary: int) -> int:
    """Most bytes that forward and backward of one microbatch allocate at once."""
    model = make_model(run.model, vocabulary)
    model.memory = run.memory
    tokens = torch.randint(0, vocabulary, (run.batch.microbatch, run.data.sequence + 1))
    run_once(model, tokens, run.run.precision == "bf16")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        with torch.autocast("cpu", torch.bfloat16, enabled=run.run.precision == "bf16"):
            loss = model.loss(tokens)
        loss.backward()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [e for e in events if e.name() == "[memory]"]
    current_bytes = peak_bytes = 0
    for event in sorted(changes, key=lambda e: e.start_ns()):
        current_bytes += event.nbytes()
        peak_bytes = max(peak_bytes, current_bytes)
    return peak_bytes


SHAPES = ((256, 0, 0), (256, 0, 1), (8192, 0, 0), (8192, 128, 2))
"""(vocabulary, chunk of the loss, heads of keys)."""


@pytest.mark.parametrize(("kind", "recompute_every"), [("none", 1), *KINDS[:3]])
@pytest.mark.parametrize(
    ("shape", "precision", "rows"),
    [
        *((shape, "fp32", 4) for shape in SHAPES),
        # One row: bf16 is emulated where there are no instructions for it.
        (SHAPES[1], "bf16", 1),
        *(pytest.param(shape, "bf16", 4, marks=pytest.mark.nightly) for shape in SHAPES),
    ],
)  # fmt: skip
def test_peak_is_what_the_plan_says(
    shape: tuple[int, int, int], precision: str, rows: int, kind: str, recompute_every: int
) -> None:
    vocabulary, chunk, kv_heads = shape
    run = override(
        Run(),
        {
            "memory.recompute": kind,
            "memory.recompute_every": recompute_every,
            "memory.loss_chunk": chunk,
            "run.precision": precision,
            "batch.microbatches": 1,
            "batch.microbatch": rows,
            "model.layers": 6,
            "model.width": 128,
            "model.heads": 4,
            "model.kv_heads": kv_heads,
        },
    )
    specs = tuple(tensor_specs(run.model, vocabulary))
    prediction = rank_memory(run, specs, Layout(), SyncChoice("none", "identity", False), "cpu")
    predicted = sum(prediction.phases["backward"].values())
    assert 0.9 < measure_peak_bytes(run, vocabulary) / predicted < 1.1


def test_a_run_with_less_memory_is_the_same_run(tmp_path: Path) -> None:
    exact_overrides = ("run.exact=true", "run.steps=16", "evaluate.sample=0", "checkpoint.every=4")
    train_small(tmp_path / "plain", *exact_overrides, "launch.processes=1")
    result = run_cordee(
        "train", *SMALL, *exact_overrides, f"run.dir={tmp_path / 'less'}", "launch.processes=2",
        "layout.shard=2", "memory.recompute=full", "fault.kill=step.start:10:0",
        "fault.recover=false",
    )  # fmt: skip
    assert result.returncode == 1
    # What is recomputed may change when the run goes on: it is no part of the descent.
    train_small(
        tmp_path / "less", *exact_overrides, "launch.processes=2", "memory.recompute=selective"
    )
    assert weights_digest(tmp_path / "less") == weights_digest(tmp_path / "plain")


def test_chunks_belong_to_the_descent_and_act(tmp_path: Path) -> None:
    overrides = ("run.steps=12", "run.precision=fp32", "launch.processes=1")
    curves = {}
    for chunk in (0, 20):
        train_small(tmp_path / str(chunk), *overrides, f"memory.loss_chunk={chunk}")
        curves[chunk] = [float(str(row["loss"])) for row in read_rows(tmp_path / str(chunk))]
    assert max(abs(a / b - 1) for a, b in zip(*curves.values(), strict=True)) < 1e-5
    result = run_cordee(
        "train", *SMALL, *overrides, "memory.loss_chunk=9", f"run.dir={tmp_path / '20'}"
    )
    assert result.returncode == 2
    assert "memory.loss_chunk" in result.stderr


def test_levers_are_refused_for_a_model_that_is_brought(run_dir: Path) -> None:
    run = override(Run(), {"run.dir": str(run_dir), "run.steps": 2, "memory.recompute": "full"})
    with pytest.raises(ConfigError, match="built-in model"):
        cordee.train(run, Parts(model=torch.nn.Linear(2, 2)))
    assert not run_dir.exists()
