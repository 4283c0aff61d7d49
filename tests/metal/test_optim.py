"""Update rules, clipping and schedules: against the library, slow references, and shards."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cordee.config.load import config_keys
from cordee.config.model import InitialSettings, ModelSettings
from cordee.config.run import ClipSettings, OptimSettings, ParameterLimit
from cordee.config.update_rules import UPDATE_RULES
from cordee.dist.autograd_collectives import AxisComm
from cordee.dist.mesh import Mesh, make_mesh
from cordee.errors import CheckpointError, LayoutError
from cordee.hf.safetensors_io import slice_box
from cordee.layout.axes import Layout
from cordee.layout.tensors import tensor_specs
from cordee.model.init_weights import init_weights
from cordee.model.transformer import Transformer
from cordee.optim.clip import clip_gradients, clip_units, global_norm, layer_norms, limit_parameters
from cordee.optim.muon import (
    Muon,
    _newton_schulz,
    _newton_schulz_by_gram,
    assign_owners,
    orthogonalise,
    orthogonalise_cost,
    product_dtype,
)
from cordee.optim.optimizer import (
    Optimizers,
    lr_factor,
    make_optimizer,
    parameter_group,
    split_groups,
)
from cordee.optim.update_rules import LOCAL_OPTIMIZERS
from cordee.parallel.fsdp import Sharding, apply_fsdp, reshard
from cordee.training.build import muon_matrix

RULES = tuple(UPDATE_RULES)
LIBRARY_RULES = ("sgd", "momentum", "adam", "adamw", "adafactor")
"""Rules that torch.optim has a class for."""
UNEVEN_MODEL = ModelSettings(layers=1, width=20, heads=2, ffn=4)
"""No dim 0 of it divides by 3 (of 4 rows the third shard has none), nor the vocabulary 7 by 2."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def make_model(model_settings: ModelSettings = UNEVEN_MODEL, vocabulary: int = 7) -> Transformer:
    transformer = Transformer(model_settings, vocabulary)
    init_weights(
        transformer, InitialSettings(residual="same", head="same"), 0, model_settings.layers
    )
    return transformer


