"""Refuses settings that cannot be obeyed, alone or together, before anything is started or written.
What needs the data or the devices is checked by `data/prepare.py` and `planner/plan.py`."""

from __future__ import annotations

import math
from difflib import get_close_matches

from cordee.config.load import RANGES, flatten
from cordee.config.model import InitialSettings, ModelSettings
from cordee.config.run import FAULT_POINTS, Run
from cordee.errors import ConfigError

DEFAULT_MINUTES = 1.5
"""Length of a run for which no limit is given."""

MAX_PROCESSES_PER_CORE = 8
"""More CPU ranks than this per core is a mistake, not a test."""


def validate_run(run: Run) -> None:
    """Raises ConfigError for the first value or combination that cannot be obeyed."""
    _check_texts(run)
    check_ranges(run)
    _check_hub_model(run)
    _check_model(run)
    _check_moe(run)
    _check_run(run)
    _check_fault(run)


def check_ranges(run: Run) -> None:
    """ConfigError for the first number out of its range."""
    defaults = flatten(Run())
    for key, value in flatten(run).items():
        if key in RANGES and not isinstance(value, str) and value not in RANGES[key]:
            default = 1 if isinstance(defaults[key], str) else defaults[key]
            raise ConfigError(
                f"{key} is {RANGES[key]}",
                values={key: value},
                fix=f"{key}={RANGES[key].nearest(value, default)}",
            )


def _check_texts(run: Run) -> None:
    """Refuses what run.toml or a file's name cannot hold: NUL, and bytes that are no UTF-8, which
    Python reads as lone surrogates."""
    for key, value in flatten(run).items():
        if isinstance(value, str) and any(
            "\ud800" <= character <= "\udfff" or character == "\0" for character in value
        ):
            raise ConfigError(
                f"{key} is no text: it holds a NUL or bytes that are not UTF-8",
                values={key: value},
                fix=f"{key} in UTF-8; a file may be renamed, or have a link with such a name",
            )


def check_processes(processes: int, cores: int) -> None:
    """Refuses a number of CPU processes that makes no sense on `cores` cores."""
    max_processes = MAX_PROCESSES_PER_CORE * cores
    if processes > max_processes:
        raise ConfigError(
            "more processes than make sense on this machine",
            values={"launch.processes": processes, "cores": cores, "most": max_processes},
            fix=f"launch.processes={cores}",
        )


