"""The model's knobs: its shape, its experts, and how its parameters start.

0 means "the usual" or "off" where the sentence says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class MoeSettings:
    experts: int = 0
    """Experts that replace the MLP of a block; 0: dense."""
    active: int = 2
    """Experts that a token uses (top-k of the router)."""
    width: int = 0
    """Hidden width of one expert; 0: that of the dense MLP divided by active."""
    shared: int = 0
    """Experts that every token uses, beside the chosen ones (Dai et al. 2024), as one wider MLP."""
    dense_layers: int = 0
    """Blocks at the start that keep a dense MLP."""
    router: Literal["softmax", "sigmoid"] = "softmax"
    """How scores become weights: softmax over all experts, or sigmoid and then normalised over the
    chosen (DeepSeek-V3)."""
    balance: Literal["loss", "bias", "none"] = "loss"
    """What keeps experts equally busy: a loss (Fedus et al. 2021), a bias on the choice moved after
    each step (Wang et al. 2024), or nothing."""
    balance_rate: float = 0.01
    """Weight of the balance loss, or by how much a bias moves in a step (0.001 is usual there)."""
    capacity: float = 0.0
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
    vocabulary: int = 0
    """Rows of embedding and head; 0: as many as the data has symbols."""
    layers: int = 5
    """Number of blocks of attention and MLP."""
    width: int = 128
    """Width of the residual stream, a multiple of model.heads unless model.head_width is given."""
    heads: int = 4
    """Attention heads; each is head_width wide."""
    kv_heads: int = 0
    """Heads of keys and values, shared by groups of query heads (Ainslie et al. 2023); a divisor
    of heads, 0: as many as heads."""
    head_width: int = 0
    """Width of one head; 0: width / heads. Even (rotary positions)."""
    window: int = 0
    """Positions that attention looks back, its own included (sliding window); 0: all."""
    ffn: int = 0
    """Hidden width of the MLP; 0: 4 x width (relu2), 8/3 x width rounded up to 32 (gated)."""
    mlp: Literal["relu2", "gated"] = "relu2"
    """relu2: squared ReLU (So et al. 2021); gated: SwiGLU (Shazeer 2020)."""
    dropout: float = 0.0
    """Dropout on attention and MLP outputs; random numbers depend on (seed, step, microbatch)."""
    qk_norm: bool = True
    """Normalise queries and keys to unit root mean square (tames exploding attention logits)."""
    qk_gain: bool = False
    """Learned gains after qk_norm, one per feature of a head (Qwen3); needs qk_norm."""
    norm_eps: float = 1e-6
    """Added to the mean square in RMS norms."""
    tied: bool = False
    """Use the embedding's matrix as the output head as well."""
    rope_base: float = 10000.0
    """Base of the rotary position frequencies (Su et al. 2021)."""
    logit_cap: float = 15.0
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
        """Width of keys and of values, all their heads together."""
        return self.width_per_head * (self.kv_heads or self.heads)

    @property
    def width_per_head(self) -> int:
        """Width of one head."""
        return self.head_width or self.width // self.heads

    @property
    def query_width(self) -> int:
        """Width of queries, all heads together."""
        return self.width_per_head * self.heads

    @property
    def expert_width(self) -> int:
        """Hidden width of one expert."""
        return self.moe.width or max(1, self.hidden_width // self.moe.active)

    def is_moe(self, layer: int) -> bool:
        """Whether block `layer` has experts."""
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
    embedding_std: float = 0.5
    """Standard deviation of the embedding."""
    head: Literal["same", "truncated_normal", "zero"] = "zero"
    """How the output head starts; zero means uniform predictions, first loss = ln(vocabulary)."""
    std: float = 0.02
    """Standard deviation for normal and truncated_normal (cut at 2 standard deviations)."""
    gain: float = 1.0
    """Factor on every matrix drawn by matrices."""
    weights: str = ""
    """Folder of a Llama or Qwen3 of transformers (config.json, safetensors) whose weights the
    transformer starts from, instead of drawing them; model.* must be that model's."""
