"""Update rules, clipping and schedules: against the library, slow references, and shards."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cordee.build import matrix_of
from cordee.config.model import InitialSettings, ModelSettings
from cordee.config.presets import DEFAULT_LR
from cordee.config.run import ClipSettings, OptimSettings, ParameterLimit
from cordee.dist.mesh import Mesh, make_mesh
from cordee.dist.wire import Wire
from cordee.errors import CheckpointError, LayoutError
from cordee.layout.axes import Layout
from cordee.layout.tensors import tensors
from cordee.model.folder import cut
from cordee.model.initial import initialise
from cordee.model.transformer import Transformer
from cordee.optim.clip import (
    clip_gradients,
    clip_units,
    global_norm,
    layer_norms,
    limit_parameters,
)
from cordee.optim.groups import Optimizers, group_of, make_optimizer, split_groups
from cordee.optim.muon import (
    Muon,
    _by_gram,
    _by_products,
    cost,
    deal,
    orthogonalise,
    product_dtype,
)
from cordee.optim.schedule import factor
from cordee.parallel.shard import Sharding, reshard, shard

RULES = tuple(DEFAULT_LR)
UNEVEN = ModelSettings(layers=1, width=20, heads=2, ffn=4)
"""No dim 0 of it divides by 3 (of 4 rows the third shard has none), nor the vocabulary 7 by 2."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def made(model: ModelSettings = UNEVEN, vocabulary: int = 7) -> Transformer:
    built = Transformer(model, vocabulary)
    initialise(built, InitialSettings(residual="same", head="same"), 0, model.layers)
    return built