def set_random_grads(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def shard_rows(tensor: Tensor, size: int, rank: int) -> Tensor:
    """The part of `tensor` that FSDP2 gives to shard `rank` of `size`."""
    chunk = -(-tensor.shape[0] // size)
    return tensor[min(rank * chunk, len(tensor)) : min((rank + 1) * chunk, len(tensor))]


# ---- groups --------------------------------------------------------------------------------------


def test_groups_are_the_table() -> None:
    groups = split_groups(Transformer(replace(UNEVEN_MODEL, mlp="gated"), 7).named_parameters())
    for spec in tensor_specs(replace(UNEVEN_MODEL, mlp="gated"), 7):
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
    assert parameter_group(name, ndim) == group


# ---- rules ---------------------------------------------------------------------------------------


def create_optimizer(
    model: nn.Module, name: str, fused: bool = False, **changes: object
) -> Optimizers:
    return make_optimizer(
        OptimSettings(name=name, **changes), model.named_parameters(), fused=fused
    )  # type: ignore[arg-type]


def test_the_table_of_rules_is_what_config_and_optimizer_know() -> None:
    assert set(UPDATE_RULES) == {*LOCAL_OPTIMIZERS, "muon"}
    assert set(get_args(config_keys()["optim.name"])) == set(UPDATE_RULES)
    assert all(UPDATE_RULES[r.rule_of_others or r.name] for r in UPDATE_RULES.values())


@pytest.mark.parametrize("name", LOCAL_OPTIMIZERS)
def test_only_rules_with_a_reason_need_whole_matrices(name: str) -> None:
    """The rows of an updated matrix are the update of its rows, wherever the table allows cuts."""
    full_model, part_model = nn.Linear(8, 6, bias=False), nn.Linear(8, 3, bias=False)
    part_model.weight.data.copy_(full_model.weight[3:])
    full_optimizer, part_optimizer = (create_optimizer(m, name) for m in (full_model, part_model))
    for step in range(3):
        set_random_grads(full_model, step)
        part_model.weight.grad = full_model.weight.grad[3:].clone()
        full_optimizer.step()
        part_optimizer.step()
    is_same = torch.equal(full_model.weight[3:], part_model.weight)
    assert is_same == (not UPDATE_RULES[name].whole_matrix_reason)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_every_rule_learns_a_toy(name: str, fused: bool) -> None:
    model = make_model(ModelSettings(layers=1, width=16, heads=2), 16)
    tokens = torch.randint(0, 16, (4, 17))
    optimizer = create_optimizer(model, name, fused)
    assert optimizer.peak_lr == UPDATE_RULES[name].default_lr
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
    reference_model, resumed_model = make_model(), make_model()
    first_optimizer = create_optimizer(reference_model, name)
    names_before = set(first_optimizer.state_tensors())
    for step in range(3):
        set_random_grads(reference_model, step)
        first_optimizer.step()
    saved_state = {key: tensor.clone() for key, tensor in first_optimizer.state_tensors().items()}
    assert set(saved_state) == names_before
    resumed_model.load_state_dict(reference_model.state_dict())
    second_optimizer = create_optimizer(resumed_model, name)
    second_optimizer.load_state(lambda key: saved_state[key])
    for step in range(3, 6):
        for model, optimizer in (
            (reference_model, first_optimizer),
            (resumed_model, second_optimizer),
        ):
            set_random_grads(model, step)
            optimizer.step()
    for (key, a), b in zip(
        first_optimizer.state_tensors().items(),
        second_optimizer.state_tensors().values(),
        strict=True,
    ):
        assert torch.equal(a, b), key
    for a, b in zip(reference_model.parameters(), resumed_model.parameters(), strict=True):
        assert torch.equal(a, b)


def make_library_optimizer(
    model: nn.Module, settings: OptimSettings, fused: bool
) -> torch.optim.Optimizer:
    """torch.optim's class for a rule, with weight decay on matrices alone."""
    groups = split_groups(model.named_parameters())
    matrices = [p for _, p in groups["matrices"]]
    other_parameters = [p for _, p in (*groups["embeddings"], *groups["vectors"])]
    param_groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": other_parameters, "weight_decay": 0.0},
    ]
    lr, betas = settings.peak_lr, (settings.beta1, settings.beta2)
    kernels = {"fused": True} if fused else {"foreach": True}
    momentum = settings.momentum if settings.name == "momentum" else 0.0
    match settings.name:
        case "adam":
            return torch.optim.Adam(param_groups, lr, betas, settings.eps, **kernels)
        case "adamw":
            return torch.optim.AdamW(param_groups, lr, betas, settings.eps, **kernels)
        case "adafactor":
            return torch.optim.Adafactor(param_groups, lr)
    return torch.optim.SGD(param_groups, lr, momentum=momentum, **kernels)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", LIBRARY_RULES)
def test_a_rule_is_the_librarys_class_to_the_bit(name: str, fused: bool) -> None:
    """And zero state is what the library makes at its first step."""
    own_model, library_model = make_model(), make_model()
    settings = OptimSettings(name=name, weight_decay=0.1)  # type: ignore[arg-type]
    own_optimizer, library_optimizer = (
        create_optimizer(own_model, name, fused, weight_decay=0.1),
        make_library_optimizer(library_model, settings, fused),
    )
    for step in range(4):
        for model, optimizer in ((own_model, own_optimizer), (library_model, library_optimizer)):
            set_random_grads(model, step)
            # One parameter has no gradient for a while: its state must wait (the library's fused
            # SGD wants either all momenta or none).
            if step < 2 and not (fused and name == "momentum"):
                next(model.parameters()).grad = None
            optimizer.step()
    for p, q in zip(own_model.parameters(), library_model.parameters(), strict=True):
        assert torch.equal(p, q)
        (own_state,) = [part.state[p] for part in own_optimizer.rules if p in part.state]
        for key, value in own_state.items():
            assert torch.equal(value, library_optimizer.state[q][key]), key
            assert value.dtype == library_optimizer.state[q][key].dtype


@pytest.mark.parametrize("name", RULES)
def test_gradients_are_forgotten_or_filled_with_zeros(name: str) -> None:
    model = make_model()
    optimizer = create_optimizer(model, name)
    set_random_grads(model, 0)
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_missing_state_starts_anew_and_a_wrong_shape_is_refused() -> None:
    model = make_model()
    optimizer = create_optimizer(model, "adamw")
    set_random_grads(model, 0)
    optimizer.step()
    optimizer.load_state(lambda key: None)
    assert all(tensor.abs().sum() == 0 for tensor in optimizer.state_tensors().values())
    with pytest.raises(CheckpointError):
        optimizer.load_state(lambda key: torch.zeros(3, 3, 3))


def test_names_of_state() -> None:
    names = set(create_optimizer(make_model(), "muon").state_tensors())
    assert "matrices/blocks.0.mlp.up.weight/momentum_buffer" in names
    assert {"embeddings/head.weight/exp_avg", "vectors/norm.weight/step"} <= names
    assert not any(name.startswith("matrices/") and "exp_avg" in name for name in names)


def test_rates_follow_the_factor() -> None:
    optimizer = create_optimizer(make_model(), "muon", lr=0.5, adam_lr=0.25)
    optimizer.set_lr(0.5)
    optimizer.set_lr(0.1)
    assert [g["lr"] for part in optimizer.rules for g in part.param_groups] == [0.05, 0.025]
    assert optimizer.peak_lr == 0.5


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_weight_decay_is_decoupled_and_on_matrices_only(name: str) -> None:
    model = make_model()
    values_before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = create_optimizer(model, name, weight_decay=0.5, lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter_name, parameter in model.named_parameters():
        has_decay = parameter_group(parameter_name, parameter.ndim) == "matrices"
        decay_factor = 0.95 if has_decay else 1.0
        torch.testing.assert_close(parameter.detach(), decay_factor * values_before[parameter_name])


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "adamw"])
def test_plain_kernels_do_not_depend_on_where_a_tensor_is_cut(name: str) -> None:
    base_tensors = {f"t{n}": torch.randn(n, 3) for n in (1, 5, 8, 13, 100)}

    def train_shards(size: int) -> dict[str, Tensor]:
        parts = {
            f"{key}.{r}": nn.Parameter(shard_rows(tensor, size, r).clone())
            for key, tensor in base_tensors.items()
            for r in range(size)
        }
        optimizer = make_optimizer(
            OptimSettings(name=name, weight_decay=0.1),  # type: ignore[arg-type]
            parts.items(),
            fused=False,
        )
        for step in range(5):
            for key, tensor in base_tensors.items():
                for r in range(size):
                    grad = shard_rows(tensor * (1 + 0.37 * step), size, r)
                    parts[f"{key}.{r}"].grad = grad.clone()
            optimizer.step()
        return {
            key: torch.cat([parts[f"{key}.{r}"].detach() for r in range(size)])
            for key in base_tensors
        }

    full_result = train_shards(1)
    for size in (2, 3, 7):
        sharded_result = train_shards(size)
        assert all(torch.equal(full_result[key], sharded_result[key]) for key in base_tensors), size


