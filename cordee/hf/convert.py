"""The built-in transformer as transformers knows it: a Llama, or a Qwen3 when qk_norm is on.

The same function under other names. Here rotary positions turn neighbouring features of a head,
there its two halves, so rows of query and key (and their gains) change places. Settings without an
equivalent (relu2, a logit cap, dropout, windows, experts) are refused, not approximated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cordee.config.model import ModelSettings
from cordee.errors import ConfigError
from cordee.hf.safetensors_io import open_folder, slice_box
from cordee.layout.slices import Box

LAYER_MODULES = {
    "input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm",
    "self_attn.q_proj": "attention.query", "self_attn.k_proj": "attention.key",
    "self_attn.v_proj": "attention.value", "self_attn.o_proj": "attention.out",
    "self_attn.q_norm": "attention.query_gain", "self_attn.k_norm": "attention.key_gain",
    "mlp.gate_proj": "mlp.gate", "mlp.up_proj": "mlp.up", "mlp.down_proj": "mlp.down",
}  # fmt: skip
"""Modules of a decoder layer: transformers' name -> the name here."""

ROTARY_SUFFIXES = ("attention.query.weight", "attention.key.weight",
          "attention.query_gain.weight", "attention.key_gain.weight")  # fmt: skip
"""Ends of the names of tensors whose rows are features that rotary positions turn."""

REQUIRED_SETTINGS: Mapping[str, object] = {
    "mlp": "gated", "logit_cap": 0.0, "dropout": 0.0, "window": 0, "moe.experts": 0,
}  # fmt: skip
"""Knobs of model.* that must have these values, because Llama and Qwen3 have nothing else."""


