"""run.arithmetic on paper: what `auto` becomes, what is refused, what a run's file records."""

from __future__ import annotations

from pathlib import Path

import pytest

from cordee.config.load import RUN_FILE, dump, load, recorded_settings
from cordee.config.run import Run
from cordee.config.validate import validate_run
from cordee.dist.process_group import (
    ARITHMETIC_VARIABLES,
    arithmetic_environment,
    present_cpu_variables,
    set_arithmetic,
)
from cordee.elastic.handshake import differences
from cordee.errors import ConfigError
from cordee.launcher.prepare import inspect_run_dir, resolve_arithmetic, resolve_config
from cordee.launcher.rendezvous import measure_arithmetic, run_identity
from cordee.planner.cluster import PORTABLE_ARITHMETICS, choose_arithmetic

AVX2_FLAGS = ("sse4_2", "avx", "avx2", "fma")
AVX512_FLAGS = (*AVX2_FLAGS, "avx512f", "amx_bf16")
EXACT_RUN = ("run.exact=true", "run.precision=fp32", "run.steps=9")


def run_of(*overrides: str) -> Run:
    return load(None, [*EXACT_RUN, *overrides]).run


@pytest.mark.parametrize(
    "overrides, device, flags, variables, expected",
    [
        ((), "cpu", AVX2_FLAGS, (), "avx2"),
        ((), "cpu", AVX512_FLAGS, (), "native"),
        ((), "cpu", (), (), "native"),
        ((), "cpu", ("sse4_2", "avx"), (), "native"),
        ((), "cuda", AVX2_FLAGS, (), "native"),
        ((), "cpu", AVX2_FLAGS, ("MKL_CBWR",), "native"),
        (("run.precision=bf16",), "cpu", AVX2_FLAGS, (), "native"),
        (("run.exact=false",), "cpu", AVX2_FLAGS, (), "native"),
        (("run.arithmetic=native",), "cpu", AVX2_FLAGS, (), "native"),
        (("run.arithmetic=avx2",), "cpu", AVX512_FLAGS, ("MKL_CBWR",), "avx2"),
        (("run.arithmetic=compatible",), "cpu", AVX2_FLAGS, (), "compatible"),
    ],
)
def test_auto_takes_avx2_where_nothing_is_lost(
    overrides: tuple[str, ...], device: str, flags: tuple[str, ...], variables: tuple[str, ...],
    expected: str,
) -> None:  # fmt: skip
    arithmetic, reason = choose_arithmetic(run_of(*overrides).run, device, flags, variables)
    assert arithmetic == expected
    assert reason


@pytest.mark.parametrize("name", PORTABLE_ARITHMETICS)
@pytest.mark.parametrize("device, flags", [("cuda", AVX2_FLAGS), ("cpu", ()), ("cpu", ("sse4_2",))])
def test_what_a_device_cannot_is_refused(name: str, device: str, flags: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="AVX2") as exc_info:
        choose_arithmetic(run_of(f"run.arithmetic={name}").run, device, flags)
    assert "run.arithmetic=native" in exc_info.value.sentence()


@pytest.mark.parametrize("name", PORTABLE_ARITHMETICS)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_unlike_processors_agree_in_fp32_alone(name: str, precision: str) -> None:
    validate_run(run_of(f"run.arithmetic={name}"))
    with pytest.raises(ConfigError, match="fp32"):
        validate_run(run_of(f"run.arithmetic={name}", f"run.precision={precision}"))


def test_a_run_goes_on_with_the_arithmetic_that_its_file_has(tmp_path: Path) -> None:
    run = resolve_config(run_of(f"run.dir={tmp_path}"))
    for name in ("native", *PORTABLE_ARITHMETICS):
        recorded_run = run_of(f"run.dir={tmp_path}", f"run.arithmetic={name}")
        (tmp_path / RUN_FILE).write_text(dump(resolve_config(recorded_run), {"arithmetic": "0123"}))
        inspect_run_dir(run)
        resolved_run, reason = resolve_arithmetic(run, "cpu", False)
        assert resolved_run.run.arithmetic == name
        assert "began" in reason
        other_name = "compatible" if name == "native" else "native"
        with pytest.raises(ConfigError, match="another run"):
            inspect_run_dir(
                resolve_config(run_of(f"run.dir={tmp_path}", f"run.arithmetic={other_name}"))
            )