# ---- muon ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_muon_is_the_librarys_muon(decay: float) -> None:
    shapes = ((16, 16), (64, 16), (16, 64), (1, 8), (33, 7), (96, 96))
    initial_values = [torch.randn(shape) for shape in shapes]
    own_parameters = [nn.Parameter(t.clone()) for t in initial_values]
    library_parameters = [nn.Parameter(t.clone()) for t in initial_values]
    own_muon = Muon(own_parameters, 0.02, momentum=0.95, weight_decay=decay, dtype=torch.bfloat16)
    library_muon = torch.optim.Muon(library_parameters, lr=0.02, momentum=0.95, weight_decay=decay)
    for _ in range(5):
        for p, q in zip(own_parameters, library_parameters, strict=True):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        own_muon.step()
        library_muon.step()
    for p, q in zip(own_parameters, library_parameters, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(24, 24), (96, 24), (24, 96), (24, 40)])
def test_orthogonalise_brings_singular_values_near_one(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    singular_values = torch.logspace(0, -1.5, 24)
    result = orthogonalise((u * singular_values) @ v, dtype).float()
    assert result.shape == shape and result.is_contiguous()
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.5 and values.max() < 1.35
    assert (u.T @ result @ v.T).diagonal().min() > 0.5


def test_the_iteration_on_the_gram_matrix_is_the_same_iteration() -> None:
    for decades in (0, 3, 8):
        u, _, v = torch.linalg.svd(torch.randn(24, 96), full_matrices=False)
        wide_matrix = (u * torch.logspace(0, -decades, 24)) @ v
        wide_matrix /= wide_matrix.norm()
        torch.testing.assert_close(
            _newton_schulz_by_gram(wide_matrix), _newton_schulz(wide_matrix), rtol=0, atol=5e-4
        )


def test_muon_takes_more_dims_as_columns_and_refuses_vectors() -> None:
    tall_parameter = nn.Parameter(torch.randn(6, 3, 2))
    flat_parameter = nn.Parameter(tall_parameter.detach().reshape(6, 6).clone())
    for parameter in (tall_parameter, flat_parameter):
        parameter.grad = torch.ones(6, 6).triu().reshape(parameter.shape)
        Muon([parameter], 0.1).step()
    assert torch.equal(tall_parameter.detach().reshape(6, 6), flat_parameter)
    with pytest.raises(LayoutError):
        Muon([nn.Parameter(torch.zeros(3))], 0.1)


@given(
    st.lists(st.tuples(st.integers(1, 512), st.integers(1, 512)), min_size=1, max_size=40),
    st.integers(1, 9),
)
def test_dealing_is_fair(shapes: list[tuple[int, int]], size: int) -> None:
    costs = [orthogonalise_cost(*shape) for shape in shapes]
    owners = assign_owners(costs, size)
    loads = [sum(c for c, o in zip(costs, owners, strict=True) if o == r) for r in range(size)]
    assert max(loads) <= sum(costs) / size + max(costs)
    assert owners == assign_owners(costs, size)


def test_products_are_in_what_the_device_is_quick_at() -> None:
    assert product_dtype(torch.device("cuda")) == torch.bfloat16
    assert product_dtype(torch.device("cpu")) in (torch.bfloat16, torch.float32)


# ---- norms and clipping --------------------------------------------------------------------------


def split_grads(
    grads: Sequence[Tensor], size: int
) -> tuple[list[list[Tensor]], Callable[..., Tensor]]:
    """Every shard's rows, and the `gather_squares` that any of them would be given."""
    parts = [[shard_rows(g, size, r).clone() for g in grads] for r in range(size)]

    def gather_squares(_: Tensor) -> Tensor:
        rows = [[_row_squares(part) for part in shard] for shard in parts]
        return torch.cat([rows[r][i] for i in range(len(grads)) for r in range(size)])

    return parts, gather_squares


def _row_squares(tensor: Tensor) -> Tensor:
    return tensor.square() if tensor.ndim < 2 else tensor.square().sum(1)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.integers(1, 70)), st.tuples(st.integers(1, 70), st.integers(1, 300))
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
    norm = global_norm(number_tensors(grads), True)
    for size in (1, 2, 3, 5):
        parts, gather_squares = split_grads(grads, size)
        row_squares: list[Tensor] = []
        global_norm(
            number_tensors(parts[0]),
            True,
            lambda rows, row_squares=row_squares, gather_squares=gather_squares: (
                row_squares.append(rows) or gather_squares(rows)  # type: ignore[func-returns-value]
            ),
        )
        assert torch.equal(row_squares[0], torch.cat([_row_squares(p) for p in parts[0]]))
        assert torch.equal(global_norm(number_tensors(parts[0]), True, gather_squares), norm), size
    expected = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
    assert float(norm) == pytest.approx(expected, rel=1e-6)
    assert float(global_norm(number_tensors(grads), False)) == pytest.approx(expected, rel=1e-5)
    # Two ranks with halves of every tensor: what both tell adds up to the whole norm.
    halves = [number_tensors([g.flatten()[r::2] for g in grads]) for r in range(2)]
    recorded_sums: list[Tensor] = []
    for half in halves:
        global_norm(half, False, norm_sums=FakeNormSums(recorded_sums.append))
    total = torch.stack(recorded_sums).sum(0)
    total_norm = global_norm(halves[0], False, norm_sums=FakeNormSums(lambda _: None, total))
    assert float(total_norm) == pytest.approx(expected, rel=1e-5)


