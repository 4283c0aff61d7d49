"""A folder of a transformers model as the planner sees it: the house's transformer of its shape.

Paper: config.json alone is read. Not here: the model itself (`model/hub.py`) or its weights
(`model/folder.py`). Traded away: what a shape does not tell (biases, norms of other kinds), so that
predictions of such models are near, not exact.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cordee.config.load import flatten
from cordee.config.model import ModelSettings, MoeSettings
from cordee.config.ranges import check_ranges
from cordee.config.run import Run
from cordee.errors import ConfigError

CONFIG = "config.json"

NAMES: Mapping[str, tuple[str, ...]] = {
    "width": ("hidden_size", "n_embd", "d_model"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "heads": ("num_attention_heads", "n_head", "num_heads"),
    "kv_heads": ("num_key_value_heads",),
    "head_width": ("head_dim",),
    "ffn": ("intermediate_size", "n_inner", "ffn_dim", "d_inner"),
    "vocabulary": ("vocab_size",),
}
"""Key of model.* -> what configurations of transformers call it."""

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


def on_paper(run: Run) -> Run:
    """The run that is planned: with model.hub, its model is the house's of that shape."""
    return replace(run, model=shape_of(run.model.hub)) if run.model.hub else run


def shape_of(path: str) -> ModelSettings:
    """The shape that the folder's config.json tells; what it leaves out keeps the house's ratio.

    ConfigError when there is no such file, or it is none of a model.
    """
    config = read_config(path, "model.hub")
    inner = config.get("text_config")
    told = inner if isinstance(inner, dict) else config
    found: dict[str, Any] = {key: _whole(told, names) for key, names in NAMES.items()}
    if not found["width"] or not found["layers"]:
        raise ConfigError(
            f"{CONFIG} does not tell the size of a language model",
            values={"model.hub": path, "model_type": config.get("model_type"),
                    "looked for": [*NAMES["width"], *NAMES["layers"]]},
            fix="the folder of a causal language model of transformers",
        )  # fmt: skip
    width = found["width"]
    found["heads"] = found["heads"] or max(1, width // (found["head_width"] or 64))
    if width % found["heads"]:
        found["head_width"] = found["head_width"] or max(1, width // found["heads"])
    gated = "gelu" not in str(told.get("hidden_act", told.get("activation_function")))
    made = ModelSettings(
        hub=path, **found,
        mlp="gated" if gated or "gemma" in str(config.get("model_type")) else "relu2",
        tied=bool(told.get("tie_word_embeddings", config.get("tie_word_embeddings", False))),
        moe=_experts(told),
    )  # fmt: skip
    try:
        check_ranges(flatten(Run(model=made)), flatten(Run()))
    except ConfigError as error:
        raise ConfigError(
            f"{CONFIG} tells a size that no model has: {error.what}",
            values={"model.hub": path, **error.values},
            fix="the folder of a causal language model of transformers",
        ) from error
    return made


def read_config(path: str, key: str) -> dict[str, Any]:
    """config.json of folder `path`; ConfigError names `key`, which said the path."""
    found = read_json(Path(path) / CONFIG, {key: path})
    if not isinstance(found, dict):
        raise ConfigError(f"{CONFIG} is no JSON object", values={key: path})
    return found


def read_json(file: Path, values: Mapping[str, object]) -> Any:
    """What a JSON file of such a folder says; ConfigError with `values` when it says nothing."""
    try:
        return json.loads(file.read_text("utf-8-sig"))
    except OSError as error:
        raise ConfigError(
            f"no folder of a transformers model: {file.name} cannot be read",
            values={**values, "error": error.strerror},
            fix=f"the path of a folder with {CONFIG} (nothing is downloaded)",
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{file.name} is no valid JSON", values={**values, "error": str(error)}
        ) from error


def _experts(told: Mapping[str, Any]) -> MoeSettings:
    experts = _whole(told, EXPERTS)
    if not experts:
        return MoeSettings()
    return MoeSettings(
        experts=experts,
        active=_whole(told, ("num_experts_per_tok",)) or 2,
        width=_whole(told, ("moe_intermediate_size", *NAMES["ffn"])),
        balance="none",
    )


def _whole(told: Mapping[str, Any], names: tuple[str, ...]) -> int:
    """The first of `names` that is a whole number; 0 when none is."""
    return next((told[name] for name in names if type(told.get(name)) is int), 0)