def give_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def rows_of(tensor: Tensor, size: int, rank: int) -> Tensor:
    """The part of `tensor` that FSDP2 gives to shard `rank` of `size`."""
    chunk = -(-tensor.shape[0] // size)
    return tensor[min(rank * chunk, len(tensor)) : min((rank + 1) * chunk, len(tensor))]


# ---- groups --------------------------------------------------------------------------------------


def test_groups_are_the_table() -> None:
    groups = split_groups(Transformer(replace(UNEVEN, mlp="gated"), 7).named_parameters())
    for spec in tensors(replace(UNEVEN, mlp="gated"), 7):
        assert spec.name in [name for name, _ in groups[spec.group]]


@pytest.mark.parametrize(
    ("name", "ndim", "group"),
    [
        ("model.embed_tokens.weight", 2, "embeddings"), ("lm_head.weight", 2, "embeddings"),
        ("transformer.wte.weight", 2, "embeddings"), ("layers.0.q_proj.weight", 2, "matrices"),
        ("layers.0.q_proj.bias", 1, "vectors"), ("conv.weight", 4, "matrices"),
        ("scale", 0, "vectors"), ("heads.weight", 2, "matrices"),
        ("blocks.12.mlp.up.weight", 2, "matrices"), ("blocks.x.norm.weight", 1, "vectors"),
    ],
)  # fmt: skip
def test_foreign_names_fall_into_groups(name: str, ndim: int, group: str) -> None:
    assert group_of(name, ndim) == group


# ---- rules ---------------------------------------------------------------------------------------


def rule(model: nn.Module, name: str, fused: bool = False, **changes: object) -> Optimizers:
    return make_optimizer(
        OptimSettings(name=name, **changes), model.named_parameters(), fused=fused
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_every_rule_learns_a_toy(name: str, fused: bool) -> None:
    model = made(ModelSettings(layers=1, width=16, heads=2), 16)
    tokens = torch.randint(0, 16, (4, 17))
    optimizer = rule(model, name, fused)
    assert optimizer.peak_lr == DEFAULT_LR[name]
    losses = []
    for _ in range(40):
        loss = model.loss(tokens) / tokens[:, 1:].numel()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0], losses[::10]
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", RULES)
def test_state_is_complete_from_the_start_and_continues(name: str) -> None:
    kept, resumed = made(), made()
    first = rule(kept, name)
    before = set(first.tensors())
    for step in range(3):
        give_gradients(kept, step)
        first.step()
    saved = {key: tensor.clone() for key, tensor in first.tensors().items()}
    assert set(saved) == before
    resumed.load_state_dict(kept.state_dict())
    second = rule(resumed, name)
    second.load(lambda key: saved[key])
    for step in range(3, 6):
        for model, optimizer in ((kept, first), (resumed, second)):
            give_gradients(model, step)
            optimizer.step()
    for (key, a), b in zip(first.tensors().items(), second.tensors().values(), strict=True):
        assert torch.equal(a, b), key
    for a, b in zip(kept.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def librarys(model: nn.Module, settings: OptimSettings, fused: bool) -> torch.optim.Optimizer:
    """torch.optim's class for a rule, with weight decay on matrices alone."""
    groups = split_groups(model.named_parameters())
    matrices = [p for _, p in groups["matrices"]]
    rest = [p for _, p in (*groups["embeddings"], *groups["vectors"])]
    parts = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    lr, betas = DEFAULT_LR[settings.name], (settings.beta1, settings.beta2)
    kernels = {"fused": True} if fused else {"foreach": True}
    momentum = settings.momentum if settings.name == "momentum" else 0.0
    match settings.name:
        case "adam":
            return torch.optim.Adam(parts, lr, betas, settings.eps, **kernels)
        case "adamw":
            return torch.optim.AdamW(parts, lr, betas, settings.eps, **kernels)
        case "adafactor":
            return torch.optim.Adafactor(parts, lr)
    return torch.optim.SGD(parts, lr, momentum=momentum, **kernels)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", [name for name in RULES if name != "muon"])
def test_a_rule_is_the_librarys_class_to_the_bit(name: str, fused: bool) -> None:
    """And zero state is what the library makes at its first step."""
    ours, theirs = made(), made()
    settings = OptimSettings(name=name, weight_decay=0.1)  # type: ignore[arg-type]
    a, b = rule(ours, name, fused, weight_decay=0.1), librarys(theirs, settings, fused)
    for step in range(4):
        for model, optimizer in ((ours, a), (theirs, b)):
            give_gradients(model, step)
            # One parameter has no gradient for a while: its state must wait (the library's fused
            # SGD wants either all momenta or none).
            if step < 2 and not (fused and name == "momentum"):
                next(model.parameters()).grad = None
            optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)
        (own,) = [part.state[p] for part in a.parts if p in part.state]
        for key, value in own.items():
            assert torch.equal(value, b.state[q][key]), key
            assert value.dtype == b.state[q][key].dtype


@pytest.mark.parametrize("name", RULES)
def test_gradients_are_forgotten_or_filled_with_zeros(name: str) -> None:
    model = made()
    optimizer = rule(model, name)
    give_gradients(model, 0)
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_missing_state_starts_anew_and_a_wrong_shape_is_refused() -> None:
    model = made()
    optimizer = rule(model, "adamw")
    give_gradients(model, 0)
    optimizer.step()
    optimizer.load(lambda key: None)
    assert all(tensor.abs().sum() == 0 for tensor in optimizer.tensors().values())
    with pytest.raises(CheckpointError):
        optimizer.load(lambda key: torch.zeros(3, 3, 3))


def test_names_of_state() -> None:
    names = set(rule(made(), "muon").tensors())
    assert "matrices/blocks.0.mlp.up.weight/momentum_buffer" in names
    assert {"embeddings/head.weight/exp_avg", "vectors/norm.weight/step"} <= names
    assert not any(name.startswith("matrices/") and "exp_avg" in name for name in names)


def test_rates_follow_the_factor() -> None:
    optimizer = rule(made(), "muon", lr=0.5, adam_lr=0.25)
    optimizer.set_lr(0.5)
    optimizer.set_lr(0.1)
    assert [g["lr"] for part in optimizer.parts for g in part.param_groups] == [0.05, 0.025]
    assert optimizer.peak_lr == 0.5


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_weight_decay_is_decoupled_and_on_matrices_only(name: str) -> None:
    model = made()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = rule(model, name, weight_decay=0.5, lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter_name, parameter in model.named_parameters():
        decayed = group_of(parameter_name, parameter.ndim) == "matrices"
        kept = 0.95 if decayed else 1.0
        torch.testing.assert_close(parameter.detach(), kept * before[parameter_name])


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "adamw"])
def test_plain_kernels_do_not_depend_on_where_a_tensor_is_cut(name: str) -> None:
    base = {f"t{n}": torch.randn(n, 3) for n in (1, 5, 8, 13, 100)}

    def run(size: int) -> dict[str, Tensor]:
        parts = {
            f"{key}.{r}": nn.Parameter(rows_of(tensor, size, r).clone())
            for key, tensor in base.items()
            for r in range(size)
        }
        optimizer = make_optimizer(
            OptimSettings(name=name, weight_decay=0.1),  # type: ignore[arg-type]
            parts.items(),
            fused=False,
        )
        for step in range(5):
            for key, tensor in base.items():
                for r in range(size):
                    grad = rows_of(tensor * (1 + 0.37 * step), size, r)
                    parts[f"{key}.{r}"].grad = grad.clone()
            optimizer.step()
        return {key: torch.cat([parts[f"{key}.{r}"].detach() for r in range(size)]) for key in base}

    whole = run(1)
    for size in (2, 3, 7):
        cut = run(size)
        assert all(torch.equal(whole[key], cut[key]) for key in base), size


