"""Which of the instructions that a CPU has an exact run uses: `run.arithmetic=auto` resolved.

Paper. Not here: how they are chosen in a process (`dist/start.py`), and what they give
(`model/arithmetic.py`). Traded away: a measurement; nothing is lost by AVX2 where a processor has
nothing wider, and everything else is asked for.
"""

from __future__ import annotations

from collections.abc import Collection

from cordee.config.run import RunSettings
from cordee.errors import ConfigError

FIXED = ("avx2", "compatible")
"""Values of run.arithmetic that make unlike processors take the same code."""

NEEDS = frozenset({"avx2", "fma"})


def choose_arithmetic(
    asked: RunSettings, device: str, flags: Collection[str], variables: Collection[str] = ()
) -> tuple[str, str]:
    """(native, avx2 or compatible; why, in words) for one host of a run.

    `device` is the plan's kind, `flags` are the processor's (empty: not an x86 one), `variables`
    those of the environment that choose instructions by themselves. ConfigError: what is asked for
    is not there.
    """
    able = NEEDS.issubset(flags)
    if asked.arithmetic in FIXED and not (device == "cpu" and able):
        raise ConfigError(
            f"run.arithmetic={asked.arithmetic} is for x86 processors that have AVX2",
            values={"run.arithmetic": asked.arithmetic, "device": device, "AVX2": able},
            fix="run.arithmetic=native" + (", or launch.device=cpu" if able else ""),
        )
    if asked.arithmetic != "auto":
        return asked.arithmetic, "as asked"
    if not asked.exact or asked.precision != "fp32":
        return "native", "processors agree in exact fp32 runs alone"
    if device != "cpu" or not able:
        return "native", f"{device} without AVX2" if device == "cpu" else f"devices are {device}"
    if variables:
        return "native", "the environment has its own " + ", ".join(sorted(variables))
    if any(flag.startswith(("avx512", "amx")) for flag in flags):
        return "native", "this processor has wider instructions than AVX2"
    return "avx2", "this processor has nothing wider"
