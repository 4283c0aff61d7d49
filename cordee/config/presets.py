"""Named model sizes. Figures of published models are those of their own configurations;
deepseek-v3-like has DeepSeek-V3's experts and plain grouped queries, not its latent attention."""

from __future__ import annotations

from functools import partial

from cordee.config.model import ModelSettings, MoeSettings

_PUBLISHED = partial(ModelSettings, mlp="gated", logit_cap=0.0)
_LLAMA3 = partial(
    _PUBLISHED, kv_heads=8, vocabulary=128256, rope_base=500000.0, norm_eps=1e-5, qk_norm=False
)
_QWEN3 = partial(
    _PUBLISHED, kv_heads=8, head_width=128, vocabulary=151936, rope_base=1e6, qk_gain=True
)
_QWEN3_MOE = partial(MoeSettings, experts=128, active=8, balance_rate=0.001)


def model_presets() -> dict[str, ModelSettings]:
    """All presets by name; parameter counts with the byte vocabulary of 256, or their own."""
    return {**_byte_models(), **_llama3(), **_qwen3(), **_moe_models()}


def _byte_models() -> dict[str, ModelSettings]:
    return {
        "micro": ModelSettings(preset="micro", layers=2, width=64, heads=4),  # 0.13 M
        "tiny": ModelSettings(preset="tiny", layers=5, width=128, heads=4),  # 1.05 M
        "small": ModelSettings(preset="small", layers=6, width=384, heads=6),  # 10.8 M
        "medium": ModelSettings(preset="medium", layers=12, width=768, heads=12),  # 85 M
        "large": ModelSettings(preset="large", layers=24, width=1024, heads=16),  # 303 M
        "xl": ModelSettings(preset="xl", layers=24, width=2048, heads=16),  # 1.2 B
        "micro-moe": ModelSettings(  # 0.13 M, of which 0.10 M work for a token
            preset="micro-moe", layers=2, width=64, heads=4,
            moe=MoeSettings(experts=4, active=2, width=64),
        ),
        "tiny-moe": ModelSettings(  # 1.38 M, of which 0.59 M work for a token
            preset="tiny-moe", layers=4, width=128, heads=4,
            moe=MoeSettings(experts=8, active=2, width=128),
        ),
    }  # fmt: skip


def _llama3() -> dict[str, ModelSettings]:
    """Grattafiori et al. 2024; `1b` is shaped like Llama 3.2 1B."""
    return {
        "1b": _LLAMA3(preset="1b", layers=16, width=2048, heads=32, ffn=8192, tied=True),
        "llama3-8b": _LLAMA3(preset="llama3-8b", layers=32, width=4096, heads=32, ffn=14336),
        "llama3-70b": _LLAMA3(preset="llama3-70b", layers=80, width=8192, heads=64, ffn=28672),
        "llama3-405b": _LLAMA3(
            preset="llama3-405b", layers=126, width=16384, heads=128, ffn=53248
        ),
    }  # fmt: skip


def _qwen3() -> dict[str, ModelSettings]:
    """Yang et al. 2025."""
    return {
        "qwen3-0.6b": _QWEN3(
            preset="qwen3-0.6b", layers=28, width=1024, heads=16, ffn=3072, tied=True
        ),
        "qwen3-1.7b": _QWEN3(
            preset="qwen3-1.7b", layers=28, width=2048, heads=16, ffn=6144, tied=True
        ),
        "qwen3-4b": _QWEN3(
            preset="qwen3-4b", layers=36, width=2560, heads=32, ffn=9728, tied=True
        ),
        "qwen3-8b": _QWEN3(preset="qwen3-8b", layers=36, width=4096, heads=32, ffn=12288),
        "qwen3-14b": _QWEN3(preset="qwen3-14b", layers=40, width=5120, heads=40, ffn=17408),
        "qwen3-32b": _QWEN3(preset="qwen3-32b", layers=64, width=5120, heads=64, ffn=25600),
    }  # fmt: skip


def _moe_models() -> dict[str, ModelSettings]:
    """Yang et al. 2025; DeepSeek-AI 2024 (671 B with its latent attention, 675 B without)."""
    return {
        "qwen3-30b-a3b": _QWEN3(
            preset="qwen3-30b-a3b", layers=48, width=2048, heads=32, kv_heads=4, ffn=6144,
            moe=_QWEN3_MOE(width=768),
        ),
        "qwen3-235b-a22b": _QWEN3(
            preset="qwen3-235b-a22b", layers=94, width=4096, heads=64, kv_heads=4, ffn=12288,
            moe=_QWEN3_MOE(width=1536),
        ),
        "deepseek-v3-like": _PUBLISHED(
            preset="deepseek-v3-like", layers=61, width=7168, heads=128, kv_heads=8,
            head_width=128, ffn=18432, vocabulary=129280, qk_norm=False,
            moe=MoeSettings(
                experts=256, active=8, width=2048, shared=1, dense_layers=3,
                router="sigmoid", balance="bias", balance_rate=0.001,
            ),
        ),
    }  # fmt: skip