class FakeNormSums:
    """Totals of a world that the test holds in its hands."""

    def __init__(self, record_sum: Callable[[Tensor], None], total: Tensor | None = None) -> None:
        self.record_sum, self.total, self.names = record_sum, total, ["0"]

    def sum_all(self, names: Sequence[str], numbers: Tensor) -> Tensor:
        self.record_sum(numbers)
        return numbers if self.total is None else self.total

    sum_local = sum_all


def number_tensors(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    return {str(index): tensor for index, tensor in enumerate(tensors)}


def make_named_toy() -> list[tuple[str, Tensor, Tensor]]:
    names = (("embed.weight", (7, 4)), ("blocks.0.mlp.up.weight", (6, 4)), ("norm.weight", (4,)))
    return [(name, torch.randn(shape), 3 * torch.randn(shape)) for name, shape in names]


@pytest.mark.parametrize("kind", ["norm", "value", "agc", "normalise", "none"])
def test_clipping_does_what_it_says(kind: str) -> None:
    named_tensors = make_named_toy()
    grads_before = [grad.clone() for _, _, grad in named_tensors]
    norm = global_norm(number_tensors(grads_before), True)
    clip_gradients(named_tensors, ClipSettings(kind=kind, limit=0.5), norm)  # type: ignore[arg-type]
    grads = [grad for _, _, grad in named_tensors]
    norm_after = float(global_norm(number_tensors(grads), True))
    if kind == "norm":
        assert norm_after == pytest.approx(0.5, rel=1e-5)
    elif kind == "normalise":
        assert norm_after == pytest.approx(1.0, rel=1e-5)
    elif kind == "value":
        assert all(
            torch.equal(g, b.clamp(-0.5, 0.5)) for g, b in zip(grads, grads_before, strict=True)
        )
    elif kind == "none":
        assert all(torch.equal(g, b) for g, b in zip(grads, grads_before, strict=True))
    else:
        assert torch.equal(grads[0], grads_before[0]), "the embedding is left alone"
        assert not torch.equal(grads[1], grads_before[1])


def test_a_small_gradient_keeps_its_bits() -> None:
    named_tensors = make_named_toy()
    grads_before = [grad.clone() for _, _, grad in named_tensors]
    clip_gradients(
        named_tensors,
        ClipSettings(kind="norm", limit=1e3),
        global_norm(number_tensors(grads_before), True),
    )
    assert all(torch.equal(g, b) for (_, _, g), b in zip(named_tensors, grads_before, strict=True))


@pytest.mark.parametrize("shape", [(6, 5), (4,), (3, 2, 2)])
@pytest.mark.parametrize("limit", [0.01, 0.5, 100.0])
def test_agc_is_the_papers_formula(shape: tuple[int, ...], limit: float) -> None:
    weight, grad = torch.randn(shape), torch.randn(shape)
    weight[0] = 0.0
    grad[1] = 0.0
    expected = grad.clone()
    for unit in range(shape[0]):
        w, g = weight[unit].norm().item(), grad[unit].norm().item()
        max_norm = limit * max(w, 1e-3)
        if g > max_norm:
            expected[unit] *= max_norm / g
    clip_units(weight, grad, limit)
    torch.testing.assert_close(grad, expected)


def test_limits_hold_after_an_update() -> None:
    model = make_model()
    limits = ClipSettings(
        matrices=ParameterLimit(norm=2.0), embeddings=ParameterLimit(value=0.1, norm=0.5)
    )
    values_before = {name: p.detach().clone() for name, p in model.named_parameters()}
    groups = split_groups(model.named_parameters())
    limit_parameters(groups, limits)
    for name, parameter in groups["matrices"]:
        expected = values_before[name] * min(1.0, 2.0 / float(values_before[name].norm()))
        torch.testing.assert_close(parameter.detach(), expected)
    for _, parameter in groups["embeddings"]:
        assert parameter.abs().max() <= 0.1 and parameter.norm() <= 0.5 + 1e-6
    for name, parameter in groups["vectors"]:
        assert torch.equal(parameter, values_before[name])


def test_limits_give_the_same_bits_for_any_sharding() -> None:
    full_tensors = [(f"t{i}", torch.randn(29, 7) * 10**i) for i in range(3)]
    limits = ClipSettings(matrices=ParameterLimit(norm=3.0))
    for size in (2, 3, 4):
        parts = [
            [(n, shard_rows(t, size, r).clone()) for n, t in full_tensors] for r in range(size)
        ]
        recorded_sums: list[Tensor] = []

        for r in range(size):
            copies = [(n, t.clone()) for n, t in parts[r]]
            limit_parameters({"matrices": copies}, limits, FakeNormSums(recorded_sums.append))
        total = torch.stack(recorded_sums).sum(0)
        for r in range(size):
            limit_parameters({"matrices": parts[r]}, limits, FakeNormSums(lambda _: None, total))
        expected = [(n, t.clone()) for n, t in full_tensors]
        limit_parameters({"matrices": expected}, limits)
        for i, (_, tensor) in enumerate(expected):
            assert torch.equal(torch.cat([part[i][1] for part in parts]), tensor)


def test_norms_by_layer() -> None:
    model = make_model(replace(UNEVEN_MODEL, layers=2))
    set_random_grads(model, 0)
    named_grads = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    norms = layer_norms(named_grads)
    assert list(norms) == ["embed", "blocks.0", "blocks.1", "norm", "head"]
    full_norm = float(global_norm(dict(named_grads), True))
    assert math.sqrt(sum(norm**2 for norm in norms.values())) == pytest.approx(full_norm, rel=1e-5)
    assert layer_norms(iter(named_grads[:1])) == {
        "embed": pytest.approx(float(named_grads[0][1].norm()))
    }


# ---- schedule ------------------------------------------------------------------------------------


@given(
    st.sampled_from(["constant", "cosine", "linear", "wsd"]),
    st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.integers(1, 300),
)  # fmt: skip
def test_schedules_rise_once_fall_once_and_start_above_zero(
    shape: str, warmup: float, decay: float, final: float, steps: int
) -> None:
    optim_settings = OptimSettings(schedule=shape, warmup=warmup, decay=decay, final=final)  # type: ignore[arg-type]
    factors = [lr_factor(optim_settings, step / steps, step) for step in range(steps)]
    assert 0 < factors[0] <= 1 and all(0 <= f <= 1 for f in factors)
    peak_step = max(range(steps), key=lambda i: factors[i])
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(factors[: peak_step + 1]))
    assert all(a + 1e-12 >= b for a, b in itertools.pairwise(factors[peak_step:]))
    has_decay_phase = shape in ("cosine", "linear") or (shape == "wsd" and 1.0 - decay < 1.0)
    final_factor = final if has_decay_phase and warmup < 1 else 1.0
    assert lr_factor(optim_settings, 1.0, steps) == pytest.approx(final_factor)