# ---- muon ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_muon_is_the_librarys_muon(decay: float) -> None:
    shapes = ((16, 16), (64, 16), (16, 64), (1, 8), (33, 7), (96, 96))
    start = [torch.randn(shape) for shape in shapes]
    ours = [nn.Parameter(t.clone()) for t in start]
    theirs = [nn.Parameter(t.clone()) for t in start]
    a = Muon(ours, 0.02, momentum=0.95, weight_decay=decay, dtype=torch.bfloat16)
    b = torch.optim.Muon(theirs, lr=0.02, momentum=0.95, weight_decay=decay)
    for _ in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(24, 24), (96, 24), (24, 96), (24, 40)])
def test_orthogonalise_brings_singular_values_near_one(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    singular = torch.logspace(0, -1.5, 24)
    result = orthogonalise((u * singular) @ v, dtype).float()
    assert result.shape == shape and result.is_contiguous()
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.5 and values.max() < 1.35
    assert (u.T @ result @ v.T).diagonal().min() > 0.5


def test_the_iteration_on_the_gram_matrix_is_the_same_iteration() -> None:
    for decades in (0, 3, 8):
        u, _, v = torch.linalg.svd(torch.randn(24, 96), full_matrices=False)
        wide = (u * torch.logspace(0, -decades, 24)) @ v
        wide /= wide.norm()
        torch.testing.assert_close(_by_gram(wide), _by_products(wide), rtol=0, atol=5e-4)


def test_muon_takes_more_dims_as_columns_and_refuses_vectors() -> None:
    tall = nn.Parameter(torch.randn(6, 3, 2))
    flat = nn.Parameter(tall.detach().reshape(6, 6).clone())
    for parameter in (tall, flat):
        parameter.grad = torch.ones(6, 6).triu().reshape(parameter.shape)
        Muon([parameter], 0.1).step()
    assert torch.equal(tall.detach().reshape(6, 6), flat)
    with pytest.raises(LayoutError):
        Muon([nn.Parameter(torch.zeros(3))], 0.1)


@given(
    st.lists(st.tuples(st.integers(1, 512), st.integers(1, 512)), min_size=1, max_size=40),
    st.integers(1, 9),
)
def test_dealing_is_fair(shapes: list[tuple[int, int]], size: int) -> None:
    costs = [cost(*shape) for shape in shapes]
    owner = deal(costs, size)
    load = [sum(c for c, o in zip(costs, owner, strict=True) if o == r) for r in range(size)]
    assert max(load) <= sum(costs) / size + max(costs)
    assert owner == deal(costs, size)


def test_products_are_in_what_the_device_is_quick_at() -> None:
    assert product_dtype(torch.device("cuda")) == torch.bfloat16
    assert product_dtype(torch.device("cpu")) in (torch.bfloat16, torch.float32)


# ---- norms and clipping --------------------------------------------------------------------------


def shards_of(
    grads: Sequence[Tensor], size: int
) -> tuple[list[list[Tensor]], Callable[..., Tensor]]:
    """Every shard's rows, and the `whole` that any of them would be given."""
    parts = [[rows_of(g, size, r).clone() for g in grads] for r in range(size)]

    def whole(_: Tensor) -> Tensor:
        rows = [[_row_squares(part) for part in shard] for shard in parts]
        return torch.cat([rows[r][i] for i in range(len(grads)) for r in range(size)])

    return parts, whole


def _row_squares(tensor: Tensor) -> Tensor:
    return tensor.square() if tensor.ndim < 2 else tensor.square().sum(1)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.integers(1, 70)),
            st.tuples(st.integers(1, 70), st.integers(1, 300)),
        ),
        min_size=1,
        max_size=6,
    ),
    st.integers(0, 1000),
)
def test_the_exact_norm_is_the_same_bits_for_any_sharding(
    shapes: list[tuple[int, ...]], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(s, generator=generator) * 10.0 ** (i - 2) for i, s in enumerate(shapes)]
    norm = global_norm(numbered(grads), True)
    for size in (1, 2, 3, 5):
        parts, whole = shards_of(grads, size)
        pieces: list[Tensor] = []
        global_norm(numbered(parts[0]), True, lambda rows, pieces=pieces, whole=whole: (
            pieces.append(rows) or whole(rows)  # type: ignore[func-returns-value]
        ))  # fmt: skip
        assert torch.equal(pieces[0], torch.cat([_row_squares(p) for p in parts[0]]))
        assert torch.equal(global_norm(numbered(parts[0]), True, whole), norm), size
    expected = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
    assert float(norm) == pytest.approx(expected, rel=1e-6)
    assert float(global_norm(numbered(grads), False)) == pytest.approx(expected, rel=1e-5)
    # Two ranks with halves of every tensor: what both tell adds up to the whole norm.
    halves = [numbered([g.flatten()[r::2] for g in grads]) for r in range(2)]
    told: list[Tensor] = []
    for half in halves:
        global_norm(half, False, totals=Told(told.append))
    total = torch.stack(told).sum(0)
    both = global_norm(halves[0], False, totals=Told(lambda _: None, total))
    assert float(both) == pytest.approx(expected, rel=1e-5)


