"""Mixed precision under shards: no cast of the whole island, and the same descent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from cordee.config.load import load
from cordee.data.loader import describe_samples
from cordee.dist.process_group import RankProcess
from cordee.launcher.prepare import resolve_config
from cordee.launcher.run_ranks import launch
from cordee.layout.axes import Layout
from cordee.layout.tensors import tensor_specs
from cordee.model.fp8 import fp8_product
from cordee.model.layers import embedding_rows, use_fp32_embedding_grads
from cordee.model.loss import chunked_loss
from cordee.parallel import fsdp
from cordee.parallel.engine import Engine
from cordee.parallel.fsdp import local_tensor
from cordee.planner.cluster import local_cluster
from cordee.planner.memory import rank_memory
from cordee.planner.network import choose_sync
from cordee.planner.plan import make_plan
from cordee.training.trainer import Trainer
from cordee.training.user_parts import Parts
from tests.metal.layouts import DENSE, Curve, make_trainer, train_curves
from tests.metal.test_bytes import MOE, VOCABULARY
from tests.metal.test_layouts import layout_overrides

STEPS = 4
"""Few and small: bf16 is emulated where there are no instructions for it."""
TINY = (*DENSE, "model.layers=2", "data.sequence=16", "batch.microbatches=4", "run.precision=bf16")
LEVERS = (
    "memory.loss_chunk=8", "model.mlp=gated", "model.tied=true", "memory.recompute=full",
    "model.dropout=0.1",
)  # fmt: skip


def check_near(curve: Curve, reference: Curve) -> None:
    """What bf16 keeps of one process (tests/metal/test_layouts.py has the same bounds)."""
    assert curve.losses == pytest.approx(reference.losses, rel=2e-2)
    assert curve.norms == pytest.approx(reference.norms, rel=0.1)


@pytest.mark.parametrize("levers", [(), LEVERS, MOE], ids=["plain", "levers", "experts"])
def test_shards_of_bf16_are_the_same_descent(levers: tuple[str, ...], tmp_path: Path) -> None:
    job = (*TINY, *levers)
    reference = launch(train_curves, str(tmp_path), [job], STEPS, ranks=1)[0][0]
    jobs = [(*job, *layout_overrides(shard=2, zero=zero)) for zero in (2, 3)]
    zero2_curve, zero3_curve = launch(train_curves, str(tmp_path), jobs, STEPS, ranks=2)[0]
    check_near(zero3_curve, reference)
    # What is gathered when does not change what is computed.
    assert zero2_curve.losses == zero3_curve.losses and zero2_curve.norms == zero3_curve.norms
    assert zero2_curve.losses != reference.losses
    assert all(tensor.dtype == torch.float32 for tensor in zero3_curve.parameters.values())


@pytest.mark.slow
def test_shards_of_bf16_beside_other_axes(tmp_path: Path) -> None:
    for levers, axes in (((), ("tensor", "context", "islands")), (MOE, ("expert", "tensor"))):
        job = (*TINY, *levers)
        reference = launch(train_curves, str(tmp_path), [job], STEPS, ranks=1)[0][0]
        jobs = [(*job, *layout_overrides(**{"shard": 2, "zero": 3, axis: 2})) for axis in axes]
        for axis, curve in zip(
            axes, launch(train_curves, str(tmp_path), jobs, STEPS, ranks=4)[0], strict=True
        ):
            print(axis)
            check_near(curve, reference)


# ---- memory --------------------------------------------------------------------------------------


def measure_saved_bytes(engine: Engine) -> int:
    """Bytes that one microbatch keeps for its backward beside the parameters themselves."""
    saved_tensors: list[Tensor] = []

    def record_saved(tensor: Tensor) -> Tensor:
        saved_tensors.append(tensor)
        return tensor

    engine.begin_step(1, 1.0)
    fsdp.set_gradient_sync(engine._fsdp_modules, True, engine.step_spec.sharding)
    batch, model = (
        engine.load_batch(1, engine.step_spec.microbatches[0]),
        engine.local_model.stage_modules[0],
    )
    with torch.autograd.graph.saved_tensors_hooks(record_saved, lambda tensor: tensor):
        loss = engine.call_model(model, batch)
    parameter_pointers = {local_tensor(p).untyped_storage().data_ptr() for p in model.parameters()}
    storages = [tensor.untyped_storage() for tensor in saved_tensors]
    # Storages of parameters that were let go are empty.
    bytes_by_pointer = {
        s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in parameter_pointers
    }
    torch.autograd.backward(loss / engine.step_spec.step_tokens)
    return sum(bytes_by_pointer.values())


def measure_jobs(process: RankProcess, folder: str, jobs: list[tuple[str, ...]]) -> list[int]:
    """`measure_saved_bytes` of every job, after a step."""
    results = []
    for job in jobs:
        trainer = make_trainer(process, folder, job)
        trainer.train_step()
        results.append(measure_saved_bytes(trainer.engine))
    return results


def test_no_rank_holds_a_cast_of_the_island(tmp_path: Path) -> None:
    """What is kept from forward to backward is what the plan says; with zero 1 autocast's copies of
    all matrices are there too."""
    jobs = [(*TINY, "model.width=64", *layout_overrides(shard=2, zero=zero)) for zero in (1, 2, 3)]
    for zero, saved_bytes in enumerate(
        launch(measure_jobs, str(tmp_path), jobs, ranks=2)[0], start=1
    ):
        run, layout = load(None, jobs[zero - 1]).run, Layout(shard=2)
        specs = tuple(tensor_specs(run.model, VOCABULARY))
        memory = rank_memory(run, specs, layout, choose_sync(run, layout), "cpu", zero)
        backward_bytes = memory.phases["backward"]
        logit_bytes = 2 * 4 * run.batch.microbatch * run.data.sequence * VOCABULARY
        matrices = [s.elements for s in specs if len(s.shape) > 1 and "embed" not in s.name]
        cast_bytes = 2 * sum(matrices)
        assert saved_bytes == pytest.approx(
            backward_bytes["activations"] + logit_bytes + cast_bytes * (zero == 1), rel=0.01
        )
        # The plan counts norms and the embedding among them.
        assert backward_bytes["bf16 weights"] == pytest.approx(cast_bytes * (zero == 1), rel=0.1)


def test_fp8_keeps_no_copy_of_a_gathered_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    x_NI = torch.randn(16, 32, generator=generator).bfloat16().requires_grad_()
    weight_OI = torch.randn(48, 32, generator=generator).bfloat16()
    wide_OI = weight_OI.float()
    gradients = []
    for weight, copies in ((wide_OI, 1), (weight_OI, 0)):
        weight.requires_grad_()
        y_NO = fp8_product(x_NI, weight, torch.bfloat16)
        saved_tensors = y_NO.grad_fn.saved_tensors  # type: ignore[union-attr]
        assert (
            sum(t.dtype.itemsize == 1 and t.shape == weight.shape for t in saved_tensors) == copies
        )
        gradients.append(torch.autograd.grad(y_NO.float().square().sum(), (x_NI, weight)))
    (x_grad, wide_grad), (second_x_grad, narrow_grad) = gradients
    assert torch.equal(x_grad, second_x_grad)
    assert torch.equal(wide_grad.bfloat16(), narrow_grad)


# ---- sums that stay wide -------------------------------------------------------------------------


def test_a_frequent_token_loses_nothing_of_its_gradient() -> None:
    """4,096 times the same row of a bf16 table, as a space of a text; padding gets none."""
    indices = torch.zeros(4096, dtype=torch.int64)
    indices[0] = 1
    table = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    table.requires_grad_()
    (grad,) = torch.autograd.grad(embedding_rows(table, indices).float().sum(), table)
    assert grad.dtype == torch.bfloat16
    expected = torch.tensor([4095.0, 1.0, 0.0]).bfloat16()
    assert torch.equal(grad, expected[:, None].expand(3, 4))
    embedding = nn.Embedding(3, 4, padding_idx=1, dtype=torch.bfloat16)
    use_fp32_embedding_grads(embedding)
    (grad,) = torch.autograd.grad(embedding(indices).float().sum(), embedding.weight)
    assert torch.equal(grad[:, 0], torch.tensor([4095.0, 0.0, 0.0]).bfloat16())


def test_chunks_of_a_gathered_head_add_in_fp32() -> None:
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(256, 8, generator=generator).bfloat16()
    targets_N = torch.randint(16, (256,), generator=generator)
    head_VD = torch.randn(16, 8, generator=generator).bfloat16().requires_grad_()
    wide_VD = head_VD.detach().float().requires_grad_()
    grad, expected_grad = (
        torch.autograd.grad(chunked_loss(x_ND, head, targets_N, 0.0, 8), head)[0]
        for head in (head_VD, wide_VD)
    )
    assert torch.equal(grad, expected_grad.bfloat16())


# ---- models that are not the house's own ---------------------------------------------------------


def train_user_model(process: RankProcess, folder: str) -> dict[torch.dtype, list[float]]:
    """Losses of a brought model under zero 3, by the type of the parameters that it reads."""
    weight_dtypes: list[torch.dtype] = []

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            weight_dtypes.append(self.inner.weight.dtype)
            logits: Tensor = self.inner(x)
            return logits

    torch.manual_seed(0)
    x = torch.randn(64, 8)
    user_parts = Parts(
        model=Net(), loss=cross_entropy_sum, data=TensorDataset(x, x[:, :4].argmax(1))
    )
    overrides = (
        f"run.dir={folder}", "run.steps=4", "run.precision=bf16", "batch.microbatch=4",
        "batch.microbatches=4", "layout.shard=2", "layout.zero=3",
    )  # fmt: skip
    run = resolve_config(load(None, overrides).run)
    plan = make_plan(run, local_cluster(), 2, process.size)
    trainer = Trainer(run, plan, process, describe_samples(user_parts.data, 0), user_parts)
    losses = [trainer.train_step().loss for _ in range(2)]
    assert plan.zero == 3
    return dict.fromkeys(weight_dtypes, losses)


def cross_entropy_sum(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The loss that is brought."""
    return F.cross_entropy(model(x).float(), y, reduction="sum")


