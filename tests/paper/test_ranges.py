"""Numbers: every key's range, typing slips, and numbers too long for anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cordee.cli.main import main
from cordee.config.load import RANGES, config_keys, convert, flatten, load, override
from cordee.config.run import Run
from cordee.errors import ConfigError
from cordee.launcher.prepare import resolve_config

ZERO_KEYS = frozenset((
    "run.seed", "run.steps", "run.tokens", "run.epochs", "run.minutes", "run.loss_scale",
    "model.vocabulary", "model.kv_heads", "model.head_width", "model.window", "model.ffn",
    "model.dropout", "model.logit_cap", "model.moe.experts", "model.moe.width", "model.moe.shared",
    "model.moe.dense_layers", "model.moe.balance_rate", "model.moe.capacity", "data.held_out",
    "data.tokens", "data.prefetch", "memory.loss_chunk", "optim.adam_lr", "optim.weight_decay",
    "optim.momentum", "optim.beta1", "optim.beta2", "optim.warmup", "optim.decay", "optim.final",
    "clip.matrices.value", "clip.matrices.norm", "clip.embeddings.value", "clip.embeddings.norm",
    "clip.vectors.value", "clip.vectors.norm", "checkpoint.every", "evaluate.every",
    "evaluate.tokens", "evaluate.sample", "evaluate.layers_every", "fault.spares",
    "fault.copy_every", "fault.host_silence_s",
))  # fmt: skip
"""Keys for which 0 has a meaning: off, no limit, the usual, nothing; or is one of many values."""

NONSENSE_VALUES = (-1, -0.5, -1e-9, 10**20, 1e30, 1e300, 1e-40, 5e-324)
"""Below every range, above every range, or nothing in fp32."""

NUMBER_KEYS = [
    key
    for key, kind in config_keys().items()
    if {int, float} & {kind, *getattr(kind, "__args__", ())}
]
"""Keys whose type is a number, or one among others."""


def test_every_number_has_a_range() -> None:
    assert set(NUMBER_KEYS) == set(RANGES)


def test_defaults_are_in_their_ranges() -> None:
    for key, value in flatten(Run()).items():
        assert key not in RANGES or value == "auto" or value in RANGES[key], key


@pytest.mark.parametrize("key", RANGES)
def test_nonsense_is_refused(key: str) -> None:
    """On the command line, and in a `Run` that a caller made in Python."""
    for value in NONSENSE_VALUES:
        with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
            resolve_config(load(None, [f"{key}={value!r}"]).run)
        with pytest.raises(ConfigError):
            resolve_config(override(Run(), {key: value}))


@pytest.mark.parametrize("key", RANGES)
def test_no_numbers(key: str) -> None:
    for text in ("nan", "inf", "-inf", "1e400", "9" * 400, "9" * 9000, "²", ""):
        with pytest.raises(ConfigError) as exc_info:
            resolve_config(load(None, [f"{key}={text}"]).run)
        assert exc_info.value.exit_code == 2 and len(str(exc_info.value)) < 4000
    for value in (float("nan"), float("inf")):
        with pytest.raises(ConfigError):
            resolve_config(override(Run(), {key: value}))


@pytest.mark.parametrize("key", RANGES)
def test_zero_has_a_meaning_or_is_refused(key: str) -> None:
    assert (0 in RANGES[key]) == (key in ZERO_KEYS)


def test_fix_is_in_the_range() -> None:
    for key, key_range in RANGES.items():
        for bad_value in (-1.0, 0.0, 1e30):
            default: Any = flatten(Run())[key]
            assert (
                key_range.nearest(bad_value, 1 if isinstance(default, str) else default)
                in key_range
            ), key


BAD_OVERRIDES = (
    "clip.limit=0", "clip.matrices.value=-1", "initial.embedding_std=-1", "optim.final=-1",
    "launch.threads=1000000", "launch.threads=1000", "fault.spares=50000", "model.vocabulary=-5",
    "layout.islands=0", "layout.shard=-2", "data.prefetch=2", "batch.microbatches=100000000000",
    "optim.eps=0", "optim.lr=0", "model.rope_base=0", "launch.timeout_s=1e12",
    "fault.kill=step.start:²:0", "fault.poison=12:" + "1" * 5000,
)  # fmt: skip


@pytest.mark.parametrize("setting", BAD_OVERRIDES)
def test_slips_are_refused_before_anything_is_written(
    setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", setting, f"run.dir={tmp_path / 'run'}", "launch.processes=1"]) == 2
    assert "nearest fix" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


BAD_TABLES = {
    "digits": "[optim]\nlr = 1" + "0" * 400,
    "more digits than Python reads": "[run]\nsteps = 1" + "0" * 5000,
    "hexadecimal digits": "[run]\nsteps = 0x" + "f" * 5000,
    "of a choice": "[layout]\nzero = 0x" + "f" * 5000,
    "infinite": "[optim]\nlr = inf",
    "not a number": "[optim]\nlr = nan",
    "deep": "[run]\nname = " + "[" * 5000 + "]" * 5000,
    "a fraction": "[run]\nsteps = 2.5",
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_numbers_of_a_file(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.toml").write_text(BAD_TABLES[name])
    for arguments in (["show"], ["explain", "optim"]):
        assert main(["config", *arguments, str(tmp_path / "run.toml")]) == 2, arguments
    assert "Traceback" not in capsys.readouterr().err


def test_recipes_are_in_the_ranges() -> None:
    recipes = sorted((Path(__file__).parents[2] / "recipes").rglob("*.toml"))
    recipe_count = 0
    for path in recipes:
        try:
            run = load(str(path)).run
        except ConfigError:  # a cluster's
            continue
        resolve_config(run)
        recipe_count += 1
    assert recipe_count


BAD_COMMANDS = (
    "sample RUN --temperature nan", "sample RUN --temperature inf", "sample RUN --temperature -1",
    "sample RUN --tokens 0", f"sample RUN --tokens {10**30}", f"sample RUN --seed {10**30}",
    "export RUN --to hf --shard-mb nan", "export RUN --to hf --shard-mb inf",
    "export RUN --shard-mb 0", "data prepare a b --held-out nan", "data prepare a b --held-out 1",
    "data prepare a b --seed -1", f"data prepare a b --tokens {10**30}", "lr --steps -5",
    f"lr --seeds {10**30}",
)  # fmt: skip


@pytest.mark.parametrize("command", BAD_COMMANDS)
def test_flags(
    command: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "RUN").mkdir()
    (tmp_path / "RUN" / "run.toml").write_text("")
    assert main(command.split()) == 2
    stderr = capsys.readouterr().err
    assert "nearest fix: --" in stderr and "nan" not in stderr.partition("fix")[2]
    assert [path.name for path in tmp_path.iterdir()] == ["RUN"]


def test_integers_stay_integers() -> None:
    assert convert("run.seed", str(2**63 - 1), int) == 2**63 - 1
    for value in (2**64, -(2**64), "1" * 30):
        with pytest.raises(ConfigError):
            convert("run.seed", value, int)
