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

from cordee.config.check import check
from cordee.config.model import InitialSettings, ModelSettings, MoeSettings
from cordee.config.run import MemorySettings, Run
from cordee.dist.mesh import Mesh, make_mesh
from cordee.dist.start import World
from cordee.dist.wire import Wire
from cordee.errors import ConfigError
from cordee.layout.axes import Layout
from cordee.layout.tensors import buffers, tensors
from cordee.layout.traffic import expert_bytes
from cordee.model.initial import initial_tensor, initialise
from cordee.model.moe import MoE, forget_load, mixtures, move_bias, total_loads
from cordee.model.span import same
from cordee.model.transformer import Transformer
from cordee.parallel.apply import make_span
from cordee.parallel.context import GatherAttention
from cordee.parallel.expert import deal_experts
from cordee.parallel.tensor import split_sequence
from cordee.testing import launch

MIXED = MoeSettings(experts=8, active=2, width=24, balance_rate=0.1)
SMALL = ModelSettings(layers=2, width=16, heads=4, mlp="gated", moe=MIXED)
LIVELY = InitialSettings(residual="same", head="same")
"""Initial values under which every parameter has a gradient."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def with_moe(settings: ModelSettings = SMALL, **changes: object) -> ModelSettings:
    return replace(settings, moe=replace(settings.moe, **changes))  # type: ignore[arg-type]


def made(settings: ModelSettings) -> Transformer:
    model = Transformer(settings, 64)
    initialise(model, LIVELY, 0, settings.layers)
    return model


def one_moe(settings: ModelSettings) -> MoE:
    """The mixture of the last block."""
    return list(mixtures(made(settings)))[-1]


def some_x(tokens: int = 10, seed: int = 3) -> Tensor:
    return torch.randn(2, tokens, 16, generator=torch.Generator().manual_seed(seed))


def some_tokens(seed: int, rows: int = 2, length: int = 17) -> Tensor:
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


# ---- against the obvious loop --------------------------------------------------------------------


def obvious(moe: MoE, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(output, balance loss times tokens, assignments of each expert), token by token."""
    wanted, rows = moe.settings, x_BTD.reshape(-1, x_BTD.shape[-1])
    scores, chosen, weights = [], [], []
    for x in rows:
        logits = moe.router.weight @ x
        score = logits.softmax(-1) if wanted.router == "softmax" else logits.sigmoid()
        judged = score if moe.bias is None else score + moe.bias
        best = sorted(range(wanted.experts), key=lambda e: -judged[e].item())[: wanted.active]
        total = sum(score[e] for e in best) if wanted.active > 1 else 1.0
        scores.append(score)
        chosen.append(best)
        weights.append({e: score[e] / total for e in best})
    limit = math.ceil(wanted.capacity * len(rows) * wanted.active / wanted.experts) or len(rows)
    out = []
    for token, x in enumerate(rows):
        mixed = torch.zeros_like(x)
        for e in chosen[token]:
            better = sum(
                e in weights[other] and weights[other][e].item() > weights[token][e].item()
                for other in range(len(rows))
            )
            if better < limit:
                mixed = mixed + weights[token][e] * obvious_mlp(moe, e, x)
        out.append(mixed if moe.shared is None else mixed + moe.shared(x))
    counts = torch.tensor([sum(e in best for best in chosen) for e in range(wanted.experts)])
    odds = torch.stack([score / score.sum() for score in scores])
    parts = counts / (len(rows) * wanted.active)
    aux = wanted.balance_rate * wanted.experts * (parts * odds.mean(0)).sum() * len(rows)
    return torch.stack(out).view_as(x_BTD), aux, counts


