"""The model's knobs: its shape, its experts, and how its parameters start. They belong to the tree
in `run.py`; named sizes are in `presets.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from cordee.config.ranges import MAX_DIM, MAX_LAYERS, MAX_RANKS, Count, Fraction, Range, Size


@dataclass(frozen=True, kw_only=True)
class MoeSettings:
    experts: Annotated[int, Range(0, MAX_RANKS)] = 0
    """Experts that replace the MLP of a block; 0: dense."""
    active: Annotated[int, Range(1, MAX_RANKS)] = 2
    """Experts that a token uses (top-k of the router)."""
    width: Size = 0
    """Hidden width of one expert; 0: that of the dense MLP divided by active."""
    shared: Annotated[int, Range(0, MAX_RANKS)] = 0
    """Experts that every token uses, beside the chosen ones (Dai et al. 2024), as one wider MLP."""
    dense_layers: Annotated[int, Range(0, MAX_LAYERS)] = 0
    """Blocks at the start that keep a dense MLP."""
    router: Literal["softmax", "sigmoid"] = "softmax"
    """How scores become weights: softmax over all experts, or sigmoid and then normalised over the
    chosen (DeepSeek-V3)."""
    balance: Literal["loss", "bias", "none"] = "loss"
    """What keeps experts equally busy: a loss (Fedus et al. 2021), a bias on the choice moved after
    each step (Wang et al. 2024), or nothing."""
    balance_rate: Annotated[float, Range(0, 1e3)] = 0.01
    """Weight of the balance loss, or by how much a bias moves in a step (0.001 is usual there)."""
    capacity: Annotated[float, Range(0, MAX_RANKS)] = 0.0
    """Tokens an expert takes at most, as a multiple of an equal share; more are dropped. 0: all."""


DEFAULT_PRESET = "tiny"
"""What model.preset=auto stands for, but for a run that the clock alone limits."""


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    preset: str = "auto"
    """A named size (see `cordee plan --models`); the other model keys override parts of it. auto:
    tiny; for a run without any limit, model and batch are those that this machine can train in two
    minutes."""
    hub: str = ""
    """Folder of a Hugging Face model to train instead (needs the extra `hf`); the other model keys
    do not apply to it."""
    vocabulary: Size = 0
    """Rows of embedding and head; 0: as many as the data has symbols."""
    layers: Annotated[int, Range(1, MAX_LAYERS)] = 5
    """Number of blocks of attention and MLP."""
    width: Annotated[int, Range(2, MAX_DIM)] = 128
    """Width of the residual stream, a multiple of model.heads unless model.head_width is given."""
    heads: Annotated[int, Range(1, MAX_DIM)] = 4
    """Attention heads; each is head_width wide."""
    kv_heads: Size = 0
    """Heads of keys and values, shared by groups of query heads (Ainslie et al. 2023); a divisor
    of heads, 0: as many as heads."""
    head_width: Size = 0
    """Width of one head; 0: width / heads. Even (rotary positions)."""
    window: Count = 0
    """Positions that attention looks back, its own included (sliding window); 0: all."""
    ffn: Size = 0
    """Hidden width of the MLP; 0: 4 x width (relu2), 8/3 x width rounded up to 32 (gated)."""
    mlp: Literal["relu2", "gated"] = "relu2"
    """relu2: squared ReLU (So et al. 2021); gated: SwiGLU (Shazeer 2020)."""
    dropout: Fraction = 0.0
    """Dropout on attention and MLP outputs; random numbers depend on (seed, step, microbatch)."""
    qk_norm: bool = True
    """Normalise queries and keys to unit root mean square (tames exploding attention logits)."""
    qk_gain: bool = False
    """Learned gains after qk_norm, one per feature of a head (Qwen3); needs qk_norm."""
    norm_eps: Annotated[float, Range(0, 1, excludes_minimum=True)] = 1e-6
    """Added to the mean square in RMS norms."""
    tied: bool = False
    """Use the embedding's matrix as the output head as well."""
    rope_base: Annotated[float, Range(1, 1e15, excludes_minimum=True)] = 10000.0
    """Base of the rotary position frequencies (Su et al. 2021)."""
    logit_cap: Annotated[float, Range(0, 1e6)] = 15.0
    """Soft cap on logits, cap x tanh(logits / cap); 0 turns it off."""

    moe: MoeSettings = field(default_factory=MoeSettings)
    """Mixture of experts."""

    @property
    def name(self) -> str:
        """What the model is called: its folder's name, or its preset's."""
        preset = DEFAULT_PRESET if self.preset == "auto" else self.preset
        return Path(self.hub).resolve().name if self.hub else preset

    @property
    def hidden_width(self) -> int:
        """Hidden width of the MLP: as given, 4 x width, or 8/3 x width rounded up to 32."""
        default_width = 4 * self.width if self.mlp == "relu2" else -(-8 * self.width // 96) * 32
        return self.ffn or default_width

    @property
    def kv_width(self) -> int:
        """Width of keys (and of values), all heads together."""
        return self.width_per_head * (self.kv_heads or self.heads)

    @property
    def width_per_head(self) -> int:
        return self.head_width or self.width // self.heads

    @property
    def query_width(self) -> int:
        """Width of queries, all heads together."""
        return self.width_per_head * self.heads

    @property
    def expert_width(self) -> int:
        return self.moe.width or max(1, self.hidden_width // self.moe.active)

    def is_moe(self, layer: int) -> bool:
        return self.moe.experts > 0 and layer >= self.moe.dense_layers


@dataclass(frozen=True, kw_only=True)
class InitialSettings:
    matrices: Literal[
        "xavier", "xavier_normal", "kaiming", "kaiming_normal", "orthogonal", "truncated_normal",
        "normal", "zero",
    ] = "xavier"  # fmt: skip
    """How weight matrices start (see the table in model/init_weights.py)."""
    residual: Literal["same", "depth_scaled", "zero"] = "zero"
    """Matrices that write into the residual stream: as the others, divided by sqrt(2 x layers), or
    zero (each block starts as the identity)."""
    embedding_std: Annotated[float, Range(0, 1e3, excludes_minimum=True)] = 0.5
    """Standard deviation of the embedding."""
    head: Literal["same", "truncated_normal", "zero"] = "zero"
    """How the output head starts; zero means uniform predictions, first loss = ln(vocabulary)."""
    std: Annotated[float, Range(0, 1e3, excludes_minimum=True)] = 0.02
    """Standard deviation for normal and truncated_normal (cut at 2 standard deviations)."""
    gain: Annotated[float, Range(0, 1e3, excludes_minimum=True)] = 1.0
    """Factor on every matrix drawn by matrices."""
    weights: str = ""
    """Folder of a Llama or Qwen3 of transformers (config.json, safetensors) whose weights the
    transformer starts from, instead of drawing them; model.* must be that model's."""
