"""Named model sizes: functions of nothing that return the model's part of a run.

Not here: recipes for clusters (they are TOML files of the user's). Traded away: only models that
this version can build; a preset that cannot be trained would be a picture, not a preset.
"""

from __future__ import annotations

from collections.abc import Mapping

from cordee.config.model import ModelSettings

DEFAULT_LR: Mapping[str, float] = {
    "sgd": 0.5,
    "momentum": 0.05,
    "adam": 0.002,
    "adamw": 0.002,
    "muon": 0.015,
    "adafactor": 0.01,
}
"""Peak learning rate per update rule, for the byte models of 1-3 M parameters (docs/tuning.md)."""


def model_presets() -> dict[str, ModelSettings]:
    """All presets by name; parameter counts with the byte vocabulary of 256."""
    return {
        "micro": ModelSettings(preset="micro", layers=2, width=64, heads=4),  # 0.13 M
        "tiny": ModelSettings(preset="tiny", layers=5, width=128, heads=4),  # 1.05 M
        "small": ModelSettings(preset="small", layers=6, width=384, heads=6),  # 10.8 M
        "medium": ModelSettings(preset="medium", layers=12, width=768, heads=12),  # 85 M
        "large": ModelSettings(preset="large", layers=24, width=1024, heads=16),  # 303 M
        "xl": ModelSettings(preset="xl", layers=24, width=2048, heads=16),  # 1.2 B
    }