def obvious_mlp(moe: MoE, e: int, x: Tensor) -> Tensor:
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
    moe = one_moe(with_moe(replace(SMALL, mlp=mlp), **changes))
    if moe.bias is not None:
        moe.bias.copy_(torch.linspace(-0.3, 0.3, moe.settings.experts))
    moe.aux_scale = 0.5
    x, grad = some_x().requires_grad_(), some_x(seed=4)
    learned = [x, *moe.parameters()]
    out = moe(x)
    found = torch.autograd.grad(out, learned, grad, materialize_grads=True)
    expected, aux, counts = obvious(moe, x)
    target = (expected * grad).sum()
    if moe.settings.balance == "loss":
        target = target + 0.5 * aux
    slow = torch.autograd.grad(target, learned, materialize_grads=True)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(found, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert moe.load.tolist() == counts.tolist()


def test_a_capacity_drops_and_a_large_one_does_not() -> None:
    x = some_x()
    free = one_moe(with_moe())(x)
    torch.testing.assert_close(one_moe(with_moe(capacity=8.0))(x), free)
    tight = one_moe(with_moe(capacity=0.25))
    assert tight.capacity(20) == 2
    assert (tight(x) - free).abs().max() > 1e-3


def test_a_bias_moves_the_choice_and_not_the_weights() -> None:
    moe, x = one_moe(with_moe(balance="bias", experts=4)), some_x()
    assert moe.bias is not None
    moe.bias[:2] = 10.0
    moe(x).sum().backward()
    assert moe.load.tolist() == [20, 20, 0, 0]
    scores = moe.router(x).softmax(-1)
    _, weights = moe._choose(scores.flatten(0, 1))
    torch.testing.assert_close(weights.max(-1).values, scores[..., :2].flatten(0, 1).max(-1)[0]
                               / scores[..., :2].flatten(0, 1).sum(-1))  # fmt: skip


@pytest.mark.parametrize("mlp", ["relu2", "gated"])
def test_grouped_products_are_the_loop(mlp: str) -> None:
    moe = one_moe(replace(SMALL, mlp=mlp)).bfloat16()
    sizes = torch.tensor([3, 0, 5, 1, 0, 2, 4, 5])
    rows = torch.randn(20, 16).bfloat16().requires_grad_()
    grad = torch.randn(20, 16).bfloat16()
    learned = [rows, moe.up, moe.down]
    fast, slow = moe.grouped(rows, sizes), moe.experts(rows, sizes)
    torch.testing.assert_close(fast, slow, rtol=2e-2, atol=2e-2)
    expected = torch.autograd.grad(slow, learned, grad)
    for a, b in zip(torch.autograd.grad(fast, learned, grad), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_bf16_routes_as_fp32_does() -> None:
    moe, x = one_moe(with_moe(shared=1)), some_x()
    plain = moe(x)
    plain.sum().backward()
    counts = moe.load.clone()
    with torch.autocast("cpu", torch.bfloat16):
        near = moe(x)
    near.float().sum().backward()
    assert torch.equal(moe.load, 2 * counts)
    assert moe.up.grad is not None and moe.up.grad.dtype == torch.float32
    torch.testing.assert_close(near.float(), plain, rtol=5e-2, atol=5e-2)


# ---- the model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mlp", ["relu2", "gated"])
@pytest.mark.parametrize("changes", [{}, {"shared": 2, "dense_layers": 1}, {"balance": "bias"}])
def test_parameters_and_buffers_are_the_table(mlp: str, changes: dict[str, object]) -> None:
    settings = with_moe(replace(SMALL, mlp=mlp), **changes)
    with torch.device("meta"):
        model = Transformer(settings, 64)
    built = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    assert built == [(spec.name, spec.shape) for spec in tensors(settings, 64)]
    others = model.state_dict().keys() - {name for name, _ in built}
    assert others == {spec.name for spec in buffers(settings)}
    model.to_empty(device="cpu")
    initialise(model, LIVELY, 0, 2)
    for moe in mixtures(model):
        assert not moe.load.any() and (moe.bias is None or not moe.bias.any())
    expected = made(settings)
    assert torch.equal(model.loss(some_tokens(1)), expected.loss(some_tokens(1)))


def test_every_parameter_learns_and_bits_repeat() -> None:
    runs = []
    for _ in range(2):
        model = made(with_moe(shared=1, dense_layers=1))
        model.loss(some_tokens(1)).backward()
        runs.append([p.grad for p in model.parameters()])
    for a, b in zip(*runs, strict=True):
        assert a is not None and torch.equal(a, b) and a.any()


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("balance", ["loss", "bias"])
def test_recomputation_changes_no_bit_and_counts_once(recompute: str, balance: str) -> None:
    results = []
    for how in ("none", recompute):
        model = made(with_moe(balance=balance))
        model.memory = MemorySettings(recompute=how)  # type: ignore[arg-type]
        # To its end, past the counting: by default it stops at the last tensor that is needed.
        with set_checkpoint_early_stop(False):
            for seed in (1, 2):
                model.loss(some_tokens(seed)).backward()
        results.append(([p.grad for p in model.parameters()], [m.load for m in mixtures(model)]))
    for a, b in zip(*(grads for grads, _ in results), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(*(loads for _, loads in results), strict=True):
        assert torch.equal(a, b) and a.sum() == 2 * 2 * 16 * 2


def test_evaluation_neither_counts_nor_balances() -> None:
    model = made(SMALL)
    reported = model.loss(some_tokens(1)).item()
    model.eval()
    with torch.no_grad():
        assert model.loss(some_tokens(1)).item() == reported
    assert not any(moe.load.any() for moe in mixtures(model))


def test_a_compiled_block_counts_and_balances_alike() -> None:
    plain, compiled = made(SMALL), made(SMALL)
    for block in compiled.parts():
        block.compile(backend="eager")
    for model in (plain, compiled):
        model.loss(some_tokens(1)).backward()
    for a, b in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    for a, b in zip(mixtures(plain), mixtures(compiled), strict=True):
        assert torch.equal(a.load, b.load)


# ---- balance -------------------------------------------------------------------------------------


def unevenness(moe: MoE) -> float:
    """The busiest expert's load over the mean one."""
    return float(moe.load.max() / moe.load.double().mean())


def trained(balance: str, rate: float) -> Iterator[float]:
    """The unevenness after every step of a short training that starts with a lopsided router."""
    moe = one_moe(with_moe(balance=balance, balance_rate=rate))
    x = some_x(200) + 1.0
    with torch.no_grad():
        moe.router.weight[0] += 0.1
    rule = torch.optim.SGD(moe.parameters(), lr=0.3)
    moe.aux_scale = 1.0 / 400
    for _ in range(60):
        forget_load(moe)
        moe.zero_grad()
        # A target that asks for nothing: only the balance moves the router.
        (0.0 * moe(x)).sum().backward()
        rule.step()
        yield unevenness(moe)
        if balance == "bias":
            move_bias([moe], total_loads([moe], same), rate)
            assert not moe.load.any()


@pytest.mark.parametrize(("balance", "rate"), [("loss", 1.0), ("bias", 0.01)])
def test_balance_evens_the_load(balance: str, rate: float) -> None:
    busy = list(trained(balance, rate))
    assert busy[0] > 2.0 and busy[-1] < 1.0 + (busy[0] - 1.0) / 3


def test_without_balance_nothing_moves() -> None:
    busy = list(trained("none", 1.0))
    assert busy[0] == busy[-1] > 2.0


def test_a_bias_moves_by_the_sign_of_what_is_missing() -> None:
    model = made(with_moe(balance="bias", experts=4))
    loads = ([7, 1, 4, 4], [0, 0, 0, 9])
    for moe, load in zip(mixtures(model), loads, strict=True):
        moe.load.copy_(torch.tensor(load))
    asked = []

    def doubled(x: Tensor) -> Tensor:
        asked.append(x.shape)
        return 2 * x

    loads = total_loads(mixtures(model), doubled)
    assert all(moe.load.any() and not moe.bias.any() for moe in mixtures(model))
    move_bias(mixtures(model), loads, 0.25)
    first, second = (moe.bias for moe in mixtures(model))
    assert first is not None and first.tolist() == [-0.25, 0.25, 0.0, 0.0]
    assert second is not None and second.tolist() == [0.25, 0.25, 0.25, -0.25]
    assert asked == [(2, 4)]
    assert not any(moe.load.any() for moe in mixtures(model))


# ---- over ranks ----------------------------------------------------------------------------------


def cut(model: Transformer, settings: ModelSettings, layout: Layout, at: dict[str, int]) -> None:
    """Gives a whole model this rank's part of every parameter."""
    for spec, parameter in zip(tensors(settings, 64), model.parameters(), strict=True):
        whole = initial_tensor(spec.name, spec.shape, LIVELY, 0, settings.layers)
        box = tuple(slice(start, stop) for start, stop in spec.box(layout, at))
        parameter.data = whole[box].clone()


Case = tuple[ModelSettings, str, torch.dtype | None]
"""A model, what it computes again, and what it computes in (None: fp32)."""

Result = tuple[float, dict[str, Tensor], list[list[int]], int]
"""The loss, gradients by name (summed over ranks as the table says), loads, bytes of experts."""


def over_ranks(world: World, layout: Layout, cases: list[Case]) -> list[Result]:
    """Every case: one microbatch on each worker; context and tensor ranks of a worker share it."""
    mesh = make_mesh(layout, world.rank, "cpu")
    return [one_microbatch(mesh, *case) for case in cases]


def one_microbatch(
    mesh: Mesh, settings: ModelSettings, recompute: str, autocast: torch.dtype | None
) -> Result:
    layout = mesh.layout
    experts, tensor, context, sequence = (
        Wire(mesh.group(*axes), mesh.size(*axes), mesh.index(*axes))
        for axes in (("expert",), ("tensor",), ("context",), ("context", "tensor"))
    )
    model = Transformer(settings, 64)
    model.memory = MemorySettings(recompute=recompute)  # type: ignore[arg-type]
    model.autocast = autocast
    cut(model, settings, layout, dict(mesh.at))
    span = make_span(mesh)
    split_sequence(model, tensor, span)
    if layout.context > 1:
        group = mesh.group("context")
        attend = GatherAttention(group, mesh.at["context"], layout.context)
        for block in model.parts():
            block.attention.attend = attend
    deal_experts(model, experts, sequence)
    for moe in mixtures(model):
        moe.aux_scale = 0.01
    tokens = some_tokens(mesh.worker)
    positions = span.attended(tokens.shape[1] - 1)
    held = slice(None) if positions is None else positions
    loss = model(tokens[:, :-1][:, held], tokens[:, 1:][:, held])
    (0.01 * loss).backward()
    grads = {}
    for spec, parameter in zip(tensors(settings, 64), model.parameters(), strict=True):
        assert parameter.grad is not None
        # The sum over workers is left out: each is compared with its own microbatch.
        wire = sequence if "tensor" in spec.shared(layout) else context
        grads[spec.name] = total(wire, parameter.grad)
    loads = [total(sequence, moe.load).tolist() for moe in mixtures(model)]
    return total(context, loss.detach()).item(), grads, loads, experts.bytes_sent


def total(wire: Wire, x: Tensor) -> Tensor:
    """The sum over a wire's ranks."""
    return x if wire.group is None else wire.total_now(x)


LAYOUTS = [
    Layout(expert=2), Layout(expert=4), Layout(tensor=2), Layout(context=2),
    Layout(expert=2, tensor=2), Layout(context=2, tensor=2), Layout(context=2, expert=2),
]  # fmt: skip
OVER_RANKS: list[Case] = [
    (SMALL, "none", None),
    (with_moe(shared=1, router="sigmoid", dense_layers=1), "full", None),
    (with_moe(balance="bias"), "selective", None),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=Layout.describe)
def test_ranks_that_share_experts_and_tokens_are_one_process(layout: Layout) -> None:
    by_rank: list[list[Result]] = launch(over_ranks, layout, OVER_RANKS, ranks=layout.size)
    for case, (settings, _, _) in enumerate(OVER_RANKS):
        alone = [by_one_process(settings, worker) for worker in range(layout.expert)]
        for rank, results in enumerate(by_rank):
            loss, grads, loads, sent = results[case]
            at = layout.coordinates(rank)
            mine = alone[at["expert"]]
            assert loss == pytest.approx(mine[0], rel=1e-5)
            assert loads == mine[2]
            assert (sent > 0) == (layout.expert > 1)
            for spec in tensors(settings, 64):
                box = tuple(slice(start, stop) for start, stop in spec.box(layout, at))
                # An expert has met the tokens of all workers.
                met = alone if spec.stacked else [mine]
                expected = torch.stack([grads[spec.name][box] for _, grads, _ in met]).sum(0)
                torch.testing.assert_close(grads[spec.name], expected, rtol=1e-5, atol=1e-5)


def by_one_process(
    settings: ModelSettings, worker: int
) -> tuple[float, dict[str, Tensor], list[list[int]]]:
    """Loss, gradients and loads of the whole model on a worker's microbatch."""
    model = made(settings)
    for moe in mixtures(model):
        moe.aux_scale = 0.01
    loss = model.loss(some_tokens(worker))
    (0.01 * loss).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), grads, [moe.load.tolist() for moe in mixtures(model)]


def dealt(settings: ModelSettings, wire: Wire) -> MoE:
    """A mixture of which this rank holds its experts."""
    moe = one_moe(settings)
    each = settings.moe.experts // wire.size
    held = slice(wire.index * each, (wire.index + 1) * each)
    for name in ("up", "gate", "down"):
        setattr(moe, name, torch.nn.Parameter(getattr(moe, name).detach()[held].clone()))
    deal_experts(moe, wire, Wire(None, 1, 0))
    return moe


LOPSIDED = with_moe(experts=4, active=1, balance="bias")
EVEN = with_moe(active=1)


def extremes(world: World) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Every token wants expert 0: (output, x's gradient, up's gradient); token t wants expert
    t mod E: bytes that this rank sends; the output of bf16 rows."""
    wires = [Wire(torch.distributed.group.WORLD, world.size, world.rank) for _ in range(2)]
    moe, even = dealt(LOPSIDED, wires[0]), dealt(EVEN, wires[1])
    assert moe.bias is not None
    moe.bias[0] = 10.0
    x = some_x(seed=world.rank).requires_grad_()
    out = moe(x)
    out.square().sum().backward()
    even.router.weight.data = torch.eye(8, 16)
    tokens = torch.eye(16)[torch.arange(32) % 8].unsqueeze(0).requires_grad_()
    even(tokens).sum().backward()
    sent = wires[1].bytes_sent
    assert x.grad is not None and moe.up.grad is not None
    grads = x.grad.clone(), moe.up.grad.clone()
    with torch.autocast("cpu", torch.bfloat16):
        near = moe(x.bfloat16())
    near.float().sum().backward()
    return out.detach(), *grads, sent, near.detach()


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_without_tokens_take_part_and_even_ones_send_what_the_formula_says(
    ranks: int,
) -> None:
    results = launch(extremes, ranks=ranks)
    moe = one_moe(LOPSIDED)
    assert moe.bias is not None
    moe.bias[0] = 10.0
    x = torch.cat([some_x(seed=rank) for rank in range(ranks)]).requires_grad_()
    out = moe(x)
    out.square().sum().backward()
    assert x.grad is not None and moe.up.grad is not None
    counts = 8 * EVEN.moe.experts * (ranks - 1) // ranks
    each = 4 // ranks
    for rank, (part, grad, up, sent, near) in enumerate(results):
        rows = slice(2 * rank, 2 * rank + 2)
        torch.testing.assert_close(part, out[rows])
        torch.testing.assert_close(grad, x.grad[rows])
        torch.testing.assert_close(up, moe.up.grad[rank * each : (rank + 1) * each])
        assert sent == expert_bytes(32, 1, 16, ranks, 4) + counts
        torch.testing.assert_close(near.float(), out[rows], rtol=5e-2, atol=5e-2)
        assert bool(up.any()) == (rank == 0)


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "fix"),
    [
        (with_moe(active=9), "model.moe.active=8"),
        (with_moe(active=0), "model.moe.active=1"),
        (with_moe(dense_layers=2), "model.moe.dense_layers=1"),
        (with_moe(capacity=-1.0), "model.moe.capacity=0"),
    ],
)
def test_mixtures_that_cannot_be(model: ModelSettings, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(Run(model=model))
    assert fix in str(caught.value.fix)
    check(Run(model=SMALL))