@dataclass(frozen=True)
class HFStateDictAdapter:
    """A transformer that transformers has too; made by `make_hf_adapter`."""

    model: ModelSettings
    vocabulary: int

    def hf_config(self, positions: int) -> dict[str, Any]:
        """Its config.json; `positions` is the longest sequence that it was trained on."""
        model = self.model
        model_type = (
            ("qwen3", "Qwen3ForCausalLM") if model.qk_norm else ("llama", "LlamaForCausalLM")
        )
        return {
            "model_type": model_type[0], "architectures": [model_type[1]], "dtype": "float32",
            "vocab_size": self.vocabulary, "hidden_size": model.width,
            "intermediate_size": model.hidden_width, "num_hidden_layers": model.layers,
            "num_attention_heads": model.heads,
            "num_key_value_heads": model.kv_heads or model.heads,
            "head_dim": model.width_per_head, "hidden_act": "silu", "rms_norm_eps": model.norm_eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_base},
            "max_position_embeddings": positions, "tie_word_embeddings": model.tied,
            "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0,
            "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
        }  # fmt: skip

    def name_pairs(self) -> Iterator[tuple[str, str]]:
        """(transformers' name, name here) of every tensor that transformers wants."""
        yield "model.embed_tokens.weight", "embed.weight"
        for layer in range(self.model.layers):
            for hf_module, native_module in LAYER_MODULES.items():
                if self.model.qk_norm or "norm" not in hf_module.partition(".")[2]:
                    yield (
                        f"model.layers.{layer}.{hf_module}.weight",
                        f"blocks.{layer}.{native_module}.weight",
                    )
        yield "model.norm.weight", "norm.weight"
        if not self.model.tied:
            yield "lm_head.weight", "head.weight"

    def has_parameter(self, name: str) -> bool:
        """Whether the model here has that parameter: without qk_gain its gains are ones."""
        return self.model.qk_gain or "_gain." not in name

    def tensor_shape(
        self, name: str, shape_of: Callable[[str], tuple[int, ...]]
    ) -> tuple[int, ...]:
        """The shape of a tensor by its name here; `shape_of` knows the parameters that exist."""
        return shape_of(name) if self.has_parameter(name) else (self.model.width_per_head,)

    def to_hf(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """A tensor as transformers wants it, by its name here."""
        if not self.has_parameter(name):
            return torch.ones(self.model.width_per_head)
        tensor = read(name)
        if not name.endswith(ROTARY_SUFFIXES):
            return tensor
        # Features 2 i and 2 i + 1 of a head become its features i and i + E / 2.
        heads = tensor.view(-1, self.model.width_per_head // 2, 2, *tensor.shape[1:])
        return heads.transpose(1, 2).reshape(tensor.shape)

    def from_hf(self, name: str, tensor: Tensor) -> Tensor:
        """The reverse of `to_hf`, by the name here."""
        if not name.endswith(ROTARY_SUFFIXES):
            return tensor
        heads = tensor.view(-1, 2, self.model.width_per_head // 2, *tensor.shape[1:])
        return heads.transpose(1, 2).reshape(tensor.shape)


def make_hf_adapter(model: ModelSettings, vocabulary: int) -> HFStateDictAdapter:
    """ConfigError names the first setting that transformers does not have."""
    model_values = {name: _setting(model, name) for name in REQUIRED_SETTINGS}
    for name, required_value in REQUIRED_SETTINGS.items():
        if model_values[name] != required_value:
            raise ConfigError(
                "transformers has no model with this knob",
                values={f"model.{name}": model_values[name]},
                fix=f"train with model.{name}={required_value}, or export --to safetensors",
            )
    if model.qk_gain and not model.qk_norm:
        raise ConfigError(
            "gains without a norm have no equivalent",
            values={"model.qk_gain": True, "model.qk_norm": False},
            fix="train with model.qk_norm=true",
        )
    return HFStateDictAdapter(model, vocabulary)


def import_weights(path: str, model: ModelSettings) -> Callable[[str, Box], Tensor]:
    """(name, box) -> that part of a parameter, from the folder of a Llama or a Qwen3.

    ConfigError names the knobs of model.* in which the folder's model differs.
    """
    folder = open_folder(path, "initial.weights")
    hf_values = settings_from_hf(folder.config, path)
    rows = int(hf_values["vocabulary"])
    derived_values = {"kv_heads": model.kv_heads or model.heads, "head_width": model.width_per_head,
            "ffn": model.hidden_width}  # fmt: skip
    model_values = {name: derived_values.get(name, _setting(model, name)) for name in hf_values}
    differences = {n: v for n, v in hf_values.items() if model_values[n] != v}
    if differences:
        raise ConfigError(
            "the weights are those of another model",
            values={"initial.weights": path} | {f"model.{n}": model_values[n] for n in differences},
            fix=" ".join(f"model.{n}={str(v).lower()}" for n, v in differences.items()),
        )
    adapter = make_hf_adapter(model, rows)
    hf_names = {native_name: name for name, native_name in adapter.name_pairs()}

    def read_box(name: str, box: Box) -> Tensor:
        if name.endswith(ROTARY_SUFFIXES):
            return slice_box(adapter.from_hf(name, folder.read(hf_names[name])), box)
        return folder.read(hf_names[name], box)

    return read_box


def settings_from_hf(config: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Values of model.* that make the model of a config.json; ConfigError when none do."""
    model_type = config.get("model_type")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    deviations = {
        "model_type": model_type if model_type not in ("llama", "qwen3") else None,
        "hidden_act": config.get("hidden_act", "silu") if config.get("hidden_act", "silu") != "silu"
        else None,
        "attention_bias": config.get("attention_bias") or None,
        "mlp_bias": config.get("mlp_bias") or None,
        "rope_type": rope.get("rope_type") if rope.get("rope_type", "default") != "default"
        else None,
        "use_sliding_window": config.get("use_sliding_window") or None,
    }  # fmt: skip
    unsupported = {name: value for name, value in deviations.items() if value is not None}
    try:
        if unsupported:
            raise ValueError(", ".join(f"{k}={v!r}" for k, v in unsupported.items()))
        heads = int(config["num_attention_heads"])
        return {
            "vocabulary": int(config["vocab_size"]), "layers": int(config["num_hidden_layers"]),
            "width": int(config["hidden_size"]), "heads": heads,
            "kv_heads": int(config.get("num_key_value_heads") or heads),
            "head_width": int(config.get("head_dim") or config["hidden_size"] // heads),
            "ffn": int(config["intermediate_size"]), "mlp": "gated",
            "qk_norm": model_type == "qwen3", "qk_gain": model_type == "qwen3",
            "norm_eps": float(config.get("rms_norm_eps", 1e-6)), "rope_base": float(theta),
            "tied": bool(config.get("tie_word_embeddings", False)), "logit_cap": 0.0,
        }  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            "the house's transformer cannot be this model",
            values={"initial.weights": path, "config.json": str(error)},
            fix=f"model.hub={path}, which trains it as it is",
        ) from error


def _setting(model: ModelSettings, name: str) -> Any:
    value: Any = model
    for part in name.split("."):
        value = getattr(value, part)
    return value
