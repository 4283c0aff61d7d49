"""The plan as text, as JSON and as a command; clusters from TOML; what is refused.

The golden tables are rewritten by running this file as a program
(`python -m tests.paper.test_plan_text`) and are reviewed as diffs. They are machine-independent:
every cluster is made here.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cordee.cli.plan import run as plan_command
from cordee.config.presets import model_presets
from cordee.errors import ConfigError
from cordee.plan.cluster import Cluster, gpu_cluster, local_cluster, read_cluster
from cordee.plan.plan import Plan, make_plan, without_axes
from cordee.plan.report import compare, plan_text
from cordee.plan.search import search
from tests.paper.test_plan import CPU, run_of

GOLDEN = Path(__file__).parent.parent / "golden"

GOLDEN_CASES = {
    "plan_cpu": (CPU, 256, ["model.preset=small", "batch.microbatches=8"]),
    "plan_exact": (CPU, 256, ["run.exact=true", "run.steps=9", "batch.microbatches=12",
                              "layout.islands=3"]),
    "plan_gpu": (gpu_cluster("H100", 8, hosts=4), 50304,
                 ["model.preset=xl", "run.precision=bf16", "optim.name=adamw",
                  "batch.microbatches=96", "data.sequence=2048"]),
}  # fmt: skip


def golden_text(name: str) -> str:
    cluster, vocabulary, overrides = GOLDEN_CASES[name]
    run = run_of(*overrides)
    plan = make_plan(run, cluster, vocabulary)
    ranking = search(without_axes(run), cluster, vocabulary)
    return plan_text(run, cluster, plan, ranking) + "\n"


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cluster", "overrides", "processes", "told", "fix"),
    [
        (CPU, ["batch.microbatches=4"], 5, "cannot give work to 5", "batch.microbatches=5"),
        (CPU, ["batch.microbatches=9", "layout.shard=2"], 2, "do not divide",
         "batch.microbatches=10"),
        (CPU, ["layout.tensor=3"], None, "model.heads=4", "layout.tensor=2"),
        (CPU, ["layout.shard=3"], 4, "do not divide the processes", "launch.processes=3"),
        (CPU, ["batch.microbatches=99"], 99, "more processes than make sense", "processes=4"),
        (gpu_cluster("A100", 2), ["batch.microbatches=8"], 4, "more processes than devices",
         "launch.processes=2"),
        (gpu_cluster("A100", 2), ["batch.microbatches=8", "launch.processes=3"], None,
         "more processes than devices", "launch.processes=2"),
        (CPU, ["launch.device=cuda"], None, "no cuda device", "launch.device=cpu"),
        (gpu_cluster("H100", 8, hosts=2048), ["model.preset=llama3-405b"], None,
         "no layout", "batch.microbatches=2048"),
        (CPU, ["optim.name=adafactor", "layout.shard=2"], None, "rows and columns", "adamw"),
    ],
)  # fmt: skip
def test_refusals_name_the_nearest_fix(
    cluster: Cluster, overrides: list[str], processes: int | None, told: str, fix: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        make_plan(run_of(*overrides), cluster, processes=processes)
    assert told in str(raised.value) and fix in str(raised.value.fix)
    assert raised.value.exit_code == 2 and raised.value.values


# ---- files ---------------------------------------------------------------------------------------


def test_a_plan_survives_json_and_nothing_else_does() -> None:
    plan = make_plan(run_of("batch.microbatches=6", "sync.codec=bf16"), CPU, processes=4)
    assert Plan.from_json(plan.to_json()) == plan
    good = json.loads(plan.to_json())
    for bad in (
        "{", "[]", {**good, "extra": 1}, {k: v for k, v in good.items() if k != "splits"},
        {**good, "processes": "4"}, {**good, "protocol": "gossip"}, {**good, "splits": [[0, "6"]]},
        {**good, "layout": {"island": 4}},
        {**good, "predicted": {**good["predicted"], "step_s": "slow"}},
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="not a plan"):
            Plan.from_json(bad if isinstance(bad, str) else json.dumps(bad))


def test_clusters_from_toml(tmp_path: Path) -> None:
    def read(text: str) -> Cluster:
        path = tmp_path / "c.toml"
        path.write_text(text)
        return read_cluster(path)

    made = read('kind = "H200"\ndevices = 4\nhosts = 2\nlink_bytes_per_s = 1e9\n')
    assert made == replace(gpu_cluster("H200", 4, hosts=2), link_bytes_per_s=1e9)
    assert made.slots == 8
    assert read('kind = "local"\ndevice = "cpu"\ncores = 3\n').cores == 3
    for text, told in [
        ('kind = "H300"', "did you mean H"),
        ('kind = "H100"\nhostz = 2', "did you mean hosts"),
        ('kind = "H100"\nhosts = "two"', "a whole number"),
        ('kind = "H100"\nhosts = 1.5', "a whole number"),
        ('kind = "H100"\nhosts = true', "a whole number"),
        ('kind = "H100"\nhosts = 0', "above 0"),
        ('kind = "H100"\ndevices = 0', "has devices"),
        ('kind = "H100"\ndevice = "tpu"', "no such kind"),
        ('device = "cpu"\nname = "x"', "lacks a field"),
        ('kind = "H100"\nmeasured = true', "has pass_bytes_per_s and operator_s"),
        ("kind = ", "not valid TOML"),
    ]:
        with pytest.raises(ConfigError, match=told):
            read(text)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_cluster(tmp_path / "missing.toml")


def test_this_machine_is_read_without_a_library() -> None:
    found = local_cluster()
    assert found.cores >= 1 and found.memory_bytes > 1 << 28 and found.flops_fp32 > 1e9
    assert found.device in ("cpu", "cuda") and found.slots >= 1


# ---- text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_the_table_is_as_reviewed(name: str) -> None:
    assert golden_text(name) == (GOLDEN / f"{name}.txt").read_text()


def test_no_line_of_the_table_is_endless() -> None:
    for name in GOLDEN_CASES:
        assert max(map(len, golden_text(name).splitlines())) <= 120


def test_compare_says_how_far_off() -> None:
    plan = make_plan(run_of("batch.microbatches=4"), CPU, processes=2)
    told = plan.predicted
    text = compare(
        plan,
        {"step_s": 2 * told.high_s, "bytes_sent": told.bytes_sent, "memory_bytes": 3 << 20},
    )
    assert "outside" in text and "to the byte" in text and "3.0 MiB" in text
    within = compare(plan, {"step_s": told.step_s, "bytes_sent": 5.0, "memory_bytes": math.nan})
    assert "within" in within and "1.00" in within and "memory" not in within
    assert compare(plan, {"step_s": math.nan}).count("\n") == 0


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved, cluster = tmp_path / "plan.json", tmp_path / "c.toml"
    cluster.write_text('kind = "H100"\ndevices = 2\n')
    words = ["small", "batch.microbatches=6", "--cluster", str(cluster)]
    assert plan_command([*words, "--json", "--top", "2", "--save", str(saved)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert set(told) == {"picked", "ranked", "rejected", "assumed"}
    assert told["ranked"][0]["layout"] == told["picked"]["layout"] and len(told["ranked"]) == 2
    assert {"layout", "reason"} == set(told["rejected"][0])
    assert Plan.from_json(saved.read_text()).to_dict() == told["picked"]
    assert plan_command(words) == 0
    assert "<- pick" in capsys.readouterr().out
    assert plan_command(["--models"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in model_presets()) and "1,049,984" in listed


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["smal"], "did you mean small"),
        (["small", "model.width=100"], "even multiple"),
        (["small", "layout.shrd=2"], "layout.shard"),
        (["--vocabulary", "1"], "--vocabulary 2"),
        (["--top", "0"], "--top 1"),
        (["small", "tiny"], "a word too many"),
        (["--save", "/nowhere/at/all.json"], "cannot be written"),
        (["--cluster", "/nowhere/c.toml"], "cannot be read"),
    ],
)
def test_the_command_refuses(words: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as raised:
        plan_command(words)
    assert told in str(raised.value)


def test_the_command_needs_neither_torch_nor_numpy() -> None:
    code = (
        "import sys; from cordee.cli.plan import run; run(['tiny', '--json']);"
        "print([m for m in ('torch', 'numpy') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr.strip() == "[]"
    assert json.loads(done.stdout)["picked"]["processes"] >= 1


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for case in GOLDEN_CASES:
        (GOLDEN / f"{case}.txt").write_text(golden_text(case))