def test_schedule_by_hand() -> None:
    wsd = OptimSettings(schedule="wsd", warmup=0.1, decay=0.4, final=0.1)
    assert [round(lr_factor(wsd, k / 100, k), 6) for k in (0, 4, 9, 10, 60)] == [0.01, 0.5, 1, 1, 1]
    assert lr_factor(wsd, 0.8, 80) == pytest.approx(0.55)
    cosine = replace(wsd, schedule="cosine", warmup=0.0, final=0.0)
    assert lr_factor(cosine, 0.5, 50) == pytest.approx(0.5)
    assert lr_factor(cosine, 0.0, 0) == 1.0
    assert lr_factor(replace(cosine, schedule="linear"), 0.25, 25) == pytest.approx(0.75)
    assert lr_factor(replace(cosine, schedule="constant"), 0.99, 99) == 1.0


# ---- processes -----------------------------------------------------------------------------------


def _run_rank(rank: int, size: int, folder: str) -> None:
    warnings.simplefilter("error", FutureWarning)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size
    )
    try:
        mesh = make_mesh(Layout(shard=size), rank, "cpu")
        _check_sharded_forward(mesh)
        tensor_layout = Layout(tensor=size)
        for layout in (Layout(shard=size), tensor_layout):
            for name in ("muon", "adamw", "momentum"):
                for dtype in (torch.bfloat16, torch.float32):
                    _check_parts_follow_full(make_mesh(layout, rank, "cpu"), name, dtype)
        _check_shared_work(make_mesh(Layout(island=size), rank, "cpu"))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _check_sharded_forward(mesh: Mesh) -> None:
    tokens = torch.randint(0, 7, (2, 9), generator=torch.Generator().manual_seed(0))
    full_model, sharded_model = make_model(), make_model()
    assert mesh.shard_mesh is not None
    comm = AxisComm(mesh.group("shard"), mesh.size("shard"), mesh.index("shard"))
    apply_fsdp(sharded_model, mesh.shard_mesh, list(sharded_model.parts()), {}, Sharding(), comm)
    full_loss, sharded_loss = full_model.loss(tokens), sharded_model.loss(tokens)
    assert torch.equal(full_loss, sharded_loss)
    full_loss.backward()
    sharded_loss.backward()
    reshard(sharded_model)
    for p, q in zip(full_model.parameters(), sharded_model.parameters(), strict=True):
        assert isinstance(q.grad, DTensor)
        assert p.grad is not None
        expected_grad = p.grad * mesh.size("shard")  # every rank gave the same samples
        torch.testing.assert_close(q.grad.full_tensor(), expected_grad, rtol=1e-4, atol=1e-6)


