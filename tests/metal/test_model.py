"""The model against its table and its obvious formulas; initial values against their statistics."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from cordee.config.load import override
from cordee.config.model import InitialSettings, ModelSettings
from cordee.config.presets import model_presets
from cordee.config.run import Run
from cordee.config.validate import validate_run
from cordee.errors import ConfigError, DataError
from cordee.layout.tensors import router_bias_specs, tensor_specs
from cordee.model.attention import (
    Attention,
    RMSNorm,
    apply_rope,
    causal_attention,
    chunked_attention,
    masked_attention,
    rms_norm,
    rope_table,
)
from cordee.model.init_weights import INIT_SCHEMES, init_weights, initial_tensor, tensor_seed
from cordee.model.layers import squared_relu
from cordee.model.loss import soft_cap
from cordee.model.transformer import Transformer
from cordee.training.evaluate import generate, to_text

CPU = torch.device("cpu")
SMALL_MODEL = ModelSettings(layers=2, width=32, heads=4)
EPS = 1e-5
NONZERO_INIT = InitialSettings(residual="same", head="same")
"""Initial values under which every parameter has a gradient."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def make_model(
    settings: ModelSettings = SMALL_MODEL, initial: InitialSettings = NONZERO_INIT
) -> Transformer:
    model = Transformer(settings, 256)
    init_weights(model, initial, 0, settings.layers)
    return model


def random_tokens(rows: int = 2, length: int = 33) -> Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(1))


def loss_value(model: Transformer, tokens: Tensor) -> float:
    return model.loss(tokens).item()


# ---- the table -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mlp", ["relu2", "gated"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv_heads", [0, 2])
def test_parameters_are_the_table(mlp: str, tied: bool, kv_heads: int) -> None:
    for preset in model_presets().values():
        settings = replace(preset, mlp=mlp, tied=tied, kv_heads=kv_heads)
        with torch.device("meta"):
            model = Transformer(settings, 256)
        name_shapes = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
        assert name_shapes == [(spec.name, spec.shape) for spec in tensor_specs(settings, 256)]
        buffer_names = {spec.name for spec in router_bias_specs(settings)}
        assert model.state_dict().keys() == buffer_names | {name for name, _ in name_shapes}


def test_hidden_width_is_obeyed() -> None:
    assert Transformer(replace(SMALL_MODEL, ffn=48), 16).blocks["0"].mlp.up.weight.shape == (48, 32)


