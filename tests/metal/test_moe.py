"""Experts against a loop over tokens, alone and over ranks that share experts and tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import set_checkpoint_early_stop

from cordee.config.model import InitialSettings, ModelSettings, MoeSettings
from cordee.config.run import MemorySettings, Run
from cordee.config.validate import validate_run
from cordee.dist.autograd_collectives import AxisComm
from cordee.dist.mesh import Mesh, make_mesh
from cordee.dist.process_group import RankProcess
from cordee.errors import ConfigError
from cordee.launcher.run_ranks import launch
from cordee.layout.axes import Layout
from cordee.layout.tensors import router_bias_specs, tensor_specs
from cordee.model.init_weights import init_weights, initial_tensor
from cordee.model.layers import identity
from cordee.model.moe import MoE, moe_layers, reset_expert_load, sum_expert_load, update_router_bias
from cordee.model.transformer import Transformer
from cordee.parallel.context import GatherAttention
from cordee.parallel.expert import set_expert_dispatch
from cordee.parallel.parallelize import make_sequence_shard
from cordee.parallel.tensor import set_sequence_parallel
from cordee.planner.traffic import expert_layer_bytes

MOE_SETTINGS = MoeSettings(experts=8, active=2, width=24, balance_rate=0.1)
SMALL_MODEL = ModelSettings(layers=2, width=16, heads=4, mlp="gated", moe=MOE_SETTINGS)
NONZERO_INIT = InitialSettings(residual="same", head="same")
"""Initial values under which every parameter has a gradient."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def change_moe(settings: ModelSettings = SMALL_MODEL, **changes: object) -> ModelSettings:
    return replace(settings, moe=replace(settings.moe, **changes))  # type: ignore[arg-type]


def make_model(settings: ModelSettings) -> Transformer:
    model = Transformer(settings, 64)
    init_weights(model, NONZERO_INIT, 0, settings.layers)
    return model


def last_moe(settings: ModelSettings) -> MoE:
    """The mixture of the last block."""
    return list(moe_layers(make_model(settings)))[-1]


def random_x(tokens: int = 10, seed: int = 3) -> Tensor:
    return torch.randn(2, tokens, 16, generator=torch.Generator().manual_seed(seed))


def random_tokens(seed: int, rows: int = 2, length: int = 17) -> Tensor:
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


# ---- against the obvious loop --------------------------------------------------------------------