def test_a_brought_model_is_gathered_as_it_is(tmp_path: Path) -> None:
    losses_by_dtype = launch(train_user_model, str(tmp_path / "run"), ranks=2)[0]
    assert list(losses_by_dtype) == [torch.float32]


def test_a_model_of_transformers_is_gathered_in_bf16(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    settings = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
                "max_position_embeddings": 64}  # fmt: skip
    jobs: list[tuple[str, ...]] = []
    for index, (kind, extra_settings) in enumerate(HF_KINDS):
        config = transformers.AutoConfig.for_model(kind, **settings, **extra_settings)
        config.save_pretrained(tmp_path / str(index))
        hub_override = (f"model.hub={tmp_path / str(index)}",)
        jobs.append((*HUB_OVERRIDES, *hub_override))
    references = launch(train_curves, str(tmp_path), jobs, STEPS, ranks=1)[0]
    sharded_jobs = [(*job, *layout_overrides(shard=2, zero=3)) for job in jobs]
    for reference, curve in zip(
        references,
        launch(train_curves, str(tmp_path), sharded_jobs, STEPS, ranks=2)[0],
        strict=True,
    ):
        check_near(curve, reference)


HF_KINDS = (("llama", {"tie_word_embeddings": True}), ("gpt2", {"n_inner": 48}))
HUB_OVERRIDES = (
    "data.path=builtin:markov", "data.tokens=20000", "data.sequence=16", "batch.microbatch=2",
    "batch.microbatches=4", "run.precision=bf16", "optim.name=adamw", "optim.lr=0.003",
)  # fmt: skip
