"""The machine profile: what is kept, what is refused, and what plans make of it."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from cordee.cli.main import main
from cordee.config.load import dump, load
from cordee.config.run import Run
from cordee.dist.process_group import RankProcess
from cordee.launcher.local_cluster import measure_cluster
from cordee.launcher.prepare import apply_recorded_settings, resolve_config
from cordee.launcher.run_ranks import launch
from cordee.layout.axes import Layout
from cordee.layout.counts import count_model_tensors
from cordee.planner.cluster import (
    Cluster,
    fastest_precision,
    gpu_cluster,
    local_cluster,
    precision_text,
    with_precision,
)
from cordee.planner.compute_cost import interval_factors, muon_precision, update_s
from cordee.planner.plan import Plan, make_plan
from cordee.planner.profile import (
    Profile,
    control_groups,
    cpu_quota,
    group_quota,
    local_host,
    profile_path,
    read_profile,
    usable_cores,
    write_profile,
)
from cordee.training.worker import broadcast_config


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cordee"


def profile_of(
    fp32: float = 50e9, bf16: float = 2e9, fp16: float = 2e9, **values: object
) -> Profile:
    profile = Profile(
        host=local_host(), threads=(1, 2), passes=(30e9, 50e9), memory=(20e9, 25e9),
        regions=(5e-6, 4e-6),
        products={"fp32": (fp32, 1.8 * fp32), "bf16": (bf16, bf16), "fp16": (fp16, fp16)},
        operator_s=6e-6, message_s=50e-6, reduce_s=100e-6, reduce_bytes_per_s=1.5e9,
        device_products={}, spread=0.05, seconds=1.2,
    )  # fmt: skip
    return replace(profile, **values)  # type: ignore[arg-type]


def cluster_of(profile: Profile) -> Cluster:
    return local_cluster(profile)


def run_of(*overrides: str) -> Run:
    return load(None, overrides).run


def test_a_profile_is_kept_for_its_host() -> None:
    assert read_profile(local_host()) == (None, "")
    profile = profile_of()
    assert write_profile(profile) == ""
    assert read_profile(local_host()) == (profile, "")
    other_host = replace(local_host(), torch="0.0")
    assert read_profile(other_host) == (None, "")
    assert [p.name for p in profile_path(local_host()).parent.iterdir()] == [
        profile_path(local_host()).name
    ]


PROFILE_FIELDS = json.loads(profile_of().to_json())
BAD_PROFILES = {
    "empty": "",
    "not JSON": "{",
    "deep": "[" * 100_000,
    "digits": "1" * 10_000,
    "a list": "[]",
    "another version": json.dumps({**PROFILE_FIELDS, "format": 1}),
    "no version": json.dumps({k: v for k, v in PROFILE_FIELDS.items() if k != "format"}),
    "a key less": json.dumps({k: v for k, v in PROFILE_FIELDS.items() if k != "passes"}),
    "a key more": json.dumps({**PROFILE_FIELDS, "colour": "red"}),
    "nan": json.dumps({**PROFILE_FIELDS, "passes": [float("nan"), 1.0]}),
    "a rate of 0": json.dumps({**PROFILE_FIELDS, "passes": [0, 1.0]}),
    "text": json.dumps({**PROFILE_FIELDS, "memory": ["1", "2"]}),
    "a rate is missing": json.dumps({**PROFILE_FIELDS, "memory": [1.0]}),
    "no threads": json.dumps({**PROFILE_FIELDS, "threads": []}),
    "no fp32": json.dumps({**PROFILE_FIELDS, "products": {"bf16": [1.0, 2.0]}}),
    "a negative time": json.dumps({**PROFILE_FIELDS, "operator_s": -1.0}),
    "a huge time": json.dumps({**PROFILE_FIELDS, "seconds": 1e400}),
    "no host": json.dumps({**PROFILE_FIELDS, "host": "this"}),
    "another machine": json.dumps(
        {**PROFILE_FIELDS, "host": {**PROFILE_FIELDS["host"], "cpu": "abacus"}}
    ),
    "long": json.dumps(PROFILE_FIELDS) + " " * 100_000,
}


@pytest.mark.parametrize("kind", BAD_PROFILES)
def test_what_is_no_profile_is_said_and_not_used(
    kind: str, cache_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache_dir.mkdir(parents=True)
    profile_path(local_host()).write_text(BAD_PROFILES[kind])
    profile, reason = read_profile(local_host())
    assert profile is None and str(profile_path(local_host())) in reason
    cluster, profile_fields = measure_cluster(may_probe=False)
    assert not cluster.measured and profile_fields == {}
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["pipe", "folder", "binary"])
def test_what_is_no_text_file_neither_hangs_nor_fails(kind: str, cache_dir: Path) -> None:
    cache_dir.mkdir(parents=True)
    path = profile_path(local_host())
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"\xff\xfe\x00")
    profile, reason = read_profile(local_host())
    assert profile is None and str(path) in reason


def test_a_cache_that_cannot_be_written_is_said(cache_dir: Path) -> None:
    cache_dir.parent.write_text("a file where the folder should be")
    assert str(cache_dir) in write_profile(profile_of())
    assert read_profile(local_host())[0] is None


def test_no_home_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert profile_path(local_host()) is None
    assert read_profile(local_host()) == (None, "")
    assert write_profile(profile_of()) == "there is no home folder"


def test_this_machine_is_measured_once_and_the_plan_holds_it(
    cache_dir: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    cache_dir.mkdir(parents=True)
    profile_path(local_host()).write_text("damaged")
    plan_path = tmp_path / "plan.json"
    assert main(["plan", "tiny", "--save", str(plan_path), "--json"]) == 0
    stderr = capsys.readouterr().err
    assert "is no profile" in stderr and "GFLOP/s" in stderr and "measured in" in stderr
    profile, reason = read_profile(local_host())
    assert profile is not None and reason == "" and profile.products["fp32"][0] > 1e9
    assert profile.reduce_s > 0 and profile.threads[-1] == usable_cores()
    plan = Plan.from_json(plan_path.read_text())
    assert Profile.from_json(json.dumps({"format": 2, **plan.profile})) == profile
    assert main(["plan", "tiny", "--json"]) == 0
    stdout, stderr = capsys.readouterr()
    assert stderr == ""  # kept: not measured again
    assert json.loads(stdout)["assumed"]["measured"] is True


def test_without_a_probe_the_flags_count(
    capsys: pytest.CaptureFixture[str], cache_dir: Path
) -> None:
    for arguments in (["--no-probe"], ["launch.probe=false"]):
        assert main(["plan", "tiny", "--json", *arguments]) == 0
        stdout, stderr = capsys.readouterr()
        assert stderr == "" and json.loads(stdout)["assumed"]["measured"] is False
    assert not cache_dir.exists()


# ---- precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({"fp32": 58e9, "bf16": 1.8e9, "fp16": 1.8e9}, "fp32"),  # AVX2
        ({"fp32": 100e9, "bf16": 110e9, "fp16": 100e9}, "fp32"),  # not worth the casts
        ({"fp32": 200e9, "bf16": 1400e9, "fp16": 190e9}, "bf16"),  # AMX
        ({"fp32": 200e9, "bf16": 1400e9, "fp16": 1500e9}, "bf16"),  # needs no scale
        ({"fp32": 14e9, "bf16": 10e9, "fp16": 100e9}, "fp16"),  # a GPU of 2017
    ],
)
def test_auto_is_the_fastest_precision_that_was_measured(
    rates: dict[str, float], expected: str
) -> None:
    cluster = cluster_of(profile_of(**rates))
    run = with_precision(run_of(), cluster)
    assert run.run.precision == fastest_precision(cluster) == expected
    plan = make_plan(run_of(), cluster, processes=1)
    assert plan.precision == precision_text(expected, cluster) and "measured" in plan.precision
    bf16_text = precision_text("bf16", cluster)
    assert ("emulated" in bf16_text) == (rates["bf16"] < rates["fp32"])
    for name in ("fp32", "bf16", "fp16"):  # by name: as it is asked
        assert with_precision(run_of(f"run.precision={name}"), cluster).run.precision == name


def test_accelerators_take_bf16() -> None:
    for kind in ("A100", "H100", "B200"):
        assert fastest_precision(gpu_cluster(kind, 8)) == "bf16"


def test_a_plan_follows_the_measured_rates() -> None:
    overrides = ("model.preset=small", "batch.microbatch=8")

    def step_s(precision: str, **rates: float) -> float:
        cluster = cluster_of(profile_of(**rates))
        run = run_of(*overrides, f"run.precision={precision}")
        return make_plan(run, cluster, processes=1).predicted.step_s

    slow_s, fast_s = step_s("fp32"), step_s("fp32", fp32=100e9)
    assert fast_s < 0.8 * slow_s
    assert step_s("bf16") > 10 * slow_s  # emulated
    assert step_s("bf16", bf16=400e9) < 0.5 * slow_s


def test_muon_is_planned_in_what_it_computes_in() -> None:
    emulating_cluster, native_cluster = (cluster_of(profile_of(bf16=rate)) for rate in (2e9, 500e9))
    assert (
        muon_precision("fp32", native_cluster)
        == "fp32"
        == muon_precision("bf16", emulating_cluster)
    )
    assert (
        muon_precision("bf16", native_cluster) == "bf16" == muon_precision("fp16", native_cluster)
    )
    specs = count_model_tensors(run_of().model, 256)
    seconds = [
        update_s(run_of(f"run.precision={p}"), specs, native_cluster, 1, Layout())
        for p in ("fp32", "bf16")
    ]
    assert seconds[0] > 2 * seconds[1]


def test_a_busy_machine_widens_the_interval() -> None:
    calm_factors = interval_factors(cluster_of(profile_of()), "fp32", 1, 1)
    busy_factors = interval_factors(cluster_of(profile_of(spread=0.5)), "fp32", 1, 1)
    wild_factors = interval_factors(cluster_of(profile_of(spread=500.0)), "fp32", 1, 1)
    assert busy_factors[0] == calm_factors[0] / 1.5 and busy_factors[1] == calm_factors[1] * 1.5
    assert wild_factors[0] == calm_factors[0] / 2 and wild_factors[1] == calm_factors[1] * 2


def test_threads_that_do_not_help_are_not_used() -> None:
    """Where two threads together are slower than one (they spin against another program), two
    ranks of one thread are planned."""
    spin_profile = replace(
        profile_of(),
        passes=(30e9, 1e9),
        products={p: (50e9, 5e9) for p in ("fp32", "bf16", "fp16")},
    )
    cluster = replace(cluster_of(spin_profile), cores=2)
    plan = make_plan(run_of(), cluster)
    assert plan.threads == 1


def test_one_process_takes_threads_only_where_they_bring_more_than_they_cost() -> None:
    def threads(preset: str, wake_s: float, *overrides: str) -> int:
        profile = profile_of(regions=(5e-6, 5e-6 + wake_s))
        cluster = replace(cluster_of(profile), cores=2)
        run = run_of(f"model.preset={preset}", "batch.microbatch=4", *overrides)
        return make_plan(run, cluster, processes=1).threads

    assert threads("micro", 0.0) == 2
    assert threads("micro", 90e-6) == 1
    assert threads("medium", 90e-6) == 2
    assert threads("micro", 90e-6, "launch.threads=2") == 2
    assert threads("medium", 0.0, "run.exact=true", "run.steps=1") == 1


def test_a_run_keeps_the_precision_it_began_with(tmp_path: Path) -> None:
    run = resolve_config(run_of(f"run.dir={tmp_path}"))
    recorded_run = with_precision(run, cluster_of(profile_of(bf16=500e9)))
    (tmp_path / "run.toml").write_text(dump(recorded_run))
    resumed_run = with_precision(apply_recorded_settings(run), cluster_of(profile_of()))
    assert resumed_run == recorded_run and resumed_run.run.precision == "bf16"
    fp32_run = resolve_config(run_of(f"run.dir={tmp_path}", "run.precision=fp32"))
    assert apply_recorded_settings(fp32_run) == fp32_run  # by name: look() refuses what differs


def plan_on_rank(process: RankProcess) -> tuple[str, dict[str, object]]:
    """Each rank's own precision and plan, then rank 0's."""
    cluster = cluster_of(profile_of(bf16=500e9 if process.rank else 1e9))
    run = with_precision(run_of("batch.microbatches=4"), cluster)
    plan = make_plan(run, cluster, processes=process.size)
    shared_run, shared_plan = broadcast_config(run, plan)
    return run.run.precision + shared_run.run.precision, shared_plan.to_dict()


def test_under_a_launcher_all_ranks_take_the_first_ones_plan() -> None:
    rank_0, rank_1 = launch(plan_on_rank, ranks=2)
    assert rank_0[0] == "fp32fp32" and rank_1[0] == "bf16fp32"
    assert rank_0[1] == rank_1[1]


# ---- the control group -------------------------------------------------------------------------


def test_a_quota_of_cpu_time_counts(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert group_quota(tmp_path) == 1.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert group_quota(tmp_path) == 0.0
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu.cfs_quota_us").write_text("50000\n")
    (tmp_path / "cpu.cfs_period_us").write_text("100000\n")
    assert group_quota(tmp_path) == 0.5
    (tmp_path / "cpu.cfs_quota_us").write_text("-1\n")
    assert group_quota(tmp_path) == 0.0
    assert usable_cores() >= 1 and cpu_quota() >= 0.0


def test_every_group_around_the_process_limits_it(tmp_path: Path) -> None:
    inner_group = tmp_path / "a" / "b"
    inner_group.mkdir(parents=True)
    v2_table = "0::/a/b\n"
    assert control_groups("cpu", tmp_path, v2_table) == [inner_group, inner_group.parent, tmp_path]
    v1_table = "3:cpuset:/x\n4:cpu,cpuacct:/jobs/7\n"
    (tmp_path / "cpu,cpuacct" / "jobs" / "7").mkdir(parents=True)
    controller_dir = tmp_path / "cpu,cpuacct"
    assert control_groups("cpu", tmp_path, v1_table) == [
        controller_dir / "jobs" / "7",
        controller_dir / "jobs",
        controller_dir,
    ]
    assert control_groups("cpu", tmp_path, "0::/../../outside\n") == [tmp_path]
    assert control_groups("cpu", tmp_path, "") == [tmp_path]
