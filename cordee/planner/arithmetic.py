"""Which of the instructions that a CPU has an exact run uses: `run.arithmetic=auto` resolved.

Paper. Not here: how they are chosen in a process (`dist/process_group.py`), and what they give
(`model/arithmetic.py`). Traded away: a measurement; nothing is lost by AVX2 where a processor has
nothing wider, and everything else is asked for.
"""

from __future__ import annotations

from collections.abc import Collection

from cordee.config.run import RunSettings
from cordee.errors import ConfigError

PORTABLE_ARITHMETICS = ("avx2", "compatible")
"""Values of run.arithmetic that make unlike processors take the same code."""

AVX2_FLAGS = frozenset({"avx2", "fma"})


def choose_arithmetic(
    settings: RunSettings, device: str, flags: Collection[str], variables: Collection[str] = ()
) -> tuple[str, str]:
    """(native, avx2 or compatible; why, in words) for one host of a run.

    `device` is the plan's kind, `flags` are the processor's (empty: not an x86 one), `variables`
    those of the environment that choose instructions by themselves. ConfigError: what is asked for
    is not there.
    """
    has_avx2 = AVX2_FLAGS.issubset(flags)
    if settings.arithmetic in PORTABLE_ARITHMETICS and not (device == "cpu" and has_avx2):
        raise ConfigError(
            f"run.arithmetic={settings.arithmetic} is for x86 processors that have AVX2",
            values={"run.arithmetic": settings.arithmetic, "device": device, "AVX2": has_avx2},
            fix="run.arithmetic=native" + (", or launch.device=cpu" if has_avx2 else ""),
        )
    if settings.arithmetic != "auto":
        return settings.arithmetic, "as asked"
    if not settings.exact or settings.precision != "fp32":
        return "native", "processors agree in exact fp32 runs alone"
    if device != "cpu" or not has_avx2:
        return "native", f"{device} without AVX2" if device == "cpu" else f"devices are {device}"
    if variables:
        return "native", "the environment has its own " + ", ".join(sorted(variables))
    if any(flag.startswith(("avx512", "amx")) for flag in flags):
        return "native", "this processor has wider instructions than AVX2"
    return "avx2", "this processor has nothing wider"