class Told:
    """Totals of a world that the test holds in its hands."""

    def __init__(self, tell: Callable[[Tensor], None], total: Tensor | None = None) -> None:
        self.tell, self.total, self.names = tell, total, ["0"]

    def every(self, names: Sequence[str], numbers: Tensor) -> Tensor:
        self.tell(numbers)
        return numbers if self.total is None else self.total

    own = every


def numbered(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    return {str(place): tensor for place, tensor in enumerate(tensors)}


def named_toy() -> list[tuple[str, Tensor, Tensor]]:
    names = (("embed.weight", (7, 4)), ("blocks.0.mlp.up.weight", (6, 4)), ("norm.weight", (4,)))
    return [(name, torch.randn(shape), 3 * torch.randn(shape)) for name, shape in names]


@pytest.mark.parametrize("kind", ["norm", "value", "agc", "normalise", "none"])
def test_clipping_does_what_it_says(kind: str) -> None:
    named = named_toy()
    before = [grad.clone() for _, _, grad in named]
    norm = global_norm(numbered(before), True)
    clip_gradients(named, ClipSettings(kind=kind, limit=0.5), norm)  # type: ignore[arg-type]
    grads = [grad for _, _, grad in named]
    after = float(global_norm(numbered(grads), True))
    if kind == "norm":
        assert after == pytest.approx(0.5, rel=1e-5)
    elif kind == "normalise":
        assert after == pytest.approx(1.0, rel=1e-5)
    elif kind == "value":
        assert all(torch.equal(g, b.clamp(-0.5, 0.5)) for g, b in zip(grads, before, strict=True))
    elif kind == "none":
        assert all(torch.equal(g, b) for g, b in zip(grads, before, strict=True))
    else:
        assert torch.equal(grads[0], before[0]), "the embedding is left alone"
        assert not torch.equal(grads[1], before[1])


def test_a_small_gradient_keeps_its_bits() -> None:
    named = named_toy()
    before = [grad.clone() for _, _, grad in named]
    clip_gradients(named, ClipSettings(kind="norm", limit=1e3), global_norm(numbered(before), True))
    assert all(torch.equal(g, b) for (_, _, g), b in zip(named, before, strict=True))


@pytest.mark.parametrize("shape", [(6, 5), (4,), (3, 2, 2)])
@pytest.mark.parametrize("limit", [0.01, 0.5, 100.0])
def test_agc_is_the_papers_formula(shape: tuple[int, ...], limit: float) -> None:
    weight, grad = torch.randn(shape), torch.randn(shape)
    weight[0] = 0.0
    grad[1] = 0.0
    expected = grad.clone()
    for unit in range(shape[0]):
        w, g = weight[unit].norm().item(), grad[unit].norm().item()
        most = limit * max(w, 1e-3)
        if g > most:
            expected[unit] *= most / g
    clip_units(weight, grad, limit)
    torch.testing.assert_close(grad, expected)


def test_limits_hold_after_an_update() -> None:
    model = made()
    limits = ClipSettings(
        matrices=ParameterLimit(norm=2.0), embeddings=ParameterLimit(value=0.1, norm=0.5)
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    groups = split_groups(model.named_parameters())
    limit_parameters(groups, limits)
    for name, parameter in groups["matrices"]:
        wanted = before[name] * min(1.0, 2.0 / float(before[name].norm()))
        torch.testing.assert_close(parameter.detach(), wanted)
    for _, parameter in groups["embeddings"]:
        assert parameter.abs().max() <= 0.1 and parameter.norm() <= 0.5 + 1e-6
    for name, parameter in groups["vectors"]:
        assert torch.equal(parameter, before[name])


def test_limits_give_the_same_bits_for_any_sharding() -> None:
    whole = [(f"t{i}", torch.randn(29, 7) * 10**i) for i in range(3)]
    limits = ClipSettings(matrices=ParameterLimit(norm=3.0))
    for size in (2, 3, 4):
        parts = [[(n, rows_of(t, size, r).clone()) for n, t in whole] for r in range(size)]
        seen: list[Tensor] = []

        for r in range(size):
            copies = [(n, t.clone()) for n, t in parts[r]]
            limit_parameters({"matrices": copies}, limits, Told(seen.append))
        total = torch.stack(seen).sum(0)
        for r in range(size):
            limit_parameters({"matrices": parts[r]}, limits, Told(lambda _: None, total))
        expected = [(n, t.clone()) for n, t in whole]
        limit_parameters({"matrices": expected}, limits)
        for i, (_, tensor) in enumerate(expected):
            assert torch.equal(torch.cat([part[i][1] for part in parts]), tensor)


def test_norms_by_layer() -> None:
    model = made(replace(UNEVEN, layers=2))
    give_gradients(model, 0)
    named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    norms = layer_norms(named)
    assert list(norms) == ["embed", "blocks.0", "blocks.1", "norm", "head"]
    whole = float(global_norm(dict(named), True))
    assert math.sqrt(sum(norm**2 for norm in norms.values())) == pytest.approx(whole, rel=1e-5)
    assert layer_norms(iter(named[:1])) == {"embed": pytest.approx(float(named[0][1].norm()))}


# ---- schedule ------------------------------------------------------------------------------------


@given(
    st.sampled_from(["constant", "cosine", "linear", "wsd"]),
    st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.integers(1, 300),
)  # fmt: skip
def test_schedules_rise_once_fall_once_and_start_above_zero(
    shape: str, warmup: float, decay: float, final: float, steps: int
) -> None:
    chosen = OptimSettings(schedule=shape, warmup=warmup, decay=decay, final=final)  # type: ignore[arg-type]
    factors = [factor(chosen, step / steps, step) for step in range(steps)]
    assert 0 < factors[0] <= 1 and all(0 <= f <= 1 for f in factors)
    top = max(range(steps), key=lambda i: factors[i])
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(factors[: top + 1]))
    assert all(a + 1e-12 >= b for a, b in itertools.pairwise(factors[top:]))
    falls = shape in ("cosine", "linear") or (shape == "wsd" and 1.0 - decay < 1.0)
    ends = final if falls and warmup < 1 else 1.0
    assert factor(chosen, 1.0, steps) == pytest.approx(ends)


def test_schedule_by_hand() -> None:
    wsd = OptimSettings(schedule="wsd", warmup=0.1, decay=0.4, final=0.1)
    assert [round(factor(wsd, k / 100, k), 6) for k in (0, 4, 9, 10, 60)] == [0.01, 0.5, 1, 1, 1]
    assert factor(wsd, 0.8, 80) == pytest.approx(0.55)
    cosine = replace(wsd, schedule="cosine", warmup=0.0, final=0.0)
    assert factor(cosine, 0.5, 50) == pytest.approx(0.5)
    assert factor(cosine, 0.0, 0) == 1.0
    assert factor(replace(cosine, schedule="linear"), 0.25, 25) == pytest.approx(0.75)
    assert factor(replace(cosine, schedule="constant"), 0.99, 99) == 1.0


# ---- processes -----------------------------------------------------------------------------------


def _rank(rank: int, size: int, folder: str) -> None:
    warnings.simplefilter("error", FutureWarning)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size
    )
    try:
        mesh = make_mesh(Layout(shard=size), rank, "cpu")
        _sharded_forward_is_the_forward(mesh)
        cut = Layout(tensor=size)
        for layout in (Layout(shard=size), cut):
            for name in ("muon", "adamw", "momentum"):
                for dtype in (torch.bfloat16, torch.float32):
                    _parts_follow_the_whole(make_mesh(layout, rank, "cpu"), name, dtype)
        _shared_work_is_the_same_work(make_mesh(Layout(island=size), rank, "cpu"))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _sharded_forward_is_the_forward(mesh: Mesh) -> None:
    tokens = torch.randint(0, 7, (2, 9), generator=torch.Generator().manual_seed(0))
    plain, cut = made(), made()
    assert mesh.shard_mesh is not None
    wire = Wire(mesh.group("shard"), mesh.size("shard"), mesh.index("shard"))
    shard(cut, mesh.shard_mesh, list(cut.parts()), {}, Sharding(), wire)
    a, b = plain.loss(tokens), cut.loss(tokens)
    assert torch.equal(a, b)
    a.backward()
    b.backward()
    reshard(cut)
    for p, q in zip(plain.parameters(), cut.parameters(), strict=True):
        assert isinstance(q.grad, DTensor)
        assert p.grad is not None
        wanted = p.grad * mesh.size("shard")  # every rank gave the same samples
        torch.testing.assert_close(q.grad.full_tensor(), wanted, rtol=1e-4, atol=1e-6)