def reference_moe(moe: MoE, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(output, balance loss times tokens, assignments of each expert), token by token."""
    settings, rows = moe.settings, x_BTD.reshape(-1, x_BTD.shape[-1])
    scores, expert_choices, weights = [], [], []
    for x in rows:
        logits = moe.router.weight @ x
        score = logits.softmax(-1) if settings.router == "softmax" else logits.sigmoid()
        biased_score = score if moe.bias is None else score + moe.bias
        top_experts = sorted(range(settings.experts), key=lambda e: -biased_score[e].item())[
            : settings.active
        ]
        score_sum = sum(score[e] for e in top_experts) if settings.active > 1 else 1.0
        scores.append(score)
        expert_choices.append(top_experts)
        weights.append({e: score[e] / score_sum for e in top_experts})
    limit = math.ceil(settings.capacity * len(rows) * settings.active / settings.experts) or len(
        rows
    )
    outputs = []
    for token, x in enumerate(rows):
        output = torch.zeros_like(x)
        for e in expert_choices[token]:
            better_count = sum(
                e in weights[other] and weights[other][e].item() > weights[token][e].item()
                for other in range(len(rows))
            )
            if better_count < limit:
                output = output + weights[token][e] * reference_mlp(moe, e, x)
        outputs.append(output if moe.shared is None else output + moe.shared(x))
    counts = torch.tensor(
        [sum(e in top_experts for top_experts in expert_choices) for e in range(settings.experts)]
    )
    probabilities = torch.stack([score / score.sum() for score in scores])
    load_shares = counts / (len(rows) * settings.active)
    aux = (
        settings.balance_rate
        * settings.experts
        * (load_shares * probabilities.mean(0)).sum()
        * len(rows)
    )
    return torch.stack(outputs).view_as(x_BTD), aux, counts


def reference_mlp(moe: MoE, e: int, x: Tensor) -> Tensor:
    up = moe.up[e] @ x
    return moe.down[e] @ (F.relu(up) ** 2 if moe.gate is None else F.silu(moe.gate[e] @ x) * up)


CASES = [
    {},
    {"router": "sigmoid"},
    {"balance": "none"},
    {"balance": "bias"},
    {"router": "sigmoid", "balance": "bias", "shared": 2},
    {"active": 1},
    {"active": 1, "capacity": 0.7},
    {"active": 3, "capacity": 1.0},
    {"capacity": 0.5, "router": "sigmoid", "shared": 1},
    {"experts": 3, "active": 3},
]


@pytest.mark.parametrize("mlp", ["relu2", "gated"])
@pytest.mark.parametrize("changes", CASES, ids=str)
def test_values_gradients_and_counts_are_those_of_the_loop(
    mlp: str, changes: dict[str, object]
) -> None:
    moe = last_moe(change_moe(replace(SMALL_MODEL, mlp=mlp), **changes))
    if moe.bias is not None:
        moe.bias.copy_(torch.linspace(-0.3, 0.3, moe.settings.experts))
    moe.aux_scale = 0.5
    x, grad = random_x().requires_grad_(), random_x(seed=4)
    inputs = [x, *moe.parameters()]
    output = moe(x)
    grads = torch.autograd.grad(output, inputs, grad, materialize_grads=True)
    expected, aux, counts = reference_moe(moe, x)
    loss = (expected * grad).sum()
    if moe.settings.balance == "loss":
        loss = loss + 0.5 * aux
    expected_grads = torch.autograd.grad(loss, inputs, materialize_grads=True)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert moe.expert_load.tolist() == counts.tolist()


def test_a_capacity_drops_and_a_large_one_does_not() -> None:
    x = random_x()
    free_output = last_moe(change_moe())(x)
    torch.testing.assert_close(last_moe(change_moe(capacity=8.0))(x), free_output)
    tight_moe = last_moe(change_moe(capacity=0.25))
    assert tight_moe.capacity(20) == 2
    assert (tight_moe(x) - free_output).abs().max() > 1e-3


def test_a_bias_moves_the_choice_and_not_the_weights() -> None:
    moe, x = last_moe(change_moe(balance="bias", experts=4)), random_x()
    assert moe.bias is not None
    moe.bias[:2] = 10.0
    moe(x).sum().backward()
    assert moe.expert_load.tolist() == [20, 20, 0, 0]
    scores = moe.router(x).softmax(-1)
    _, weights = moe._route(scores.flatten(0, 1))
    torch.testing.assert_close(weights.max(-1).values, scores[..., :2].flatten(0, 1).max(-1)[0]
                               / scores[..., :2].flatten(0, 1).sum(-1))  # fmt: skip


@pytest.mark.parametrize("mlp", ["relu2", "gated"])
def test_grouped_products_are_the_loop(mlp: str) -> None:
    moe = last_moe(replace(SMALL_MODEL, mlp=mlp)).bfloat16()
    sizes = torch.tensor([3, 0, 5, 1, 0, 2, 4, 5])
    rows = torch.randn(20, 16).bfloat16().requires_grad_()
    grad = torch.randn(20, 16).bfloat16()
    inputs = [rows, moe.up, moe.down]
    grouped_output, loop_output = moe.run_experts_grouped(rows, sizes), moe.run_experts(rows, sizes)
    torch.testing.assert_close(grouped_output, loop_output, rtol=2e-2, atol=2e-2)
    expected_grads = torch.autograd.grad(loop_output, inputs, grad)
    for a, b in zip(torch.autograd.grad(grouped_output, inputs, grad), expected_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_bf16_routes_as_fp32_does() -> None:
    moe, x = last_moe(change_moe(shared=1)), random_x()
    fp32_output = moe(x)
    fp32_output.sum().backward()
    counts = moe.expert_load.clone()
    with torch.autocast("cpu", torch.bfloat16):
        bf16_output = moe(x)
    bf16_output.float().sum().backward()
    assert torch.equal(moe.expert_load, 2 * counts)
    assert moe.up.grad is not None and moe.up.grad.dtype == torch.float32
    torch.testing.assert_close(bf16_output.float(), fp32_output, rtol=5e-2, atol=5e-2)


# ---- the model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mlp", ["relu2", "gated"])
@pytest.mark.parametrize("changes", [{}, {"shared": 2, "dense_layers": 1}, {"balance": "bias"}])
def test_parameters_and_buffers_are_the_table(mlp: str, changes: dict[str, object]) -> None:
    settings = change_moe(replace(SMALL_MODEL, mlp=mlp), **changes)
    with torch.device("meta"):
        model = Transformer(settings, 64)
    name_shapes = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    assert name_shapes == [(spec.name, spec.shape) for spec in tensor_specs(settings, 64)]
    buffer_names = model.state_dict().keys() - {name for name, _ in name_shapes}
    assert buffer_names == {spec.name for spec in router_bias_specs(settings)}
    model.to_empty(device="cpu")
    init_weights(model, NONZERO_INIT, 0, 2)
    for moe in moe_layers(model):
        assert not moe.expert_load.any() and (moe.bias is None or not moe.bias.any())
    expected_model = make_model(settings)
    assert torch.equal(model.loss(random_tokens(1)), expected_model.loss(random_tokens(1)))


def test_every_parameter_learns_and_bits_repeat() -> None:
    grads_by_run = []
    for _ in range(2):
        model = make_model(change_moe(shared=1, dense_layers=1))
        model.loss(random_tokens(1)).backward()
        grads_by_run.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads_by_run, strict=True):
        assert a is not None and torch.equal(a, b) and a.any()


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("balance", ["loss", "bias"])
def test_recomputation_changes_no_bit_and_counts_once(recompute: str, balance: str) -> None:
    results = []
    for kind in ("none", recompute):
        model = make_model(change_moe(balance=balance))
        model.memory = MemorySettings(recompute=kind)  # type: ignore[arg-type]
        # To its end, past the counting: by default it stops at the last tensor that is needed.
        with set_checkpoint_early_stop(False):
            for seed in (1, 2):
                model.loss(random_tokens(seed)).backward()
        results.append(
            ([p.grad for p in model.parameters()], [m.expert_load for m in moe_layers(model)])
        )
    for a, b in zip(*(grads for grads, _ in results), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(*(loads for _, loads in results), strict=True):
        assert torch.equal(a, b) and a.sum() == 2 * 2 * 16 * 2


def test_evaluation_neither_counts_nor_balances() -> None:
    model = make_model(SMALL_MODEL)
    loss = model.loss(random_tokens(1)).item()
    model.eval()
    with torch.no_grad():
        assert model.loss(random_tokens(1)).item() == loss
    assert not any(moe.expert_load.any() for moe in moe_layers(model))


def test_a_compiled_block_counts_and_balances_alike() -> None:
    plain_model, compiled_model = make_model(SMALL_MODEL), make_model(SMALL_MODEL)
    for block in compiled_model.parts():
        block.compile(backend="eager")
    for model in (plain_model, compiled_model):
        model.loss(random_tokens(1)).backward()
    for a, b in zip(plain_model.parameters(), compiled_model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    for a, b in zip(moe_layers(plain_model), moe_layers(compiled_model), strict=True):
        assert torch.equal(a.expert_load, b.expert_load)


# ---- balance -------------------------------------------------------------------------------------


def unevenness(moe: MoE) -> float:
    """The busiest expert's load over the mean one."""
    return float(moe.expert_load.max() / moe.expert_load.double().mean())


def train_unevenness(balance: str, rate: float) -> Iterator[float]:
    """The unevenness after every step of a short training that starts with a lopsided router."""
    moe = last_moe(change_moe(balance=balance, balance_rate=rate))
    x = random_x(200) + 1.0
    with torch.no_grad():
        moe.router.weight[0] += 0.1
    optimizer = torch.optim.SGD(moe.parameters(), lr=0.3)
    moe.aux_scale = 1.0 / 400
    for _ in range(60):
        reset_expert_load(moe)
        moe.zero_grad()
        # A target that asks for nothing: only the balance moves the router.
        (0.0 * moe(x)).sum().backward()
        optimizer.step()
        yield unevenness(moe)
        if balance == "bias":
            update_router_bias([moe], sum_expert_load([moe], identity), rate)
            assert not moe.expert_load.any()


@pytest.mark.parametrize(("balance", "rate"), [("loss", 1.0), ("bias", 0.01)])
def test_balance_evens_the_load(balance: str, rate: float) -> None:
    unevenness_values = list(train_unevenness(balance, rate))
    assert (
        unevenness_values[0] > 2.0
        and unevenness_values[-1] < 1.0 + (unevenness_values[0] - 1.0) / 3
    )


def test_without_balance_nothing_moves() -> None:
    unevenness_values = list(train_unevenness("none", 1.0))
    assert unevenness_values[0] == unevenness_values[-1] > 2.0


def test_a_bias_moves_by_the_sign_of_what_is_missing() -> None:
    model = make_model(change_moe(balance="bias", experts=4))
    loads = ([7, 1, 4, 4], [0, 0, 0, 9])
    for moe, load in zip(moe_layers(model), loads, strict=True):
        moe.expert_load.copy_(torch.tensor(load))
    shapes = []

    def double(x: Tensor) -> Tensor:
        shapes.append(x.shape)
        return 2 * x

    loads = sum_expert_load(moe_layers(model), double)
    assert all(moe.expert_load.any() and not moe.bias.any() for moe in moe_layers(model))
    update_router_bias(moe_layers(model), loads, 0.25)
    first_bias, second_bias = (moe.bias for moe in moe_layers(model))
    assert first_bias is not None and first_bias.tolist() == [-0.25, 0.25, 0.0, 0.0]
    assert second_bias is not None and second_bias.tolist() == [0.25, 0.25, 0.25, -0.25]
    assert shapes == [(2, 4)]
    assert not any(moe.expert_load.any() for moe in moe_layers(model))


# ---- over ranks ----------------------------------------------------------------------------------


def shard_parameters(
    model: Transformer, settings: ModelSettings, layout: Layout, coords: dict[str, int]
) -> None:
    """Gives a whole model this rank's part of every parameter."""
    for spec, parameter in zip(tensor_specs(settings, 64), model.parameters(), strict=True):
        full_tensor = initial_tensor(spec.name, spec.shape, NONZERO_INIT, 0, settings.layers)
        box = tuple(slice(start, stop) for start, stop in spec.box(layout, coords))
        parameter.data = full_tensor[box].clone()


Case = tuple[ModelSettings, str, torch.dtype | None]
"""A model, what it computes again, and what it computes in (None: fp32)."""

MicrobatchResult = tuple[float, dict[str, Tensor], list[list[int]], int]
"""The loss, gradients by name (summed over ranks as the table says), loads, bytes of experts."""


def run_cases(process: RankProcess, layout: Layout, cases: list[Case]) -> list[MicrobatchResult]:
    """Every case: one microbatch on each worker; context and tensor ranks of a worker share it."""
    mesh = make_mesh(layout, process.rank, "cpu")
    return [run_microbatch(mesh, *case) for case in cases]


def run_microbatch(
    mesh: Mesh, settings: ModelSettings, recompute: str, autocast: torch.dtype | None
) -> MicrobatchResult:
    layout = mesh.layout
    expert_comm, tensor_comm, context_comm, sequence_comm = (
        AxisComm(mesh.group(*axes), mesh.size(*axes), mesh.index(*axes))
        for axes in (("expert",), ("tensor",), ("context",), ("context", "tensor"))
    )
    model = Transformer(settings, 64)
    model.memory = MemorySettings(recompute=recompute)  # type: ignore[arg-type]
    model.autocast = autocast
    shard_parameters(model, settings, layout, dict(mesh.coords))
    sequence_shard = make_sequence_shard(mesh)
    set_sequence_parallel(model, tensor_comm, sequence_shard)
    if layout.context > 1:
        group = mesh.group("context")
        attention = GatherAttention(group, mesh.coords["context"], layout.context)
        for block in model.parts():
            block.attention.attend = attention
    set_expert_dispatch(model, expert_comm, sequence_comm)
    for moe in moe_layers(model):
        moe.aux_scale = 0.01
    tokens = random_tokens(mesh.worker_index)
    positions = sequence_shard.attention_positions(tokens.shape[1] - 1)
    local_positions = slice(None) if positions is None else positions
    loss = model(tokens[:, :-1][:, local_positions], tokens[:, 1:][:, local_positions])
    (0.01 * loss).backward()
    grads = {}
    for spec, parameter in zip(tensor_specs(settings, 64), model.parameters(), strict=True):
        assert parameter.grad is not None
        # The sum over workers is left out: each is compared with its own microbatch.
        comm = sequence_comm if "tensor" in spec.replicated_axes(layout) else context_comm
        grads[spec.name] = sum_over_ranks(comm, parameter.grad)
    loads = [sum_over_ranks(sequence_comm, moe.expert_load).tolist() for moe in moe_layers(model)]
    return sum_over_ranks(context_comm, loss.detach()).item(), grads, loads, expert_comm.bytes_sent


def sum_over_ranks(comm: AxisComm, x: Tensor) -> Tensor:
    """The sum over a wire's ranks."""
    return x if comm.group is None else comm.all_reduce_no_grad(x)


LAYOUTS = [
    Layout(expert=2), Layout(expert=4), Layout(tensor=2), Layout(context=2),
    Layout(expert=2, tensor=2), Layout(context=2, tensor=2), Layout(context=2, expert=2),
]  # fmt: skip
RANK_CASES: list[Case] = [
    (SMALL_MODEL, "none", None),
    (change_moe(shared=1, router="sigmoid", dense_layers=1), "full", None),
    (change_moe(balance="bias"), "selective", None),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=Layout.describe)
def test_ranks_that_share_experts_and_tokens_are_one_process(layout: Layout) -> None:
    results_by_rank: list[list[MicrobatchResult]] = launch(
        run_cases, layout, RANK_CASES, ranks=layout.size
    )
    for case, (settings, _, _) in enumerate(RANK_CASES):
        reference_results = [run_one_process(settings, worker) for worker in range(layout.expert)]
        for rank, results in enumerate(results_by_rank):
            loss, grads, loads, sent_bytes = results[case]
            coords = layout.coordinates(rank)
            reference = reference_results[coords["expert"]]
            assert loss == pytest.approx(reference[0], rel=1e-5)
            assert loads == reference[2]
            assert (sent_bytes > 0) == (layout.expert > 1)
            for spec in tensor_specs(settings, 64):
                box = tuple(slice(start, stop) for start, stop in spec.box(layout, coords))
                # An expert has met the tokens of all workers.
                worker_results = reference_results if spec.is_stacked else [reference]
                expected = torch.stack(
                    [grads[spec.name][box] for _, grads, _ in worker_results]
                ).sum(0)
                torch.testing.assert_close(grads[spec.name], expected, rtol=1e-5, atol=1e-5)


def run_one_process(
    settings: ModelSettings, worker: int
) -> tuple[float, dict[str, Tensor], list[list[int]]]:
    """Loss, gradients and loads of the whole model on a worker's microbatch."""
    model = make_model(settings)
    for moe in moe_layers(model):
        moe.aux_scale = 0.01
    loss = model.loss(random_tokens(worker))
    (0.01 * loss).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), grads, [moe.expert_load.tolist() for moe in moe_layers(model)]


