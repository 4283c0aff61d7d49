"""run.arithmetic on paper: what `auto` becomes, what is refused, what a run's file records."""

from __future__ import annotations

from pathlib import Path

import pytest

from cordee.begin import look, settle, settle_arithmetic
from cordee.config.check import check
from cordee.config.load import RUN_FILE, dump, load, recorded
from cordee.config.run import Run
from cordee.dist.start import VARIABLES, arithmetic_environment, chosen_variables, take_arithmetic
from cordee.errors import ConfigError
from cordee.fault.handshake import differences
from cordee.plan.arithmetic import FIXED, choose_arithmetic
from cordee.rendezvous import greeting, measure

AVX2 = ("sse4_2", "avx", "avx2", "fma")
WIDE = (*AVX2, "avx512f", "amx_bf16")
EXACT = ("run.exact=true", "run.precision=fp32", "run.steps=9")


def settings(*words: str) -> Run:
    return load(None, [*EXACT, *words]).run


@pytest.mark.parametrize(
    "words, device, flags, variables, chosen",
    [
        ((), "cpu", AVX2, (), "avx2"),
        ((), "cpu", WIDE, (), "native"),
        ((), "cpu", (), (), "native"),
        ((), "cpu", ("sse4_2", "avx"), (), "native"),
        ((), "cuda", AVX2, (), "native"),
        ((), "cpu", AVX2, ("MKL_CBWR",), "native"),
        (("run.precision=bf16",), "cpu", AVX2, (), "native"),
        (("run.exact=false",), "cpu", AVX2, (), "native"),
        (("run.arithmetic=native",), "cpu", AVX2, (), "native"),
        (("run.arithmetic=avx2",), "cpu", WIDE, ("MKL_CBWR",), "avx2"),
        (("run.arithmetic=compatible",), "cpu", AVX2, (), "compatible"),
    ],
)
def test_auto_takes_avx2_where_nothing_is_lost(
    words: tuple[str, ...], device: str, flags: tuple[str, ...], variables: tuple[str, ...],
    chosen: str,
) -> None:  # fmt: skip
    found, why = choose_arithmetic(settings(*words).run, device, flags, variables)
    assert found == chosen
    assert why


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("device, flags", [("cuda", AVX2), ("cpu", ()), ("cpu", ("sse4_2",))])
def test_what_a_device_cannot_is_refused(name: str, device: str, flags: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="AVX2") as refused:
        choose_arithmetic(settings(f"run.arithmetic={name}").run, device, flags)
    assert "run.arithmetic=native" in refused.value.sentence()


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_unlike_processors_agree_in_fp32_alone(name: str, precision: str) -> None:
    check(settings(f"run.arithmetic={name}"))
    with pytest.raises(ConfigError, match="fp32"):
        check(settings(f"run.arithmetic={name}", f"run.precision={precision}"))


def test_a_run_goes_on_with_the_arithmetic_that_its_file_has(tmp_path: Path) -> None:
    run = settle(settings(f"run.dir={tmp_path}"))
    for name in ("native", *FIXED):
        there = settings(f"run.dir={tmp_path}", f"run.arithmetic={name}")
        (tmp_path / RUN_FILE).write_text(dump(settle(there), {"arithmetic": "0123"}))
        look(run)
        settled, why = settle_arithmetic(run, "cpu", False)
        assert settled.run.arithmetic == name
        assert "began" in why
        other = "compatible" if name == "native" else "native"
        with pytest.raises(ConfigError, match="another run"):
            look(settle(settings(f"run.dir={tmp_path}", f"run.arithmetic={other}")))


def test_a_run_of_before_is_native(tmp_path: Path) -> None:
    lines = dump(settle(settings(f"run.dir={tmp_path}"))).splitlines()
    old = [line for line in lines if not line.startswith("arithmetic")]
    (tmp_path / RUN_FILE).write_text("\n".join(old))
    for words in ((), ("run.arithmetic=native",)):
        run = settle(settings(f"run.dir={tmp_path}", *words))
        look(run)
        assert settle_arithmetic(run, "cpu", False)[0].run.arithmetic == "native"
    with pytest.raises(ConfigError, match="another run"):
        look(settle(settings(f"run.dir={tmp_path}", "run.arithmetic=compatible")))


def test_what_is_recorded_is_no_setting(tmp_path: Path) -> None:
    run, told = settings(), {"arithmetic": "0123456789abcdef", "torch": "2.13.0+cpu"}
    file = tmp_path / RUN_FILE
    file.write_text(dump(run, told))
    assert recorded(file) == told
    assert load(str(file)).run == run
    file.write_text(dump(run))
    assert recorded(file) == {}


def test_the_environment_of_an_arithmetic_ends_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES["avx2"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MKL_CBWR", "AUTO")
    for arithmetic, values in VARIABLES.items():
        with arithmetic_environment(arithmetic):
            assert chosen_variables() == values
        assert chosen_variables() == {"MKL_CBWR": "AUTO"}
    with arithmetic_environment("native"):
        assert chosen_variables() == {"MKL_CBWR": "AUTO"}


def test_once_torch_is_imported_only_the_same_environment_will_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("torch")
    for name, value in VARIABLES["compatible"].items():
        monkeypatch.setenv(name, value)
    take_arithmetic("compatible")
    take_arithmetic("native")
    with pytest.raises(ConfigError, match="imported") as refused:
        take_arithmetic("avx2")
    assert "MKL_CBWR=AVX2,STRICT" in refused.value.sentence()
    assert chosen_variables() == VARIABLES["compatible"]


def test_hosts_that_compute_other_bits_differ_where_bits_count(tmp_path: Path) -> None:
    words = [f"run.dir={tmp_path}"]
    for promise in ("run.exact=true", "data.placement=replicate"):
        run = load(None, [*words, promise, "run.precision=fp32"]).run
        rows = differences(*(greeting(run, "data", "1", "cpu", bits) for bits in ("ab", "cd")))
        assert [row[1:] for row in rows] == [("ab", "cd")]
        assert "run.arithmetic=compatible" in rows[0][0]
    run = settings("run.arithmetic=compatible", *words)
    rows = differences(*(greeting(run, "data", "1", "cpu", bits) for bits in ("ab", "cd")))
    assert "no setting" in rows[0][0]


def test_hosts_compare_the_library_of_a_model_where_bits_count(tmp_path: Path) -> None:
    words = [f"run.dir={tmp_path}", f"model.hub={tmp_path}"]
    exact, free = (load(None, [*words, f"run.exact={on}"]).run for on in ("true", "false"))
    assert greeting(exact, "data", "1", "cpu")["transformers"]
    assert greeting(free, "data", "1", "cpu")["transformers"] is None
    assert greeting(settings(*words[:1]), "data", "1", "cpu")["transformers"] is None


def test_a_host_measures_once_for_each_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def measured(run: Run, device: str) -> tuple[str, bool]:
        calls.append(device)
        return f"bits {len(calls)}", device == "cpu"

    monkeypatch.setattr("cordee.rendezvous._measured", measured)
    run = settings(f"run.dir={tmp_path}")
    assert [measure(run, "cpu") for _ in range(2)] == ["bits 1", "bits 1"]
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    assert [measure(run, "cpu") for _ in range(2)] == ["bits 2", "bits 2"]
    assert [measure(run, "cuda") for _ in range(2)] == ["bits 3", "bits 4"]
