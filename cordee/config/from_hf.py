"""A folder of a transformers model as the planner sees it: our transformer of its shape, from
config.json alone. Biases and other norms are left out, so that its predictions are near, not exact.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cordee.config.model import ModelSettings, MoeSettings
from cordee.config.run import Run
from cordee.config.validate import check_ranges
from cordee.errors import ConfigError

CONFIG_FILE = "config.json"

HF_KEYS: Mapping[str, tuple[str, ...]] = {
    "width": ("hidden_size", "n_embd", "d_model"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "heads": ("num_attention_heads", "n_head", "num_heads"),
    "kv_heads": ("num_key_value_heads",),
    "head_width": ("head_dim",),
    "ffn": ("intermediate_size", "n_inner", "ffn_dim", "d_inner"),
    "vocabulary": ("vocab_size",),
}
"""Key of model.* -> what configurations of transformers call it."""

EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts")


def with_hub_shape(run: Run) -> Run:
    """The run that is planned: with model.hub, our model of that shape."""
    return replace(run, model=hub_model_settings(run.model.hub)) if run.model.hub else run


def hub_model_settings(path: str) -> ModelSettings:
    """The shape in the folder's config.json, with our ratios for what it leaves out; ConfigError
    when there is no such file, or it is none of a model."""
    config = read_config(path, "model.hub")
    text_config = config.get("text_config")
    table = text_config if isinstance(text_config, dict) else config
    sizes: dict[str, Any] = {key: _first_int(table, names) for key, names in HF_KEYS.items()}
    if not sizes["width"] or not sizes["layers"]:
        raise ConfigError(
            f"{CONFIG_FILE} does not tell the size of a language model",
            values={"model.hub": path, "model_type": config.get("model_type"),
                    "looked for": [*HF_KEYS["width"], *HF_KEYS["layers"]]},
            fix="the folder of a causal language model of transformers",
        )  # fmt: skip
    width = sizes["width"]
    sizes["heads"] = sizes["heads"] or max(1, width // (sizes["head_width"] or 64))
    if width % sizes["heads"]:
        sizes["head_width"] = sizes["head_width"] or max(1, width // sizes["heads"])
    is_gated = "gelu" not in str(table.get("hidden_act", table.get("activation_function")))
    settings = ModelSettings(
        hub=path, **sizes,
        mlp="gated" if is_gated or "gemma" in str(config.get("model_type")) else "relu2",
        tied=bool(table.get("tie_word_embeddings", config.get("tie_word_embeddings", False))),
        moe=_moe_settings(table),
    )  # fmt: skip
    try:
        check_ranges(Run(model=settings))
    except ConfigError as error:
        raise ConfigError(
            f"{CONFIG_FILE} tells a size that no model has: {error.message}",
            values={"model.hub": path, **error.values},
            fix="the folder of a causal language model of transformers",
        ) from error
    return settings


def read_config(path: str, key: str) -> dict[str, Any]:
    """config.json of folder `path`; ConfigError names `key`, which said the path."""
    config = read_json(Path(path) / CONFIG_FILE, {key: path})
    if not isinstance(config, dict):
        raise ConfigError(f"{CONFIG_FILE} is no JSON object", values={key: path})
    return config


def read_json(file: Path, values: Mapping[str, object]) -> Any:
    """A JSON file of such a folder; ConfigError with `values` when it cannot be read."""
    try:
        return json.loads(file.read_text("utf-8-sig"))
    except OSError as error:
        raise ConfigError(
            f"no folder of a transformers model: {file.name} cannot be read",
            values={**values, "error": error.strerror},
            fix=f"the path of a folder with {CONFIG_FILE} (nothing is downloaded)",
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{file.name} is no valid JSON", values={**values, "error": str(error)}
        ) from error


def _moe_settings(table: Mapping[str, Any]) -> MoeSettings:
    experts = _first_int(table, EXPERT_KEYS)
    if not experts:
        return MoeSettings()
    return MoeSettings(
        experts=experts,
        active=_first_int(table, ("num_experts_per_tok",)) or 2,
        width=_first_int(table, ("moe_intermediate_size", *HF_KEYS["ffn"])),
        balance="none",
    )


def _first_int(table: Mapping[str, Any], names: tuple[str, ...]) -> int:
    """The first of `names` that is a whole number; 0 when none is."""
    return next((table[name] for name in names if type(table.get(name)) is int), 0)