def _parts_follow_the_whole(mesh: Mesh, name: str, dtype: torch.dtype) -> None:
    """Three steps with given gradients: parameters and state have the uncut bits."""
    chosen = OptimSettings(name=name, weight_decay=0.1)  # type: ignore[arg-type]
    plain = made()
    specs = {spec.name: spec for spec in tensors(plain.settings, plain.vocabulary)}
    boxes = {spec.name: spec.box(mesh.layout, mesh.at) for spec in specs.values()}
    parts = {n: cut(p.detach(), boxes[n]).clone() for n, p in plain.named_parameters()}
    matrices = {n: matrix_of(specs[n], mesh, False) for n in parts if specs[n].group == "matrices"}
    one = make_optimizer(chosen, plain.named_parameters(), fused=False, muon_dtype=dtype)
    many = make_optimizer(chosen, parts.items(), fused=False, matrices=matrices, muon_dtype=dtype)
    for step in range(3):
        give_gradients(plain, step)
        for n, p in plain.named_parameters():
            assert p.grad is not None
            parts[n].grad = cut(p.grad, boxes[n]).clone()
        one.step()
        many.step()
    for n, p in plain.named_parameters():
        assert torch.equal(cut(p.detach(), boxes[n]), parts[n])
    whole, part = one.tensors(), many.tensors()
    assert list(whole) == list(part)
    for key, tensor in whole.items():
        wanted = cut(tensor, boxes[key.split("/")[1]]) if tensor.ndim else tensor
        assert torch.equal(wanted, part[key]), key
    assert (many.sent_bytes > 0) == (name == "muon")


def _shared_work_is_the_same_work(mesh: Mesh) -> None:
    alone, shared = made(), made()
    matrices = {
        spec.name: matrix_of(spec, mesh, False)
        for spec in tensors(alone.settings, alone.vocabulary)
        if spec.group == "matrices"
    }
    one = make_optimizer(OptimSettings(), alone.named_parameters(), fused=True)
    many = make_optimizer(OptimSettings(), shared.named_parameters(), fused=True, matrices=matrices)
    for step in range(3):
        for model, optimizer in ((alone, one), (shared, many)):
            give_gradients(model, step)
            optimizer.step()
    for p, q in zip(alone.parameters(), shared.parameters(), strict=True):
        assert torch.equal(p, q)
    assert one.sent_bytes == 0 < many.sent_bytes


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_follow_one_process_to_the_bit(size: int, tmp_path: Path) -> None:
    mp.spawn(_rank, (size, str(tmp_path)), nprocs=size)