def shard_moe(settings: ModelSettings, comm: AxisComm) -> MoE:
    """A mixture of which this rank holds its experts."""
    moe = last_moe(settings)
    experts_per_rank = settings.moe.experts // comm.size
    local_slice = slice(comm.index * experts_per_rank, (comm.index + 1) * experts_per_rank)
    for name in ("up", "gate", "down"):
        setattr(moe, name, torch.nn.Parameter(getattr(moe, name).detach()[local_slice].clone()))
    set_expert_dispatch(moe, comm, AxisComm(None, 1, 0))
    return moe


LOPSIDED_MODEL = change_moe(experts=4, active=1, balance="bias")
EVEN_MODEL = change_moe(active=1)


def run_extremes(process: RankProcess) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Every token wants expert 0: (output, x's gradient, up's gradient); token t wants expert
    t mod E: bytes that this rank sends; the output of bf16 rows."""
    comms = [AxisComm(torch.distributed.group.WORLD, process.size, process.rank) for _ in range(2)]
    moe, even_moe = shard_moe(LOPSIDED_MODEL, comms[0]), shard_moe(EVEN_MODEL, comms[1])
    assert moe.bias is not None
    moe.bias[0] = 10.0
    x = random_x(seed=process.rank).requires_grad_()
    output = moe(x)
    output.square().sum().backward()
    even_moe.router.weight.data = torch.eye(8, 16)
    tokens = torch.eye(16)[torch.arange(32) % 8].unsqueeze(0).requires_grad_()
    even_moe(tokens).sum().backward()
    sent_bytes = comms[1].bytes_sent
    assert x.grad is not None and moe.up.grad is not None
    grads = x.grad.clone(), moe.up.grad.clone()
    with torch.autocast("cpu", torch.bfloat16):
        bf16_output = moe(x.bfloat16())
    bf16_output.float().sum().backward()
    return output.detach(), *grads, sent_bytes, bf16_output.detach()


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_without_tokens_take_part_and_even_ones_send_what_the_formula_says(
    ranks: int,
) -> None:
    results = launch(run_extremes, ranks=ranks)
    moe = last_moe(LOPSIDED_MODEL)
    assert moe.bias is not None
    moe.bias[0] = 10.0
    x = torch.cat([random_x(seed=rank) for rank in range(ranks)]).requires_grad_()
    output = moe(x)
    output.square().sum().backward()
    assert x.grad is not None and moe.up.grad is not None
    counts = 8 * EVEN_MODEL.moe.experts * (ranks - 1) // ranks
    experts_per_rank = 4 // ranks
    for rank, (local_output, grad, up, sent_bytes, bf16_output) in enumerate(results):
        rows = slice(2 * rank, 2 * rank + 2)
        torch.testing.assert_close(local_output, output[rows])
        torch.testing.assert_close(grad, x.grad[rows])
        torch.testing.assert_close(
            up, moe.up.grad[rank * experts_per_rank : (rank + 1) * experts_per_rank]
        )
        assert sent_bytes == expert_layer_bytes(32, 1, 16, ranks, 4) + counts
        torch.testing.assert_close(bf16_output.float(), output[rows], rtol=5e-2, atol=5e-2)
        assert bool(up.any()) == (rank == 0)


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "fix"),
    [
        (change_moe(active=9), "model.moe.active=8"),
        (change_moe(active=0), "model.moe.active=1"),
        (change_moe(dense_layers=2), "model.moe.dense_layers=1"),
        (change_moe(capacity=-1.0), "model.moe.capacity=0"),
    ],
)
def test_mixtures_that_cannot_be(model: ModelSettings, fix: str) -> None:
    with pytest.raises(ConfigError) as error_info:
        validate_run(Run(model=model))
    assert fix in str(error_info.value.fix)
    validate_run(Run(model=SMALL_MODEL))