def test_a_run_of_before_is_native(tmp_path: Path) -> None:
    lines = dump(resolve_config(run_of(f"run.dir={tmp_path}"))).splitlines()
    old_lines = [line for line in lines if not line.startswith("arithmetic")]
    (tmp_path / RUN_FILE).write_text("\n".join(old_lines))
    for overrides in ((), ("run.arithmetic=native",)):
        run = resolve_config(run_of(f"run.dir={tmp_path}", *overrides))
        inspect_run_dir(run)
        assert resolve_arithmetic(run, "cpu", False)[0].run.arithmetic == "native"
    with pytest.raises(ConfigError, match="another run"):
        inspect_run_dir(resolve_config(run_of(f"run.dir={tmp_path}", "run.arithmetic=compatible")))


def test_what_is_recorded_is_no_setting(tmp_path: Path) -> None:
    run, facts = run_of(), {"arithmetic": "0123456789abcdef", "torch": "2.13.0+cpu"}
    run_file = tmp_path / RUN_FILE
    run_file.write_text(dump(run, facts))
    assert recorded_settings(run_file) == facts
    assert load(str(run_file)).run == run
    run_file.write_text(dump(run))
    assert recorded_settings(run_file) == {}


def test_the_environment_of_an_arithmetic_ends_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ARITHMETIC_VARIABLES["avx2"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MKL_CBWR", "AUTO")
    for arithmetic, values in ARITHMETIC_VARIABLES.items():
        with arithmetic_environment(arithmetic):
            assert present_cpu_variables() == values
        assert present_cpu_variables() == {"MKL_CBWR": "AUTO"}
    with arithmetic_environment("native"):
        assert present_cpu_variables() == {"MKL_CBWR": "AUTO"}


def test_once_torch_is_imported_only_the_same_environment_will_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("torch")
    for name, value in ARITHMETIC_VARIABLES["compatible"].items():
        monkeypatch.setenv(name, value)
    set_arithmetic("compatible")
    set_arithmetic("native")
    with pytest.raises(ConfigError, match="imported") as exc_info:
        set_arithmetic("avx2")
    assert "MKL_CBWR=AVX2,STRICT" in exc_info.value.sentence()
    assert present_cpu_variables() == ARITHMETIC_VARIABLES["compatible"]


def test_hosts_that_compute_other_bits_differ_where_bits_count(tmp_path: Path) -> None:
    overrides = [f"run.dir={tmp_path}"]
    for promise_override in ("run.exact=true", "data.placement=replicate"):
        run = load(None, [*overrides, promise_override, "run.precision=fp32"]).run
        rows = differences(
            *(run_identity(run, "data", "1", "cpu", digest) for digest in ("ab", "cd"))
        )
        assert [row[1:] for row in rows] == [("ab", "cd")]
        assert "run.arithmetic=compatible" in rows[0][0]
    run = run_of("run.arithmetic=compatible", *overrides)
    rows = differences(*(run_identity(run, "data", "1", "cpu", digest) for digest in ("ab", "cd")))
    assert "no setting" in rows[0][0]


def test_hosts_compare_the_library_of_a_model_where_bits_count(tmp_path: Path) -> None:
    overrides = [f"run.dir={tmp_path}", f"model.hub={tmp_path}"]
    exact_run, inexact_run = (
        load(None, [*overrides, f"run.exact={value}"]).run for value in ("true", "false")
    )
    assert run_identity(exact_run, "data", "1", "cpu")["transformers"]
    assert run_identity(inexact_run, "data", "1", "cpu")["transformers"] is None
    assert run_identity(run_of(*overrides[:1]), "data", "1", "cpu")["transformers"] is None


def test_a_host_measures_once_for_each_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured_devices: list[str] = []

    def fake_measure(run: Run, device: str) -> tuple[str, bool]:
        measured_devices.append(device)
        return f"bits {len(measured_devices)}", device == "cpu"

    monkeypatch.setattr("cordee.launcher.rendezvous._run_measurement", fake_measure)
    run = run_of(f"run.dir={tmp_path}")
    assert [measure_arithmetic(run, "cpu") for _ in range(2)] == ["bits 1", "bits 1"]
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    assert [measure_arithmetic(run, "cpu") for _ in range(2)] == ["bits 2", "bits 2"]
    assert [measure_arithmetic(run, "cuda") for _ in range(2)] == ["bits 3", "bits 4"]