def _check_parts_follow_full(mesh: Mesh, name: str, dtype: torch.dtype) -> None:
    """Three steps with given gradients: parameters and state have the uncut bits."""
    optim_settings = OptimSettings(name=name, weight_decay=0.1)  # type: ignore[arg-type]
    full_model = make_model()
    specs = {spec.name: spec for spec in tensor_specs(full_model.settings, full_model.vocabulary)}
    boxes = {spec.name: spec.box(mesh.layout, mesh.coords) for spec in specs.values()}
    parts = {n: slice_box(p.detach(), boxes[n]).clone() for n, p in full_model.named_parameters()}
    matrices = {
        n: muon_matrix(specs[n], mesh, False) for n in parts if specs[n].group == "matrices"
    }
    full_optimizer = make_optimizer(
        optim_settings, full_model.named_parameters(), fused=False, muon_dtype=dtype
    )
    sharded_optimizer = make_optimizer(
        optim_settings, parts.items(), fused=False, matrices=matrices, muon_dtype=dtype
    )
    for step in range(3):
        set_random_grads(full_model, step)
        for n, p in full_model.named_parameters():
            assert p.grad is not None
            parts[n].grad = slice_box(p.grad, boxes[n]).clone()
        full_optimizer.step()
        sharded_optimizer.step()
    for n, p in full_model.named_parameters():
        assert torch.equal(slice_box(p.detach(), boxes[n]), parts[n])
    full_state, sharded_state = full_optimizer.state_tensors(), sharded_optimizer.state_tensors()
    assert list(full_state) == list(sharded_state)
    for key, tensor in full_state.items():
        expected = slice_box(tensor, boxes[key.split("/")[1]]) if tensor.ndim else tensor
        assert torch.equal(expected, sharded_state[key]), key
    assert (sharded_optimizer.sent_bytes > 0) == (name == "muon")


def _check_shared_work(mesh: Mesh) -> None:
    single_model, shared_model = make_model(), make_model()
    matrices = {
        spec.name: muon_matrix(spec, mesh, False)
        for spec in tensor_specs(single_model.settings, single_model.vocabulary)
        if spec.group == "matrices"
    }
    single_optimizer = make_optimizer(OptimSettings(), single_model.named_parameters(), fused=True)
    shared_optimizer = make_optimizer(
        OptimSettings(), shared_model.named_parameters(), fused=True, matrices=matrices
    )
    for step in range(3):
        for model, optimizer in (
            (single_model, single_optimizer),
            (shared_model, shared_optimizer),
        ):
            set_random_grads(model, step)
            optimizer.step()
    for p, q in zip(single_model.parameters(), shared_model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert single_optimizer.sent_bytes == 0 < shared_optimizer.sent_bytes


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_follow_one_process_to_the_bit(size: int, tmp_path: Path) -> None:
    mp.spawn(_run_rank, (size, str(tmp_path)), nprocs=size)