def _check_model(run: Run) -> None:
    width, heads = run.model.width, run.model.heads
    if run.model.head_width % 2:
        raise ConfigError(
            "model.head_width is even (rotary positions turn pairs)",
            values={"model.head_width": run.model.head_width},
            fix=f"model.head_width={run.model.head_width + 1}",
        )
    if not run.model.head_width and (width % heads or (width // heads) % 2):
        nearest = max(1, round(width / (2 * heads))) * 2 * heads
        raise ConfigError(
            "model.width must be an even multiple of model.heads",
            values={"model.width": width, "model.heads": heads},
            fix=f"model.width={nearest}, or a model.head_width of its own",
        )
    if run.model.kv_heads and heads % run.model.kv_heads:
        divisors = [n for n in range(1, heads + 1) if heads % n == 0]
        nearest = min(divisors, key=lambda n: abs(n - run.model.kv_heads))
        raise ConfigError(
            "model.kv_heads must divide model.heads",
            values={"model.kv_heads": run.model.kv_heads, "model.heads": heads},
            fix=f"model.kv_heads={nearest}",
        )
    if run.model.qk_gain and not run.model.qk_norm:
        raise ConfigError(
            "model.qk_gain is the gain of model.qk_norm, which is off",
            values={"model.qk_gain": True, "model.qk_norm": False},
            fix="model.qk_norm=true",
        )


def _check_moe(run: Run) -> None:
    moe = run.model.moe
    if not moe.experts:
        return
    if moe.active > moe.experts:
        raise ConfigError(
            "a token cannot use more experts than there are",
            values={"model.moe.active": moe.active, "model.moe.experts": moe.experts},
            fix=f"model.moe.active={moe.experts}",
        )
    if moe.dense_layers >= run.model.layers:
        raise ConfigError(
            "no block is left for the experts",
            values={"model.moe.dense_layers": moe.dense_layers, "model.layers": run.model.layers},
            fix=f"model.moe.dense_layers={run.model.layers - 1}, or model.moe.experts=0",
        )


def _check_hub_model(run: Run) -> None:
    """What a model or weights of transformers' cannot obey."""
    if run.initial.weights and run.model.hub:
        raise ConfigError(
            "initial.weights starts the house's transformer",
            values={"initial.weights": run.initial.weights, "model.hub": run.model.hub},
            fix="initial.weights= (empty); model.hub starts from its folder's own weights",
        )
    if not run.model.hub:
        return
    fields, defaults = vars(run.model), vars(ModelSettings(hub=run.model.hub))
    if foreign_keys := {f"model.{k}": v for k, v in fields.items() if v != defaults[k]}:
        raise ConfigError(
            "the folder's config.json says what the model is; other model keys would not act",
            values={"model.hub": run.model.hub, **foreign_keys},
            fix=f"leave {next(iter(foreign_keys))} out",
        )
    if run.run.precision == "fp8":
        raise ConfigError(
            "fp8 is for the blocks of the house's own models",
            values={"model.hub": run.model.hub, "run.precision": "fp8"},
            fix="run.precision=bf16",
        )
    for axis in ("pipeline", "context", "expert"):
        if (degree := getattr(run.layout, axis)) not in (1, "auto"):
            raise ConfigError(
                f"a model of transformers is not cut by {axis}",
                values={"model.hub": run.model.hub, f"layout.{axis}": degree},
                fix=f"layout.{axis}=1; layout.shard and layout.tensor cut it",
            )
    if run.initial != InitialSettings():
        raise ConfigError(
            "a model of transformers starts from its files or by its own rules",
            values={"model.hub": run.model.hub},
            fix="leave initial.* out",
        )


def _check_run(run: Run) -> None:
    if run.run.arithmetic in ("avx2", "compatible") and run.run.precision != "fp32":
        raise ConfigError(
            "processors agree on the last bits of fp32 alone",
            values={"run.arithmetic": run.run.arithmetic, "run.precision": run.run.precision},
            fix="run.precision=fp32, or run.arithmetic=native",
        )
    if run.run.precision == "fp8":
        _check_fp8(run)
    if run.run.loss_scale:
        _check_loss_scale(run)
    if run.sync.every != 1:
        raise ConfigError(
            "this version agrees every step",
            values={"sync.every": run.sync.every},
            fix="sync.every=1",
        )
    if run.layout.schedule == "interleaved" and run.layout.chunks < 2:
        raise ConfigError(
            "interleaved gives a rank two stages or more",
            values={"layout.schedule": "interleaved", "layout.chunks": run.layout.chunks},
            fix="layout.chunks=2, or layout.schedule=1f1b",
        )
    if run.run.exact:
        _check_exact(run)


def _check_exact(run: Run) -> None:
    if run.run.minutes and not (run.run.steps or run.run.tokens or run.run.epochs):
        raise ConfigError(
            "run.exact cannot follow a clock",
            values={"run.exact": True, "run.minutes": run.run.minutes},
            fix="run.steps=500",
        )
    if run.run.minutes:
        raise ConfigError(
            "run.exact cannot follow a clock: the schedule would depend on the machine's speed",
            values={"run.exact": True, "run.minutes": run.run.minutes},
            fix="run.minutes=0",
        )
    if run.sync.protocol == "allreduce":
        raise ConfigError(
            "the fused all-reduce adds in an order that depends on the number of islands",
            values={"run.exact": True, "sync.protocol": "allreduce"},
            fix="sync.protocol=exchange",
        )
    if run.sync.codec != "identity":
        raise ConfigError(
            "a rounding codec rounds sums that depend on the number of islands",
            values={"run.exact": True, "sync.codec": run.sync.codec},
            fix="sync.codec=identity",
        )


def _check_loss_scale(run: Run) -> None:
    scale, precision = run.run.loss_scale, run.run.precision
    values = {"run.loss_scale": scale, "run.precision": precision}
    if precision != "fp16":
        raise ConfigError(
            f"{precision} has the range of fp32 and needs no loss scaling"
            if precision != "fp8" else "fp8 products have scales of their own",
            values=values,
            fix="run.loss_scale=0, or run.precision=fp16",
        )  # fmt: skip
    powers = [2**exponent for exponent in range(25)]
    if scale not in powers:
        nearest_scale = min(powers, key=lambda power: abs(power - scale))
        raise ConfigError(
            "a loss scale is a power of two from 1 to 2^24: dividing by others rounds",
            values=values,
            fix=f"run.loss_scale={nearest_scale}",
        )


def _check_fp8(run: Run) -> None:
    """Every dim of an fp8 product, forward and backward, is a multiple of 16 (the library's)."""
    model, rows = run.model, run.batch.microbatch
    width_step, sequence_step = math.lcm(16, 2 * model.heads), 16 // math.gcd(16, rows)
    nearest_sequence = _nearest_multiple(run.data.sequence, sequence_step)
    dims = {
        "model.width": (model.width, _nearest_multiple(model.width, width_step)),
        "model.head_width": (model.query_width, _nearest_multiple(model.width_per_head, 16)),
        "model.kv_heads": (model.kv_width, model.heads),
        "model.ffn": (model.hidden_width, _nearest_multiple(model.hidden_width, 16)),
        "data.sequence": (rows * run.data.sequence, nearest_sequence),
    }
    for key, (dim, nearest) in dims.items():
        if dim % 16:
            raise ConfigError(
                "fp8 products need dims that are multiples of 16, the tokens of a microbatch too",
                values={"run.precision": "fp8", f"dim of {key}": dim},
                fix=f"{key}={nearest}",
            )


def check_threads(run: Run, cores: int) -> None:
    """Refuses threads of a rank, or spare processes, that make no sense on `cores` cores."""
    max_threads = MAX_PROCESSES_PER_CORE * cores
    counts = {"launch.threads": run.launch.threads, "fault.spares": run.fault.spares}
    for key, count in counts.items():
        if count != "auto" and int(count) > max_threads:
            raise ConfigError(
                f"{key} is more than makes sense on this machine",
                values={key: count, "cores": cores, "most": max_threads},
                fix=f"{key}={cores}",
            )


def _nearest_multiple(value: int, step: int) -> int:
    return max(1, round(value / step)) * step


def _check_fault(run: Run) -> None:
    for key, entries in (("kill", run.fault.kill_specs), ("crash", [run.fault.crash])):
        for point, _, suffix in (entry.partition(":") for entry in entries if entry):
            is_hang = key == "kill" and point.startswith("!")
            if point[is_hang:] not in FAULT_POINTS or not _is_fault_spec(suffix):
                nearest = (get_close_matches(point, FAULT_POINTS, 1, 0.0) or FAULT_POINTS)[0]
                value, points = getattr(run.fault, key), " ".join(FAULT_POINTS)
                raise ConfigError(
                    f"fault.{key} is written point:step:rank",
                    values={f"fault.{key}": value, "points": points},
                    fix=f"fault.{key}={nearest}:12:0",
                )
    if run.fault.poison and not _is_fault_spec(run.fault.poison.replace("-", ":", 1), 3):
        raise ConfigError(
            "poison is written step:rank or step-step:rank",
            values={"fault.poison": run.fault.poison},
            fix="fault.poison=12:0",
        )


def _is_fault_spec(text: str, max_parts: int = 2) -> bool:
    parts = text.split(":")
    return 2 <= len(parts) <= max_parts and all(
        part.isdecimal() and len(part) < 19 for part in parts
    )