# ---- fast against obvious ------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 5, 32), (3, 4, 2, 8)])
def test_norm_is_the_formula(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    gain = torch.randn(shape[-1], dtype=torch.float64, requires_grad=True)
    expected = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * gain
    torch.testing.assert_close(rms_norm(x, gain, torch.float64, EPS), expected)
    assert torch.autograd.gradcheck(lambda a, b: rms_norm(a, b, torch.float64, EPS), (x, gain))
    assert torch.autograd.gradcheck(lambda a: rms_norm(a, None, torch.float64, EPS), (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_agrees_with_the_library(dtype: torch.dtype) -> None:
    x = torch.randn(2, 7, 64).to(dtype).requires_grad_()
    gain = torch.randn(64, requires_grad=True)
    grad = torch.randn(2, 7, 64).to(dtype)
    own_grads = torch.autograd.grad(rms_norm(x, gain, dtype, EPS), (x, gain), grad)
    library_output = F.rms_norm(x.float(), (64,), gain, EPS)
    expected_grads = torch.autograd.grad(library_output, (x, gain), grad.float())
    tolerance = (
        {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    )
    for a, b in zip(own_grads, expected_grads, strict=True):
        torch.testing.assert_close(a.float(), b.float(), **tolerance)


def test_a_bf16_gain_is_computed_with_in_fp32() -> None:
    x, grad = torch.randn(4, 16).bfloat16().requires_grad_(), torch.randn(4, 16).bfloat16()
    gain = torch.randn(16).bfloat16().requires_grad_()
    own_grads = torch.autograd.grad(rms_norm(x, gain, torch.bfloat16, EPS), (x, gain), grad)
    double_inputs = [t.detach().double().requires_grad_() for t in (x, gain)]
    double_grads = torch.autograd.grad(
        rms_norm(*double_inputs, torch.float64, EPS), double_inputs, grad.double()
    )
    for a, b in zip(own_grads, double_grads, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.double(), b, rtol=1e-2, atol=1e-6)


def test_a_norm_of_zeros_is_finite() -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    rms_norm(x, torch.ones(8), torch.float32, EPS).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_squared_relu_is_the_formula() -> None:
    x = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(squared_relu(x), F.relu(x).square())
    assert torch.autograd.gradcheck(squared_relu, (x,))


def test_rotation_turns_pairs() -> None:
    x_BTHE = torch.randn(2, 6, 3, 8)
    output = apply_rope(x_BTHE, rope_table(6, 8, 10000.0, CPU))
    for position in range(6):
        for pair in range(4):
            angle = position * 10000.0 ** (-2 * pair / 8)
            rotation = torch.tensor(
                [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
            )
            dims = slice(2 * pair, 2 * pair + 2)
            expected = x_BTHE[:, position, :, dims] @ rotation.T
            torch.testing.assert_close(output[:, position, :, dims], expected)


@pytest.mark.parametrize("length", [1, 5, 127, 128, 129, 300])
def test_chunked_attention_is_causal_attention(length: int) -> None:
    q, k, v = (torch.randn(2, length, 3, 8, requires_grad=True) for _ in range(3))
    grad = torch.randn(2, length, 3, 8)
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    expected_output = F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)
    output = chunked_attention(q, k, v)
    torch.testing.assert_close(output, expected_output, rtol=1e-4, atol=1e-5)
    expected_grads = torch.autograd.grad(expected_output, (q, k, v), grad)
    for a, b in zip(torch.autograd.grad(output, (q, k, v), grad), expected_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [130, 1100])
def test_grouped_queries_are_repeated_keys(length: int) -> None:
    q = torch.randn(2, length, 6, 8, requires_grad=True)
    k, v = (torch.randn(2, length, 2, 8, requires_grad=True) for _ in range(2))
    grad = torch.randn(2, length, 6, 8)
    # Heads 0-2 share the first key head, 3-5 the second.
    repeated_kv = [x[:, :, [0, 0, 0, 1, 1, 1]] for x in (k, v)]
    expected_output = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, *repeated_kv)), is_causal=True
    ).transpose(1, 2)
    output = causal_attention(q, k, v)
    torch.testing.assert_close(output, expected_output, rtol=1e-4, atol=1e-5)
    expected_grads = torch.autograd.grad(expected_output, (q, k, v), grad)
    for a, b in zip(torch.autograd.grad(output, (q, k, v), grad), expected_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def dense_attention(q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, window: int) -> Tensor:
    """The formula with one mask over everything; queries are the last T of S positions."""
    length, total, heads = q_BTHE.shape[1], k_BSKE.shape[1], q_BTHE.shape[2]
    kv_heads = torch.arange(heads) * k_BSKE.shape[2] // heads
    score = (
        torch.einsum("bthe,bshe->bhts", q_BTHE, k_BSKE[:, :, kv_heads]) * q_BTHE.shape[-1] ** -0.5
    )
    age = torch.arange(total - length, total)[:, None] - torch.arange(total)
    mask = (age < 0) | (age >= (window or total))
    weight = score.masked_fill(mask, float("-inf")).softmax(-1)
    return torch.einsum("bhts,bshe->bthe", weight, v_BSKE[:, :, kv_heads])


LONG_CASES = [
    (1100, 2300, 2, 0),
    (3000, 3000, 1, 300),
    (1500, 1500, 2, 1100),
    (1500, 1500, 2, 1500),
]
"""Lengths, key heads and windows for which nothing keeps its probabilities."""


@pytest.mark.parametrize("use_library", [False, True])
@pytest.mark.parametrize(
    ("length", "total", "kv_heads", "window"),
    [
        *itertools.product((7, 129, 300), (300,), (1, 2), (0, 1, 5, 128, 170)),
        *((n, n, 1, window) for n in (7, 129) for window in (0, 1, 5, 128, 300)),
        *LONG_CASES,
    ],
)
def test_windows_and_late_queries(
    length: int, total: int, kv_heads: int, window: int, use_library: bool
) -> None:
    q = torch.randn(1, length, 2, 8, requires_grad=True)
    k, v = (torch.randn(1, total, kv_heads, 8, requires_grad=True) for _ in range(2))
    grad = torch.randn(1, length, 2, 8)
    expected = dense_attention(q, k, v, window)
    expected_grads = torch.autograd.grad(expected, (q, k, v), grad)
    if use_library:
        repeated_kv = (x.repeat_interleave(2 // kv_heads, 2) for x in (k, v))
        output = masked_attention(q, *repeated_kv, window=window)
    else:
        output = causal_attention(q, k, v, window)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    grads = torch.autograd.grad(output, (q, k, v), grad)
    for a, b in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_no_mask_spans_a_long_sequence() -> None:
    q = torch.randn(1, 9000, 1, 8)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        causal_attention(q, q, q, 300)
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    largest_bytes = max(event.nbytes() for event in events if event.name() == "[memory]")
    # Distances (int64) in a chunk of 300 queries; a mask of everything would take 77 MiB.
    assert largest_bytes <= 8 * 300 * 599 + 4096


def test_long_sequences_agree_too() -> None:
    q, k, v = (torch.randn(1, 1100, 1, 8) for _ in range(3))
    torch.testing.assert_close(
        causal_attention(q, k, v), chunked_attention(q, k, v), rtol=1e-4, atol=1e-5
    )


# ---- the knobs -----------------------------------------------------------------------------------


def test_a_head_may_have_a_width_of_its_own() -> None:
    settings = replace(SMALL_MODEL, width=30, head_width=12, kv_heads=2)
    model, tokens = make_model(settings), random_tokens()
    attention = model.blocks["0"].attention
    assert attention.query.weight.shape == (48, 30) and attention.out.weight.shape == (30, 48)
    assert attention.key.weight.shape == (24, 30) and model(tokens).isfinite().all()
    assert model.rope_cache.shape[1:] == (6, 2)


def test_gains_follow_the_norm() -> None:
    module = Attention(replace(SMALL_MODEL, qk_gain=True, kv_heads=2))
    gainless_module = Attention(replace(SMALL_MODEL, kv_heads=2))
    gainless_module.load_state_dict(module.state_dict(), strict=False)
    assert module.query_gain.weight.shape == module.key_gain.weight.shape == (8,)
    x, rope = torch.randn(2, 9, 32), rope_table(9, 8, 1e4, CPU)
    torch.testing.assert_close(module(x, rope), gainless_module(x, rope))
    torch.nn.init.normal_(module.query_gain.weight)
    torch.nn.init.normal_(module.key_gain.weight)

    def normalise_and_rotate(projected: Tensor, gain: Tensor) -> Tensor:
        x_BTHE = projected.unflatten(-1, (-1, 8))
        unit = x_BTHE * torch.rsqrt(x_BTHE.square().mean(-1, keepdim=True) + 1e-6)
        return apply_rope(unit * gain, rope)

    q, k = (
        normalise_and_rotate(module.query(x), module.query_gain.weight),
        normalise_and_rotate(module.key(x), module.key_gain.weight),
    )
    expected = dense_attention(q, k, module.value(x).unflatten(-1, (-1, 8)), 0)
    torch.testing.assert_close(module(x, rope), module.out(expected.flatten(-2)))


def test_the_window_bounds_what_a_position_sees() -> None:
    model, tokens = make_model(replace(SMALL_MODEL, window=5)), random_tokens(1, 40)
    changed_tokens = tokens.clone()
    changed_tokens[0, 10] = (changed_tokens[0, 10] + 1) % 256
    with torch.no_grad():
        is_changed = (model(tokens) - model(changed_tokens)).abs().amax((0, 2)) > 1e-6
    # Two blocks, each looking 4 positions back.
    assert is_changed.nonzero().flatten().tolist() == list(range(10, 10 + 2 * 4 + 1))


def test_every_norm_adds_the_given_eps() -> None:
    x = torch.full((1, 4), 2.0)
    torch.testing.assert_close(RMSNorm(4, 12.0)(x), x / 4)
    model = make_model(replace(SMALL_MODEL, norm_eps=0.5, qk_gain=True))
    norms = [m for m in model.modules() if isinstance(m, RMSNorm)]
    assert len(norms) == 9 and {m.eps for m in norms} == {0.5}
    module = Attention(replace(SMALL_MODEL, norm_eps=1e12))
    # So large an eps leaves nothing of queries and keys: every key weighs the same.
    y, rope = torch.randn(1, 6, 32), rope_table(6, 8, 1e4, CPU)
    mean_value = module.value(y).cumsum(1) / torch.arange(1, 7)[:, None]
    torch.testing.assert_close(module(y, rope), module.out(mean_value))


@pytest.mark.parametrize(
    ("changes", "fix"),
    [
        ({"model.window": -1}, "model.window=0"),
        ({"model.head_width": 7}, "model.head_width=8"),
        ({"model.head_width": -2}, "model.head_width=0"),
        ({"model.norm_eps": 0.0}, "model.norm_eps=1e-06"),
        ({"model.qk_gain": True, "model.qk_norm": False}, "model.qk_norm=true"),
        ({"model.width": 30, "model.heads": 4}, "model.width=32"),
    ],
)
def test_knobs_that_cannot_be_obeyed(changes: dict[str, object], fix: str) -> None:
    with pytest.raises(ConfigError, match=fix):
        validate_run(override(Run(), changes))


def test_the_width_is_free_when_heads_have_their_own() -> None:
    validate_run(override(Run(), {"model.width": 30, "model.heads": 4, "model.head_width": 8}))


# ---- the whole -----------------------------------------------------------------------------------


def test_positions_do_not_see_the_future() -> None:
    model, tokens = make_model(), random_tokens(1, 200)
    changed_tokens = tokens.clone()
    changed_tokens[0, 150] = (changed_tokens[0, 150] + 1) % 256
    with torch.no_grad():
        logits_before, logits_after = model(tokens), model(changed_tokens)
    torch.testing.assert_close(logits_before[:, :150], logits_after[:, :150])
    assert (logits_before[:, 150:] - logits_after[:, 150:]).abs().max() > 1e-4


@pytest.mark.parametrize(
    "settings",
    [
        SMALL_MODEL,
        replace(SMALL_MODEL, mlp="gated", tied=True),
        replace(SMALL_MODEL, qk_norm=False, logit_cap=0.0),
        replace(SMALL_MODEL, head_width=12, qk_gain=True, window=9, kv_heads=2),
    ],
)
def test_loss_is_summed_cross_entropy_and_reaches_every_parameter(settings: ModelSettings) -> None:
    model, tokens = make_model(settings), random_tokens()
    loss = model.loss(tokens)
    logits_BTV = model(tokens[:, :-1])
    assert logits_BTV.dtype == torch.float32 and logits_BTV.shape == (2, 32, 256)
    token_log_probs = logits_BTV.log_softmax(-1).gather(-1, tokens[:, 1:, None])
    torch.testing.assert_close(loss, -token_log_probs.sum())
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_first_loss_is_that_of_a_uniform_guess() -> None:
    tokens = random_tokens()
    loss = make_model(SMALL_MODEL, InitialSettings()).loss(tokens).detach()
    assert float(loss) / tokens[:, 1:].numel() == pytest.approx(math.log(256), rel=1e-5)


def test_targets_of_minus_100_do_not_count() -> None:
    model, tokens = make_model(), random_tokens()
    targets = tokens[:, 1:].clone()
    targets[:, 16:] = -100
    expected = model(tokens[:, :16], tokens[:, 1:17])
    torch.testing.assert_close(model(tokens[:, :-1], targets), expected)


def test_soft_cap_bounds_logits_and_zero_leaves_them() -> None:
    logits = torch.linspace(-100, 100, 11)
    assert soft_cap(logits, 15.0).abs().max() <= 15.0
    assert soft_cap(logits, 0.0) is logits
    torch.testing.assert_close(soft_cap(logits / 1000, 15.0), logits / 1000, rtol=1e-3, atol=1e-6)


def test_bf16_autocast_is_near_fp32_and_leaves_fp32_gradients() -> None:
    model, tokens = make_model(), random_tokens()
    fp32_loss = model.loss(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(tokens)
        loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(fp32_loss.item(), rel=2e-3)
    assert loss.item() != fp32_loss.item()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def test_dropout_follows_the_key_and_the_mode() -> None:
    model, tokens = make_model(replace(SMALL_MODEL, dropout=0.2)), random_tokens()
    losses = []
    for key in (1, 1, 2):
        losses.append(model(tokens[:, :-1], tokens[:, 1:], key).item())
    assert losses[0] == losses[1] != losses[2]
    model.eval()
    assert loss_value(model, tokens) == loss_value(make_model(), tokens)


def test_backward_keeps_nothing_twice() -> None:
    """What autograd keeps, in units of tokens x width: the list in the comment, and no more."""
    settings, rows, length = replace(SMALL_MODEL, layers=1, width=64), 2, 64
    model, tokens = make_model(settings), random_tokens(rows, length + 1)
    model.loss(tokens)
    parameter_pointers = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved_bytes: dict[int, int] = {}

    def record_saved(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameter_pointers:
            saved_bytes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record_saved, lambda tensor: tensor):
        loss = model.loss(tokens)
    assert loss.requires_grad
    unit = rows * length * 64 * 4
    # Norms 3 x (unit, output); q and k normed 2; q, k, v 3; attention's output 1; MLP 4 + 4.
    streams = 20 * unit
    probabilities = rows * 4 * length * length * 4
    logits = 2 * rows * length * 256 * 4
    assert sum(saved_bytes.values()) <= 1.05 * (streams + probabilities + logits)


def test_meta_construction_ends_where_plain_construction_does() -> None:
    tokens = random_tokens()
    with torch.device("meta"):
        model = Transformer(SMALL_MODEL, 256)
        model(tokens.to("meta"))
    model.to_empty(device="cpu")
    init_weights(model, NONZERO_INIT, 0, SMALL_MODEL.layers)
    assert loss_value(model, tokens) == loss_value(make_model(), tokens)


def test_training_works_after_inference_made_the_tables() -> None:
    model, tokens = make_model(), random_tokens()
    with torch.inference_mode():
        model(tokens)
    model.loss(tokens).backward()
    long_tokens = random_tokens(1, 65)
    assert loss_value(model, long_tokens) == loss_value(make_model(), long_tokens)


# ---- initial values ------------------------------------------------------------------------------

EXPECTED_VARIANCES = {
    "xavier": 2 / (400 + 300), "xavier_normal": 2 / (400 + 300), "kaiming": 2 / 300,
    "kaiming_normal": 2 / 300, "normal": 0.03**2, "orthogonal": 1 / 400,
}  # fmt: skip
FOURTH_MOMENTS = {"xavier": 9 / 5, "kaiming": 9 / 5}
"""Fourth moment over squared variance: 9/5 is uniform, 3 is normal."""


@pytest.mark.parametrize("scheme", sorted(INIT_SCHEMES))
def test_schemes_have_their_statistics(scheme: str) -> None:
    settings = InitialSettings(matrices=scheme, std=0.03, gain=1.0)
    tensor = initial_tensor("blocks.0.mlp.up.weight", (400, 300), settings, 7, 2)
    assert tensor.shape == (400, 300) and tensor.dtype == torch.float32
    assert INIT_SCHEMES[scheme].formula and INIT_SCHEMES[scheme].source
    if scheme == "zero":
        assert tensor.abs().sum() == 0
        return
    assert float(tensor.mean()) == pytest.approx(0.0, abs=3 * float(tensor.std()) / 346)
    if scheme == "truncated_normal":
        assert tensor.abs().max() <= 0.06
        assert float(tensor.std()) == pytest.approx(0.03 * 0.8796, rel=0.02)
        return
    variance = float(tensor.square().mean())
    assert variance == pytest.approx(EXPECTED_VARIANCES[scheme], rel=0.02)
    fourth_ratio = float(tensor.pow(4).mean()) / variance**2
    assert fourth_ratio == pytest.approx(FOURTH_MOMENTS.get(scheme, 3.0), rel=0.03)
    if scheme == "orthogonal":
        torch.testing.assert_close(tensor.T @ tensor, torch.eye(300), rtol=0, atol=1e-5)
    double_tensor = initial_tensor(
        "blocks.0.mlp.up.weight", (400, 300), replace(settings, gain=2.0), 7, 2
    )
    torch.testing.assert_close(double_tensor, 2 * tensor)


def test_numbers_depend_on_seed_and_name_alone() -> None:
    shape, settings = (16, 16), InitialSettings(residual="same")
    a = initial_tensor("blocks.0.mlp.up.weight", shape, settings, 0, 4)
    torch.manual_seed(99)
    assert torch.equal(a, initial_tensor("blocks.0.mlp.up.weight", shape, settings, 0, 4))
    assert not torch.equal(a, initial_tensor("blocks.1.mlp.up.weight", shape, settings, 0, 4))
    assert not torch.equal(a, initial_tensor("blocks.0.mlp.up.weight", shape, settings, 1, 4))
    assert tensor_seed(0, "embed.weight") == 1845875384748339236


def test_residual_head_and_embedding_follow_their_settings() -> None:
    def initial_matrix(name: str, **changes: object) -> Tensor:
        settings = replace(InitialSettings(), **changes)  # type: ignore[arg-type]
        return initial_tensor(name, (64, 64), settings, 0, 8)

    for name in ("blocks.3.attention.out.weight", "blocks.3.mlp.down.weight"):
        assert initial_matrix(name).abs().sum() == 0
        scaled_tensor, same_tensor = (
            initial_matrix(name, residual="depth_scaled"),
            initial_matrix(name, residual="same"),
        )
        torch.testing.assert_close(scaled_tensor, same_tensor / 4)
    assert initial_matrix("head.weight").abs().sum() == 0
    assert float(initial_matrix("head.weight", head="same").std()) == pytest.approx(
        64**-0.5, rel=0.05
    )
    assert float(initial_matrix("head.weight", head="truncated_normal").std()) < 0.02
    assert float(initial_matrix("embed.weight", embedding_std=0.5).std()) == pytest.approx(
        0.5, rel=0.05
    )
    assert initial_matrix("blocks.0.mlp.up.weight").abs().sum() > 0
    for name, expected_value in (
        ("norm.weight", 1.0),
        ("blocks.1.mlp_norm.weight", 1.0),
        ("a.bias", 0.0),
    ):
        vector = initial_tensor(name, (8,), InitialSettings(), 0, 8)
        assert vector.tolist() == [expected_value] * 8


def test_a_scheme_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError):
        initial_tensor("a.weight", (2, 2), InitialSettings(matrices="glorot"), 0, 1)  # type: ignore[arg-type]


def test_a_shard_can_be_written_from_its_rows() -> None:
    full_model, shard_model = make_model(), Transformer(SMALL_MODEL, 256)
    expected_rows = {name: p[1:3].clone() for name, p in full_model.named_parameters()}
    written_rows: dict[str, Tensor] = {}
    names = {id(p): name for name, p in shard_model.named_parameters()}
    init_weights(
        shard_model,
        NONZERO_INIT,
        0,
        2,
        write=lambda p, t: written_rows.update({names[id(p)]: t[1:3]}),
    )
    assert all(torch.equal(written_rows[name], expected_rows[name]) for name in expected_rows)


# ---- sampling ------------------------------------------------------------------------------------


def test_samples_follow_the_seed() -> None:
    model, prompt = make_model(), torch.tensor([100, 101])
    sample = generate(model, prompt, 30, 16, 1.0, 3)
    assert sample.shape == (32,) and sample[:2].tolist() == [100, 101]
    assert torch.equal(sample, generate(model, prompt, 30, 16, 1.0, 3))
    assert not torch.equal(sample, generate(model, prompt, 30, 16, 1.0, 4))


def test_greedy_samples_take_the_most_likely_token_of_the_window() -> None:
    model, prompt = make_model(), torch.arange(5)
    text = generate(model, prompt, 8, 4, 0.0, 0)
    for end in range(5, 13):
        with torch.no_grad():
            logits_V = model(text[None, end - 4 : end])[0, -1]
        assert int(text[end]) == int(logits_V.argmax())


def test_text_shows_what_is_not_text() -> None:
    assert to_text(torch.tensor([104, 105, 0, 0xC3, 0xA9, 0xFF])) == "hi\n\n\u00e9\ufffd"
    with pytest.raises(DataError):
        to_text(torch.tensor([256]))
    with pytest.raises(DataError):
        generate(make_model(), torch.tensor([], dtype=torch.int64), 1, 4, 1.0, 0)
